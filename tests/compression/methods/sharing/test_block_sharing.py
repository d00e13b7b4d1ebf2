"""FoldGPT-style grouped sharing (foldgpt.md, section 4, acceptance tests 6, 7, 10)."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.sharing.block_sharing import BlockSharing
from foldstack.compression.methods.sharing.group_sharing import best_windows, window_score
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import Ranking, rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.size import count_parameters, size_of, size_of_plan
from foldstack.compression.structure.surgery import build_on_meta, cut, plan_of


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, {"similarity"})
    return Evidence(windows, statistics, rank_blocks(statistics))


def cross_entropy(model: Any, windows: Tensor) -> float:
    with torch.no_grad():
        return float(model(windows, labels=windows).loss)


def linears_share(model: Any) -> float:
    """The fraction of the parameters in the linears of one block."""
    family = architecture_of(model)
    block = family.blocks(model)[0]
    linears = [block.get_submodule(site.name) for site in family.linears]
    return sum(p.numel() for m in linears for p in m.parameters()) / count_parameters(model)


def ranking_of(scores: list[list[float]]) -> Ranking:
    size = len(scores)
    rows = tuple(tuple(row) for row in scores)
    influence = tuple(1 - scores[i][i + 1] for i in range(size - 1))
    return Ranking(
        num_blocks=size - 1,
        scores={"block_influence": influence},
        similarity=rows,
        last_token_angle=rows,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 3), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_windows_are_the_best_of_all_choices(size: int, count: int, random: Any) -> None:
    num_blocks = 9
    scores = [[random.random() for _ in range(num_blocks + 1)] for _ in range(num_blocks + 1)]
    ranking = ranking_of(scores)
    stretches = [range(1, 5), range(6, 9)] if size == 2 else [range(num_blocks)]
    every = [s[i : i + size] for s in stretches for i in range(len(s) - size + 1)]
    choices = [
        choice
        for choice in itertools.combinations(every, count)
        if all(a.stop <= b.start for a, b in itertools.pairwise(choice))
    ]
    best = max(sum(window_score(w, ranking) for w in choice) for choice in choices)
    chosen = best_windows(stretches, size, count, num_blocks, lambda w: window_score(w, ranking))
    assert len(chosen) == count
    assert set(chosen) <= set(every)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(chosen))
    assert sum(window_score(w, ranking) for w in chosen) == pytest.approx(best)


def test_a_score_by_hand() -> None:
    cosine = [[1, 0.8, 0.7, 0.6], [0.8, 1, 0.9, 0.4], [0.7, 0.9, 1, 0.5], [0.6, 0.4, 0.5, 1]]
    # blocks 0 and 1: own (0.8 + 0.9) / 2; their outputs are boundaries 1 and 2: 0.9
    assert window_score(range(2), ranking_of(cosine)) == pytest.approx((0.85 + 0.9) / 2)


def test_sharing_what_is_equal_already_changes_nothing(
    architecture: str, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    family = architecture_of(model)
    blocks = family.blocks(model)
    for site in family.linears:
        blocks[2].get_submodule(site.name).load_state_dict(
            blocks[1].get_submodule(site.name).state_dict()
        )
    method = BlockSharing(sparsity=linears_share(model), keep_head=1, keep_tail=1)
    smaller = cut(model, method.compress(model, evidence_of(model, windows)))
    assert plan_of(smaller).blocks[2].weights_of == 1
    with torch.no_grad():  # every block has norms of its own, and keeps them
        expected, got = model(windows).logits, smaller(windows).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_leader_is_the_best_candidate(tiny_model: Any, windows: Tensor) -> None:
    """Block 2 was made wild: sharing block 1's weights must beat sharing its own."""
    model = tiny_model("qwen2")
    evidence = evidence_of(model, windows)
    method = BlockSharing(sparsity=linears_share(model), keep_head=1, keep_tail=1)
    chosen = cut(model, method.compress(model, evidence))
    loss = cross_entropy(chosen, windows)
    family = architecture_of(model)
    for leader in (1, 2):
        by_hand = tiny_model("qwen2")
        blocks = family.blocks(by_hand)
        for site in family.linears:
            state = family.blocks(model)[leader].get_submodule(site.name).state_dict()
            for member in (1, 2):
                blocks[member].get_submodule(site.name).load_state_dict(state)
        assert loss <= cross_entropy(by_hand, windows) + 1e-6


def test_tensors_are_stored_once_and_biases_follow(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("opt")
    method = BlockSharing(sparsity=2 * linears_share(model), keep_head=1, keep_tail=0)
    change = method.compress(model, evidence_of(model, windows))
    smaller = cut(model, change)
    assert [block.weights_of for block in change.plan.blocks] == [None, None, 1, 1]
    removed = 1 - count_parameters(smaller) / count_parameters(model)
    assert removed == pytest.approx(2 * linears_share(model))
    assert change.tensors["blocks.1.fc1.bias"].shape == (56,)
    assert size_of(smaller).flops_per_token == size_of(model).flops_per_token


@pytest.mark.parametrize(
    ("blocks_worth", "group_size", "expected"),
    [(1, "smallest", [2]), (3, "smallest", [2, 2, 2]), (4, "smallest", [3, 3]), (2, 3, [3])],
)
def test_the_smallest_groups_that_reach_the_size(
    tiny_model: Any, blocks_worth: int, group_size: Any, expected: list[int]
) -> None:
    model = tiny_model("llama", num_hidden_layers=9)  # 6 free blocks between head and tail
    method = BlockSharing(sparsity=blocks_worth * linears_share(model), group_size=group_size)
    blocks = method.outline(model).blocks
    owners = [p for p, b in enumerate(blocks) if any(c.weights_of == p for c in blocks)]
    sizes = [1 + sum(b.weights_of == owner for b in blocks) for owner in owners]
    assert sizes == expected


def test_out_of_reach_says_what_is_in_reach(tiny_model: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=7)
    with pytest.raises(InputError, match="groups of 2 among 4 of 7 blocks"):
        BlockSharing(sparsity=0.5, group_size=2).outline(model)
    with pytest.raises(InputError, match="groups of any size among 4 of 7"):
        BlockSharing(sparsity=0.9).outline(model)
    with pytest.raises(InputError, match="cannot make this model smaller"):
        BlockSharing(sparsity=0.1).outline(tiny_model("llama", num_hidden_layers=4))
    with pytest.raises(InputError, match="got group_size 1"):
        BlockSharing(sparsity=0.1, group_size=1).outline(model)


def test_blocks_that_share_already_are_left_alone(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    once = BlockSharing(sparsity=linears_share(model))
    shared = cut(model, once.compress(model, evidence_of(model, windows)))
    again = BlockSharing(sparsity=linears_share(model))
    twice = cut(shared, again.compress(shared, evidence_of(shared, windows)))
    assert sum(block.weights_of is not None for block in plan_of(twice).blocks) == 2
    assert torch.isfinite(twice(windows).logits).all()


def test_the_published_arithmetic_of_llama_2_7b() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=28,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = build_on_meta(config)  # the 28 blocks that are left after 4 were removed
    whole = 6_738_415_616
    plan = BlockSharing(sparsity=0.1365, group_size=2).outline(model)
    assert sum(block.weights_of is not None for block in plan.blocks) == 4
    after = size_of_plan(config, plan).parameters
    assert 1 - after / whole == pytest.approx(0.24, abs=5e-4)
