"""Closed forms that several families use: tensors in, tensors out.

- `channel_removal`: Channels between two matrices that go one after the other, each the one whose
  absence costs the output least: closed forms, tensors in and out.
- `head_merging`: Several key and value heads as one, best on calibration data: closed forms,
  tensors in and out.
- `inner_pairs`: Pairs of matrices with a narrower dimension between them: closed forms, tensors in
  and out.
- `leading_directions`: Eigenvectors and least squares in float32, where a measurement says that
  float64 would lose no less: tensors in, tensors out.
- `loss_curve`: A loss as a function of what is saved, from a few places where it is known.
- `low_rank`: Low-rank factors of a linear, best on its own inputs: closed forms, tensors in,
  tensors out.
- `output_refit`: Linears that write into the residual stream, fitted again to a target: closed
  forms, tensors in and out.
- `selection`: One option for every slot, with the least loss at a budget: a binary program, solved
  exactly.
"""
