"""Several key and value heads as one, best on calibration data: closed forms, tensors in and out.

Values are read linearly: one head is the best product of its rank for all outputs of those that it
stands for, as in MoDeGPT (arXiv 2408.09632, algorithm 3). Keys are compared after a rotation by the
token's position, which commutes with nothing but multiples of a rotary pair seen as one complex
number: of every pair the first principal component over the heads stays, and what each query reads
of it is its own complex multiple. Coordinates that do not rotate may mix at will. (Published ways
to fewer heads take the mean, arXiv 2305.13245, which is this where the heads are alike.)
"""

import torch
from jaxtyping import Complex128, Float, Float64
from torch import Tensor

from foldstack.compression.closed_forms.inner_pairs import narrower_values

_LEAST_ENERGY = 1e-12
"""Of the largest: queries of less do not count."""


def merged_values(
    values: Float[Tensor, "merged dim hidden"],
    outputs: Float[Tensor, "merged group hidden dim"],
    gram: Float[Tensor, "hidden hidden"],
) -> tuple[Float[Tensor, "dim hidden"], Float[Tensor, "all hidden dim"]]:
    """One value head in the place of several, and what reads it in their order.

    Minimises the sum over all outputs of ||X W_V W_O - X W_V' W_O'||_F^2.
    """
    merged, group, hidden, dim = outputs.shape
    apart = outputs.new_zeros(merged, group, hidden, merged, dim)
    for head in range(merged):
        apart[head, :, :, head] = outputs[head]
    return narrower_values(values.flatten(0, 1), apart.flatten(3).flatten(0, 1), gram, dim)


def merged_keys(
    keys: Float64[Tensor, "merged dim inputs"],
    queries: Float64[Tensor, "merged group dim inputs"],
    moments: Float64[Tensor, "inputs inputs"],
    rotary_dim: int,
) -> tuple[Float64[Tensor, "dim inputs"], Float64[Tensor, "all dim inputs"]]:
    """One key head in the place of several, and the queries that read it in their order.

    Args:
        moments: sum of x x^T, with a one behind x where there are biases (the last input).
        rotary_dim: leading coordinates that rotate, i with i + rotary_dim / 2.
    """
    half = rotary_dim // 2
    key, query = [], []
    for pair in range(half):
        places = [pair, pair + half]
        found = _merged_pair(_paired(keys[:, places]), _paired(queries[:, :, places]), moments)
        key.append(found[0])
        query.append(found[1])
    parts = (
        [
            (torch.stack([k.real for k in key]), torch.stack([q.real for q in query], 1)),
            (torch.stack([k.imag for k in key]), torch.stack([q.imag for q in query], 1)),
        ]
        if half
        else []
    )
    if rotary_dim < keys.shape[1]:
        parts.append(_merged_still(keys[:, rotary_dim:], queries[:, :, rotary_dim:], moments))
    return torch.cat([k for k, _ in parts]), torch.cat([q for _, q in parts], 1)


def _paired(rows: Tensor) -> Complex128[Tensor, "*heads inputs"]:
    """Two rows that rotate together as one complex one."""
    return torch.complex(rows[..., 0, :], rows[..., 1, :])


def _merged_pair(
    keys: Complex128[Tensor, "merged inputs"],
    queries: Complex128[Tensor, "merged group inputs"],
    moments: Float64[Tensor, "inputs inputs"],
) -> tuple[Complex128[Tensor, " inputs"], Complex128[Tensor, "all inputs"]]:
    """Minimises the sum over heads of E|q|^2 E|k - c z|^2, with z the one and c a number each.

    A score is Re(conj(q) k), so with k = c z it is Re(conj(conj(c) q) z).
    """
    moments = moments.to(keys.dtype)
    energy = torch.einsum("hgi,ij,hgj->h", queries, moments, queries.conj()).real.clamp_min(0)
    size = energy.clamp_min(_LEAST_ENERGY * float(energy.max()) or 1.0).sqrt()
    weighted = size[:, None] * keys
    top = torch.linalg.eigh(weighted @ moments @ weighted.conj().T).eigenvectors[:, -1]
    usual = size.square().mean().sqrt()
    one = top.conj() @ weighted / usual
    share = usual * top / size
    return one, (queries * share.conj()[:, None, None]).flatten(0, 1)


def _merged_still(
    keys: Float64[Tensor, "merged dim inputs"],
    queries: Float64[Tensor, "merged group dim inputs"],
    moments: Float64[Tensor, "inputs inputs"],
) -> tuple[Float64[Tensor, "dim inputs"], Float64[Tensor, "all dim inputs"]]:
    """The same for coordinates that do not rotate: minimises the sum over heads of
    E|Q^1/2 (k - B z)|^2, with Q = E q q^T of the queries that read the head and B a matrix each.
    """
    merged, dim, _ = keys.shape
    read = torch.einsum("hgdi,ij,hgej->hde", queries, moments, queries)
    values, vectors = torch.linalg.eigh(read)
    values = values.clamp_min(_LEAST_ENERGY * float(values.max()) or 1.0).sqrt()
    root = vectors * values[:, None] @ vectors.mT
    inverse = vectors / values[:, None] @ vectors.mT
    weighted = (root @ keys).flatten(0, 1)
    usual = values.square().mean().sqrt()
    top = torch.linalg.eigh(weighted @ moments @ weighted.T).eigenvectors[:, -dim:]
    one = top.T @ weighted / usual
    share = usual * inverse @ top.unflatten(0, (merged, dim))
    return one, torch.einsum("hde,hgdi->hgei", share, queries).flatten(0, 1)
