"""A compressed model in the form that another program loads, checked in that program.

- `block_configs`: Folders whose blocks have widths and heads of their own: `DeciLMForCausalLM` and
  OpenELM's.
- `configuration_nemotron_nas`: The config of a folder with block_configs, as vLLM and SGLang read
  it: by attribute.
- `deci_layers`: Sublayers as layers of llama.cpp's `deci`: attention, one linear or neither, then
  an MLP.
- `engines`: The engines that load what is exported, each in a process of its own: found, and asked.
- `export_report`: What was exported, what its engines make of it beside transformers, and the card
  that says so.
- `exported`: `export_model`: write a model folder in another form, load it in its engines, and
  compare.
- `foldstack_mlx`: A compressed decoder for mlx-lm, which loads it as the `model_file` of a folder.
- `forms`: The forms that a model may be exported to: what loads each, and what of a structure it
  keeps.
- `gguf_file`: A model as a GGUF file for llama.cpp, written with the `gguf` package.
- `gguf_tokenizer`: The tokenizer of a model folder as llama.cpp stores it: read from
  tokenizer.json.
- `in_engine`: Load models in an engine that is not ours and say what it computes.
- `mapped_stream`: What no stock block does to the residual stream, as layers of llama.cpp's
  `deci`.
- `mlx_folder`: A model as a folder for mlx-lm: of its own class of the family, or with code of
  ours.
- `multiplied_out`: Any structure as its stock class: factors multiplied, borrowed weights copied,
  widths padded.
- `what_runs`: What runs a model folder, with the command for each program: the table of its card.
"""
