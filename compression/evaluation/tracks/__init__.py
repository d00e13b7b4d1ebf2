"""What is left of a model, track by track, and whether it still matches the dense one.

- `answers`: How written answers are scored: exact match and F1 as SQuAD has them, rouge-L, and
  variety.
- `costs`: The tracks that nothing is asked for: footprint and speed, from what is measured anyway.
- `judge`: A judge behind an OpenAI-compatible address: which of two answers is better, in both
  orders.
- `local_records`: Records of local files: read, and put into one form whatever the release of their
  data.
- `local_tasks`: Benchmarks over files of the user's own, in the forms that their authors publish.
- `measure`: A track measured: all of it, or until the verdict on each task is known.
- `paired_task`: One task of a track: what the dense model and a compressed one made of the same
  items.
- `result`: What a track says of a compressed model: the share of every task that is left, and the
  verdict.
- `sequential`: Stopping early without being wrong more often: looks at some of the items, alpha
  spent honestly.
- `settings`: What a track measures: benchmarks and texts, and how they are asked.
- `track_beside_dense`: What a model made of a track, held against what the dense model made of it.
- `track_evaluation`: What a model made of a track: every item of its tasks, every window of its
  texts, in a folder.
- `verdict`: Whether a compressed model is as good as the dense one: matching, not matching, or not
  known yet.
"""
