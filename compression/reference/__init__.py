"""The embedded default: a corpus, a small model trained on it, and benchmarks for lm-eval."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
"""The reference model, as `AutoModelForCausalLM.from_pretrained` wants it."""
BENCHMARKS_FOLDER = Path(__file__).parent / "benchmarks"
"""lm-eval task files: give it as `include_path`."""
