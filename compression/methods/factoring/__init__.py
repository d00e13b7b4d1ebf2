"""Linears become two thin ones.

SVD-LLM (arXiv 2403.07378, 2503.12340) factors every linear on its own inputs, Basis Sharing
(2410.03765) the linears of neighbouring blocks on one basis.

- `basis_sharing`: Basis Sharing: linears of the same name in neighbouring blocks are factored on
  one basis.
- `factored_linears`: Factored linears of a model: the inputs they are fitted to, and their tensors
  in a cut.
- `svd_llm`: SVD-LLM: every linear of the blocks becomes two thin ones, best on its own inputs.
"""
