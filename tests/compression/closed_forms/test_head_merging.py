"""Heads that can be one become one without loss, and others better than by their mean."""

import pytest
import torch
from torch import Tensor

from foldstack.compression.closed_forms.head_merging import merged_keys, merged_values

MERGED, GROUP, DIM, HIDDEN, TOKENS = 2, 3, 8, 20, 400


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def inputs() -> Tensor:
    mixed = drawn(TOKENS, HIDDEN - 1, seed=0) @ drawn(HIDDEN - 1, HIDDEN - 1, seed=1)
    return torch.cat([mixed, torch.ones(TOKENS, 1, dtype=torch.float64)], dim=1)


def rotated(x: Tensor, angles: Tensor, rotary: int) -> Tensor:
    """Rows [tokens, dim] rotated by an angle for each token and pair, as rotary positions do."""
    turning = torch.complex(x[:, : rotary // 2], x[:, rotary // 2 : rotary])
    turned = turning * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, x[:, rotary:]], dim=1)


def scores(query: Tensor, key: Tensor, x: Tensor, rotary: int) -> Tensor:
    """[tokens, tokens] of one query head and one key head, with positions."""
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] / 7 ** torch.arange(rotary // 2)
    return rotated(x @ query.T, angles, rotary) @ rotated(x @ key.T, angles, rotary).T


@pytest.mark.parametrize("rotary", [0, 4, 8])
def test_keys_that_are_multiples_of_one_another_merge_without_loss(
    inputs: Tensor, rotary: int
) -> None:
    """Complex multiples of every rotary pair, and any mixture of what does not rotate."""
    one, half = drawn(DIM, HIDDEN, seed=2), rotary // 2
    turns = torch.complex(drawn(half, seed=3), drawn(half, seed=4))
    pairs = turns[:, None] * torch.complex(one[:half], one[half:rotary])
    still = drawn(DIM - rotary, DIM - rotary, seed=5) @ one[rotary:]
    keys = torch.stack([one, torch.cat([pairs.real, pairs.imag, still])])
    queries = drawn(MERGED, GROUP, DIM, HIDDEN, seed=6)
    key, read = merged_keys(keys, queries, inputs.T @ inputs, rotary)
    x = inputs[:20]
    for number in range(MERGED * GROUP):
        head = divmod(number, GROUP)
        expected = scores(queries[head], keys[head[0]], x, rotary)
        torch.testing.assert_close(
            scores(read[number], key, x, rotary), expected, rtol=1e-8, atol=1e-6
        )


def test_keys_merge_better_than_by_their_mean(inputs: Tensor) -> None:
    keys = drawn(1, DIM, HIDDEN, seed=2) + 0.5 * drawn(MERGED, DIM, HIDDEN, seed=3)
    queries = drawn(MERGED, GROUP, DIM, HIDDEN, seed=6)
    key, read = merged_keys(keys, queries, inputs.T @ inputs, DIM)

    def error(key: Tensor, read: Tensor) -> float:
        of_heads = [
            scores(read[h, g], key if key.ndim == 2 else key[h], inputs, DIM)
            - scores(queries[h, g], keys[h], inputs, DIM)
            for h in range(MERGED)
            for g in range(GROUP)
        ]
        return float(torch.stack(of_heads).square().sum())

    assert error(key, read.unflatten(0, (MERGED, GROUP))) < 0.9 * error(keys.mean(0), queries)


def test_values_merge_to_the_best_product(inputs: Tensor) -> None:
    """By the singular values of all outputs on the data."""
    values = drawn(MERGED, DIM, HIDDEN, seed=7)
    outputs = drawn(MERGED, GROUP, HIDDEN, DIM, seed=8)
    value, read = merged_values(values, outputs, inputs.T @ inputs)
    whole = (outputs @ values[:, None]).flatten(0, 1)
    errors = inputs @ (whole - read @ value).mT
    singular = torch.linalg.svdvals(torch.cat(list(inputs @ whole.mT), dim=1))
    assert float(errors.square().sum()) == pytest.approx(float(singular[DIM:].square().sum()))
