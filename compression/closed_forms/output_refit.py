"""Linears that write into the residual stream, fitted again to a target: closed forms, tensors in
and out.

A linear W with inputs x is to make up for an error e of what its output is added to, summed over
tokens:

    minimise  sum |e - D x|^2 + lambda |D|^2,   lambda = ridge * mean(diag G),   G = sum x x^T

D is the change of W, so that the ridge holds W where its own closed form has put it, and the
squared error cannot rise. Where a norm with gains g stands behind the linear (Gemma 2 and 3), its
output y comes to the stream as g y / s with s = rms(y): with s held fixed the fit is linear again,
x / s in place of x, and each output has a ridge regression of its own.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from foldstack.compression.closed_forms.inner_pairs import cholesky
from foldstack.compression.closed_forms.low_rank import NO_ENERGY, symmetric

RIDGE = 1e-3
"""lambda over the mean of the Gram's diagonal."""


def refit_change(
    gram: Float[Tensor, "n n"],
    crossed: Float[Tensor, "n out"],
    *,
    ridge: float = RIDGE,
    has_bias: bool = False,
    gains: Float[Tensor, " out"] | None = None,
) -> Float64[Tensor, "out n"]:
    """D, in float64.

    Args:
        crossed: sum of x e^T.
        has_bias: the last input is one for every token; it has no ridge.
        gains: those of the norm behind the linear; x is then divided by the root mean square of
            each token's output.

    Raises:
        InputError: the Gram has an entry that is not finite.
    """
    gram, crossed = symmetric(gram), crossed.double()
    weights = len(gram) - has_bias
    shift = ridge * gram.diagonal()[:weights].mean().clamp_min(NO_ENERGY)
    if gains is None:
        gram.diagonal()[:weights] += shift
        # What is left of a ridge is for an input that is always zero, and for rounding noise.
        return torch.cholesky_solve(crossed, cholesky(gram, shift * 1e-9)).T
    assert not has_bias
    gains = gains.double()
    values, vectors = torch.linalg.eigh(gram)
    energy = gains.square().mean().clamp_min(NO_ENERGY)
    damped = values.clamp_min(0)[:, None] * gains.square() + shift * energy
    return (vectors @ ((vectors.T @ crossed) * gains / damped.clamp_min(NO_ENERGY))).T


def refit_operations(rows: int, width: int, *, normed: bool) -> float:
    """Float64 operations of `refit_change` for a linear (rows, width)."""
    if normed:
        return 9.0 * width**3 + 4.0 * rows * width**2
    return width**3 / 3 + 2.0 * rows * width**2
