"""From documents to token windows.

- `bos`: Where BOS tokens may stand in a text.
- `calibration`: Fixed-length token windows, drawn from documents.
- `corpus`: Text from where the user says: the standard library, a local file, or a dataset of the
  hub.
- `self_written`: Windows that the model writes itself, for where there is no text to calibrate on.
- `text_files`: Local files with text as people have them: plain, records or tables, compressed or
  not.
- `text_tokens`: Documents as one stream of tokens that knows how many bytes of text each token
  stands for.
"""
