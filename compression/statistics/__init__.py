"""The one pass over the calibration data: what is summed up, and how the model is run for it.

- `block_residency`: A model that computes on an accelerator while the weights of its blocks stay in
  host memory.
- `gathering`: What one pass over the calibration windows tells about a model, as sums that add up.
- `gram_files`: Grams of a model's blocks in files, one file per block, read one matrix at a time.
- `grams`: Sums over tokens of what enters a block's linears: the Gram matrix X^T X, and X itself.
- `hidden_states`: Hidden states of all windows at one place of a model: in memory, or in a file.
- `kept_pass`: How far a pass over a model's blocks has come, kept on disk for the run that goes on
  with it.
- `ranking`: Scores of blocks and of runs of blocks, from the similarity of hidden states.
- `run_states`: What enters a run of blocks and what leaves it: kept in memory, or computed again
  when asked.
- `sensitivity`: What the loss says of each change that may be made to a model, made alone.
- `similarity`: How alike the hidden states of a token are at all pairs of boundaries between
  blocks.
- `stream`: Run a model's blocks one after another over all windows, each block once for the whole
  data.
- `variant_times`: What variants save of the time that a model takes: a linear model of whole ones
  that were timed.
"""
