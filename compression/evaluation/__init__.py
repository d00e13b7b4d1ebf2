"""How good a model is, and how fast.

- `benchmark_index`: Which benchmarks lm-eval knows, and the cheapest way to make it know the ones
  that are asked for.
- `beside_dense`: What compression changed, item by item: a model's evaluation beside that of the
  dense one.
- `candidate_loss`: Next-token loss of candidates for a smaller model, without computing their
  common part again.
- `generation`: A greedy continuation with its two parts timed apart, and the random prompt that it
  follows.
- `harness`: Benchmarks through lm-eval's Python API, with the result of every single item kept.
- `memory_probe`: Peak memory of a model: load it and run it once in a process of its own.
- `paired`: Differences between two models that were measured on the same items, with their
  uncertainty.
- `perplexity`: Perplexity and bits per byte of a causal model on a text, in a protocol that is
  stated.
- `quiet_lm_eval`: lm-eval without its noise: log lines, bars, git calls, bootstrap processes,
  changed seeds.
- `records`: What is measured of a model, as data: read without loading torch.
- `samples`: What a model writes: the greedy continuations of a few prompts, to be read beside
  another's.
- `shared_prefix`: lm-eval's model, with a context computed once for all its endings, and only
  logits that count.
- `speed`: How fast models read and write, how long they take to load and how much memory they need.
- `stability`: How far a compressed model still answers as the original did, right or wrong.
- `token_losses`: Per-token losses of a causal model, in float64, without the logits of a whole
  batch.
- `tracks/`: What is left of a model, track by track, and whether it still matches the dense one.
"""
