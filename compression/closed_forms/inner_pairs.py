"""Pairs of matrices with a narrower dimension between them: closed forms, tensors in and out.

MoDeGPT (arXiv 2408.09632) shrinks what lies between two matrices of a block so that the output of
the pair changes least on calibration data. The operation between them decides how. An elementwise
function (the MLP) leaves only a choice of channels: the second matrix is fitted again on them
(Nystrom). A dot product of rotated vectors (queries and keys) leaves only a choice of coordinates,
in whole rotary pairs (CR). Nothing between them (values and outputs) leaves any rank-k product: its
optimum is an SVD. Nothing is inverted here but diagonal matrices and Cholesky factors.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foldstack.compression.closed_forms.low_rank import NO_ENERGY, symmetric, truncate, whitened_svd

# First ridge of a fit on kept channels, relative to their unit diagonals, and how it grows while
# rounding noise keeps the matrix from being positive definite.
REFIT_RIDGE = 1e-8
RIDGE_GROWTH = 10.0


def leverage_scores(gram: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, " n"]:
    """s = diag(C (C + lambda I)^-1) with lambda = `ridge` * mean(diag C), between 0 and 1.

    A small ridge ranks channels by how badly the others predict them, a large one by their energy
    (arXiv 2408.09632, algorithm 1).
    """
    gram = symmetric(gram)
    shift = ridge * gram.diagonal().mean().clamp_min(NO_ENERGY)
    factor = cholesky(gram, shift)
    return (1 - shift * torch.cholesky_inverse(factor).diagonal()).clamp(0, 1)


def refitted(
    down: Float[Tensor, "out n"], gram: Float[Tensor, "n n"], kept: Int[Tensor, " k"]
) -> Float[Tensor, "out k"]:
    """The matrix on the kept channels that fits `down` on all of them best, by least squares.

    W' = W_J + W_D C_DJ C_JJ^-1, with J the kept channels and D the dropped ones: what was dropped
    is predicted from what was kept (the same as W C_:J C_JJ^-1, but exact when nothing is dropped).
    """
    gram, down = symmetric(gram), down.double()
    is_dropped = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    is_dropped[kept] = False
    dropped = is_dropped.nonzero()[:, 0]
    energy = gram.diagonal()[kept]
    scale = torch.where(energy > 0, energy.clamp_min(0).rsqrt(), torch.zeros_like(energy))
    correlation = scale[:, None] * gram[kept][:, kept] * scale
    correlation.diagonal()[scale == 0] = 1
    factor = cholesky(correlation, REFIT_RIDGE)
    crossed = scale[:, None] * (gram[kept][:, dropped] @ down[:, dropped].T)
    return down[:, kept] + (scale[:, None] * torch.cholesky_solve(crossed, factor)).T


def narrowing_operations(rows: int, width: int, kept: int) -> float:
    """Float64 operations of `leverage_scores` and `refitted` of a matrix (rows, width), times what
    their triangular factors take over matrix products (benchmarks/decomposition.py)."""
    scores = 2.5 * width**3
    return scores + 1.9 * (kept**3 / 3 + 2.0 * kept**2 * rows + 2.0 * kept * (width - kept) * rows)


def cholesky(matrix: Float[Tensor, "n n"], ridge: Tensor | float) -> Float[Tensor, "n n"]:
    """The Cholesky factor of matrix + ridge I, with the least growth of the ridge that has one."""
    while True:
        shifted = matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return factor
        ridge = ridge * RIDGE_GROWTH


def output_energy(
    weight: Float[Tensor, "heads dim hidden"],
    bias: Float[Tensor, "heads dim"] | None,
    gram: Float[Tensor, "hidden hidden"],
    input_sum: Float[Tensor, " hidden"],
    num_tokens: int,
) -> Float[Tensor, "heads dim"]:
    """Sum over tokens of the square of each output W x + b: the diagonals of C_Q and of C_K."""
    energy = torch.einsum("hdi,ij,hdj->hd", weight, gram, weight)
    if bias is not None:
        energy = energy + 2 * bias * (weight @ input_sum) + num_tokens * bias.square()
    return energy.clamp_min(0)


def kept_coordinates(
    query_energy: Float[Tensor, "group dim"],
    key_energy: Float[Tensor, " dim"],
    rotary_dim: int,
    kept_pairs: int,
    kept_others: int,
    score: Literal["energy", "sum"] = "energy",
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " pairs"]]:
    """Coordinates that one key head and its query heads keep, and which rotary pairs those are.

    The score of a coordinate is the product of its norms in queries and keys (the columns of
    C_Q^1/2 and C_K^1/2, whose squared norms are the diagonals of C_Q and C_K), that of a rotary
    pair (i, i + rotary_dim / 2)

        energy: (C_Q[i, i] + C_Q[i', i']) (C_K[i, i] + C_K[i', i']), which rotation leaves alone
        sum:    s_i + s_i', as in UniQL (arXiv 2512.03383)

    The order is that of a shorter rotating head: first halves, second halves, unrotated ones.
    """
    half = rotary_dim // 2
    queries = query_energy.sum(0)
    single = (queries * key_energy).sqrt()
    if score == "energy":
        of_pair = [e[:half] + e[half:rotary_dim] for e in (queries, key_energy)]
        pair_scores = of_pair[0] * of_pair[1]
    else:
        pair_scores = single[:half] + single[half:rotary_dim]
    pairs = top(pair_scores, kept_pairs)
    others = rotary_dim + top(single[rotary_dim:], kept_others)
    return torch.cat([pairs, pairs + half, others]), pairs


def top(scores: Float[Tensor, " n"], count: int) -> Int[Tensor, " count"]:
    """Indices of the largest scores, ascending; of equal ones the earlier."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def narrower_values(
    value: Float[Tensor, "dim hidden"],
    outputs: Float[Tensor, "group hidden dim"],
    gram: Float[Tensor, "hidden hidden"],
    width: int,
    *,
    by_values_alone: bool = False,
) -> tuple[Float[Tensor, "width hidden"], Float[Tensor, "group hidden width"]]:
    """A value head of `width` coordinates and what reads it, with the best product.

    Minimises the sum over the group of ||X W_V W_O - X W_V' W_O'||_F^2: the truncated SVD of the
    stacked outputs on the Gram of the values, W_V G W_V^T (arXiv 2408.09632, algorithm 3, whose
    two SVDs give the same for one output). `by_values_alone` chooses the subspace by X W_V only,
    as the published re-implementations do for grouped queries.
    """
    group, hidden, dim = outputs.shape
    of_values = value @ gram @ value.T
    stacked = outputs.flatten(0, 1)
    if by_values_alone:
        identity = torch.eye(dim, dtype=value.dtype, device=value.device)
        first, second = truncate(whitened_svd(identity, of_values), width)
        second = stacked @ second
    else:
        first, second = truncate(whitened_svd(stacked, of_values), width)
    return first @ value, second.unflatten(0, (group, hidden))
