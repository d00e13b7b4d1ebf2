"""Closed forms of the low-rank factors against brute force (svd_llm.md, acceptance tests 1-6)."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foldstack.compression.closed_forms.low_rank import (
    balance,
    eigen_whitened_svd,
    pooled_gram,
    ranks_by_loss,
    shared_factors,
    tail_energy,
    truncate,
    uniform_ranks,
    updated_directions,
    whitened_svd,
)
from foldstack.compression.errors import InputError

SHAPES = [(24, 16), (16, 24), (20, 20)]


def problem(out: int, inputs: int, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=generator, dtype=torch.float64)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixing
    return weight, x


def loss(x: Tensor, weight: Tensor, approximation: Tensor) -> float:
    return float((x @ (weight - approximation).T).square().sum())


def least_loss(x: Tensor, weight: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(x @ weight.T)[rank:].square().sum())


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_the_loss_is_the_dropped_energy_and_the_least_possible(out: int, inputs: int) -> None:
    weight, x = problem(out, inputs)
    svd = whitened_svd(weight, x.T @ x)
    for rank in (1, 5, 15):
        first, second = truncate(svd, rank)
        assert first.shape == (rank, inputs)
        assert second.shape == (out, rank)
        got = loss(x, weight, second @ first)
        assert got == pytest.approx(float(svd.singular_values[rank:].square().sum()), rel=1e-6)
        assert got == pytest.approx(least_loss(x, weight, rank), rel=1e-6)
        assert tail_energy(svd, rank) == pytest.approx(got / least_loss(x, weight, 0), rel=1e-6)


def test_three_equivalent_forms_give_the_same_matrix() -> None:
    weight, x = problem(20, 16)
    gram, rank = x.T @ x, 6
    first, second = truncate(whitened_svd(weight, gram), rank)

    root = torch.linalg.cholesky(gram)  # the paper's form
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    by_cholesky = u[:, :rank] * s[:rank] @ v[:rank] @ torch.linalg.inv(root)

    values, vectors = torch.linalg.eigh(gram)  # V2's form
    u, s, v = torch.linalg.svd(weight @ vectors * values.sqrt(), full_matrices=False)
    by_eigen = u[:, :rank] * s[:rank] @ (v[:rank] / values.sqrt()) @ vectors.T
    own_first, own_second = truncate(eigen_whitened_svd(weight, gram), rank)

    torch.testing.assert_close(second @ first, by_cholesky, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(second @ first, by_eigen, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(own_second @ own_first, by_eigen, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("fault", ["few tokens", "dead channel", "silent data"])
def test_a_singular_gram_needs_no_fallback(fault: str) -> None:
    weight, x = problem(24, 16, tokens=9 if fault == "few tokens" else 200)
    if fault == "dead channel":
        x[:, 3] = 0
    if fault == "silent data":
        x[:] = 0
    svd = whitened_svd(weight, x.T @ x)
    scale = least_loss(x, weight, 0)
    for rank, form in itertools.product((4, 12), (svd, eigen_whitened_svd(weight, x.T @ x))):
        first, second = truncate(form, rank)
        assert torch.isfinite(first).all()
        assert torch.isfinite(second).all()
        assert loss(x, weight, second @ first) <= least_loss(x, weight, rank) + 1e-8 * scale
    first, second = truncate(svd, 16)
    # Full rank is the identity even where the data never was.
    torch.testing.assert_close(second @ first, weight, rtol=0, atol=1e-8)


@pytest.mark.parametrize("out", [24, 8])
def test_silent_data_leave_what_the_update_starts_from(out: int) -> None:
    weight, _ = problem(out, 16, tokens=3)
    silent = torch.zeros(16, 16, dtype=torch.float64)
    first, second = truncate(whitened_svd(weight, silent), 5)
    assert torch.isfinite(first.float()).all()  # in the precision in which it is stored, too
    assert torch.linalg.matrix_rank(second @ first) == 5
    assert torch.equal(updated_directions(weight, first, second, silent), second)


def test_a_gram_that_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match="finite"):
        whitened_svd(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, float("inf")]]))


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_full_rank_is_the_identity(out: int, inputs: int) -> None:
    weight, x = problem(out, inputs)
    first, second = truncate(whitened_svd(weight, x.T @ x), min(out, inputs))
    torch.testing.assert_close(second @ first, weight, rtol=0, atol=1e-8)


def test_the_two_factors_have_the_same_scale_however_many_tokens_were_summed() -> None:
    weight, x = problem(24, 16)
    first, second = truncate(whitened_svd(weight, x.T @ x), 5)
    torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0))
    many_first, many_second = truncate(whitened_svd(weight, 1e6 * x.T @ x), 5)
    torch.testing.assert_close(many_second @ many_first, second @ first)
    torch.testing.assert_close(many_second.abs(), second.abs())


def test_a_component_that_carries_nothing_keeps_its_scale() -> None:
    first, second = torch.eye(2).double(), torch.tensor([[4.0, 0.0], [0.0, 0.0]]).double()
    balanced_first, balanced_second = balance(first, second)
    assert torch.equal(balanced_first, torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double())
    assert torch.equal(balanced_second, torch.tensor([[2.0, 0.0], [0.0, 0.0]]).double())


def test_the_update_is_least_squares_on_the_deviated_inputs() -> None:
    weight, x = problem(20, 16)
    _, noise = problem(20, 16, seed=1)
    deviated = x + 0.3 * noise
    first, second = truncate(whitened_svd(weight, x.T @ x), 6)
    updated = updated_directions(weight, first, second, deviated.T @ deviated)
    by_tokens = torch.linalg.lstsq(deviated @ first.T, deviated @ weight.T).solution.T
    torch.testing.assert_close(updated, by_tokens, rtol=1e-8, atol=1e-8)
    before = loss(deviated, weight, second @ first)
    assert loss(deviated, weight, updated @ first) < before


def test_the_update_fits_the_outputs_on_other_inputs_too() -> None:
    weight, x = problem(20, 16)
    _, noise = problem(20, 16, seed=1)
    deviated = x + 0.3 * noise
    first, second = truncate(whitened_svd(weight, x.T @ x), 6)
    wanted = 0.7 * deviated + 0.3 * x
    shift = (wanted - deviated).T @ deviated
    updated = updated_directions(weight, first, second, deviated.T @ deviated, shift)
    by_tokens = torch.linalg.lstsq(deviated @ first.T, wanted @ weight.T).solution.T
    torch.testing.assert_close(updated, by_tokens, rtol=1e-8, atol=1e-8)


def test_the_update_changes_nothing_on_unchanged_inputs() -> None:
    weight, x = problem(20, 16)
    first, second = truncate(whitened_svd(weight, x.T @ x), 6)
    updated = updated_directions(weight, first, second, x.T @ x)
    torch.testing.assert_close(updated, second, rtol=1e-8, atol=1e-8)


def test_the_update_never_hurts_with_fewer_tokens_than_rank() -> None:
    weight, x = problem(20, 16)
    first, second = truncate(whitened_svd(weight, x.T @ x), 10)
    _, few = problem(20, 16, tokens=4, seed=2)
    updated = updated_directions(weight, first, second, few.T @ few)
    assert torch.isfinite(updated).all()
    assert loss(few, weight, updated @ first) <= loss(few, weight, second @ first)
    # It moved no more than the four tokens ask for.
    assert torch.linalg.matrix_rank(updated - second, rtol=1e-8) <= 4


def test_ranks_are_the_papers_floors() -> None:
    shapes = {"q": (4096, 4096), "k": (1024, 4096)}
    assert uniform_ranks(shapes, 0.2, spend_leftover=False) == {"q": 1638, "k": 655}


def test_a_whole_rank_is_not_lost_to_rounding() -> None:
    # 64 * 64 * 0.7 / 128 = 22.4, and 100 * 100 * 0.58 / 200 = 29 exactly but 28.999... in floats
    assert uniform_ranks({"a": (100, 100)}, 0.42, spend_leftover=False) == {"a": 29}


def test_ranks_are_multiples_and_land_within_one_of_the_size() -> None:
    shapes = {n: (400 + 40 * n, 300) for n in range(6)} | {"small": (20, 12)}
    ranks = uniform_ranks(shapes, 0.3, multiple=16)
    assert all(rank % 16 == 0 for key, rank in ranks.items() if key != "small")
    assert 1 <= ranks["small"] < 16
    left = 0.7 * sum(m * n for m, n in shapes.values())
    left -= sum(rank * sum(shapes[key]) for key, rank in ranks.items())
    assert 0 <= left < 16 * (600 + 300)


def test_v2_moves_ranks_in_multiples() -> None:
    ranks = ranks_by_loss({"a": 10.0, "b": 100.0, "c": 1e4}, (600, 400), 3 * 96, multiple=16)
    assert sum(ranks.values()) == 3 * 96
    assert all(rank % 16 == 0 for rank in ranks.values())
    assert ranks["a"] < ranks["c"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(4, 80), st.integers(4, 80)), min_size=1, max_size=12),
    st.floats(0.05, 0.8),
)
def test_spending_the_leftover_comes_closer_and_never_overspends(
    shapes: list[tuple[int, int]], removed: float
) -> None:
    named = dict(enumerate(shapes))
    floors = uniform_ranks(named, removed, spend_leftover=False)
    ranks = uniform_ranks(named, removed)
    assert all(floors[key] <= ranks[key] <= floors[key] + 1 for key in named)

    def stored(key: int, rank: int) -> int:
        m, n = named[key]
        return min(rank * (m + n), m * n)  # a rank that large means dense

    budget = (1 - removed) * sum(m * n for m, n in shapes)
    spent = sum(stored(key, rank) for key, rank in ranks.items())
    at_floors = sum(stored(key, rank) for key, rank in floors.items())
    # Rank 1 everywhere may already be more than was asked.
    assert spent <= max(budget, at_floors) + 1e-6
    for key in named:
        if ranks[key] == floors[key]:
            price = stored(key, ranks[key] + 1) - stored(key, ranks[key])
            assert price > budget - spent - 1e-6


def test_more_loss_gives_more_rank_by_v2s_score() -> None:
    losses = {"a": 1e2, "b": 1e4, "c": 1e6}
    shape, total = (600, 400), 3 * 120  # half of each is removed: k = 120 of 240
    ranks = ranks_by_loss(losses, shape, total)
    scores = {key: 1 / math.log(loss) for key, loss in losses.items()}
    for key, score in scores.items():
        ratio = 3 * 0.5 * score / sum(scores.values())
        assert ranks[key] == pytest.approx((1 - ratio) * 240, abs=1)
    assert ranks["a"] < ranks["b"] < ranks["c"]
    assert sum(ranks.values()) == total


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("removed", [0.3, 0.8, 0.95])
def test_v2_keeps_the_mean_and_the_cap_at_any_scale_of_the_inputs(
    scale: float, removed: float
) -> None:
    losses = {key: scale * 3.0**key for key in range(6)} | {6: 0.0}
    equal = int((1 - removed) * 240)
    ranks = ranks_by_loss(losses, (600, 400), 7 * equal)
    assert sum(ranks.values()) == 7 * equal
    assert all(rank >= min(equal, 24) for rank in ranks.values())  # nine tenths of 240 at most
    assert list(ranks.values())[:6] == sorted(list(ranks.values())[:6])
    if scale < 1:
        assert set(ranks.values()) == {equal}  # no loss says anything


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1e8), min_size=1, max_size=9),
    st.tuples(st.integers(2, 60), st.integers(3, 60)),
    st.floats(0.01, 1),
)
def test_v2_ranks_are_always_smaller_than_dense(
    losses: list[float], shape: tuple[int, int], share: float
) -> None:
    m, n = shape
    most = max(1, (m * n - 1) // (m + n))
    total = max(1, round(share * most)) * len(losses)
    ranks = ranks_by_loss(dict(enumerate(losses)), shape, total)
    assert sum(ranks.values()) == total
    assert all(1 <= rank <= most for rank in ranks.values())


def group(count: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Weights 20 x 16 of one name, and the inputs of each: every next one's twice as large."""
    problems = [problem(20, 16, seed=seed) for seed in range(count)]
    return [w for w, _ in problems], [2.0**i * x for i, (_, x) in enumerate(problems)]


def test_the_pooled_loss_is_the_dropped_energy() -> None:
    weights, inputs = group()
    stacked, x = torch.cat(weights), torch.cat(inputs)
    pooled = pooled_gram([x.T @ x for x in inputs], equal_traces=False)
    basis, coefficients = shared_factors(weights, pooled, 7)
    assert [tuple(own.shape) for own in coefficients] == [(20, 7)] * 3
    got = loss(x, stacked, torch.cat(coefficients) @ basis)
    assert got == pytest.approx(least_loss(x, stacked, 7), rel=1e-6)

    # Whitened with the wrong one of the two triangular factors it is not the least.
    root = torch.linalg.cholesky(pooled)
    u, s, v = torch.linalg.svd(stacked @ root.T, full_matrices=False)
    slipped = u[:, :7] * s[:7] @ v[:7] @ torch.linalg.inv(root.T)
    assert loss(x, stacked, slipped) > 1.01 * got


def test_a_fit_to_its_own_inputs_lowers_the_loss_of_every_member() -> None:
    weights, inputs = group()
    grams = [x.T @ x for x in inputs]
    pooled = pooled_gram(grams, equal_traces=False)
    basis, coefficients = shared_factors(weights, pooled, 7)
    losses = {"pooled": least_loss(torch.cat(inputs), torch.cat(weights), 7), "own": 0.0, "fit": 0}
    for weight, x, own in zip(weights, inputs, coefficients, strict=True):
        fitted = updated_directions(weight, basis, own, x.T @ x)
        assert loss(x, weight, fitted @ basis) < loss(x, weight, own @ basis)
        losses["own"] += loss(x, weight, own @ basis)
        losses["fit"] += loss(x, weight, fitted @ basis)
        # On the pooled inputs, at whatever scale, the coefficients are the best there are.
        for scale in (1, 3):
            again = updated_directions(weight, basis, own, scale * pooled)
            torch.testing.assert_close(again, own, rtol=1e-8, atol=1e-8)
    assert losses["fit"] < losses["own"] < losses["pooled"]


def test_equal_traces_give_every_member_the_same_say() -> None:
    _, inputs = group()
    grams = [x.T @ x for x in inputs]
    pooled = pooled_gram(grams, equal_traces=True)
    rescaled = pooled_gram([grams[0], 100 * grams[1], grams[2]], equal_traces=True)
    torch.testing.assert_close(rescaled / rescaled.trace(), pooled / pooled.trace())
    torch.testing.assert_close(pooled.trace(), sum(gram.trace() for gram in grams))
    torch.testing.assert_close(pooled_gram(grams[:1], equal_traces=True), grams[0])
    silent = pooled_gram([grams[0], 0 * grams[0]], equal_traces=True)
    assert torch.isfinite(silent).all()


def test_weights_of_one_row_space_are_reproduced_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    weights = [torch.randn(20, 5, generator=generator, dtype=torch.float64) @ rows for _ in "ab"]
    _, inputs = group(2)
    pooled = pooled_gram([x.T @ x for x in inputs], equal_traces=True)
    basis, coefficients = shared_factors(weights, pooled, 5)
    for weight, own in zip(weights, coefficients, strict=True):
        torch.testing.assert_close(own @ basis, weight, rtol=0, atol=1e-8)


def test_identical_members_share_for_free() -> None:
    weight, x = problem(20, 16)
    gram = x.T @ x
    alone = least_loss(x, weight, 4)
    basis, coefficients = shared_factors([weight] * 3, 3 * gram, 4)
    assert loss(x, weight, coefficients[1] @ basis) == pytest.approx(alone, rel=1e-6)
    # At the stored size of three separate rank-4 linears there is room for a larger basis.
    rank = 3 * 4 * (20 + 16) // (16 + 3 * 20)
    assert rank > 4
    basis, coefficients = shared_factors([weight] * 3, 3 * gram, rank)
    assert loss(x, weight, coefficients[1] @ basis) < alone
