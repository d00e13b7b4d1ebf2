"""The embedded default: a corpus, a small model trained on it, and benchmarks for lm-eval.

- `against_xz`: Compare the reference model with xz: `python -m
  foldstack.compression.reference.against_xz`.
- `stdlib_corpus`: The Python standard library of the running interpreter as a text corpus.
- `tokenizer`: The reference model's tokenizer: byte-level BPE learnt from the train split.
- `train`: Train the reference model: `python -m foldstack.compression.reference.train --out DIR`.
- `training_text`: The train split as batches of packed documents, for the training of the reference
  model.
- `benchmarks/`: Benchmarks for lm-eval over the held-out modules: `lm_eval --include_path <this
  folder>`.
"""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
"""The reference model, as `AutoModelForCausalLM.from_pretrained` wants it."""
BENCHMARKS_FOLDER = Path(__file__).parent / "benchmarks"
"""lm-eval task files: give it as `include_path`."""
