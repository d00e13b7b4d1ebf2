"""What the methods of the papers make of measured losses."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from foldstack.compression.errors import InputError
from foldstack.compression.methods import METHODS
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.search.scoring import scored
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.statistics.sensitivity import (
    Family,
    Saved,
    Score,
    Sensitivity,
    Variant,
    VariantKind,
)
from foldstack.compression.structure.size import count_parameters
from foldstack.compression.structure.surgery import cut

SETTINGS: dict[str, dict[str, Any]] = {
    "modegpt": {"allocation": "sensitivity"},
    "svd_llm": {"allocation": "sensitivity", "update": "none"},
    "basis_sharing": {"allocation": "sensitivity", "update": "none"},
    "shortgpt": {"ranking": "sensitivity"},
    "uidl": {"ranking": "sensitivity", "protect_last": 0},
    "llm_streamline": {"ranking": "sensitivity", "replacement": "none"},
    "replaceme": {"choice": "sensitivity"},
    "flexigpt": {"ranking": "sensitivity", "rank": 1, "gain_windows": 2},
    "foldgpt": {"ranking": "sensitivity", "removal_portion": 1},
    "block_sharing": {"groups": "sensitivity", "keep_head": 0, "keep_tail": 0},
}


@pytest.fixture(scope="module")
def silent(tiny_model: Any) -> Iterator[Any]:
    """A model whose block 1 adds next to nothing; no method changes what it reads."""
    model = tiny_model("llama")
    block = dict(model.model.layers[1].named_parameters())
    with torch.no_grad():
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            block[name].mul_(1e-3)
    before = copy.deepcopy(model.state_dict())
    yield model
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def evidence(silent: Any) -> Evidence:
    windows = torch.randint(97, (4, 20), generator=torch.Generator().manual_seed(0))
    statistics = gather(silent, windows, KINDS)
    return Evidence(windows, statistics, rank_blocks(statistics))


@pytest.fixture(scope="module")
def scored_on(silent: Any, evidence: Evidence) -> Callable[[Iterable[Family]], Evidence]:
    """The evidence with scores of these families, each set of which is scored once."""
    made: dict[frozenset[Family], Evidence] = {}

    def of(families: Iterable[Family]) -> Evidence:
        asked = frozenset(families)
        if asked not in made:
            made[asked] = scored(evidence, silent, asked)
        return made[asked]

    return of


def least_pair(evidence: Evidence) -> int:
    assert evidence.sensitivity is not None
    losses = evidence.sensitivity.losses_of_sharing()
    return min(losses, key=losses.__getitem__)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_costs_nothing_loses_most(name: str, silent: Any, scored_on: Any) -> None:
    method = METHODS[name](sparsity=0.15, **SETTINGS[name])
    evidence = scored_on(method.scores)
    assert method.scores
    change = method.compress(silent, evidence)
    removed = 1 - count_parameters(cut(silent, change)) / count_parameters(silent)
    assert removed >= 0.145
    if name in ("shortgpt", "uidl", "llm_streamline", "replaceme", "foldgpt"):
        assert change.inherits == (0, 2, 3)
        return
    if name in ("flexigpt", "block_sharing"):
        users = [p for p, block in enumerate(change.plan.blocks) if block.weights_of is not None]
        assert users == ([1] if name == "flexigpt" else [least_pair(evidence) + 1])
        return
    assert removed <= 0.155
    blocks = change.plan.blocks
    if name == "modegpt":
        lost = [56 - (block.mlp_width or 56) for block in blocks]
        assert lost[1] == max(lost) > 30
    elif name == "svd_llm":
        ranks = [block.linears["mlp.up_proj"].rank for block in blocks if block.linears]
        assert len(ranks) < 4 or min(ranks) == blocks[1].linears["mlp.up_proj"].rank
        assert "mlp.up_proj" in blocks[1].linears
    else:
        assert "mlp.down_proj" in blocks[1].linears


@pytest.mark.parametrize("name", SETTINGS)
def test_without_scores_it_says_what_it_reads(
    name: str, silent: Any, evidence: Evidence, scored_on: Any
) -> None:
    method = METHODS[name](sparsity=0.15, **SETTINGS[name])
    with pytest.raises(InputError, match=f"{name} with these settings reads scores of"):
        method.compress(silent, evidence)
    other = "widths" if "widths" not in method.scores else "removals"
    with pytest.raises(InputError, match="no variants of"):
        method.compress(silent, scored_on([other]))


def test_a_stack_scores_what_each_step_is_given(silent: Any, evidence: Evidence) -> None:
    steps = [{"name": "shortgpt"}, {"name": "modegpt", "allocation": "sensitivity"}]
    method = METHODS["stack"](sparsity=0.4, steps=steps)
    change = method.compress(silent, evidence)
    assert 1 - count_parameters(cut(silent, change)) / count_parameters(silent) >= 0.395


def test_a_run_costs_what_was_measured_of_it_or_the_least_sum_of_its_parts() -> None:
    def score(kind: VariantKind, first: int, stop: int, loss: float) -> Score:
        variant = Variant(kind=kind, first=first, stop=stop)
        return Score(variant=variant, saved=Saved(), kl=(loss, loss))

    scores = [score("absent", p, p + 1, 1.0) for p in range(4)]
    scores += [score("run_absent", 1, 3, 3.0), score("run_absent", 2, 4, 0.5)]
    scores += [score("run_map", 0, 2, 0.25), score("run_map", 0, 3, 0.75)]
    found = Sensitivity(num_blocks=4, num_windows=2, window_tokens=4, scores=tuple(scores))
    assert found.losses_of_runs(2) == (2.0, 3.0, 0.5)
    assert found.loss_of_run(range(1, 4)) == 1.5
    assert found.loss_of_run(range(1, 3), "run_map") == 0.75
    assert found.loss_of_run(range(2, 4), "run_map") == math.inf
    assert found.loss_of_run(range(2, 2)) == 0.0


def test_scores_of_another_model_are_refused(silent: Any, scored_on: Any) -> None:
    method = METHODS["modegpt"](sparsity=0.1, allocation="sensitivity")
    evidence = scored_on(method.scores)
    assert evidence.sensitivity is not None
    few = tuple(s for s in evidence.sensitivity.scores if s.variant.first != 2)
    part = evidence.sensitivity.model_copy(update={"scores": few})
    with pytest.raises(InputError, match="block 2 was scored"):
        method.compress(silent, replace(evidence, sensitivity=part))
