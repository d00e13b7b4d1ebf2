"""Model folders: found, opened, written, and proved to load.

- `checkpoint`: Model folders: find one, load it, save one, and prove that what was saved loads
  anywhere.
- `model_card`: The model card (README.md) that travels with every compressed folder.
- `model_folder`: Find the folder of a model, and say in one sentence what is wrong with it; no
  torch needed.
- `quantized_weights`: Quantised weights made plain again: GGUF files, and what transformers can
  dequantise.
- `reload_check`: Load model folders in this process and compare each with what its maker saw.
"""
