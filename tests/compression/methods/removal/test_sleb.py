"""SLEB (shortgpt_family.md, acceptance tests 2, 4, 6-9)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.candidate_loss import deletion_losses, windows_of
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.removal.sleb import Sleb
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.size import count_parameters
from foldstack.compression.structure.surgery import Cut, cut, plan_of


@pytest.fixture
def windows() -> Tensor:
    # More than are evaluated at once, the last batch smaller than the others.
    return torch.randint(97, (11, 20), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, {"similarity"})
    return Evidence(windows, statistics, rank_blocks(statistics))


def share_of_blocks(model: Any, count: int) -> float:
    block = architecture_of(model).blocks(model)[0]
    return count * count_parameters(block) / count_parameters(model)


def loss(model: Any, windows: Tensor) -> float:
    with torch.no_grad():
        return float(model(windows, labels=windows).loss)


def without(model: Any, gone: tuple[int, ...]) -> Any:
    survivors = tuple(p for p in range(len(plan_of(model).blocks)) if p not in gone)
    return cut(model, Cut(plan_of(model).keep(survivors), survivors))


def test_every_deletion_costs_what_the_pruned_model_loses(
    architecture: str, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    before = loss(model, windows)
    got = deletion_losses(model, windows, range(4))
    assert got == pytest.approx(
        {position: loss(without(model, (position,)), windows) for position in range(4)}, abs=1e-5
    )
    got = deletion_losses(model, windows, (0, 3), gone=(1,))
    assert got == pytest.approx(
        {position: loss(without(model, (1, position)), windows) for position in (0, 3)}, abs=1e-5
    )
    assert loss(model, windows) == before
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_greedy_choice_is_that_of_brute_force(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    gone: tuple[int, ...] = ()
    for _ in range(3):
        alive = [position for position in range(1, 5) if position not in gone]
        gone += (min(alive, key=lambda p: loss(without(model, (*gone, p)), windows)),)
    method = Sleb(sparsity=share_of_blocks(model, 3))
    change = method.compress(model, evidence_of(model, windows))
    assert change.plan.removed_blocks == tuple(sorted(gone))
    assert change.tensors == {}
    smaller = cut(model, change)
    assert type(smaller) is type(model)
    for new, old in enumerate(change.inherits):
        assert old is not None
        for name, tensor in model.model.layers[old].state_dict().items():
            assert torch.equal(smaller.model.layers[new].state_dict()[name], tensor)


def test_a_block_that_does_nothing_costs_nothing(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("gemma2")
    with torch.no_grad():
        for site in architecture_of(model).linears:
            model.model.layers[2].get_submodule(site.name).weight.zero_()
    got = deletion_losses(model, windows, [1, 2])
    assert got[2] == deletion_losses(model, windows, [2], gone=[2])[2]
    assert got[2] == pytest.approx(loss(model, windows), abs=1e-6)
    assert got[1] != pytest.approx(got[2], abs=1e-4)


def test_the_number_of_evaluations(tiny_model: Any, windows: Tensor) -> None:
    """The sum over s < n of (L - 2 - s): 189 for L = 32 and n = 7, here L = 12 and n = 4."""
    told: list[tuple[str, int, int]] = []
    model = tiny_model("llama", num_hidden_layers=12)
    telling = replace(evidence_of(model, windows[:1]), progress=lambda *what: told.append(what))
    Sleb(sparsity=share_of_blocks(model, 4)).compress(model, telling)
    assert told == [("sleb", done, 34) for done in range(1, 35)]


def test_a_killed_run_goes_on_with_the_next_removal(
    tiny_model: Any, windows: Tensor, tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    whole = evidence_of(model, windows)
    method = Sleb(sparsity=share_of_blocks(model, 3))
    expected = method.compress(model, whole)
    told: list[int] = []

    def killed_at_the_sixth(_what: str, done: int, _total: int) -> None:
        told.append(done)
        if done == 6:
            raise KeyboardInterrupt

    def on_the_way(progress: Any) -> Evidence:
        return replace(whole, work=tmp_path / "new", progress=progress)

    with pytest.raises(KeyboardInterrupt):
        method.compress(model, on_the_way(killed_at_the_sixth))
    assert all("forward" not in vars(module) for module in model.modules())
    told.clear()
    found = method.compress(model, on_the_way(lambda _what, done, _total: told.append(done)))
    assert found.inherits == expected.inherits
    assert told == [5, 6, 7, 8, 9]  # the first removal took 4 evaluations


def test_barriers(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    evidence = evidence_of(model, windows)
    for settings, expected in (
        ({"early_barrier": 2}, (2,)),
        ({"early_barrier": 0, "latter_barrier": 3}, (0,)),
        ({"early_barrier": 3, "latter_barrier": 0}, (3,)),
    ):
        method = Sleb(sparsity=share_of_blocks(model, 1), **settings)
        assert method.compress(model, evidence).plan.removed_blocks == expected
    with pytest.raises(InputError, match="early_barrier 3 and latter_barrier 1 for 4 blocks"):
        Sleb(sparsity=0.2, early_barrier=3).outline(model)
    with pytest.raises(InputError, match="2 of 4 blocks"):
        Sleb(sparsity=0.6).outline(model)


def test_calibration_is_counted_in_tokens(windows: Tensor) -> None:
    assert len(windows_of(windows, 1)) == 1
    assert len(windows_of(windows, 21)) == 2
    assert len(windows_of(windows, 10**9)) == 11


@pytest.mark.parametrize("form", ["shared", "factored", "replaced"])
def test_blocks_of_any_form_can_go(tiny_model: Any, windows: Tensor, form: str) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    plan = plan_of(model)
    if form == "shared":
        compressed = cut(model, Cut(plan.share(1, [2]), tuple(range(5))))
    elif form == "factored":
        weight = model.model.layers[1].mlp.down_proj.weight
        factors = {
            "blocks.1.mlp.down_proj.first.weight": weight[:4],
            "blocks.1.mlp.down_proj.second.weight": weight[:, :4],
        }
        change = Cut(plan.factor({(1, "mlp.down_proj"): 4}), tuple(range(5)), factors)
        compressed = cut(model, change)
    else:
        replacement = plan.replace(1, 2, "ffn", 8)
        tensors = {
            f"blocks.1.ffn.{name}": torch.zeros(shape)
            for name, shape in (
                ("up.weight", (8, 32)), ("up.bias", (8,)),
                ("down.weight", (32, 8)), ("down.bias", (32,)),
            )
        }  # fmt: skip
        compressed = cut(model, Cut(replacement, (0, None, 2, 3, 4), tensors))
    got = deletion_losses(compressed, windows, range(5))
    expected = {p: loss(without(compressed, (p,)), windows) for p in range(5)}
    assert got == pytest.approx(expected, abs=1e-5)
    method = Sleb(sparsity=share_of_blocks(compressed, 1))
    smaller = cut(compressed, method.compress(compressed, evidence_of(compressed, windows)))
    removed = 1 - count_parameters(smaller) / count_parameters(compressed)
    assert removed >= method.sparsity - 0.005
