"""Greedy removal of channels against brute force (quantise_delta_sketch.md, section 6.4)."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from foldstack.compression.closed_forms.channel_removal import centred, refitted_bias, removals
from foldstack.compression.closed_forms.inner_pairs import leverage_scores, refitted, top
from foldstack.compression.errors import InputError

NUM_TOKENS, SIZE, ROWS = 400, 24, 7


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture
def activations() -> Tensor:
    """Channels with energies of their own that predict one another in part, and are not centred."""
    mixed = normal(NUM_TOKENS, 16, seed=0) @ normal(16, SIZE, seed=1)
    single = normal(NUM_TOKENS, SIZE, seed=2)
    return (mixed + single + 1.5) * torch.linspace(0.1, 3, SIZE, dtype=torch.float64)


@pytest.fixture
def down() -> Tensor:
    return normal(ROWS, SIZE, seed=3)


def least_error(activations: Tensor, down: Tensor, kept: list[int], *, bias: bool = False) -> float:
    """Squared error of the best matrix on the kept channels, by least squares over the tokens."""
    read, target = activations[:, kept], activations @ down.T
    if bias:
        read = torch.cat([read, torch.ones(len(read), 1, dtype=read.dtype)], dim=1)
    solution = torch.linalg.lstsq(read, target).solution
    return float((target - read @ solution).square().sum())


def brute_force(activations: Tensor, down: Tensor, count: int, *, bias: bool) -> tuple[list, list]:
    left, order, errors = list(range(SIZE)), [], [0.0]
    for _ in range(count):
        error, gone = min(
            (least_error(activations, down, [j for j in left if j != i], bias=bias), i)
            for i in left
        )
        left.remove(gone)
        order.append(gone)
        errors.append(error)
    return order, [after - before for before, after in pairwise(errors)]


@pytest.mark.parametrize("at_once", [1, 4, 128])
@pytest.mark.parametrize("bias", [False, True])
def test_each_channel_that_goes_is_the_cheapest_after_a_refit(
    activations: Tensor, down: Tensor, bias: bool, at_once: int
) -> None:
    gram = activations.T @ activations
    if bias:
        gram = centred(gram, activations.sum(0), NUM_TOKENS)
    got = removals(down, gram, SIZE - 6, at_once=at_once)
    order, rises = brute_force(activations, down, SIZE - 6, bias=bias)
    assert got.order.tolist() == order
    torch.testing.assert_close(got.rise.tolist(), rises, rtol=1e-5, atol=1e-5)


def test_the_size_of_a_step_changes_nothing(activations: Tensor, down: Tensor) -> None:
    """Where the matrices are many steps deep too."""
    wide = torch.cat([activations, activations.roll(1, 0).tanh(), activations.roll(2, 0).abs()], 1)
    weight = normal(ROWS, wide.shape[1], seed=4)
    single, blocks = (removals(weight, wide.T @ wide, 60, at_once=m) for m in (1, 16))
    assert torch.equal(single.order, blocks.order)
    torch.testing.assert_close(single.rise, blocks.rise)


@pytest.mark.parametrize("width", [17, 12])
def test_the_error_that_it_tells_is_that_of_one_refit_and_at_most_that_of_leverage(
    activations: Tensor, down: Tensor, width: int
) -> None:
    gram = activations.T @ activations
    found = removals(down, gram, SIZE - width)
    kept = found.kept(width, SIZE)

    def error(channels: Tensor) -> float:
        change = activations @ down.T - activations[:, channels] @ refitted(down, gram, channels).T
        return float(change.square().sum())

    assert error(kept) == pytest.approx(float(found.rise.sum()), rel=1e-5)
    assert error(kept) <= error(top(leverage_scores(gram, 0.01), width))


def test_widths_from_one_order_are_nested(activations: Tensor, down: Tensor) -> None:
    gram = activations.T @ activations
    found = removals(down, gram, SIZE - 3)
    for width in (3, 11, SIZE):
        kept = found.kept(width, SIZE)
        assert len(kept) == width
        assert torch.equal(kept, removals(down, gram, SIZE - width).kept(width, SIZE))


def test_of_copies_one_stays_and_dead_channels_go_first(activations: Tensor, down: Tensor) -> None:
    """Both copies cost nothing alone, and much together."""
    activations[:, 5] = 2 * activations[:, 6]
    activations[:, [9, 20]] = 0
    gram = activations.T @ activations
    found = removals(down, gram, 3)
    assert set(found.order[:2].tolist()) == {9, 20}
    assert int(found.order[2]) in (5, 6)
    assert float(found.rise.sum()) < 1e-5 * float((activations @ down.T).square().sum())


def test_with_a_bias_the_mean_costs_nothing(activations: Tensor, down: Tensor) -> None:
    """A channel that is always the same is in the bias, exactly."""
    activations[:, 23] = 40.0
    gram = centred(activations.T @ activations, activations.sum(0), NUM_TOKENS)
    found = removals(down, gram, 1)
    kept = found.kept(SIZE - 1, SIZE)
    assert found.order.tolist() == [23]
    narrow, bias = refitted(down, gram, kept), normal(ROWS, seed=5)
    moved = refitted_bias(bias, down, narrow, activations.mean(0), kept)
    torch.testing.assert_close(
        activations[:, kept] @ narrow.T + moved, activations @ down.T + bias, rtol=1e-6, atol=1e-6
    )


def test_fewer_tokens_than_channels_are_no_special_case(activations: Tensor, down: Tensor) -> None:
    few = activations[:10]
    found = removals(down, few.T @ few, SIZE - 10)
    kept = found.kept(10, SIZE)
    error = few @ down.T - few[:, kept] @ refitted(down, few.T @ few, kept).T
    assert error.norm() < 1e-3 * (few @ down.T).norm()  # ten channels span ten tokens


def test_a_gram_that_is_not_finite_is_refused(down: Tensor) -> None:
    with pytest.raises(InputError, match="must be finite"):
        removals(down, torch.full((SIZE, SIZE), torch.nan), 3)
