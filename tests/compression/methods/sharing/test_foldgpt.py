"""FoldGPT-style removal and sharing in one method (foldgpt.md, acceptance tests 6 and 10)."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.sharing.block_sharing import BlockSharing
from foldstack.compression.methods.sharing.foldgpt import FoldGpt, loss_without
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import Cut, build_on_meta, cut, plan_of
from foldstack.compression.training.recovery import Recovery, recover

QUICK: dict[str, Any] = {"gates": {"steps": 10}, "leader_windows": 2}


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor, work: Path | None = None) -> Evidence:
    statistics = gather(model, windows, {"similarity"})
    return Evidence(windows, statistics, rank_blocks(statistics), work)


def share_of_blocks(model: Any, count: float) -> float:
    block = architecture_of(model).blocks(model)[0]
    return count * count_parameters(block) / count_parameters(model)


def num_shared(plan: Any) -> int:
    return sum(block.weights_of is not None for block in plan.blocks)


@pytest.mark.parametrize(
    ("sparsity", "portion", "removed", "pairs", "expected"),
    [(0.12, 1.0, 4, 0, 0.12), (0.24, 0.5, 4, 4, 0.24), (0.36, 0.5, 6, 6, 0.36)],
)
def test_the_published_arithmetic_of_llama_2_7b(
    sparsity: float, portion: float, removed: int, pairs: int, expected: float
) -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    )  # fmt: skip
    plan = FoldGpt(sparsity=sparsity, removal_portion=portion).outline(build_on_meta(config))
    assert len(plan.blocks) == 32 - removed
    assert num_shared(plan) == pairs
    after = size_of_plan(config, plan).parameters
    assert 1 - after / 6_738_415_616 == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    ("portion", "removed", "shared"), [(0.0, 0, 4), (0.25, 1, 3), (0.5, 2, 2), (1.0, 4, 0)]
)
def test_the_portion_decides_how_much_is_removed(
    tiny_model: Any, portion: float, removed: int, shared: int
) -> None:
    model = tiny_model("llama", num_hidden_layers=12)
    method = FoldGpt(sparsity=share_of_blocks(model, 3.9), removal_portion=portion)
    plan = method.outline(model)
    assert (12 - len(plan.blocks), num_shared(plan)) == (removed, shared)


def test_more_goes_where_sharing_cannot_reach_the_rest(tiny_model: Any) -> None:
    """Between head and tail stand four blocks: sharing among them and removal of some of them save
    three together at most."""
    model = tiny_model("llama", num_hidden_layers=7)
    sparsity = share_of_blocks(model, 3.9)
    plan = FoldGpt(sparsity=sparsity, removal_portion=0.1).outline(model)
    assert (7 - len(plan.blocks), num_shared(plan)) == (4, 0)
    with pytest.raises(InputError, match="foldgpt can remove at most"):
        FoldGpt(sparsity=sparsity, removal_portion=0).outline(model)
    with pytest.raises(InputError, match="got group_size 1"):
        FoldGpt(sparsity=sparsity, group_size=1).outline(model)


def test_sharing_alone_is_block_sharing(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("qwen2", num_hidden_layers=6)
    evidence, sparsity = evidence_of(model, windows), share_of_blocks(model, 1.9)
    only = FoldGpt(sparsity=sparsity, removal_portion=0, **QUICK).compress(model, evidence)
    other = BlockSharing(sparsity=sparsity, leader_windows=2).compress(model, evidence)
    assert only.plan == other.plan
    assert only.inherits == other.inherits
    assert all(torch.equal(only.tensors[name], t) for name, t in other.tensors.items())


def test_removal_alone_is_native_and_keeps_every_tensor(
    tiny_model: Any, windows: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("gemma3_text")
    caplog.set_level(logging.INFO)
    method = FoldGpt(sparsity=share_of_blocks(model, 2), removal_portion=1, gate_runs=2, **QUICK)
    change = method.compress(model, evidence_of(model, windows))
    assert change.tensors == {}
    assert change.plan.is_native
    assert "mean Jaccard index" in caplog.text
    gone = sorted(set(range(4)) - set(change.inherits))
    assert f"foldgpt removes blocks {gone}" in caplog.text
    smaller = cut(model, change)
    assert type(smaller) is type(model)
    for new, old in enumerate(change.inherits):
        for name, tensor in model.model.layers[old].state_dict().items():
            assert torch.equal(smaller.model.layers[new].state_dict()[name], tensor)


def test_blocks_that_share_after_a_removal_keep_their_attention(
    tiny_model: Any, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(
        "gemma3_text",
        num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    order = [1, 0, 2, 3, 4, 5]
    scores = [float(order.index(block)) for block in range(6)]
    monkeypatch.setattr(FoldGpt, "_gates", lambda *_: scores)
    method = FoldGpt(sparsity=share_of_blocks(model, 1.9), keep_head=0, keep_tail=0, **QUICK)
    change = method.compress(model, evidence_of(model, windows))
    assert change.plan.removed_blocks == (1,)
    assert num_shared(change.plan) == 1
    types = cut(model, change).config.base_config.layer_types
    assert types == [model.config.layer_types[block] for block in (0, 2, 3, 4, 5)]


def test_the_set_that_is_missed_least_goes(tiny_model: Any, windows: Tensor) -> None:
    """Never one that costs more than the set of least block influence."""
    model = tiny_model("llama", num_hidden_layers=6)
    evidence = evidence_of(model, windows)
    by_influence = evidence.ranking.order()[:2]
    losses = {}
    for selection in ("lowest_loss", "mean_gate"):
        method = FoldGpt(
            sparsity=share_of_blocks(model, 2), removal_portion=1, selection=selection, **QUICK
        )
        kept = method.compress(model, evidence).inherits
        losses[selection] = loss_without(model, evidence, set(range(6)) - set(kept))
    assert losses["lowest_loss"] <= loss_without(model, evidence, by_influence)
    plan = plan_of(model).keep(p for p in range(6) if p not in by_influence)
    survivors = tuple(block.source for block in plan.blocks)
    with torch.no_grad():
        expected = cut(model, Cut(plan, survivors))(windows, labels=windows).loss
    assert loss_without(model, evidence, by_influence) == pytest.approx(float(expected), abs=1e-5)


def test_both_cuts_store_what_the_plan_says_once(
    tiny_model: Any, windows: Tensor, tmp_path: Path
) -> None:
    model = tiny_model("opt", num_hidden_layers=8)
    method = FoldGpt(sparsity=share_of_blocks(model, 3.9), **QUICK)
    change = method.compress(model, evidence_of(model, windows))
    assert (len(change.plan.blocks), num_shared(change.plan)) == (6, 2)
    smaller = cut(model, change)
    smaller.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert stored == count_parameters(smaller)
    assert stored == size_of_plan(model.config, change.plan).parameters
    # Each block has its own norms, whoever's linears it uses.
    blocks, old_blocks = (architecture_of(m).blocks(m) for m in (smaller, model))
    for block, old in zip(blocks, change.inherits, strict=True):
        assert old is not None
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            assert torch.equal(getattr(block, name).weight, getattr(old_blocks[old], name).weight)


def test_scale_vectors_start_as_nothing_and_train(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama", num_hidden_layers=7)
    settings = {"sparsity": share_of_blocks(model, 1.9), **QUICK}
    evidence = evidence_of(model, windows)
    plain = cut(model, FoldGpt(**settings).compress(model, evidence))
    change = FoldGpt(scale_outputs=True, **settings).compress(model, evidence)
    scaled = cut(model, change)
    with torch.no_grad():
        torch.testing.assert_close(scaled(windows).logits, plain(windows).logits)
    assert [block.outputs for block in change.plan.blocks].count("scaled") == 2
    # two vectors in each of the two blocks of the pair
    assert count_parameters(scaled) - count_parameters(plain) == 4 * model.config.hidden_size
    recover(scaled, windows, Recovery(steps=3, batch_size=2, lora_rank=2))
    scales = [p for name, p in scaled.named_parameters() if "_output." in name]
    assert len(scales) == 4
    assert all((scale != 1).any() for scale in scales)


@pytest.mark.parametrize("leader", ["first", "mean"])
def test_groups_and_leaders_without_a_look_at_the_data(
    tiny_model: Any, windows: Tensor, leader: str
) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    method = FoldGpt(
        sparsity=share_of_blocks(model, 0.9), removal_portion=0, groups="front", leader=leader
    )
    change = method.compress(model, evidence_of(model, windows))
    assert change.plan.blocks[3].weights_of == 2
    first, second = (model.model.layers[p].mlp.up_proj.weight for p in (2, 3))
    expected = first if leader == "first" else (first + second) / 2
    torch.testing.assert_close(change.tensors["blocks.2.mlp.up_proj.weight"], expected)


def test_a_killed_run_goes_on_from_its_gates(
    tiny_model: Any, windows: Tensor, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    method = FoldGpt(sparsity=share_of_blocks(model, 1), removal_portion=1, **QUICK)
    first = method.compress(model, evidence_of(model, windows, tmp_path))
    told: list[str] = []
    evidence = evidence_of(model, windows)
    again = Evidence(
        windows, evidence.statistics, evidence.ranking, tmp_path, lambda *a: told.append(a[0])
    )
    assert method.compress(model, again).inherits == first.inherits
    assert told == []  # all its steps were on disk


def test_an_already_shared_model_loses_blocks_until_it_is_small_enough(
    tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    first = BlockSharing(sparsity=share_of_blocks(model, 2.9), leader_windows=2)
    shared = cut(model, first.compress(model, evidence_of(model, windows)))
    method = FoldGpt(sparsity=0.3, removal_portion=1, **QUICK)
    smaller = cut(shared, method.compress(shared, evidence_of(shared, windows)))
    assert 1 - count_parameters(smaller) / count_parameters(shared) >= 0.295
    assert len(plan_of(smaller).blocks) < 8
    assert torch.isfinite(smaller(windows).logits).all()
