"""Model folders: found, opened, written, and proved to load.

- `agreement`: Whether a config and the weights beside it describe one model; where the config errs,
  which way.
- `checkpoint`: Model folders: find one, load it, save one, and prove that what was saved loads
  anywhere.
- `folder_files`: Small files of a model folder: JSON, read at one door that says what is wrong with
  it.
- `hub`: Models of the Hugging Face hub: what is needed of one comes, once; no torch needed.
- `model_card`: The model card (README.md) that travels with every compressed folder.
- `model_folder`: Find the folder of a model, and say in one sentence what is wrong with it; no
  torch needed.
- `older_readers`: Entries of a stock model's JSON files under the names by which older programs
  read them.
- `pickled_weights`: Weights that a repository of the hub has as pickles only, read as tensors and
  written again.
- `quantized_weights`: Quantised weights made plain again: GGUF files, and what transformers can
  dequantise.
- `reload_check`: Load model folders in this process and compare each with what its maker saw.
- `stored_weights`: What a model folder's safetensors files hold, read from their headers; no torch
  needed.
- `tokenizer_files`: The files that a tokenizer is made of, and what it makes of a text that tells
  it from others.
"""
