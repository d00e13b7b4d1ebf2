"""Closed forms that several families use: tensors in, tensors out.

- `inner_pairs`: Pairs of matrices with a narrower dimension between them: closed forms, tensors in
  and out.
- `low_rank`: Low-rank factors of a linear, best on its own inputs: closed forms, tensors in,
  tensors out.
"""
