"""Widths shrink.

MoDeGPT (arXiv 2408.09632) narrows MLPs and heads, SliceGPT (2401.15024) the residual stream.

- `inner_widths`: How wide the inner dimensions of each block become when the whole model loses so
  much.
- `modegpt`: MoDeGPT: the same blocks with narrower insides, pair of matrices by pair of matrices.
- `residual_slicing`: A residual stream in another basis at each link, with only the leading
  directions kept.
- `slicegpt`: SliceGPT: the residual stream in its principal directions, of which the last ones go.
"""
