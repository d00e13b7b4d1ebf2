"""ReplaceMe against least squares over the tokens, planted blocks and every family."""

from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.replacement.replaceme import (
    ReplaceMe,
    number_of_runs,
    runs_of_least_distance,
)
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.surgery import build_on_meta, cut, plan_of


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (8, 40), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, KINDS)
    return Evidence(windows, statistics, rank_blocks(statistics))


def logits(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(windows, use_cache=False).logits


def seen(model: Any, windows: Tensor, position: int) -> dict[str, Tensor]:
    """What the last linear of an MLP reads and writes, and what leaves its block."""
    architecture = architecture_of(model)
    block = architecture.blocks(model)[position]
    down = next(s.name for s in architecture.linears if s.reads == "mlp_output")
    rows: dict[str, Tensor] = {}

    def flat(value: Any) -> Tensor:
        tensor = value[0] if isinstance(value, tuple) else value
        return tensor.detach().reshape(-1, tensor.shape[-1])

    def of_linear(_module: Any, args: Any, output: Any) -> None:
        rows.update(read=flat(args), written=flat(output))

    handles = [
        block.get_submodule(down).register_forward_hook(of_linear),
        block.register_forward_hook(lambda _m, _a, output: rows.update(leaving=flat(output))),
    ]
    logits(model, windows)
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize("weighting", ["equal", "relative"])
@pytest.mark.parametrize("fitted", ["map", "projection"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3"])
def test_the_map_is_the_least_squares_solution(
    family: str, fitted: Any, weighting: Any, tiny_model: Any, windows: Tensor
) -> None:
    """Folded into the linear, its bias and a transposed weight included."""
    model = tiny_model(family, num_hidden_layers=6).double()
    settings = {"fitted": fitted, "weighting": weighting, "ridge": 1e-12}
    change = ReplaceMe(sparsity=0.25, **settings).compress(model, evidence_of(model, windows))
    host = next(p for p, q in enumerate(change.inherits) if (*change.inherits, 6)[p + 1] != q + 1)
    source, behind = change.inherits[host], (*change.inherits, 6)[host + 1]
    assert change.plan.is_native
    assert {name.split(".")[1] for name in change.tensors} == {str(host)}

    before, target = seen(model, windows, source), seen(model, windows, behind - 1)["leaving"]
    read = before["written" if fitted == "map" else "read"]
    if family in ("opt", "gpt2"):
        read = torch.nn.functional.pad(read, (0, 1), value=1.0)
    wanted = target - (before["leaving"] - before["written"])
    size = target.square().mean(1, keepdim=True).sqrt() if weighting == "relative" else 1.0
    # gelsd: units that no token wakes are no trouble to it.
    solution = torch.linalg.lstsq(read / size, wanted / size, driver="gelsd").solution
    got = seen(cut(model, change), windows, host)["written"]
    torch.testing.assert_close(got, read @ solution, rtol=1e-4, atol=1e-5)


def test_it_beats_plain_removal_behind_the_run(
    architecture: str, tiny_model: Any, windows: Tensor
) -> None:
    """In families that norm what an MLP writes as well."""
    model = tiny_model(architecture)
    change = ReplaceMe(sparsity=0.15, protect_last=1).compress(model, evidence_of(model, windows))
    host = next(p for p, q in enumerate(change.inherits) if change.inherits[p + 1] != q + 1)
    target = seen(model, windows, change.inherits[host + 1] - 1)["leaving"]
    plain = cut(model, type(change)(change.plan, change.inherits))
    errors = [
        float(
            ((seen(m, windows, host)["leaving"] - target).norm(dim=1) / target.norm(dim=1)).mean()
        )
        for m in (plain, cut(model, change))
    ]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("choice", ["cosine", "loss"])
@pytest.mark.parametrize("fitted", ["map", "projection"])
def test_idle_blocks_go_and_nothing_changes(
    choice: Any, fitted: Any, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    idle = (2, 3, 5)
    with torch.no_grad():
        for position in idle:
            block = model.model.layers[position]
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    method = ReplaceMe(sparsity=0.35, runs=2, choice=choice, fitted=fitted)
    change = method.compress(model, evidence_of(model, windows))
    assert change.inherits == (0, 1, 4)
    got = logits(cut(model, change), windows)
    torch.testing.assert_close(got, logits(model, windows), rtol=1e-4, atol=1e-5)


def test_a_second_run_is_fitted_on_what_the_first_has_left(
    tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model("qwen2", num_hidden_layers=7).double()
    evidence = evidence_of(model, windows)
    method = ReplaceMe(sparsity=0.35, runs=3, ridge=1e-12, weighting="equal", choice="loss")
    change = method.compress(model, evidence)
    smaller = cut(model, change)
    hosts = [p for p, q in enumerate(change.inherits) if (*change.inherits, 7)[p + 1] != q + 1]
    assert len(hosts) > 1
    last = hosts[-1]
    target = seen(model, windows, (*change.inherits, 7)[last + 1] - 1)["leaving"]
    rows = seen(smaller, windows, last)
    wanted = target - (rows["leaving"] - rows["written"])
    solution = torch.linalg.lstsq(rows["read"], wanted).solution
    torch.testing.assert_close(rows["written"], rows["read"] @ solution, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most_runs", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_runs_are_the_best_of_all_that_there_are(most_runs: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count + 10 * most_runs)
    similarity = torch.rand(9, 9, generator=generator, dtype=torch.float64)
    removable = [1, 2, 3, 5, 6, 7]

    def distance(gone: tuple[int, ...]) -> float:
        starts = [p for p in gone if p - 1 not in gone]
        ends = [p + 1 for p in gone if p + 1 not in gone]
        return sum(1 - float(similarity[a, b]) for a, b in zip(starts, ends, strict=True))

    allowed = [c for c in combinations(removable, count) if number_of_runs(set(c)) <= most_runs]
    found = runs_of_least_distance(
        lambda start, stop: 1 - float(similarity[start][stop]),
        len(similarity) - 1,
        removable,
        count,
        most_runs,
    )
    assert found == set(min(allowed, key=distance, default=()))


def test_by_hand() -> None:
    """Blocks 1 and 2 together turn the stream less than any other pair in one run."""
    similarity = [
        [1.0, 0.5, 0.4, 0.3, 0.2],
        [0.5, 1.0, 0.9, 0.8, 0.1],
        [0.4, 0.9, 1.0, 0.9, 0.5],
        [0.3, 0.8, 0.9, 1.0, 0.6],
        [0.2, 0.1, 0.5, 0.6, 1.0],
    ]
    best = partial(runs_of_least_distance, lambda start, stop: 1 - similarity[start][stop], 4)
    assert best([1, 2, 3], 2, 1) == {1, 2}
    assert best([1, 3], 2, 2) == {1, 3}
    assert best([1, 3], 2, 1) == set()


def test_norms_behind_the_residual_links_are_refused(tiny_model: Any) -> None:
    model = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(InputError, match="no block of this model that may stay"):
        ReplaceMe(sparsity=0.2).outline(build_on_meta(model.config))


def test_the_first_block_stays(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    change = ReplaceMe(sparsity=0.4).compress(model, evidence_of(model, windows))
    assert change.inherits[0] == 0
    assert len(plan_of(cut(model, change)).blocks) == 2
