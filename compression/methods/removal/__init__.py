"""Blocks go, or are merged into a neighbour.

ShortGPT (arXiv 2403.03853), UIDL (2403.17887) and SLEB (2402.09025) choose blocks and remove them;
LaCo (2402.11187) and MKA (2406.16330) merge blocks into one of the same shape. The result is a
stock model with fewer blocks.

- `laco`: LaCo: merge neighbouring blocks into one by adding up what tells them apart.
- `manifold`: How alike two layers place the same inputs: diffusion maps, and the information
  between them.
- `merging`: Several blocks merged into one of the same shape: the survivor's weights are a sum of
  theirs.
- `mka`: MKA: merge neighbouring blocks whose outputs lie on the most similar manifolds.
- `shortgpt`: ShortGPT: remove the blocks that change the hidden states least.
- `sleb`: SLEB: remove, one at a time, the block whose absence costs the least loss.
- `uidl`: UIDL: remove the run of blocks that turns the last token's hidden state least.
"""
