"""What a compressed model is: the plan, the surgery that follows it, and the file that runs it.

- `architectures`: Where the blocks and their linears sit in each supported model family.
- `block_plan`: One executed block as data: whose weights it runs on, in which form, of which
  widths.
- `folding`: Factored linears that store no less than their product, multiplied out: a model's last
  step.
- `head_slices`: Linears of which other positions hold some slices: the form in a plan, and how a
  change of order moves it.
- `heads`: The attention of a block head by head, whatever way its family stores the projections.
- `modeling_foldstack`: A compressed decoder: a stock Hugging Face model whose blocks were
  restructured after a plan.
- `plan`: The compressed structure as data: the executed blocks, and what may become of them.
- `size`: How big a structure is: parameters, bytes, FLOPs, KV cache; no memory for weights needed.
- `surgery`: cut(model, change): the one place that makes a model smaller.
"""
