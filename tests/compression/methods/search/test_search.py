"""The search on models of which it is known what can go, and what it must never do worse."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from foldstack.compression.closed_forms.loss_curve import LossCurve
from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.removal.shortgpt import ShortGpt
from foldstack.compression.methods.removal.sleb import Sleb
from foldstack.compression.methods.search.assembly import Assembly
from foldstack.compression.methods.search.curves import options_of
from foldstack.compression.methods.search.library import Library
from foldstack.compression.methods.search.scoring import Scorer, scored
from foldstack.compression.methods.search.search import Search
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.statistics.sensitivity import Family
from foldstack.compression.structure.size import size_of
from foldstack.compression.structure.surgery import cut, plan_of

OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(97, (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def evidence_of(windows: Tensor) -> Callable[..., Evidence]:
    """Half of the windows are scored on, the others are for the rounds."""

    def of(model: Any, families: frozenset[Family] = Search(sparsity=0.5).scores) -> Evidence:
        statistics = gather(model, windows, KINDS)
        evidence = Evidence(windows, statistics, rank_blocks(statistics))
        half = replace(evidence, calibration=windows[:4])
        return replace(evidence, sensitivity=scored(half, model, families).sensitivity)

    return of


@pytest.fixture(scope="module")
def plain(tiny_model: Any, evidence_of: Any) -> tuple[Any, Evidence]:
    """A model of which nothing is known, and its scores: no search changes either."""
    model = tiny_model("llama")
    return model, evidence_of(model)


def divergence(model: Any, smaller: Any, windows: Tensor) -> float:
    with torch.no_grad():
        log_p, log_q = (m(windows).logits.double().log_softmax(-1) for m in (model, smaller))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_a_block_that_does_nothing_goes_first_and_costs_nothing(
    tiny_model: Any, windows: Tensor, evidence_of: Any
) -> None:
    model = tiny_model("llama")
    block = dict(model.model.layers[2].named_parameters())
    with torch.no_grad():
        for name in OUTPUTS:
            block[name].zero_()
    change = Search(sparsity=0.18).compress(model, evidence_of(model))
    smaller = cut(model, change)
    assert divergence(model, smaller, windows) < 1e-6
    of_block = size_of(model).parameters - size_of(cut(model, change)).parameters
    assert of_block >= 0.18 * size_of(model).parameters - 1


def test_copies_of_channels_and_unused_values_go_before_anything_else(
    tiny_model: Any, windows: Tensor, evidence_of: Any
) -> None:
    """Half of one MLP's channels are copies of the other half, and half of the coordinates of one
    block's values are not read."""
    model = tiny_model("llama")
    mlp, attention = model.model.layers[1].mlp, model.model.layers[3].self_attn
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[28:] = linear.weight[:28]
        heads = attention.o_proj.weight.view(32, 4, 8)
        heads[:, :, 4:] = 0
    dense = size_of(model).parameters
    nothing = 28 * 96 + 4 * (4 + 2) * 32
    change = Search(sparsity=0.99 * nothing / dense, rounds=0).compress(model, evidence_of(model))
    assert divergence(model, cut(model, change), windows) < 1e-6
    widths = [block.mlp_width for block in change.plan.blocks]
    assert widths[1] is not None
    assert widths[:1] + widths[2:] == [None, None, None]
    assert [b.narrow_heads is not None for b in change.plan.blocks] == [False, False, False, True]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_depth_alone_is_never_worse_than_the_methods_that_remove_blocks(
    tiny_model: Any, windows: Tensor, evidence_of: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    model = tiny_model("llama", num_hidden_layers=6)
    with torch.no_grad():  # blocks that need one another
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    evidence = evidence_of(model, frozenset({"removals"}))
    one = (
        size_of(model).parameters
        - size_of(cut(model, ShortGpt(sparsity=0.01).compress(model, evidence))).parameters
    )
    sparsity = 2.9 * one / size_of(model).parameters
    losses = {}
    for method in (
        Search(sparsity=sparsity, library=("removals",), rounds=1, refit="none"),
        ShortGpt(sparsity=sparsity),
        Sleb(sparsity=sparsity, early_barrier=0, latter_barrier=0),
    ):
        smaller = cut(model, method.compress(model, evidence))
        assert len(plan_of(smaller).blocks) == 3
        assert plan_of(smaller).is_native  # no widths beside, which rounds could bring in
        losses[method.name] = divergence(model, smaller, windows[:4])
    assert losses["search"] <= losses["shortgpt"] + 1e-6
    assert losses["search"] <= losses["sleb"] + 1e-6


def test_rounds_never_end_worse_on_windows_that_no_score_has_seen(
    tiny_model: Any, windows: Tensor, evidence_of: Any
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(3)
    evidence = evidence_of(model)
    losses = [
        divergence(
            model,
            cut(model, Search(sparsity=0.3, rounds=n).compress(model, evidence)),
            windows[4:],
        )
        for n in (0, 3)
    ]
    assert losses[1] <= losses[0] + 1e-9


def test_the_same_scores_give_the_same_choice(tiny_model: Any, evidence_of: Any) -> None:
    model = tiny_model("qwen2")
    evidence = evidence_of(model)
    first, second = (Search(sparsity=0.3, rounds=1).compress(model, evidence) for _ in range(2))
    assert first.plan == second.plan
    assert all(torch.equal(second.tensors[name], t) for name, t in first.tensors.items())


def test_two_budgets_are_both_kept(plain: tuple[Any, Evidence]) -> None:
    model, evidence = plain
    dense = size_of(model)
    method = Search(sparsity=0.2, budget={"kv_bytes": 0.5, "flops": 0.75}, rounds=1)
    smaller = size_of(cut(model, method.compress(model, evidence)))
    assert smaller.parameters <= 0.8 * dense.parameters + 1
    assert smaller.kv_bytes_per_token <= 0.5 * dense.kv_bytes_per_token
    assert smaller.flops_per_token <= 0.75 * dense.flops_per_token
    outlined = method.outline(model)
    assert len(outlined.blocks) <= 4


def test_a_native_target_gives_a_stock_model(
    tiny_model: Any, windows: Tensor, evidence_of: Any
) -> None:
    """Rounds, too: what comes back must have the width of the others, and the model gets better."""
    torch.manual_seed(0)
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    evidence = evidence_of(model)
    losses = []
    for sparsity, rounds in ((0.1, 0), (0.4, 0), (0.4, 2)):
        method = Search(sparsity=sparsity, target="native", rounds=rounds, refit="none")
        change = method.compress(model, evidence)
        assert change.plan.is_native
        smaller = cut(model, change)
        assert 1 - size_of(smaller).parameters / size_of(model).parameters >= sparsity - 1e-9
        losses.append(divergence(model, smaller, windows[4:]))
    assert losses[2] <= losses[1] + 1e-9


def test_widths_are_multiples_where_scored_ones_are_not(plain: tuple[Any, Evidence]) -> None:
    """One scoring serves searches of all multiples; a kernel that asked for 8 must get 8."""
    model, evidence = plain
    for rounds in (0, 1):
        multiples = {"mlp_multiple": 8, "head_multiple": 4}
        method = Search(sparsity=0.3, library=("widths",), rounds=rounds, **multiples)
        plan = method.compress(model, evidence).plan
        assert any(block.mlp_width for block in plan.blocks)
        for block in plan.blocks:
            assert (block.mlp_width or 0) % 8 == 0
            if block.narrow_heads is not None:
                assert block.narrow_heads.qk_dim % 4 == block.narrow_heads.v_dim % 4 == 0


def test_budgets_out_of_reach_say_how_far_the_library_goes(tiny_model: Any) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match=r"search can remove at most \d+\.\d% .* in \(0, 0\.\d+\]"):
        Search(sparsity=0.95, library=("widths",)).outline(model)
    both = Search(sparsity=0.1, budget={"kv_bytes": 0.05}, library=("widths",))
    with pytest.raises(InputError, match=r"kv_bytes down to \d+\.\d%"):
        both.outline(model)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Search(sparsity=0.1, budget={"kv_bytes": 1.5})


def test_what_the_reported_rise_and_the_measured_one_are_is_of_one_kind(
    plain: tuple[Any, Evidence], windows: Tensor
) -> None:
    """At little sparsity, single scores add up to what the built model loses, or nearly."""
    model, evidence = plain
    assert evidence.sensitivity is not None
    library = Library(model)
    scores = {s.variant: s.mean for s in evidence.sensitivity.scores}
    pair = [library.width(0, "mlp", library.variants(["widths"])[0].level)]
    pair += [next(v for v in library.variants(["widths"]) if v.first == 3)]
    loss = Scorer(Assembly(library, evidence), windows[:4]).loss(frozenset(pair))
    assert float(loss.mean()) == pytest.approx(sum(scores[v] for v in pair), rel=0.3, abs=1e-7)


def test_between_scored_widths_a_curve_rises_and_passes_through_all() -> None:
    points = [(10.0, 1e-5), (25.0, 3e-4), (40.0, 2e-2), (60.0, 0.5)]
    curve = LossCurve(points)
    assert [curve(saved) for saved, _ in points] == pytest.approx([loss for _, loss in points])
    read = [curve(saved / 4) for saved in range(241)]
    assert read == sorted(read)
    assert curve(5.0) == pytest.approx(5e-6)
    assert LossCurve([(10.0, 0.0)])(10.0) <= 1e-12


def test_every_slot_has_its_original(plain: tuple[Any, Evidence]) -> None:
    model, evidence = plain
    assert evidence.sensitivity is not None
    library = Library(model)
    options = options_of(library, evidence.sensitivity)
    assert {slot for o in options if not o.key for slot in o.slots} == set(library.slots)
    assert all(o.saved["parameters"] > 0 for o in options if o.key)


def test_a_cache_is_counted_in_the_precision_of_the_model(tiny_model: Any) -> None:
    """Without it a narrower head of a half-precision model would save less than nothing."""
    model = tiny_model("llama")
    saved = []
    for precise in (model, tiny_model("llama").to(torch.bfloat16)):
        library = Library(precise)
        saved.append(library.saved(library.width(0, "value_output", 4)))
    assert saved[1].kv_bytes == saved[0].kv_bytes / 2 > 0
    assert saved[1].parameters == saved[0].parameters


def test_finalists_differ_in_how_many_blocks_go(plain: tuple[Any, Evidence]) -> None:
    """Without it a contest would heal the same model again and again."""
    model, evidence = plain
    method = Search(sparsity=0.4, finalists=3, rounds=1, refit="none")
    assert Search(sparsity=0.4, rounds=1, refit="none") == method.contenders[0]
    made = [each.compress(model, evidence) for each in method.contenders]
    depths = [len(change.plan.blocks) for change in made]
    assert len(set(depths)) == 3
    for change in made:
        removed = 1 - size_of(cut(model, change)).parameters / size_of(model).parameters
        assert removed >= 0.4 - 1e-9
    with pytest.raises(InputError, match="and was asked for finalist 10"):
        method.model_copy(update={"finalists": 1, "finalist": 9}).compress(model, evidence)
    with pytest.raises(ValueError, match="must hold removals and something else, got widths"):
        Search(sparsity=0.4, library=("widths",), finalists=2)
