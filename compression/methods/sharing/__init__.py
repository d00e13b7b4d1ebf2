"""Weights serve several blocks or heads.

FoldGPT (arXiv 2407.00928) shares linears in groups of neighbouring blocks, FlexiGPT (2501.14713)
brings pruned blocks back on the weights of the most similar one, DirectShare and PostShare
(2402.11819) let attention heads use the weights of an earlier one.

- `block_sharing`: FoldGPT-style grouped sharing: neighbouring blocks use one set of linear weights.
- `direct_share`: DirectShare: attention heads that use the weights of an earlier head that is like
  them.
- `flexigpt`: FlexiGPT: pruned blocks come back as virtual ones, on the weights of the block most
  like them.
- `flexigpt_extend`: FlexiGPT in reverse: blocks run again on their own weights, with adapters, to
  deepen a model.
- `foldgpt`: FoldGPT-style removal and sharing: blocks whose gates close go, neighbours of the rest
  share.
- `gain_fitting`: Gains of virtual blocks by least squares, so that each comes near to the block it
  stands for.
- `gate_training`: Trainings of block gates (see `gates`): by sampling, and by the gradient of
  relaxed gates.
- `gates`: Block gates: one number per block, trained to close where the model can do without the
  block.
- `group_sharing`: Grouped sharing: neighbouring blocks use one set of linear weights, each with
  norms of its own.
- `head_matching`: Which attention heads of a model are alike, and which are to give their weights
  to which.
- `head_sharing`: What the methods that share attention heads have in common: the pairs and the
  plan.
- `post_share`: PostShare: heads are pulled towards their donors by training, then they share.
- `virtual_blocks`: Virtual blocks: borrowed linears, an own low-rank adapter on each, small normed
  outputs.
"""
