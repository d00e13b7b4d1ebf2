"""Eigenvectors and least squares in float32, where a measurement says that float64 would lose no
less: tensors in, tensors out.

The form is M = C G C^T, and what is wanted is the span of its k leading eigenvectors. The product
is taken in float32, but for the few largest eigenvalues of G, to which all rounding is relative:
they are split off by a randomised subspace iteration and added in float64. The eigenvectors V are
found in float32, but for those of the few largest eigenvalues of M and of the nearest ones on both
sides of the cut, and refined once: with the residuals R = M V - V diag(s) in float64,

    V <- V + V X,   X_ji = v_j^T R_i / (s_i - s_j)

What rounding costs is known before the result is used. By second-order perturbation theory a
coupling b between a kept direction and a dropped one, g apart in eigenvalue, loses b^2 / g of the
energy that could be kept. The couplings of V are what the refinement has found; it takes away all
but the share |E|^2 / g^2 of each, with E = V^T M V - diag(s). The error of the product is measured:
random vectors go through C, G and C^T in float64, which costs no more than reading them.

Of least squares, U A x against t: the gradient T - U N, with N = A G A^T, is zero at the optimum;
where rounding leaves R of it, the loss is R N^-1 R^T too high, and R is measured alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Below this size float64 is as quick, and the better choice whatever the matrix.
SMALLEST_SIZE = 512
# Most that rounding to float32 may add to what is lost, as a share of it. It stands well below what
# would be noticed: errors are not spread evenly, and a later fit on other inputs, for which the
# directions are not the best, sees their first order, the root of this share times a tenth or so.
LARGEST_SHARE = 1e-7
# Least squares whose scaled normal matrix is conditioned worse than this are solved in float64.
LARGEST_CONDITION = 1e4

_STRIP = 512
_PROBES = 4
# Larger steps of the refinement would leave vectors that are not orthogonal.
_LARGEST_STEP = 0.03
# Eigenvalues of a Gram that are split off, and passes over it to find about where they are.
_DOMINANT = 64
_PASSES = 2
# Eigenvalues of the form that are split off at most, and how exact their vectors are then.
_OUTSTANDING = 32
_EXACT = 1e-9
# Eigenvectors on either side of a cut that are told apart in float64.
_ABOUT = 16
# Of the power method.
_ITERATIONS = 10
# Standard deviations of the sum of the dropped eigenvalues that it must exceed to count.
_DEVIATIONS = 10.0


@dataclass(frozen=True)
class Leading:
    """Eigenvalues and leading eigenvectors of a symmetric matrix, in descending order."""

    values: Float[Tensor, " size"]
    """All of them, in float64."""
    vectors: Float[Tensor, "size rank"]
    share: float
    """Expected share that rounding adds to what is lost at the worst of the ranks asked for."""


def leading_in_float32(
    core: Float[Tensor, "size in"],
    gram: Float[Tensor, "in in"],
    ranks: Sequence[int],
    *,
    is_triangular: bool = False,
) -> Leading:
    """The decomposition of C G C^T, with C `core` and G `gram` (symmetric, of order one).

    Args:
        ranks: how many vectors are to be kept; as many are returned as the largest of them.
        is_triangular: `core` is zero below its diagonal, which saves most of the products.
    """
    form = _form(core, gram, is_triangular=is_triangular)
    error = _size_of_error(core, gram, form)
    values, vectors = _decomposed(form, min(_OUTSTANDING, min(ranks) // 2))
    for rank in ranks:  # kept and dropped ones may be too close to one another for the refinement
        _tell_apart(form, values, vectors, slice(max(0, rank - _ABOUT), rank + _ABOUT))
    kept = vectors[:, : max(ranks)]
    residual = (form @ kept).addcmul_(kept, values[: max(ranks)], value=-1).float()
    vectors = vectors.float()
    couplings = vectors.T @ residual
    gaps = (values[: max(ranks)] - values[:, None]).float()
    steps = _steps(couplings, gaps)
    shares = [
        share_of_rounding(values, rank, error) + _share_left(values, couplings, gaps, steps, rank)
        for rank in ranks
    ]
    refined = kept.float() + vectors @ steps
    refined = 1.5 * refined - 0.5 * refined @ (refined.T @ refined)  # orthonormal again
    return Leading(values.clamp_min(0), refined, max(shares))


def _form(
    core: Float[Tensor, "size in"], gram: Float[Tensor, "in in"], *, is_triangular: bool
) -> Float[Tensor, "size size"]:
    """C G C^T in float64, all but the products with the largest eigenvalues of G taken in
    float32."""
    root = _dominant_root(gram.float()).double()
    rest = torch.empty(gram.shape, dtype=torch.float32, device=gram.device)
    for start in range(0, len(gram), _STRIP):
        strip = slice(start, start + _STRIP)
        rest[strip] = gram[strip] - root[strip] @ root.T
    upper = upper_sandwich(core.float(), rest, is_triangular=is_triangular).triu_().double()
    large = strips_times(core, root)
    return (upper + upper.triu(1).T).addmm_(large, large.T)


def _dominant_root(gram: Float[Tensor, "in in"]) -> Float[Tensor, "in few"]:
    """F such that G - F F^T lacks the largest eigenvalues of G, about."""
    basis = _normal(len(gram), min(_DOMINANT, len(gram)), gram)
    for _ in range(_PASSES):
        basis = torch.linalg.qr(gram @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ (gram @ basis))
    return basis @ vectors * values.clamp_min(0).sqrt()


def _decomposed(
    form: Float[Tensor, "size size"], most: int
) -> tuple[Float[Tensor, " size"], Float[Tensor, "size size"]]:
    """Eigenvalues in descending order and their vectors, of which float32 has found all but the
    `most` that stand out: rounding is relative to the largest of the others."""
    lead, top = _outstanding(form, most)
    lowered = form
    if len(top):
        lowered = form - lead * (top - top[-1]) @ lead.T
    values, vectors = torch.linalg.eigh(lowered.float())
    values, vectors = values.double().flip(0), vectors.double().flip(1)
    if len(top):  # they lie among the vectors of about that value, and are told apart in float64
        _tell_apart(form, values, vectors, slice(2 * len(top)))
    return values, vectors


def _tell_apart(
    form: Float[Tensor, "size size"],
    values: Float[Tensor, " size"],
    vectors: Float[Tensor, "size size"],
    some: slice,
) -> None:
    """Replace some of the vectors by the best ones of their span, and their eigenvalues, in
    float64 (Rayleigh and Ritz)."""
    basis = torch.linalg.qr(vectors[:, some]).Q
    found, rotation = torch.linalg.eigh(basis.T @ (form @ basis))
    values[some], vectors[:, some] = found.flip(0), basis @ rotation.flip(1)


def _outstanding(
    form: Float[Tensor, "size size"], most: int
) -> tuple[Float[Tensor, "size few"], Float[Tensor, " few"]]:
    """The largest eigenvalues and their vectors as far as a subspace iteration finds them exactly,
    which are those that stand out."""
    count = min(len(form), 2 * most)
    basis = torch.linalg.qr(_normal(len(form), count, form)).Q
    image = form @ basis
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(image).Q
        image = form @ basis
    values, rotation = torch.linalg.eigh(basis.T @ image)
    values, rotation = values.flip(0), rotation.flip(1)
    basis, image = basis @ rotation, image @ rotation
    is_exact = (image - basis * values).norm(dim=0) <= _EXACT * values
    number = int(is_exact[:most].long().cumprod(0).sum())
    return basis[:, :number], values[:number]


def _steps(
    couplings: Float[Tensor, "size most"], gaps: Float[Tensor, "size most"]
) -> Float[Tensor, "size most"]:
    """X of the refinement; zero between vectors whose eigenvalues are too close for it."""
    is_apart = (gaps.abs() > _norm_of(couplings)) & (couplings.abs() < _LARGEST_STEP * gaps.abs())
    return torch.where(is_apart, couplings / gaps, torch.zeros_like(gaps))


def _share_left(
    values: Float[Tensor, " size"],
    couplings: Float[Tensor, "size most"],
    gaps: Float[Tensor, "size most"],
    steps: Float[Tensor, "size most"],
    rank: int,
) -> float:
    """What is left of the couplings between the first `rank` vectors and the others after the
    refinement, as a share of what is lost anyhow."""
    across = slice(rank, None), slice(None, rank)
    sizes, apart = couplings[across].abs(), gaps[across]
    cost = sizes.square() / torch.maximum(apart, sizes).clamp_min(torch.finfo(sizes.dtype).tiny)
    left = (_norm_of(couplings) / apart).square().where(steps[across] != 0, 1.0)
    lost = float(values[rank:].sum())
    return float((cost * left).sum(dtype=torch.float64)) / lost if lost > 0 else math.inf


def _norm_of(couplings: Float[Tensor, "size most"]) -> Tensor:
    """Of a random symmetric matrix with entries of that size."""
    return 2 * couplings.square().mean().sqrt() * math.sqrt(len(couplings))


def upper_sandwich(
    core: Float[Tensor, "size in"], gram: Float[Tensor, "in in"], *, is_triangular: bool = False
) -> Float[Tensor, "size size"]:
    """C G C^T above the diagonal and in the square on it of every strip of rows, zero elsewhere."""
    total = core.new_zeros(len(core), len(core))
    for start in range(0, len(core), _STRIP):
        strip, first = slice(start, start + _STRIP), start if is_triangular else 0
        left = core[strip, first:] @ gram[first:, first:]
        total[strip, start:] = left @ core[start:, first:].T
    return total


def share_of_rounding(values: Float[Tensor, " size"], rank: int, error: float) -> float:
    """What entries of size `error` in a matrix with these eigenvalues add to the sum of those
    behind the first `rank`, as a share of it; infinite where that sum is itself no more than
    noise."""
    kept, dropped = values[:rank], values[rank:]
    lost = float(dropped.sum()) - _DEVIATIONS * error * math.sqrt(max(1, len(dropped)))
    if not lost > 0:
        return math.inf
    gaps = (kept[:, None] - dropped).clamp_min(max(error, torch.finfo(values.dtype).tiny))
    return float(error**2 * gaps.reciprocal().sum()) / lost


def well_conditioned_factor(
    matrix: Float[Tensor, "n n"],
) -> tuple[Float[Tensor, "n n"], float] | None:
    """The Cholesky factor of a matrix with a unit diagonal, in its precision, and the norm of its
    inverse; None where it is not positive definite or its condition number exceeds
    `LARGEST_CONDITION`."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    up = down = _normal(len(matrix), 1, matrix)
    for _ in range(_ITERATIONS):  # within a factor of two or so, which is enough
        up, down = matrix @ up, torch.cholesky_solve(down, factor)
        largest, inverse = up.norm(), down.norm()
        up, down = up / largest, down / inverse
    condition = float(largest * inverse)
    return (factor, float(inverse)) if condition <= LARGEST_CONDITION else None


def share_of_gradient(
    weight: Float[Tensor, "out in"],
    coordinates: Float[Tensor, "rank in"],
    directions: Float[Tensor, "out rank"],
    gram: Float[Tensor, "in in"],
    shift: Float[Tensor, "in in"] | None,
    scale: Float[Tensor, " rank"],
    inverse: float,
) -> float:
    """Most that the loss of U A x against W x is above the least one, as a share of it, where U
    fits W (G + D) A^T but for rounding.

    Args:
        scale: of the coordinates, that gives N = A G A^T a unit diagonal.
        inverse: norm of the inverse of N so scaled.
    """
    double = torch.float64
    probes = scale[:, None] * _normal(len(coordinates), _PROBES, scale.to(double))
    inputs = _strips_across(coordinates, probes)
    seen = strips_times(gram, inputs)
    target = seen if shift is None else seen + strips_times(shift, inputs)
    left = strips_times(weight, target) - strips_times(directions, strips_times(coordinates, seen))
    outputs = _normal(len(weight), _PROBES, probes)
    missed = _strips_across(weight, outputs) - _strips_across(
        coordinates, _strips_across(directions, outputs)
    )
    loss = float((missed * strips_times(gram, missed)).sum())
    return float(left.square().sum()) * inverse / loss if loss > 0 else math.inf


def strips_times(
    matrix: Float[Tensor, "rows in"], columns: Float[Tensor, "in many"]
) -> Float[Tensor, "rows many"]:
    """The product in the precision of `columns`, with no copy of `matrix` in it as a whole."""
    if matrix.dtype == columns.dtype:
        return matrix @ columns
    return torch.cat([strip.to(columns.dtype) @ columns for strip in matrix.split(_STRIP)])


def _size_of_error(core: Tensor, gram: Tensor, form: Tensor) -> float:
    """Root mean square of the entries of C G C^T - M, with M the `form` in float64."""
    probes = _normal(len(core), _PROBES, form)
    exact = strips_times(core, strips_times(gram, _strips_across(core, probes)))
    # A vector of independent normal numbers sees the Frobenius norm in the mean.
    return float((exact - form @ probes).norm()) / math.sqrt(_PROBES) / len(core)


def _strips_across(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix^T @ columns, as `strips_times`."""
    total = columns.new_zeros(matrix.shape[1], columns.shape[1])
    for strip, part in zip(matrix.split(_STRIP), columns.split(_STRIP), strict=True):
        total += strip.to(columns.dtype).T @ part
    return total


def _normal(rows: int, columns: int, like: Tensor) -> Tensor:
    """Numbers that are the same in every run and on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(like)
