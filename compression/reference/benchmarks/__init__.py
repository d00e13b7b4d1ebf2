"""Benchmarks for lm-eval over the held-out modules: `lm_eval --include_path <this folder>`.

- `stdlib_items`: The items of the two benchmarks, made from the test split when lm-eval asks for
  them.
"""
