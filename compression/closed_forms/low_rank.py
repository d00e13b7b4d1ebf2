"""Low-rank factors of a linear, best on its own inputs: closed forms, tensors in, tensors out.

A linear y = W x has inputs with Gram matrix G = sum over tokens of x x^T. The rank-k matrix W' with
the least loss ||(W - W') G^(1/2)||_F (the error of the outputs on those tokens) is the projection
of the outputs on their k leading directions, W' = U U^T W, where U holds the leading eigenvectors
of W G W^T.

That is SVD-LLM's optimum (arXiv 2403.07378, theorem 3.2), and for a regular G the very same
matrices: with G = S S^T and W S = U Sigma V^T, U^T W = Sigma V^T S^-1. But nothing is inverted
here, so a singular or badly conditioned G (too few tokens, a dead channel) needs no fallback: an
input direction that never occurred keeps its projection U U^T W x, where an inverse would answer
with noise or with zero.

For the ranks that are asked for, large matrices are decomposed in float32, whose rounding is
measured; where it would cost anything, and for weights of float64, it is float64
(`leading_directions`).

Several weights that read inputs of one width can share their first factor, the basis (Basis
Sharing, arXiv 2410.03765): stacked, they are one weight of more outputs, factored once on their
pooled Gram.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from foldstack.compression.closed_forms.leading_directions import (
    LARGEST_SHARE,
    SMALLEST_SIZE,
    leading_in_float32,
    share_of_gradient,
    strips_times,
    well_conditioned_factor,
)
from foldstack.compression.errors import InputError

# Weight of directions that never occurred, relative to the mean energy of those that did: it orders
# the leading directions of W G W^T beyond its rank, and is far below float32's noise in G.
UNSEEN_DIRECTION_WEIGHT = 1e-10
# Mean squares below this are no energy at all: products with them would leave float64's range.
NO_ENERGY = 1e-200
# Diagonals of the triangular factor of a weight farther apart than this are left to Householder's
# reflections in float64.
WEIGHT_CONDITION = 1e5
# Singular values of a Gram below this share of the largest one are rounding noise of float32 sums.
RELATIVE_TOLERANCE = 1e-10

# The same for sums that are divided by: below it an inverse would blow up their noise.
NOISE_FLOOR = 1e-6

# No linear loses more than this share of its parameters to a better use elsewhere.
LARGEST_RATIO = 0.9

Key = TypeVar("Key")


@dataclass(frozen=True)
class WhitenedSVD:
    """The factors of a weight in descending order of what they carry on its inputs."""

    left: Float[Tensor, "out rank"]
    """Orthonormal directions of the outputs (U)."""
    singular_values: Float[Tensor, " all"]
    """Root of the output energy along each direction: the singular values of W G^(1/2), also those
    of directions that were left out."""
    right: Float[Tensor, "rank in"]
    """Coordinates of the outputs as functions of the inputs, U^T W (Sigma V^T S^-1 for a regular
    G)."""
    rounding: float = 0.0
    """Share that float32 adds to what is lost at the ranks asked for; 0 in float64."""


def whitened_svd(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], ranks: Sequence[int] = ()
) -> WhitenedSVD:
    """The decomposition of `weight` on inputs with Gram matrix `gram`.

    arXiv 2403.07378, algorithm 1, in the inverse-free form (see the module's docstring).

    Args:
        ranks: those that it is to be cut to; it has as many components as the largest of them, and
            all singular values. Without any it is whole, and in float64.

    Raises:
        InputError: the Gram has an entry that is not finite.
    """
    if ranks and weight.dtype != torch.float64 and min(weight.shape) >= SMALLEST_SIZE:
        found = _in_float32(weight, gram, ranks)
        if found is not None:
            return found
    weight, gram = weight.double(), symmetric(gram)
    seen = gram.diagonal().mean()
    # Inputs that are always zero say nothing: then the weight alone orders its directions.
    unseen = UNSEEN_DIRECTION_WEIGHT * seen if seen > NO_ENERGY else torch.ones_like(seen)
    if weight.shape[0] > weight.shape[1]:
        basis, core = torch.linalg.qr(weight)  # the outputs span no more than `in` directions
    else:
        basis, core = None, weight
    energy = core @ gram @ core.T + unseen * (core @ core.T)
    values, directions = torch.linalg.eigh((energy + energy.T) / 2)
    values, directions = values.flip(0).clamp_min(0), directions.flip(1)
    directions = directions[:, : max(ranks)] if ranks else directions
    left = directions if basis is None else basis @ directions
    return WhitenedSVD(left=left, singular_values=values.sqrt(), right=left.T @ weight)


def _in_float32(weight: Tensor, gram: Tensor, ranks: Sequence[int]) -> WhitenedSVD | None:
    """The same, but None where it takes float64.

    For more outputs than inputs W = Q R, so U = Q Z and U^T W = Z^T R with Z the eigenvectors of
    R G R^T; R comes from W^T W, whose condition is that of a weight squared, not of activations.
    """
    energy = float(gram.diagonal().double().mean())
    if not energy > NO_ENERGY:
        return None
    unit = symmetric(gram / energy, torch.float32)
    is_tall = weight.shape[0] > weight.shape[1]
    core = _triangle(weight) if is_tall else weight
    if core is None:
        return None
    leading = leading_in_float32(core, unit, ranks, is_triangular=is_tall)
    if not leading.share <= LARGEST_SHARE:
        return None
    single, directions = weight.float(), leading.vectors
    if is_tall:
        solved = torch.linalg.solve_triangular(core, directions.double(), upper=True)
        left, right = single @ solved.float(), directions.T @ core.float()
    else:
        left, right = directions, directions.T @ single
    return WhitenedSVD(left, (leading.values * energy).sqrt(), right, leading.share)


def _triangle(weight: Tensor) -> Tensor | None:
    """The upper triangular R with R^T R = W^T W, in float64; None where W is too badly
    conditioned for it."""
    columns = weight.shape[1]
    upper = torch.zeros(columns, columns, dtype=torch.float64, device=weight.device)
    for rows in weight.split(columns):
        double = rows.double()
        for start in range(0, columns, SMALLEST_SIZE):
            strip = slice(start, start + SMALLEST_SIZE)
            upper[strip, start:] += double[:, strip].T @ double[:, start:]
    factor, failed = torch.linalg.cholesky_ex(upper, upper=True)
    diagonal = factor.diagonal()
    if failed or diagonal.max() > WEIGHT_CONDITION * diagonal.min():
        return None
    return factor


def whitened_svd_operations(rows: int, columns: int, rank: int | None = None) -> float:
    """Operations of `whitened_svd` of a weight (rows, columns), in the time of float64: those in
    float32 count half.

    Args:
        rank: the largest that it is cut to; none: it is whole.

    An eigendecomposition with its vectors is counted as 9 n^3 (Golub and Van Loan, section 8.3).
    """
    kept = min(rows, columns) if rank is None else rank
    if rank is None or min(rows, columns) < SMALLEST_SIZE:
        if rows > columns:
            return 15.0 * columns**3 + 4.0 * rows * columns**2 + 4.0 * rows * columns * kept
        return 9.0 * rows**3 + 4.0 * columns * rows**2 + 2.0 * rows * columns**2
    size = min(rows, columns)
    refinement = 2.0 * size**2 * kept
    single = 9.0 * size**3 + 4.0 * size**2 * kept + 4.0 * size * kept**2
    if rows > columns:
        triangle = rows * columns**2 + columns**3 / 3 + columns**2 * kept
        single += 2.0 * columns**3 + 2.0 * rows * columns * kept + 2.0 * columns**2 * kept
        return triangle + refinement + single / 2
    single += 2.0 * rows * columns**2 + rows**2 * columns + 2.0 * rows * columns * kept
    return refinement + single / 2


def updated_directions_operations(rows: int, columns: int, rank: int, *, shifted: bool) -> float:
    """Operations of `updated_directions` for a weight (rows, columns), in the time of float64."""
    crossed = 2.0 * rank * columns**2
    residual = 2.0 * rows * columns * rank
    square = 2.0 * columns * rank**2 + 4.0 * rows * rank**2
    if min(rows, columns) < SMALLEST_SIZE:
        return square + 13.0 * rank**3 + (2 if shifted else 1) * (crossed + residual)
    single = square + (2 if shifted else 1) * crossed + residual
    return rank**3 / 3 + single / 2


def eigen_whitened_svd(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]
) -> WhitenedSVD:
    """The same by whitening with the eigenvectors of the Gram (arXiv 2503.12340, theorem 3.1).

    With G = Q diag(s) Q^T and W Q diag(s)^1/2 = U Sigma V^T, the coordinates are Sigma V^T
    diag(s)^-1/2 Q^T; an s below the relative tolerance counts as zero, and so does its inverse.

    Raises:
        InputError: the Gram has an entry that is not finite.
    """
    values, vectors = torch.linalg.eigh(symmetric(gram))
    seen = values > RELATIVE_TOLERANCE * values.max()
    root = torch.where(seen, values, torch.zeros_like(values)).clamp_min(0).sqrt()
    inverse = torch.where(root > 0, root, torch.ones_like(root)).reciprocal() * (root > 0)
    left, singular_values, right = torch.linalg.svd(
        weight.double() @ vectors * root, full_matrices=False
    )
    coordinates = singular_values[:, None] * right * inverse @ vectors.T
    return WhitenedSVD(left=left, singular_values=singular_values, right=coordinates)


def symmetric(
    gram: Float[Tensor, "in in"], dtype: torch.dtype = torch.float64
) -> Float[Tensor, "in in"]:
    """The Gram in float64, or another precision, its rounding noise out of the way.

    Raises:
        InputError: it has an entry that is not finite.
    """
    if not torch.isfinite(gram).all():
        raise InputError(
            "a Gram matrix must be finite, got NaN or infinity; "
            "run the model in float32 or bfloat16"
        )
    total = gram.to(dtype, copy=True)
    total += gram.T
    return total.div_(2)  # in place: of the widest Gram each copy counts


def truncate(
    svd: WhitenedSVD, rank: int
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """The factors (first, second) of the best matrix of this rank: W' = second @ first.

    Their components have equal norms (`balance`). The root of the singular values on both (arXiv
    2403.07378, algorithm 1) is the same product, but those are of the summed outputs: `second`
    would be larger by about the root of the number of tokens, and recovery would move one of the
    two while the other stands still.
    """
    assert 1 <= rank <= svd.left.shape[1]
    return balance(svd.right[:rank], svd.left[:, :rank])


def balance(
    first: Float[Tensor, "rank in"], second: Float[Tensor, "out rank"]
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """The same product of factors whose components have equal norms, which Adam's equal steps
    suit."""
    norms = first.norm(dim=1), second.norm(dim=0)
    # A component that carries nothing has no scale of its own.
    carries = (norms[0] > 0) & (norms[1] > 0)
    scale = torch.where(carries, norms[1] / norms[0], 1.0).sqrt()
    return first * scale[:, None], second / scale


def tail_energy(svd: WhitenedSVD, rank: int) -> float:
    """Share of the output energy that rank `rank` loses: sum of sigma_i^2 for i > rank, over
    all."""
    energy = svd.singular_values.square()
    return float(energy[rank:].sum() / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny))


def updated_directions(
    weight: Float[Tensor, "out in"],
    coordinates: Float[Tensor, "rank in"],
    directions: Float[Tensor, "out rank"],
    deviated_gram: Float[Tensor, "in in"],
    target_shift: Float[Tensor, "in in"] | None = None,
) -> Float[Tensor, "out rank"]:
    """Directions that fit the outputs best on the inputs x' that the compressed model really sees.

    Least squares of U A x' against W t, with A the coordinates, G' the sum of x' x'^T, and
    `target_shift` D that of (t - x') x'^T. Without it t = x', the closed form of SVD-LLM's
    layer-wise update (the authors' `--step 2`):

        U_new = W (G' + D) A^T (A G' A^T)^-1 = U + ((W - U A) G' + W D) A^T (A G' A^T)^-1

    The second form is the one computed: where A G' A^T is singular it leaves U as it was. Large
    ones are computed in float32 where that is as good (`leading_directions`).
    """
    if weight.dtype != torch.float64 and min(weight.shape) >= SMALLEST_SIZE:
        found = _updated_in_float32(weight, coordinates, directions, deviated_gram, target_shift)
        if found is not None:
            return found
    weight, gram = weight.double(), deviated_gram.double()
    coordinates, directions = coordinates.double(), directions.double()
    crossed = gram @ coordinates.T
    normal = coordinates @ crossed
    scale = normal.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale.reciprocal(), torch.zeros_like(scale))
    tolerance = RELATIVE_TOLERANCE if target_shift is None else NOISE_FLOOR
    inverse = torch.linalg.pinv(scale[:, None] * normal * scale, rtol=tolerance, hermitian=True)
    residual = weight @ crossed - directions @ normal
    if target_shift is not None:
        residual = residual + weight @ (target_shift.double() @ coordinates.T)
    updated: Tensor = directions + (residual * scale) @ inverse * scale
    return updated


def _updated_in_float32(
    weight: Tensor,
    coordinates: Tensor,
    directions: Tensor,
    deviated_gram: Tensor,
    target_shift: Tensor | None,
) -> Tensor | None:
    """The same, but None where it takes float64."""
    weight, coordinates, directions = weight.float(), coordinates.float(), directions.float()
    crossed = strips_times(deviated_gram, coordinates.T)
    normal = coordinates @ crossed
    energy = normal.diagonal()
    if not (energy > 0).all():
        return None
    scale = energy.rsqrt()
    solvable = well_conditioned_factor((scale[:, None] * normal * scale).double())
    if solvable is None:
        return None
    factor, inverse = solvable
    wanted = crossed
    if target_shift is not None:
        wanted = crossed + strips_times(target_shift, coordinates.T)
    residual = weight @ wanted - directions @ normal
    updated = directions + torch.cholesky_solve((residual * scale).T, factor.float()).T * scale
    share = share_of_gradient(
        weight, coordinates, updated, deviated_gram, target_shift, scale, inverse
    )
    return updated if share <= LARGEST_SHARE else None


def pooled_gram(
    grams: Sequence[Float[Tensor, "in in"]], *, equal_traces: bool
) -> Float[Tensor, "in in"]:
    """The Gram of the inputs of several linears together, the sum of theirs.

    With `equal_traces` each is first scaled to the mean trace, so that no linear has a larger say
    because its inputs are larger.
    """
    traces = torch.stack([gram.double().trace() for gram in grams])
    weights = torch.ones_like(traces)
    if equal_traces and len(grams) > 1:
        weights = torch.where(traces > 0, traces.mean() / traces, weights)
    return torch.stack(
        [weight * gram.double() for weight, gram in zip(weights, grams, strict=True)]
    ).sum(0)


def shared_factors(
    weights: Sequence[Float[Tensor, "_ in"]], gram: Float[Tensor, "in in"], rank: int
) -> tuple[Float[Tensor, "rank in"], list[Float[Tensor, "_ rank"]]]:
    """One basis for several linears and the coefficients of each: W_i' = coefficients[i] @ basis.

    arXiv 2410.03765, section 3.1: the whitened SVD of the weights side by side. Its loss is that
    of every linear on the pooled inputs of all.
    """
    basis, stacked = truncate(whitened_svd(torch.cat(tuple(weights)), gram, (rank,)), rank)
    return basis, list(stacked.split([len(weight) for weight in weights]))


def uniform_ranks(
    shapes: Mapping[Key, tuple[int, int]],
    removed_fraction: float | Mapping[Key, float],
    *,
    spend_leftover: bool = True,
    multiple: int = 1,
) -> dict[Key, int]:
    """A rank for every (out, in) shape, removing the same fraction of each, or of each its own.

    arXiv 2403.07378, section 4.2: k = floor(m n (1 - R) / (m + n)), at least 1. The floors remove
    more than was asked; `spend_leftover` gives what they left over to the linears with the largest
    remainders, one rank each, so that the whole lands within one rank of the asked size. A rank k
    with k (m + n) >= m n says that the linear is better kept dense. Ranks from `multiple` on are
    multiples of it, and a rank to spend is that many.
    """
    if isinstance(removed_fraction, Mapping):
        kept = {key: 1 - removed_fraction[key] for key in shapes}
    else:
        kept = dict.fromkeys(shapes, 1 - removed_fraction)
    exact = {key: m * n * kept[key] / (m + n) for key, (m, n) in shapes.items()}
    steps = {key: multiple if value >= multiple else 1 for key, value in exact.items()}
    # 1e-9 keeps a rank that is whole in exact arithmetic from falling to the integer below.
    ranks = {
        key: max(1, int(value / steps[key] + 1e-9) * steps[key]) for key, value in exact.items()
    }
    if not spend_leftover:
        return ranks
    budget = sum(kept[key] * m * n for key, (m, n) in shapes.items())
    left = budget - sum(rank * sum(shapes[key]) for key, rank in ranks.items())
    for key in sorted(shapes, key=lambda key: (ranks[key] - exact[key]) / steps[key]):
        m, n = shapes[key]
        price = min((ranks[key] + steps[key]) * (m + n), m * n) - ranks[key] * (m + n)
        if price <= left + 1e-6:
            ranks[key] += steps[key]
            left -= price
    return ranks


def ranks_by_loss(
    losses: Mapping[Key, float], shape: tuple[int, int], total_rank: int, multiple: int = 1
) -> dict[Key, int]:
    """Ranks for linears of one shape with the sum `total_rank`, larger where more would be lost.

    SVD-LLM V2, arXiv 2503.12340, algorithm 1: with L_w the loss (root of the summed squares) of
    each at equal ranks, and R their mean ratio of removed parameters,

        R_w = |group| R a_w / sum of a,   a_w = 1 / log(L_w)

    (the printed a_w is multiplied by the loss; what is meant is the score). No R_w exceeds
    `LARGEST_RATIO`, what that cuts off is spread over the others, and ranks are rounded so that
    their sum stays; all are multiples of `multiple`, as `total_rank` is. The score has a pole at
    L = 1 and follows the scale of the inputs: a loss below e counts as e.
    """
    m, n = shape
    per_rank = (m + n) / (m * n)
    removed = len(losses) - total_rank * per_rank
    most = max(LARGEST_RATIO, removed / len(losses))
    scores = {key: 1 / math.log(max(loss, math.e)) for key, loss in losses.items()}
    ratios: dict[Key, float] = {}
    # From the largest score down: once one stays below the cap, so do all after it.
    for key in sorted(scores, key=lambda key: -scores[key]):
        left = sum(score for other, score in scores.items() if other not in ratios)
        ratios[key] = min(most, (removed - sum(ratios.values())) * scores[key] / left)
    exact = {key: (1 - ratios[key]) / per_rank / multiple for key in losses}
    largest = max(1, (m * n - 1) // (m + n) // multiple)
    rounded = _rounded(exact, total_rank // multiple, largest)
    return {key: units * multiple for key, units in rounded.items()}


def _rounded(exact: Mapping[Key, float], total: int, largest: int) -> dict[Key, int]:
    """Whole ranks from 1 to `largest` with the sum `total`, as close to `exact` as that allows."""
    assert len(exact) <= total <= len(exact) * largest
    ranks = {key: min(largest, max(1, int(value + 1e-9))) for key, value in exact.items()}
    while (missing := total - sum(ranks.values())) != 0:
        step = 1 if missing > 0 else -1
        movable = [key for key in ranks if 1 <= ranks[key] + step <= largest]
        ranks[max(movable, key=lambda key: step * (exact[key] - ranks[key]))] += step
    return ranks
