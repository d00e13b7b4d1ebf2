"""Scores are the divergence of the whole model with one change, whatever is computed again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foldstack.compression.evaluation import candidate_loss
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.search import scoring
from foldstack.compression.methods.search.assembly import Assembly
from foldstack.compression.methods.search.library import Library
from foldstack.compression.methods.search.scoring import Scorer, score_variants, with_variant
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.statistics.sensitivity import KINDS as VARIANT_KINDS
from foldstack.compression.statistics.sensitivity import Sensitivity, Variant, plot
from foldstack.compression.storage.spool import Spool
from foldstack.compression.structure.size import size_of, size_of_plan
from foldstack.compression.structure.surgery import cut


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (4, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def assembly_of(windows: Tensor) -> Callable[..., Assembly]:
    def of(model: Any, **grids: Any) -> Assembly:
        statistics = gather(model, windows, KINDS)
        library = Library(model, **({"grid": (0.3, 0.7), "rank_grid": (0.5,)} | grids))
        return Assembly(library, Evidence(windows, statistics, rank_blocks(statistics)))

    return of


def divergence(model: Any, changed: Any, windows: Tensor) -> Tensor:
    """KL of every window by its definition, in float64."""
    with torch.no_grad():
        log_p, log_q = (m(windows).logits.double().log_softmax(-1) for m in (model, changed))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)


def test_a_score_is_the_divergence_of_the_model_that_is_built(
    architecture: str, tiny_model: Any, windows: Tensor, assembly_of: Any
) -> None:
    model = tiny_model(architecture)
    assembly = assembly_of(model)
    # The first and the last block: all kinds, and both ends of what is computed again.
    variants = [v for v in assembly.library.variants() if v.first in (0, 3)]
    kept_whole = {"query_key_width", "kv_heads"} if assembly.library.heads.has_norms else set()
    assert {v.kind for v in variants} == set(VARIANT_KINDS) - kept_whole
    sensitivity = score_variants(assembly, windows, variants)
    dense = size_of(model)
    for score in sensitivity.scores:
        built = cut(model, assembly.cut(frozenset([score.variant])))
        expected = divergence(model, built, windows)
        torch.testing.assert_close(
            torch.tensor(score.kl, dtype=torch.float64), expected, rtol=1e-3, atol=1e-6
        )
        size = size_of(built)
        assert score.saved.parameters == dense.parameters - size.parameters
        assert score.saved.flops == dense.flops_per_token - size.flops_per_token
        assert score.saved.kv_bytes == dense.kv_bytes_per_token - size.kv_bytes_per_token
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())


def test_heads_with_norms_keep_their_queries_and_keys(tiny_model: Any, assembly_of: Any) -> None:
    """Nor are their keys merged: a norm of a mixture is no mixture of norms."""
    kinds = {v.kind for v in assembly_of(tiny_model("qwen3")).library.variants()}
    assert set(VARIANT_KINDS) - kinds == {"query_key_width", "kv_heads"}


def test_what_is_given_stands_while_others_are_scored(
    tiny_model: Any, windows: Tensor, assembly_of: Any
) -> None:
    model = tiny_model("llama")
    assembly = assembly_of(model)
    library = assembly.library
    absent = Variant(kind="absent", first=1, stop=2)
    given = frozenset([library.width(2, "mlp", 20), library.width(0, "value_output", 4), absent])
    alternatives = [
        with_variant(given, library.width(2, "mlp", 56)),  # whole again
        with_variant(given, library.width(3, "query_key", 4)),
        given - {absent},
        with_variant(given, Variant(kind="absent", first=3, stop=4)),
    ]
    found = Scorer(assembly, windows).losses(alternatives, given)
    for choice, values in zip(alternatives, found, strict=True):
        expected = divergence(model, cut(model, assembly.cut(choice)), windows)
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-6)


def test_a_large_vocabulary_is_its_likeliest_tokens_and_the_rest(
    tiny_model: Any, windows: Tensor, assembly_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One outcome instead of many: never more than the whole divergence, and most of it."""
    model = tiny_model("llama")
    with torch.no_grad():  # a model that is sure of something
        model.get_output_embeddings().weight.mul_(20)
    assembly = assembly_of(model)
    variants = assembly.library.variants(["widths"])
    whole = score_variants(assembly, windows, variants)
    monkeypatch.setattr(scoring, "TOP", 60)
    part = score_variants(assembly, windows, variants)
    for score, less in zip(whole.scores, part.scores, strict=True):
        assert 0.5 * score.mean <= less.mean <= score.mean * (1 + 1e-4) + 1e-7


def test_few_logits_at_a_time_change_nothing(
    tiny_model: Any, windows: Tensor, assembly_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = assembly_of(tiny_model("gpt2"))
    variants = assembly.library.variants(["removals"])
    whole = score_variants(assembly, windows, variants)
    monkeypatch.setattr(candidate_loss, "LOGIT_BYTES", 1)
    one_by_one = score_variants(assembly, windows, variants)
    for score, other in zip(whole.scores, one_by_one.scores, strict=True):
        assert other.kl == pytest.approx(score.kl, rel=1e-4)


def test_a_killed_scoring_goes_on_at_the_block_where_it_was(
    tiny_model: Any,
    windows: Tensor,
    assembly_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assembly = assembly_of(tiny_model("llama"))
    variants = assembly.library.variants(["widths"])
    expected = score_variants(assembly, windows, variants)

    def stop(_what: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_variants(assembly, windows, variants, spool=Spool(tmp_path), progress=stop)
    scored: list[int] = []
    whole = Scorer._losses_from

    def seen(self: Scorer, position: int, *rest: Any) -> Any:
        scored.append(position)
        return whole(self, position, *rest)

    monkeypatch.setattr(Scorer, "_losses_from", seen)
    assert score_variants(assembly, windows, variants, spool=Spool(tmp_path)) == expected
    assert scored == [3]


def test_shards_and_families_add_up(
    tiny_model: Any, windows: Tensor, assembly_of: Any, tmp_path: Path
) -> None:
    assembly = assembly_of(tiny_model("llama"))
    variants = assembly.library.variants()
    parts = [
        score_variants(assembly, windows, [v for v in variants if v.first % 2 == index])
        for index in range(2)
    ]
    whole = score_variants(assembly, windows, variants)
    assert (parts[0] + parts[1]).table() == whole.table()
    assert whole.of(["removals"]).table() == [r for r in whole.table() if r["kind"] == "absent"]
    whole.save(tmp_path)
    assert Sensitivity.load(tmp_path) == whole
    plot(whole, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "sensitivity.json").read_text())["num_windows"] == 4


def test_what_a_structure_saves_is_what_its_variants_save(
    architecture: str, tiny_model: Any, assembly_of: Any
) -> None:
    """Savings add up over sites, whatever stands beside them."""
    model = tiny_model(architecture)
    library = assembly_of(model).library
    choice = [
        next(v for v in reversed(library.variants(["widths"])) if v.site == site)
        for site in dict.fromkeys(v.site for v in library.variants(["widths"]) if v.first != 2)
    ]
    choice.append(Variant(kind="absent", first=2, stop=3))
    plan, survivors = library.structure(choice)
    assert survivors == (0, 1, 3)
    saved = sum(library.saved(variant).parameters for variant in choice)
    built = size_of_plan(model.config, plan).parameters
    assert abs(size_of(model).parameters - built - saved) <= 64 * len(survivors)
