"""Decompositions in float32 against float64 by brute force, and where float64 must stay."""

import math

import pytest
import torch
from torch import Tensor

from foldstack.compression.closed_forms import leading_directions, low_rank
from foldstack.compression.closed_forms.leading_directions import (
    share_of_rounding,
    upper_sandwich,
    well_conditioned_factor,
)
from foldstack.compression.closed_forms.low_rank import (
    tail_energy,
    truncate,
    updated_directions,
    whitened_svd,
)

SHAPES = [(96, 96), (240, 96), (96, 240)]
GRAMS = ["white", "1e2", "1e4", "1e6", "outlier 30", "outlier 3e5", "few tokens", "dead", "tiny"]
# Those that float32 cannot resolve, whatever the shape, and those that it can.
NEED_FLOAT64 = {"few tokens"}
SUIT_FLOAT32 = {"white", "1e2", "tiny"}


@pytest.fixture(autouse=True)
def _small_sizes_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "SMALLEST_SIZE", 64)
    monkeypatch.setattr(leading_directions, "_STRIP", 40)


def problem(shape: tuple[int, int], kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a Gram in float32, as they come from a model and from gathering."""
    generator = torch.Generator().manual_seed(seed)
    columns = shape[1]
    weight = torch.randn(shape, generator=generator) / math.sqrt(columns)
    tokens = 30 if kind == "few tokens" else 1000
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x += torch.randn(tokens, 8, generator=generator).double() @ torch.randn(
        8, columns, generator=generator, dtype=torch.float64
    )
    if kind.startswith("1e"):
        order = torch.randperm(columns, generator=generator)
        x *= torch.logspace(0, -math.log10(float(kind)), columns, dtype=torch.float64)[order]
    elif kind.startswith("outlier"):
        x[:, 5] *= float(kind.split()[1])
    elif kind == "dead":
        x[:, 7] = 0
    elif kind == "tiny":
        x *= 1e-25  # squares leave float32's range, but not the Gram's
        return weight, x.T @ x
    return weight, (x.T @ x).float()


def lost(weight: Tensor, gram: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    first, second = (factor.double() for factor in factors)
    error = weight.double() - second @ first
    return float(((error @ gram.double()) * error).sum())


@pytest.mark.parametrize("kind", GRAMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_that_of_float64(shape: tuple[int, int], kind: str) -> None:
    """Without the measurement it is wrong by 10 % and more where channels stand out.

    Kinds that are numbers: the largest scale of a channel over the smallest.
    """
    weight, gram = problem(shape, kind)
    ranks = (35, 20)
    exact = whitened_svd(weight.double(), gram)
    found = whitened_svd(weight, gram, ranks)
    assert found.left.shape == (shape[0], 35)
    assert found.right.shape == (35, shape[1])
    is_single = found.left.dtype == torch.float32
    assert not (is_single and kind in NEED_FLOAT64)
    assert is_single or kind not in SUIT_FLOAT32
    for rank in ranks:
        least = lost(weight, gram, truncate(exact, rank))
        whole = lost(weight, gram, (0 * weight, torch.eye(shape[0])))
        got = lost(weight, gram, truncate(found, rank))
        assert got == pytest.approx(least, rel=1e-5, abs=1e-12 * whole)
        # It is compared with other tails; how many threads add up moves it by 1.5e-3.
        assert tail_energy(found, rank) == pytest.approx(
            tail_energy(exact, rank), rel=5e-3, abs=1e-12
        )


@pytest.mark.parametrize("apart", [1e-3, 1e-4, 1e-5])
def test_directions_on_both_sides_of_the_cut_are_told_apart(apart: float) -> None:
    """A kept and a dropped direction of nearly one eigenvalue, whose mixture the refinement leaves
    alone: it would count as lost, and send the whole matrix to float64."""
    generator = torch.Generator().manual_seed(0)
    values = torch.full((96,), 1e-5, dtype=torch.float64)
    values[:34] = torch.linspace(1, 0.5, 34, dtype=torch.float64)
    values[34], values[35] = 1e-2, 1e-2 * (1 - apart)
    left, right = (
        torch.linalg.qr(torch.randn(96, 96, generator=generator, dtype=torch.float64)).Q
        for _ in range(2)
    )
    weight = (left * values.sqrt() @ right).float()
    found = whitened_svd(weight, torch.eye(96), (35,))
    assert found.left.dtype == torch.float32
    least = float(torch.linalg.svdvals(weight.double())[35:].square().sum())
    assert lost(weight, torch.eye(96), truncate(found, 35)) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_of_deficient_rank_is_reproduced(shape: tuple[int, int]) -> None:
    """The triangle of W^T W does not exist there; what float32 takes for lost is noise."""
    weight, gram = problem(shape, "white")
    weight = weight[:, :20] @ weight[:20]
    found = whitened_svd(weight, gram, (24,))
    assert found.left.dtype == torch.float64
    first, second = truncate(found, 24)
    torch.testing.assert_close((second @ first).float(), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["white", "1e4", "outlier 3e5", "few tokens", "dead"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_shift", [True, False])
def test_the_update_loses_what_float64_loses(
    shape: tuple[int, int], kind: str, has_shift: bool
) -> None:
    weight, gram = problem(shape, kind)
    other = gram.double() if kind == "few tokens" else problem(shape, kind, seed=1)[1].double()
    deviated = gram.double() + 0.1 * other
    shift = 0.05 * (other - gram.double()) if has_shift else None
    first, second = truncate(whitened_svd(weight.double(), gram), 35)
    exact = updated_directions(weight.double(), first, second, deviated, shift)
    found = updated_directions(weight, first.float(), second.float(), deviated, shift)
    assert found.dtype == torch.float64 or kind != "few tokens"
    assert found.dtype == torch.float32 or kind != "white"
    # The error of the fit: its distance from the exact one in the energy that is minimised.
    apart = (found.double() - exact) @ first
    least = max(0.0, lost(weight, deviated, (first, exact)))
    noise = 1e-15 * lost(weight, deviated, (0 * first, exact))
    assert float(((apart @ deviated) * apart).sum()) <= 1e-5 * least + noise


def test_the_share_of_rounding_is_what_noise_of_that_size_costs() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.logspace(0, -4, 80, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(80, 80, generator=generator, dtype=torch.float64)).Q
    form = basis * values @ basis.T
    noise = torch.randn(80, 80, generator=generator, dtype=torch.float64)
    for error, rank in ((1e-7, 20), (1e-6, 20), (1e-5, 40)):
        disturbed = form + error * (noise + noise.T) / math.sqrt(2)
        vectors = torch.linalg.eigh(disturbed).eigenvectors.flip(1)[:, :rank]
        kept = (vectors.T @ form @ vectors).trace()
        real = float((values[:rank].sum() - kept) / values[rank:].sum())
        assert 0.5 < share_of_rounding(values, rank, error) / real < 2
    assert share_of_rounding(values, 40, 1e-2) == math.inf


def test_strips_make_the_upper_half_of_the_product() -> None:
    weight, gram = problem((100, 100), "white")
    for core, is_triangular in ((weight, False), (weight.triu(), True)):
        found = upper_sandwich(core, gram, is_triangular=is_triangular)
        torch.testing.assert_close(found.triu(), (core @ gram @ core.T).triu(), rtol=1e-4, atol=0.1)


def test_a_condition_number_beyond_the_limit_is_seen() -> None:
    basis = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64)).Q
    for condition, is_fine in ((1e2, True), (2e3, True), (1e5, False), (-1e3, False)):
        values = torch.full((60,), 1.0, dtype=torch.float64)
        values[3] = 1 / condition
        factor = well_conditioned_factor(basis * values @ basis.T)
        assert (factor is not None) == is_fine
