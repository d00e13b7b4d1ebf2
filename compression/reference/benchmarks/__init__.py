"""Benchmarks for lm-eval over the held-out modules: `lm_eval --include_path <this folder>`."""
