"""A compressed model in the form that another program loads, checked in that program.

- `exported`: `export_model`: write a model folder in another form, load it in its engine, and
  compare.
- `gguf_file`: A model as a GGUF file for llama.cpp, written with the `gguf` package.
- `gguf_tokenizer`: The tokenizer of a model folder as llama.cpp stores it: read from
  tokenizer.json.
- `llama_cpp_check`: Load a GGUF file in llama.cpp and say what it computes; quantise it before, if
  asked.
- `multiplied_out`: Any structure as its stock class: factors multiplied, borrowed weights copied,
  widths padded.
- `vllm_check`: Load model folders in vLLM and say what it computes.
"""
