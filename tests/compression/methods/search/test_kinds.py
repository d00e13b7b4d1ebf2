"""Every kind of variant where it costs nothing, and the models that they make."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foldstack.compression.checkpoints.checkpoint import load_model, save_model
from foldstack.compression.errors import InputError
from foldstack.compression.methods import METHODS
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.search.assembly import Assembly
from foldstack.compression.methods.search.curves import neighbours_counted_wrong, option
from foldstack.compression.methods.search.kinds import KIND_OF
from foldstack.compression.methods.search.library import Choice, Library
from foldstack.compression.methods.search.scoring import Scorer, score_variants
from foldstack.compression.statistics.gathering import KINDS as STATISTICS
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.statistics.sensitivity import KINDS, Variant
from foldstack.compression.structure.size import size_of
from foldstack.compression.structure.surgery import cut


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(2, 97, (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def assembly_of(windows: Tensor) -> Callable[[Any], Assembly]:
    def of(model: Any) -> Assembly:
        statistics = gather(model, windows, STATISTICS)
        return Assembly(Library(model), Evidence(windows, statistics, rank_blocks(statistics)))

    return of


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def cached_logits(model: Any, ids: Tensor) -> Tensor:
    cache, parts = None, []
    with torch.no_grad():
        for part in (ids[:, :18], ids[:, 18:19], ids[:, 19:]):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    return torch.cat(parts, dim=1)


def everything(library: Library) -> Choice:
    """A choice of as many new kinds as four blocks have room for, none of them in the way of
    another: block 0 attends no more, 1 has one KV head and takes in block 2, 3 has no MLP."""
    offered = {(v.kind, v.first): v for v in reversed(library.variants())}  # the shortest runs
    wanted = (("attention_absent", 0), ("kv_heads", 1), ("run_map", 1), ("mlp_absent", 3))
    return frozenset(offered[place] for place in wanted if place in offered)


def test_every_kind_is_made_by_one_class() -> None:
    assert set(KIND_OF) == set(KINDS)


def test_what_they_make_together_decodes_saves_and_counts(
    architecture: str, tiny_model: Any, windows: Tensor, assembly_of: Any, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    assembly = assembly_of(model)
    choice = everything(assembly.library)
    assert len(choice) == (3 if assembly.library.heads.has_norms else 4)
    smaller = cut(model, assembly.cut(choice))
    got = logits(smaller, windows)
    torch.testing.assert_close(cached_logits(smaller, windows), got, rtol=1e-4, atol=1e-4)
    saved = [assembly.library.saved(variant) for variant in choice]
    dense, size = size_of(model), size_of(smaller)
    assert dense.parameters - size.parameters == sum(s.parameters for s in saved)
    assert dense.kv_bytes_per_token - size.kv_bytes_per_token == sum(s.kv_bytes for s in saved)
    written = smaller.generate(windows[:1, :8], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(written[:, 8], logits(smaller, windows[:1, :8])[:, -1].argmax(-1))
    save_model(smaller, tmp_path, tokenizer_from=tmp_path)
    assert torch.equal(logits(load_model(tmp_path), windows), got)


def _silent_attention(layers: Any) -> None:
    layers[1].self_attn.o_proj.weight.zero_()


def _silent_mlp(layers: Any) -> None:
    layers[2].mlp.down_proj.weight.zero_()


def _heads_alike(layers: Any) -> None:
    for name in ("k_proj", "v_proj"):
        weight = getattr(layers[1].self_attn, name).weight
        weight[8:] = weight[:8]


def _silent_run(layers: Any) -> None:
    for layer in layers[1:3]:
        _silent_attention([layer] * 2)
        _silent_mlp([layer] * 3)


def _run_of_nothing(layers: Any) -> None:
    """The map is none, and the fit must find that."""
    layers[2].self_attn.o_proj.weight.zero_()
    layers[2].mlp.down_proj.weight.zero_()


def _blocks_alike(layers: Any) -> None:
    layers[2].load_state_dict(layers[1].state_dict())


PLANTED: dict[str, tuple[Callable[[Any], None], str]] = {
    "attention_absent": (_silent_attention, "block 1 attention absent"),
    "mlp_absent": (_silent_mlp, "block 2 mlp absent"),
    "kv_heads": (_heads_alike, "kv heads 1 of block 1"),
    "run_absent": (_silent_run, "block 1..2 run absent"),
    "run_map": (_run_of_nothing, "block 2 as a map of what block 1 adds"),
    "shared": (_blocks_alike, "blocks 1 and 2 on weights of 1"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_can_be_had_for_nothing_is_the_cheapest_of_its_kind(
    kind: str, tiny_model: Any, windows: Tensor, assembly_of: Any
) -> None:
    plant, name = PLANTED[kind]
    model = tiny_model("llama")
    with torch.no_grad():
        plant(model.model.layers)
    assembly = assembly_of(model)
    variants = [v for v in assembly.library.variants() if v.kind == kind]
    scores = sorted(score_variants(assembly, windows, variants).scores, key=lambda s: s.mean)
    assert str(scores[0].variant) == name
    assert scores[0].mean < 1e-6
    worst = 2 if kind == "shared" else 1  # either of the two may lend
    assert scores[worst].mean > 100 * scores[0].mean


def test_maps_are_those_of_the_dense_model_whatever_stands_in_it(
    tiny_model: Any, windows: Tensor, assembly_of: Any
) -> None:
    """They are fitted in passes of the scored model, whose blocks are replaced meanwhile."""
    model = tiny_model("llama")
    given = frozenset([Variant(kind="mlp_absent", first=0, stop=1)])
    found = []
    for first in (True, False):
        assembly = assembly_of(model)
        mapped = next(v for v in assembly.library.variants(["maps"]) if v.kind == "run_map")
        mapped = mapped.model_copy(update={"first": 1, "stop": 3})
        if first:
            assembly.prepare([frozenset([mapped])])
        found.append(Scorer(assembly, windows).losses([given | {mapped}], given)[0])
    assert torch.equal(*found)


def test_of_neighbours_that_are_gone_the_run_is_counted(tiny_model: Any) -> None:
    """Two losses of single blocks say less than the one that was measured of both."""
    library = Library(tiny_model("llama"))
    options = [option(library, v, 1.0) for v in library.variants(["removals", "runs"])]
    pairs = {
        frozenset(str(key[0]) for key in pair)
        for pair in neighbours_counted_wrong(options)
        if all(key[0].kind == "absent" for key in pair)
    }
    assert pairs == {frozenset(f"block {p + n} absent" for n in (0, 1)) for p in range(3)}


@pytest.mark.parametrize(
    ("name", "refuses"),
    [
        ("svd_llm", False),
        ("basis_sharing", False),
        ("replaceme", False),
        ("search", False),
        ("slicegpt", False),
        ("modegpt", True),
        ("mka", True),
    ],
)
def test_a_method_takes_what_they_made_or_says_why_not(
    name: str, refuses: bool, tiny_model: Any, windows: Tensor, assembly_of: Any
) -> None:
    """Modules of no width are there like any others."""
    model = tiny_model("llama", num_hidden_layers=6)
    assembly = assembly_of(model)
    places = (("attention_absent", 0), ("mlp_absent", 1), ("mlp_absent", 4))
    choice = frozenset(KIND_OF[kind].at(position) for kind, position in places)
    smaller = cut(model, assembly.cut(choice))
    statistics = gather(smaller, windows, STATISTICS)
    evidence = replace(assembly.evidence, statistics=statistics, ranking=rank_blocks(statistics))
    method = METHODS[name](sparsity=0.1)
    if refuses:
        with pytest.raises(InputError, match="block"):
            method.compress(smaller, evidence)
        return
    again = cut(smaller, method.compress(smaller, evidence))
    assert torch.isfinite(logits(again, windows)).all()
