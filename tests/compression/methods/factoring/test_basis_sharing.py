"""Basis Sharing (basis_sharing.md, acceptance tests 1, 3, 4, 7 to 10; the others: low_rank)."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from foldstack.compression.closed_forms.low_rank import updated_directions
from foldstack.compression.errors import InputError
from foldstack.compression.methods import METHODS
from foldstack.compression.methods.factoring.basis_sharing import BasisSharing, Group
from foldstack.compression.methods.factoring.svd_llm import SvdLlm
from foldstack.compression.methods.method import Evidence
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.block_plan import LowRank
from foldstack.compression.structure.modeling_foldstack import LowRankLinear
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import (
    count_parameters,
    linear_shapes,
    size_of,
    size_of_plan,
)
from foldstack.compression.structure.surgery import Cut, build_on_meta, cut, plan_of
from foldstack.compression.training.adapters import Adapters

Q, K, OUT = "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"
UP, DOWN = "mlp.up_proj", "mlp.down_proj"


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (12, 24), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, {"similarity", "gram"})
    return Evidence(windows, statistics, rank_blocks(statistics))


def logits(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(windows, use_cache=False).logits


def shared_by(plan: Plan) -> set[str]:
    """Names of the linears that use a basis stored at another position."""
    forms = [item for block in plan.blocks for item in block.linears.items()]
    return {name for name, form in forms if form.basis_of is not None}


def llama(hidden: int, intermediate: int, blocks: int, **settings: Any) -> Any:
    """A Llama without memory for its weights, all heads with keys and values of their own."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=blocks, num_attention_heads=hidden // 16,
        tie_word_embeddings=False, **settings,
    )  # fmt: skip
    return build_on_meta(config)


class FullRank(BasisSharing):
    """The method with every rank as large as it gets: it must change nothing."""

    def _groups(self, model: Any, evidence: Any = None) -> list[Group]:
        shapes = linear_shapes(model)
        reads = {site.name: site.reads for site in architecture_of(model).linears}
        return [
            Group(
                site[1],
                reads[site[1]],
                positions,
                min(shapes[site][1], sum(shapes[p, site[1]][0] for p in positions)),
            )
            for site, positions in self._members(model, shapes).items()
        ]


@pytest.mark.parametrize("update", ["global", "layerwise"])
def test_full_rank_changes_nothing(
    architecture: str, update: str, tiny_model: Any, windows: Tensor
) -> None:
    """Grouped heads, biases (once), fused projections, transposed weights."""
    model = tiny_model(architecture)
    method = FullRank(sparsity=0.3, group_size=3, update=update)
    smaller = cut(model, method.compress(model, evidence_of(model, windows)))
    assert shared_by(plan_of(smaller))
    expected = logits(model, windows)
    torch.testing.assert_close(logits(smaller, windows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("allocation", ["exact", "paper"])
def test_groups_of_one_are_svd_llm(allocation: Any, tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("qwen2")
    evidence = evidence_of(model, windows)
    alone = BasisSharing(sparsity=0.3, group_size=1, allocation=allocation, update="none")
    change = alone.compress(model, evidence)
    expected = SvdLlm(sparsity=0.3, allocation=allocation, update="none").compress(model, evidence)
    assert change.plan == expected.plan
    assert change.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(change.tensors[name], tensor)


@pytest.mark.parametrize(
    ("size", "qkv", "up"), [(1, 1638, 2388), (2, 2184, 2762), (4, 2621, 2997), (32, 3177, 3239)]
)
def test_ranks_of_llama_7b(size: int, qkv: int, up: int) -> None:
    model = llama(4096, 11008, 32, num_key_value_heads=256)
    share = size_of(model).block_linear_parameters / count_parameters(model)
    method = BasisSharing(sparsity=0.2 * share, group_size=size, allocation="paper")
    linears = method.outline(model).blocks[0].linears
    assert (linears[Q].rank, linears[K].rank, linears[UP].rank) == (qkv, qkv, up)
    assert (linears[OUT].rank, linears[DOWN].rank) == (1638, 2388)
    dense = size_of(model)
    smaller = size_of_plan(model.config, method.outline(model))
    flops_of_head = 2 * 32000 * 4096
    ratio = (smaller.flops_per_token - flops_of_head) / (dense.flops_per_token - flops_of_head)
    assert ratio == pytest.approx({1: 0.80, 2: 0.92, 4: 1.01, 32: 1.11}[size], abs=0.005)


def test_ranks_at_width_64_and_a_remainder_group_of_its_own_rank() -> None:
    model = llama(64, 172, 5)
    share = size_of(model).block_linear_parameters / count_parameters(model)
    outline = BasisSharing(sparsity=0.2 * share, allocation="paper").outline(model)
    first, last = outline.blocks[0].linears, outline.blocks[4].linears
    assert [first[name].rank for name in (Q, OUT, UP, DOWN)] == [34, 25, 43, 37]
    assert last[Q].rank == first[OUT].rank  # alone and square, as the private output projection
    groups = [block.linears[Q].basis_of for block in outline.blocks]
    assert groups == [None, 0, None, 2, None]
    linears = size_of(model).block_linear_parameters
    left = size_of_plan(model.config, outline).block_linear_parameters
    assert 0.2 <= 1 - left / linears < 0.22


@pytest.mark.parametrize(
    ("family", "size", "sparsity"),
    [("llama_tied", 2, 0.1), ("gpt2", 3, 0.3), ("opt", 3, 0.4), ("phi3", 4, 0.5)],
)
def test_the_asked_size_is_hit(family: str, size: int, sparsity: float, tiny_model: Any) -> None:
    """Also with a smaller group at the end; counted per group as basis and coefficients."""
    model = tiny_model(family)
    method = BasisSharing(sparsity=sparsity, group_size=size)
    plan = method.outline(model)
    dense = count_parameters(model)
    removed = 1 - size_of_plan(model.config, plan).parameters / dense
    assert sparsity <= removed + 1e-9 < sparsity + 0.005
    shapes = linear_shapes(model)
    saved = sum(m * n for site, (m, n) in shapes.items() if site[1] in plan.blocks[site[0]].linears)
    for (position, name), (m, n) in shapes.items():
        form = plan.blocks[position].linears.get(name)
        if form is not None:
            saved -= form.rank * (m + (n if form.basis_of is None else 0))
    assert saved == pytest.approx(removed * dense)


@pytest.mark.parametrize(
    ("family", "overrides", "shared"),
    [
        ("llama", {}, {Q, "mlp.gate_proj", UP}),
        ("llama", {"num_key_value_heads": 4}, {Q, K, "self_attn.v_proj", "mlp.gate_proj", UP}),
        ("opt", {}, {Q, K, "self_attn.v_proj", "fc1"}),
        ("gpt2", {}, {"attn.c_attn", "attn.c_proj", "mlp.c_fc"}),
        ("phi3", {}, {"self_attn.qkv_proj", "mlp.gate_up_proj"}),
    ],
)
def test_the_papers_choice_of_what_is_shared(
    family: str, overrides: dict[str, Any], shared: set[str], tiny_model: Any
) -> None:
    model = tiny_model(family, **overrides)
    plan = BasisSharing(sparsity=0.3, group_size=4).outline(model)
    assert shared_by(plan) == shared
    assert [block.linears[min(shared)].basis_of for block in plan.blocks] == [None, 0, 0, 0]
    assert set(plan.blocks[3].linears) == {site.name for site in architecture_of(model).linears}


def test_what_is_shared_can_be_set(tiny_model: Any) -> None:
    model = tiny_model("llama")
    plan = BasisSharing(sparsity=0.3, group_size=4, shared_linears=(OUT,)).outline(model)
    assert shared_by(plan) == {OUT}
    assert [block.linears[OUT].basis_of for block in plan.blocks] == [None, 0, 0, 0]
    with pytest.raises(InputError, match=r"self_attn\.q_proj.*; got q_proj"):
        BasisSharing(sparsity=0.3, shared_linears=("q_proj",)).outline(model)


def test_the_global_update_fits_each_block_to_what_the_compressed_model_sees(
    tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model("opt").double()
    evidence = evidence_of(model, windows)
    plain = BasisSharing(sparsity=0.4, update="none").compress(model, evidence)
    seen = gather(cut(model, plain), windows, {"gram"})
    updated = BasisSharing(sparsity=0.4, update="global").compress(model, evidence)
    weight = model.model.decoder.layers[3].fc1.weight.detach()
    basis = plain.tensors["blocks.2.fc1.first.weight"]
    before = plain.tensors["blocks.3.fc1.second.weight"]
    expected = updated_directions(weight, basis, before, seen.gram(3, "mlp_input"))
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(updated.tensors["blocks.3.fc1.second.weight"], expected)
    # The paper's form fits all members to the pooled inputs.
    paper = {"coefficients": "paper", "pooling": "paper"}
    plain = BasisSharing(sparsity=0.4, update="none", **paper).compress(model, evidence)
    seen = gather(cut(model, plain), windows, {"gram"})
    updated = BasisSharing(sparsity=0.4, update="global", **paper).compress(model, evidence)
    pooled = seen.gram(2, "mlp_input") + seen.gram(3, "mlp_input")
    basis = plain.tensors["blocks.2.fc1.first.weight"]
    expected = updated_directions(
        weight, basis, plain.tensors["blocks.3.fc1.second.weight"], pooled
    )
    torch.testing.assert_close(updated.tensors["blocks.3.fc1.second.weight"], expected)
    assert {name for name in updated.tensors if name.endswith("first.bias")} == set()


def test_the_layerwise_update_fits_each_block_to_the_compressed_ones_before_it(
    tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model("llama").double()
    evidence = evidence_of(model, windows)
    plain = BasisSharing(sparsity=0.4, update="none").compress(model, evidence).tensors
    change = BasisSharing(sparsity=0.4, update="layerwise", dense_target=0).compress(
        model, evidence
    )
    seen = gather(cut(model, change), windows, {"gram"})
    weight = model.model.layers[3].self_attn.q_proj.weight.detach()
    basis, before = plain[f"blocks.2.{Q}.first.weight"], plain[f"blocks.3.{Q}.second.weight"]
    expected = updated_directions(weight, basis, before, seen.gram(3, "attention_input"))
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(change.tensors[f"blocks.3.{Q}.second.weight"], expected)
    # In the first block nothing has changed yet.
    first = f"blocks.0.{Q}.second.weight"
    torch.testing.assert_close(change.tensors[first], plain[first], rtol=1e-6, atol=1e-8)


def test_bases_are_stored_once_trained_once_and_reloaded_so(
    tiny_model: Any, windows: Tensor, tmp_path: Path
) -> None:
    model = tiny_model("qwen2")
    method = BasisSharing(sparsity=0.3, group_size=4)
    smaller = cut(model, method.compress(model, evidence_of(model, windows)))
    adapters = Adapters(smaller, rank=2, alpha=4, dropout=0.0, train_vectors=True, in_float32=True)
    for parameter in adapters.matrices.values():
        parameter.data += 0.05
    trained = logits(smaller, windows)
    adapters.merge()
    torch.testing.assert_close(logits(smaller, windows), trained, rtol=1e-4, atol=1e-4)

    smaller.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert stored == count_parameters(smaller)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    queries = [block.self_attn.q_proj for block in architecture_of(again).blocks(again)]
    assert {query.first.weight.data_ptr() for query in queries} == {
        queries[0].first.weight.data_ptr()
    }
    torch.testing.assert_close(logits(again, windows), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["opt", "gpt2", "phi3"])
def test_the_products_in_a_stock_model_compute_the_same(
    family: str, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model(family)
    method = BasisSharing(sparsity=0.3, group_size=3)
    smaller = cut(model, method.compress(model, evidence_of(model, windows)))
    architecture, by_hand = architecture_of(model), copy.deepcopy(model)
    for position, block in enumerate(architecture.blocks(smaller)):
        for site in architecture.linears:
            thin = block.get_submodule(site.name)
            assert isinstance(thin, LowRankLinear)
            dense: Any = architecture.blocks(by_hand)[position].get_submodule(site.name)
            product = (thin.second.weight @ thin.first.weight).detach()
            dense.weight.data = architecture.stored_weight(dense, product)
    torch.testing.assert_close(
        logits(smaller, windows), logits(by_hand, windows), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("update", ["none", "global", "layerwise"])
def test_blocks_that_share_weights_or_attend_no_more_have_their_place(
    update: Any, tiny_model: Any, windows: Tensor
) -> None:
    """A borrower stores nothing to factor, a replacement has none of the family's linears, and
    what is factored already stays."""
    model = tiny_model("llama", num_hidden_layers=8)
    plan = plan_of(model).share(1, [2]).replace(4, 5, "ffn", 16).factor({(3, UP): 4})
    plan = plan.borrow({6: 7}, {Q: 2}, "normed")  # an adapter on linears that are stored after it
    tensors = {
        f"blocks.6.{Q}.adapter.first.weight": torch.randn(2, 32),
        f"blocks.6.{Q}.adapter.second.weight": torch.randn(32, 2),
        "blocks.6.attention_output.weight": torch.ones(32),
        "blocks.6.mlp_output.weight": torch.ones(32),
        "blocks.4.ffn.up.weight": 0.1 * torch.randn(16, 32),
        "blocks.4.ffn.up.bias": torch.zeros(16),
        "blocks.4.ffn.down.weight": 0.1 * torch.randn(32, 16),
        "blocks.4.ffn.down.bias": torch.zeros(32),
        f"blocks.3.{UP}.first.weight": torch.randn(4, 32),
        f"blocks.3.{UP}.second.weight": torch.randn(56, 4),
    }
    changed = cut(model, Cut(plan, (0, 1, 2, 3, None, 5, 6, 7), tensors))
    method = BasisSharing(sparsity=0.2, update=update)
    smaller = cut(changed, method.compress(changed, evidence_of(changed, windows)))
    assert count_parameters(smaller) / count_parameters(changed) == pytest.approx(0.8, abs=0.005)
    bases = [block.linears.get(Q) for block in plan_of(smaller).blocks]
    assert [form and form.basis_of for form in bases] == [
        *(None, 0, None, None, None, 3, None, None)
    ]
    assert plan_of(smaller).blocks[3].linears[UP] == LowRank(rank=4)
    assert plan_of(smaller).blocks[5].linears[UP].basis_of is None
    assert torch.isfinite(logits(smaller, windows)).all()


@pytest.mark.parametrize("name", ["shortgpt", "block_sharing", "llm_streamline"])
def test_other_methods_follow_it(name: str, tiny_model: Any, windows: Tensor) -> None:
    """A block that stores a basis may go: the next user stores it then."""
    model = tiny_model("llama", num_hidden_layers=6)
    smaller = cut(
        model,
        BasisSharing(sparsity=0.2, group_size=6).compress(model, evidence_of(model, windows)),
    )
    settings = {"llm_streamline": {"replacement": "ffn", "epochs": 1}}.get(name, {})
    method = METHODS[name](sparsity=0.05, **settings)
    twice = cut(smaller, method.compress(smaller, evidence_of(smaller, windows)))
    assert count_parameters(twice) < count_parameters(smaller)
    assert torch.isfinite(logits(twice, windows)).all()
    without_first = plan_of(smaller).keep(range(1, 6))
    left = cut(smaller, Cut(without_first, tuple(range(1, 6))))
    blocks, before = architecture_of(left).blocks(left), architecture_of(left).blocks(smaller)
    for position, block in enumerate(blocks):
        basis = block.get_submodule(Q).first.weight
        assert torch.equal(basis, before[position + 1].get_submodule(Q).first.weight)
    assert plan_of(left).blocks[0].linears[Q].basis_of is None
