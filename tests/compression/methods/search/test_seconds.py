"""Times of whole models: what is fitted to them, and searches that have a budget of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.speed import SpeedSpec
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.search.library import Library
from foldstack.compression.methods.search.scoring import scored
from foldstack.compression.methods.search.search import Search
from foldstack.compression.methods.search.seconds import (
    measure_seconds,
    measured_choices,
    stand_in,
)
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.statistics.sensitivity import FAMILIES, Family, VariantKind
from foldstack.compression.statistics.variant_times import Seconds, Slope, Timed, fitted
from foldstack.compression.structure.size import size_of

QUICK = SpeedSpec(prompt_tokens=6, new_tokens=2, repeats=1, warmup=0)


def test_what_kinds_save_is_found_again() -> None:
    """Of a machine on which an absent block saves its share and 1 % more, and narrow heads cost 2 %
    each that their share of the FLOPs does not bring back."""
    absent, heads = Slope(per_flops=0.9, fixed=0.01), Slope(per_flops=0.5, fixed=-0.02)
    models: list[dict[VariantKind, tuple[float, int]]] = [
        {"absent": (0.2, 2)}, {"absent": (0.4, 4)}, {"value_output_width": (0.1, 8)},
        {"value_output_width": (0.3, 8)}, {"absent": (0.25, 3), "value_output_width": (0.1, 5)},
    ]  # fmt: skip
    truth = {"absent": absent, "value_output_width": heads}
    saved = [
        sum(truth[k].per_flops * share + truth[k].fixed * n for k, (share, n) in model.items())
        for model in models
    ]
    slopes, error = fitted([*models, {"absent": (0.2, 1)}], [*saved, 0.19])  # a block twice as big
    assert error == pytest.approx(0, abs=1e-6)
    for kind, slope in truth.items():
        assert slopes[kind].per_flops == pytest.approx(slope.per_flops)  # type: ignore[index]
        assert slopes[kind].fixed == pytest.approx(slope.fixed)  # type: ignore[index]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_whole_models_are_timed_beside_the_dense_one(tiny_model: Any, architecture: str) -> None:
    library = Library(tiny_model(architecture))
    for family in FAMILIES:
        for _, choice in measured_choices(library, family):
            made = stand_in(library, choice)
            wanted = size_of(library.model).parameters - sum(
                library.saved(variant).parameters for variant in choice
            )
            assert size_of(made).parameters == wanted
            assert torch.isfinite(made(torch.tensor([[1, 2, 3]])).logits).all()
    found = measure_seconds(library, "removals", QUICK)
    assert found.dense_prefill > 0
    assert {timed.what for timed in found.measured} == {"absent, 1 of them", "absent, 2 of them"}
    variants = library.variants(["removals", "widths"])
    told = [found.saved(variant, library.saved(variant).flops) for variant in variants]
    assert all(not each for variant, each in zip(variants, told, strict=True) if variant.level)
    assert next(each.keys() for each in told if each) == {
        "prefill_seconds", "decode_seconds", "seconds",
    }  # fmt: skip


def seconds_of(model: Any, **decode: Slope) -> Seconds:
    """Of a machine on which reading takes as long as its FLOPs, and writing what is said."""
    kinds: tuple[VariantKind, ...] = (
        "mlp_width",
        "query_key_width",
        "value_output_width",
        "absent",
    )
    prefill = dict.fromkeys(kinds, Slope(per_flops=1.0, fixed=0.0))
    nothing = dict.fromkeys(kinds, Slope(per_flops=0.0, fixed=0.0))
    return Seconds(
        prompt_tokens=6, new_tokens=2, batch_size=1, dense_flops=size_of(model).flops_per_token,
        dense_prefill=1.0, dense_decode=3.0, prefill=prefill, decode={**nothing, **decode},
        prefill_error=0.01, decode_error=0.02, measured=(Timed(what="x", prefill=1, decode=1),),
    )  # fmt: skip


def test_a_budget_of_time_is_kept_beside_that_of_parameters(tiny_model: Any) -> None:
    """Where only absent blocks decode faster, a budget of decoding removes blocks, and narrower
    MLPs do the rest; without it the search may keep every block."""
    model = tiny_model("llama")
    windows = torch.randint(97, (8, 24), generator=torch.Generator().manual_seed(0))
    statistics = gather(model, windows, KINDS)
    evidence = Evidence(windows, statistics, rank_blocks(statistics))
    both: tuple[Family, ...] = ("widths", "removals")
    sensitivity = scored(evidence, model, both).sensitivity
    seconds = seconds_of(model, absent=Slope(per_flops=0.0, fixed=0.2))
    evidence = replace(evidence, sensitivity=sensitivity, seconds=seconds)
    method = Search(
        sparsity=0.1, rounds=0, refit="none", library=both, budget={"decode_seconds": 0.6}
    )
    change = method.compress(model, evidence)
    depth = len(Library(model).positions)
    assert len(change.plan.blocks) == depth - 2
    assert change.forecast["decode_seconds"] == pytest.approx(0.6)
    left = change.forecast["prefill_seconds"] + 3 * change.forecast["decode_seconds"]
    assert change.forecast["seconds"] == pytest.approx(left / 4)
    with pytest.raises(InputError, match="a budget of seconds needs times of variants"):
        method.compress(model, replace(evidence, seconds=None))
    with pytest.raises(InputError, match="decode_seconds down to"):
        Search(sparsity=0.1, library=both, budget={"decode_seconds": 0.05}).compress(
            model, evidence
        )


def test_times_of_two_families_belong_to_one_request(tiny_model: Any) -> None:
    one = seconds_of(tiny_model("llama"))
    assert (one + one).measured == (*one.measured, *one.measured)
    with pytest.raises(InputError, match="of one request"):
        one + one.model_copy(update={"new_tokens": 9})
