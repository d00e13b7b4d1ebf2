"""SVD-LLM (svd_llm.md, acceptance tests 4-6, 8, 9)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from foldstack.compression.closed_forms.low_rank import updated_directions
from foldstack.compression.errors import InputError
from foldstack.compression.methods.factoring.svd_llm import SvdLlm
from foldstack.compression.methods.method import Evidence
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.size import (
    count_parameters,
    linear_shapes,
    size_of,
    size_of_plan,
)
from foldstack.compression.structure.surgery import Cut, cut, plan_of


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (12, 24), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, {"similarity", "gram"})
    return Evidence(windows, statistics, rank_blocks(statistics))


def logits(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(windows, use_cache=False).logits


class FullRank(SvdLlm):
    """The method with every rank as large as it gets: it must change nothing."""

    def _ranks(self, model: Any, evidence: Any = None) -> dict[tuple[int, str], int]:
        return {site: min(shape) for site, shape in linear_shapes(model).items()}


def test_full_rank_changes_nothing(architecture: str, tiny_model: Any, windows: Tensor) -> None:
    """Grouped heads, biases (once), fused projections, transposed weights, other rotary bases."""
    overrides = {} if architecture in ("gpt2", "opt") else {"rope_theta": 50_000.0}
    model = tiny_model(architecture, **overrides)
    method = FullRank(sparsity=0.3, update="closed_form")  # goes through update none as well
    smaller = cut(model, method.compress(model, evidence_of(model, windows)))
    expected = logits(model, windows)
    torch.testing.assert_close(logits(smaller, windows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "sparsity"), [("llama_tied", 0.1), ("gpt2", 0.3), ("phi3", 0.5)]
)
def test_the_asked_size_is_hit(family: str, tiny_model: Any, sparsity: float) -> None:
    model = tiny_model(family)
    dense = count_parameters(model)
    outline = SvdLlm(sparsity=sparsity).outline(model)
    removed = 1 - size_of_plan(model.config, outline).parameters / dense
    largest_rank_step = max(sum(shape) for shape in linear_shapes(model).values()) / dense
    assert sparsity <= removed + 1e-9
    assert removed - sparsity <= largest_rank_step


def test_paper_allocation_is_the_floor(tiny_model: Any) -> None:
    model = tiny_model("llama")
    shapes = linear_shapes(model)
    linears = sum(m * n for m, n in shapes.values())
    sparsity = 0.25 * linears / count_parameters(model)  # a quarter of the linears
    plan = SvdLlm(sparsity=sparsity, allocation="paper").outline(model)
    for (position, name), (m, n) in shapes.items():
        form = plan.blocks[position].linears[name]
        assert form.rank == int(m * n * 0.75 / (m + n) + 1e-9)


def test_the_output_error_is_the_least_possible(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama").double()
    smaller = cut(
        model, SvdLlm(sparsity=0.3, update="none").compress(model, evidence_of(model, windows))
    )
    seen = _inputs(model, windows, 2, "mlp.down_proj")
    dense = model.model.layers[2].mlp.down_proj
    thin = architecture_of(smaller).blocks(smaller)[2].mlp.down_proj
    product = (thin.second.weight @ thin.first.weight).detach()
    loss = float((seen @ (dense.weight.detach() - product).T).square().sum())
    outputs = torch.linalg.svdvals(seen @ dense.weight.detach().T)
    assert loss == pytest.approx(float(outputs[len(thin.first.weight) :].square().sum()), rel=1e-6)


def test_the_update_lowers_the_error_on_what_the_model_sees(
    tiny_model: Any, windows: Tensor
) -> None:
    """Least squares per linear: at the first block, whose inputs did not change, it changes
    nothing."""
    model = tiny_model("qwen2").double()
    evidence = evidence_of(model, windows)
    plain = SvdLlm(sparsity=0.4, update="none").compress(model, evidence).tensors
    updated = SvdLlm(sparsity=0.4, update="closed_form").compress(model, evidence).tensors
    for name, tensor in plain.items():
        if name.startswith("blocks.0.") or name.endswith((".first.weight", ".bias")):
            torch.testing.assert_close(updated[name], tensor, rtol=1e-6, atol=1e-8)
    name = "blocks.3.mlp.down_proj.second.weight"
    assert (updated[name] - plain[name]).abs().max() > 1e-3


@pytest.mark.parametrize("dense_target", [0, 0.5, 1])
def test_the_update_aims_between_both_models_outputs(
    dense_target: float, tiny_model: Any, windows: Tensor
) -> None:
    """Against least squares over the tokens themselves."""
    model = tiny_model("qwen2").double()
    method = SvdLlm(sparsity=0.4, dense_target=dense_target)
    change = method.compress(model, evidence_of(model, windows))
    seen = [_inputs(m, windows, 3, "self_attn.q_proj") for m in (model, cut(model, change))]
    name = "blocks.3.self_attn.q_proj"
    weight = model.model.layers[3].self_attn.q_proj.weight.detach()
    target = (dense_target * seen[0] + (1 - dense_target) * seen[1]) @ weight.T
    coordinates = seen[1] @ change.tensors[f"{name}.first.weight"].T
    expected = torch.linalg.lstsq(coordinates, target).solution.T
    torch.testing.assert_close(
        change.tensors[f"{name}.second.weight"], expected, rtol=1e-5, atol=1e-7
    )


def test_biases_are_kept_once(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("opt")
    change = SvdLlm(sparsity=0.3).compress(model, evidence_of(model, windows))
    bias = model.model.decoder.layers[1].self_attn.q_proj.bias
    assert torch.equal(change.tensors["blocks.1.self_attn.q_proj.second.bias"], bias)
    assert not any(name.endswith("first.bias") for name in change.tensors)


def test_too_few_tokens_are_no_special_case(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    few = windows[:1, :6]  # 6 tokens, widths of 32 and 56
    smaller = cut(model, SvdLlm(sparsity=0.3).compress(model, evidence_of(model, few)))
    assert torch.isfinite(logits(smaller, windows)).all()


def test_shared_weights_are_factored_once_for_all_their_inputs(
    tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model("llama")
    plan = plan_of(model).share(1, [2])
    shared = cut(model, Cut(plan, (0, 1, 2, 3)))
    evidence = evidence_of(shared, windows)
    smaller = cut(shared, SvdLlm(sparsity=0.2).compress(shared, evidence))
    assert plan_of(smaller).blocks[2].weights_of == 1
    assert count_parameters(smaller) / count_parameters(shared) == pytest.approx(0.8, abs=0.005)
    assert torch.isfinite(logits(smaller, windows)).all()


def test_the_update_runs_through_shared_weights_too(tiny_model: Any, windows: Tensor) -> None:
    """The last block is fitted to what the compressed blocks before it produce, borrowers and
    their adapters too, whether these come after the owner or before it."""
    model = tiny_model("llama", num_hidden_layers=5).double()
    q = "self_attn.q_proj"
    plan = plan_of(model).borrow({1: 2, 3: 2}, {q: 3})
    tensors = {
        f"blocks.{position}.{q}.adapter.{factor}.weight": torch.randn(shape)
        for position in (1, 3)
        for factor, shape in (("first", (3, 32)), ("second", (32, 3)))
    }
    shared = cut(model, Cut(plan, tuple(range(5)), tensors))
    evidence = evidence_of(shared, windows)
    plain = SvdLlm(sparsity=0.3, update="none").compress(shared, evidence).tensors
    change = SvdLlm(sparsity=0.3, dense_target=0).compress(shared, evidence)
    seen = gather(cut(shared, change), windows, {"gram"}).gram(4, "attention_input")
    name = f"blocks.4.{q}"
    factors = plain[f"{name}.first.weight"], plain[f"{name}.second.weight"]
    weight = model.model.layers[4].self_attn.q_proj.weight.detach()
    expected = updated_directions(weight, *factors, seen)
    assert (expected - factors[1]).abs().max() > 1e-3
    updated = change.tensors[f"{name}.second.weight"]
    torch.testing.assert_close(updated, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("family", "sparsity"), [("llama_tied", 0.3), ("gpt2", 0.3), ("opt", 0.5)])
def test_v2_moves_ranks_inside_a_type_and_keeps_the_size(
    family: str, tiny_model: Any, windows: Tensor, sparsity: float
) -> None:
    model = tiny_model(family)
    architecture = architecture_of(model)
    for site in architecture.linears:  # block 1 has eight times as much to lose
        architecture.blocks(model)[1].get_submodule(site.name).weight.data *= 8
    method = SvdLlm(sparsity=sparsity, allocation="v2")
    planned = method.compress(model, evidence_of(model, windows)).plan
    uniform = method.outline(model)
    assert uniform == SvdLlm(sparsity=sparsity).outline(model)
    assert size_of_plan(model.config, planned) == size_of_plan(model.config, uniform)
    for site in architecture.linears:
        ranks, before = (
            [block.linears[site.name].rank for block in plan.blocks] for plan in (planned, uniform)
        )
        assert sum(ranks) == sum(before)
        assert ranks[1] == max(ranks) > min(ranks)


def test_whitening_by_eigenvectors_gives_the_same_model(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("qwen3").double()
    evidence = evidence_of(model, windows)
    one, other = (
        cut(model, SvdLlm(sparsity=0.3, whitening=form).compress(model, evidence))
        for form in ("projection", "eigen")
    )
    torch.testing.assert_close(logits(one, windows), logits(other, windows), rtol=1e-6, atol=1e-6)


def test_out_of_reach_says_what_is_in_reach(tiny_model: Any) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match=r"at most .*ask for a value in \(0, 0\.\d+\]") as caught:
        SvdLlm(sparsity=0.95).outline(model)
    offered = float(str(caught.value).rsplit(", ", 1)[1].rstrip("]"))
    assert SvdLlm(sparsity=offered).outline(model)


def test_share_of_the_linears_in_llama_7b() -> None:
    from transformers import LlamaConfig

    from foldstack.compression.structure.surgery import build_on_meta

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = build_on_meta(config)
    size = size_of(model)
    share = size.block_linear_parameters / size.parameters
    assert share == pytest.approx(0.961, abs=5e-4)
    plan = SvdLlm(sparsity=0.2 * share, allocation="paper").outline(model)
    assert plan.blocks[0].linears["self_attn.q_proj"].rank == 1638


def _inputs(model: Any, windows: Tensor, position: int, name: str) -> Tensor:
    """What enters a linear, a row a token."""
    seen: list[Tensor] = []
    linear: Any = architecture_of(model).blocks(model)[position].get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
    logits(model, windows)
    handle.remove()
    return torch.cat(seen)
