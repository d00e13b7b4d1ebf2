"""FlexiGPT: who lends its weights, what adapters and gains start from, and what it costs."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.methods.factoring.svd_llm import SvdLlm
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.sharing import virtual_blocks
from foldstack.compression.methods.sharing.flexigpt import FlexiGpt
from foldstack.compression.methods.sharing.flexigpt_extend import FlexiGptExtend
from foldstack.compression.methods.sharing.gain_fitting import fit_gains
from foldstack.compression.methods.sharing.virtual_blocks import (
    adapter_ranks,
    adapters_of_difference,
    block_distances,
    block_shapes,
    distance,
    gains,
    leading_part,
    nearest,
)
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.modeling_foldstack import sublayer_ends
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import Cut, build_on_meta, config_for, cut, plan_of

ModelFactory = Callable[..., PreTrainedModel]


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (6, 24), generator=torch.Generator().manual_seed(0))


def evidence_of(model: PreTrainedModel, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, FlexiGpt.needs)
    return Evidence(windows, statistics, rank_blocks(statistics))


def logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(windows, use_cache=False).logits


def random_matrix(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


# --- the base ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("shape", [(20, 14), (9, 30), (12, 12)])
def test_distance_is_that_of_the_definition(shape: tuple[int, int], rank: int) -> None:
    """Equations 2 to 4 written out; a rank above half the smaller side included."""
    first, second = random_matrix(*shape, 1), random_matrix(*shape, 2)
    parts = []
    for weight in (first, second):
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        parts.append((left[:, :rank] * values[:rank]) @ right[:rank])
    left, values, right = torch.linalg.svd(parts[0] - parts[1], full_matrices=False)
    adapter = (left[:, :rank] * values[:rank]) @ right[:rank]
    expected = float((parts[0] - (parts[1] + adapter)).norm())
    factors = [leading_part(weight, rank) for weight in (first, second)]
    found = distance(*factors, rank)
    assert found == pytest.approx(expected, rel=1e-4)
    assert distance(factors[0], factors[0], rank) < 1e-8 * expected


def test_the_randomised_decomposition_finds_the_leading_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_matrix(150, 120, 1) @ torch.diag(0.8 ** torch.arange(120.0).double())
    exact = torch.mm(*leading_part(weight, 8))
    monkeypatch.setattr(virtual_blocks, "EXACT_UP_TO", 0)
    found = leading_part(weight, 8)
    assert found[0].dtype == torch.float32  # it was the other way
    torch.testing.assert_close(torch.mm(*found).double(), exact, rtol=0, atol=1e-3)
    assert torch.equal(leading_part(weight, 8)[0], found[0])


@pytest.fixture
def related(tiny_model: ModelFactory) -> PreTrainedModel:
    """Eight blocks with leading directions that turn with depth, and noise that grows with it.

    The noise makes the first blocks the nearest to every other by the norm of a difference, as in
    real models.
    """
    model = tiny_model("llama", num_hidden_layers=8)
    for site in architecture_of(model).linears:
        for position, block in enumerate(architecture_of(model).blocks(model)):
            weight = block.get_submodule(site.name).weight
            rows, columns = weight.shape
            mix = [
                math.cos(0.1 * position) * random_matrix(rows, columns, 1)[:, :2],
                math.sin(0.1 * position) * random_matrix(rows, columns, 2)[:, :2],
            ]
            leading = sum(mix) @ random_matrix(2, columns, 3)
            noise = (0.1 + 0.25 * position) * random_matrix(rows, columns, 10 + position)
            with torch.no_grad():
                weight.copy_((leading + noise) / 20)
    return model


def test_bases_are_neighbours_where_the_plain_norm_takes_the_first_blocks(
    related: PreTrainedModel,
) -> None:
    virtual, candidates = [3, 4, 6], [0, 1, 2, 5, 7]
    ranks = adapter_ranks(block_shapes(related, 0), 2)
    bases = nearest(block_distances(related, virtual, candidates, ranks, "sum"))
    blocks = architecture_of(related).blocks(related)

    def plain_distance(i: int, j: int) -> float:
        pairs = ([blocks[p].get_submodule(name).weight for p in (i, j)] for name in ranks)
        with torch.no_grad():
            return sum(float((mine - other).norm()) for mine, other in pairs)

    plain = {i: min(candidates, key=lambda j: plain_distance(i, j)) for i in virtual}
    assert len(set(bases.values())) > 1
    assert sum(abs(i - j) for i, j in bases.items()) < sum(abs(i - j) for i, j in plain.items())
    relative = block_distances(related, virtual, candidates, ranks, "rel")
    assert nearest(relative) == bases
    assert nearest({4: {2: 1.0, 5: 1.0, 7: 1.0}}) == {4: 5}  # a tie


# --- the adapters and the gains ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_adapters_start_as_the_closest_of_their_rank(tiny_model: ModelFactory, family: str) -> None:
    model = tiny_model(family)
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    ranks = adapter_ranks(block_shapes(model, 0), 3)
    for initial in ("paper", "balanced"):
        tensors = adapters_of_difference(model, {2: 0}, ranks, initial)
        for name, rank in ranks.items():
            mine, base = (blocks[p].get_submodule(name) for p in (2, 0))
            difference = architecture.weight(mine) - architecture.weight(base)
            difference = difference.detach().double()
            first = tensors[f"blocks.2.{name}.adapter.first.weight"]
            second = tensors[f"blocks.2.{name}.adapter.second.weight"]
            lost = float((difference - second @ first).square().sum())
            tail = float(torch.linalg.svdvals(difference)[rank:].square().sum())
            assert lost == pytest.approx(tail, rel=1e-6)
            if initial == "paper":
                torch.testing.assert_close(first @ first.T, torch.eye(rank).double())
            else:
                torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0))
            if mine.bias is not None:
                bias = tensors[f"blocks.2.{name}.adapter.second.bias"]
                torch.testing.assert_close(bias, (mine.bias - base.bias).detach().double())


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_whitened_adapters_are_the_closest_of_their_rank_on_the_inputs(
    tiny_model: ModelFactory, windows: Tensor, family: str
) -> None:
    """With G = L L^T the least error on the inputs is the tail of the singular values of D L."""
    model = tiny_model(family)
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    statistics = gather(model, windows, {"gram"})
    ranks = adapter_ranks(block_shapes(model, 0), 3)
    tensors = adapters_of_difference(model, {2: 0}, ranks, "whitened", statistics)
    for site in architecture.linears:
        mine, base = (blocks[p].get_submodule(site.name) for p in (2, 0))
        difference = (architecture.weight(mine) - architecture.weight(base)).detach().double()
        values, vectors = torch.linalg.eigh(statistics.gram(2, site.reads))
        root = vectors * values.clamp_min(0).sqrt()
        place = f"blocks.2.{site.name}.adapter"
        first, second = (tensors[f"{place}.{part}.weight"] for part in ("first", "second"))
        lost = float(((difference - second @ first) @ root).square().sum())
        tail = float(torch.linalg.svdvals(difference @ root)[ranks[site.name] :].square().sum())
        assert lost == pytest.approx(tail, rel=1e-4, abs=1e-9)
        torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0))


def test_gains_of_zero_leave_the_pruned_model_bit_for_bit(
    tiny_model: ModelFactory, architecture: str, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    change = FlexiGpt(sparsity=0.2, g0=0).compress(model, evidence_of(model, windows))
    virtual = [p for p, block in enumerate(change.plan.blocks) if block.is_virtual]
    assert virtual
    kept = tuple(p for p in range(4) if p not in virtual)
    pruned = cut(model, Cut(plan_of(model).keep(kept), kept))
    assert torch.equal(logits(cut(model, change), windows), logits(pruned, windows))


def error(model: PreTrainedModel, dense: Tensor, windows: Tensor) -> float:
    return float((logits(model, windows) - dense).square().mean())


def test_fitted_gains_come_nearer_to_the_model_than_small_or_no_ones(
    tiny_model: ModelFactory, architecture: str, windows: Tensor
) -> None:
    """Half of each block is the same in all blocks, so that a borrowed one can do some good."""
    model = tiny_model(architecture)
    blocks = architecture_of(model).blocks(model)
    with torch.no_grad():
        for site in architecture_of(model).linears:
            shared = blocks[0].get_submodule(site.name).weight.clone()
            for block in blocks:
                weight = block.get_submodule(site.name).weight
                weight.copy_((2 * shared + weight) / 3)
    dense, evidence = logits(model, windows), evidence_of(model, windows)
    errors = {}
    for g0 in (0.0, 1e-2):
        change = FlexiGpt(sparsity=0.2, g0=g0).compress(model, evidence)
        smaller = cut(model, change)
        errors[g0] = error(smaller, dense, windows)
    virtual = [position for position, b in enumerate(change.plan.blocks) if b.is_virtual]
    fit_gains(model, smaller, virtual, windows)
    assert error(smaller, dense, windows) < 0.8 * errors[1e-2] <= errors[0.0]


@pytest.mark.parametrize("seed", range(3))
def test_fitted_gains_never_lose_to_small_ones(
    seed: int, tiny_model: ModelFactory, windows: Tensor
) -> None:
    model = tiny_model("llama", seed=seed)
    evidence = evidence_of(model, windows)
    losses = {}
    for g0 in ("fitted", 1e-2):
        smaller = cut(model, FlexiGpt(sparsity=0.4, g0=g0).compress(model, evidence))
        with torch.no_grad():
            losses[g0] = float(smaller(windows, labels=windows).loss)
    assert losses["fitted"] <= losses[1e-2] + 1e-6


def test_a_gain_is_the_least_squares_one(
    tiny_model: ModelFactory, architecture: str, windows: Tensor
) -> None:
    """With adapters of full rank the virtual block computes the very sub-layers of the original."""
    model = tiny_model(architecture)
    ranks = {name: min(shape) for name, shape in block_shapes(model, 0).items()}
    tensors = adapters_of_difference(model, {1: 2}, ranks, "paper") | gains(model, [1], 0.0)
    change = Cut(plan_of(model).borrow({1: 2}, ranks, "normed"), (0, 1, 2, 3), tensors)
    fitted = fit_gains(model, cut(model, change), [1], windows)
    attention, _ = sublayer_ends(architecture_of(model).blocks(model)[1])
    seen: list[Tensor] = []
    handle = attention.register_forward_hook(lambda _module, _args, out: seen.append(out))
    logits(model, windows)
    handle.remove()
    y = (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).double().flatten(0, 1)
    unit = torch.nn.functional.layer_norm(y, y.shape[-1:])
    expected = (unit * y).sum(0) / unit.square().sum(0)
    found = fitted["blocks.1.attention_output.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# --- how many, and how big ---------------------------------------------------------------------


def llama_2_7b() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    )  # fmt: skip
    return build_on_meta(config)


@pytest.mark.parametrize(("count", "gross", "net"), [(9, 0.2703, 0.2436), (13, 0.3904, 0.3519)])
def test_llama_2_7b_counts(count: int, gross: float, net: float) -> None:
    model = llama_2_7b()
    ranks = adapter_ranks(block_shapes(model, 0), 256)
    assert set(ranks.values()) == {256}
    plan = Plan.identity("llama", 32)
    dense = count_parameters(model)
    virtual = plan.borrow(dict.fromkeys(range(18, 18 + count), 0), ranks, "normed")
    pruned = plan.keep([*range(18), *range(18 + count, 32)])
    sizes = [size_of_plan(model.config, p).parameters for p in (pruned, virtual)]
    assert 1 - sizes[0] / dense == pytest.approx(gross, abs=5e-5)
    assert 1 - sizes[1] / dense == pytest.approx(net, abs=5e-5)
    assert sizes[1] - sizes[0] == count * (19_988_480 + 4 * 4096)
    assert dense - sizes[0] == count * 202_383_360
    outlined = FlexiGpt(sparsity=net, allocation="paper").outline(model)
    assert sum(block.is_virtual for block in outlined.blocks) == count


def test_what_whole_blocks_remove_too_much_is_spent_on_rank(
    tiny_model: ModelFactory, windows: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=112, head_dim=16)
    evidence = evidence_of(model, windows)
    removed, ranks = {}, {}
    with caplog.at_level(logging.INFO, "foldstack"):
        for allocation in ("paper", "exact"):
            method = FlexiGpt(sparsity=0.3, allocation=allocation)
            plan = method.compress(model, evidence).plan
            removed[allocation] = 1 - size_of_plan(
                model.config, plan
            ).parameters / count_parameters(model)
            ranks[allocation] = max(r for b in plan.blocks for r in b.adapters.values())
    assert ranks["paper"] == 4 < ranks["exact"]
    assert 0.3 <= removed["exact"] < 0.32 < removed["paper"]
    line = caplog.messages[-1]
    assert f"net {100 * removed['exact']:.2f}%" in line
    assert " on " in line


def test_the_blocks_of_least_influence_become_virtual(
    tiny_model: ModelFactory, windows: Tensor
) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    evidence = evidence_of(model, windows)
    plan = FlexiGpt(sparsity=0.3).compress(model, evidence).plan
    virtual = {p for p, block in enumerate(plan.blocks) if block.is_virtual}
    assert virtual == set(evidence.ranking.order()[: len(virtual)])
    assert plan.removed_blocks == ()


def test_blocks_of_different_widths_cannot_borrow(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    narrow = build_on_meta(config_for(model.config, plan_of(model).narrow({1: 40})))
    with pytest.raises(InputError, match="borrows from a block of the same widths"):
        FlexiGpt(sparsity=0.2).outline(narrow)


def test_it_works_on_its_own_result(tiny_model: ModelFactory, windows: Tensor) -> None:
    """Bases and virtual blocks stay what they are; others become virtual."""
    model = tiny_model("llama", num_hidden_layers=8)
    once = cut(model, FlexiGpt(sparsity=0.12).compress(model, evidence_of(model, windows)))
    twice = cut(once, FlexiGpt(sparsity=0.12).compress(once, evidence_of(once, windows)))
    before, after = plan_of(once).blocks, plan_of(twice).blocks
    assert sum(b.is_virtual for b in after) > sum(b.is_virtual for b in before)
    for old, new in zip(before, after, strict=True):
        assert new == old or not old.is_virtual
    assert torch.isfinite(logits(twice, windows)).all()
    grams = gather(once, windows, {"similarity", "gram"})
    thin_cut = SvdLlm(sparsity=0.1).compress(once, Evidence(windows, grams, rank_blocks(grams)))
    thin = cut(once, thin_cut)
    again = cut(thin, FlexiGpt(sparsity=0.05).compress(thin, evidence_of(thin, windows)))
    assert torch.isfinite(logits(again, windows)).all()


# --- the extension -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        ({}, [0, 1, 1, 2, 2, 3]),
        ({"pattern": "sequential"}, [0, 1, 2, 1, 2, 3]),
        ({"start": 0, "stop": 1, "repeats": 2}, [0, 0, 0, 1, 2, 3]),
    ],
)
def test_an_extension_starts_near_its_base(
    tiny_model: ModelFactory, windows: Tensor, settings: dict[str, Any], order: list[int]
) -> None:
    model = tiny_model("llama")
    method = FlexiGptExtend(sparsity=-0.15, g0=1e-4, **settings)
    change = method.compress(model, evidence_of(model, windows))
    assert [block.source for block in change.plan.blocks] == order
    assert change.plan == method.outline(build_on_meta(model.config))
    deeper = cut(model, change)
    assert 0.1 < count_parameters(deeper) / count_parameters(model) - 1 <= 0.15
    apart = (logits(deeper, windows) - logits(model, windows)).abs().max()
    assert 0 < apart < 1e-2
    seconds = [t for name, t in change.tensors.items() if name.endswith("second.weight")]
    assert seconds
    assert all(not t.any() for t in seconds)


def test_tinyllama_extended_by_14_blocks_gains_the_papers_share() -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = build_on_meta(config)
    plan = FlexiGptExtend(sparsity=-0.117).outline(model)
    assert len(plan.blocks) == 36
    assert [p for p, b in enumerate(plan.blocks) if b.is_virtual] == list(range(5, 32, 2))
    ranks = {rank for block in plan.blocks for rank in block.adapters.values()}
    # 128 is half of what keys and values have; with 256 there too the rest would have 256.
    assert ranks == {128, 275}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sparsity": -0.001}, r"adds .* ask for a value in \[-"),
        ({"sparsity": -0.9}, r"adds .* ask for a value in \[-"),
        ({"start": 3, "stop": 2}, "got start 3 and stop 2"),
        ({"stop": 9}, "blocks start to stop - 1 of 4"),
    ],
)
def test_an_extension_out_of_reach_is_refused(
    tiny_model: ModelFactory, settings: dict[str, Any], sentence: str
) -> None:
    model = build_on_meta(tiny_model("llama").config)
    with pytest.raises(InputError, match=sentence):
        FlexiGptExtend(**({"sparsity": -0.1} | settings)).outline(model)


def test_virtual_blocks_are_not_repeated(tiny_model: ModelFactory, windows: Tensor) -> None:
    model = tiny_model("llama")
    virtual = cut(model, FlexiGpt(sparsity=0.2).compress(model, evidence_of(model, windows)))
    with pytest.raises(InputError, match="does not; choose another start and stop"):
        FlexiGptExtend(sparsity=-0.1, start=0, stop=4).outline(virtual)
