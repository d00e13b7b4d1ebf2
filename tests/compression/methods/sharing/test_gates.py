"""Block gates (foldgpt.md, section 3, acceptance tests 1-5)."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.candidate_loss import deletion_losses
from foldstack.compression.methods.sharing.gate_training import train_gates
from foldstack.compression.methods.sharing.gates import (
    Gates,
    GateTraining,
    along_budget,
    gated,
    gates_of,
    mean_jaccard,
)
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.surgery import Cut, cut, plan_of

ModelFactory = Callable[..., PreTrainedModel]
QUICK = {
    form: GateTraining(form=form, steps=60, batch_tokens=256) for form in ("sampled", "relaxed")
}
both_forms = pytest.mark.parametrize("form", QUICK)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """Each token follows from the one two before it: only attention can tell."""
    starts = torch.randint(0, 97, (64, 2), generator=torch.Generator().manual_seed(1))
    steps = 7 * torch.arange(8)
    return ((starts[:, None, :] + steps[None, :, None]) % 97).flatten(1)


@pytest.fixture(scope="module")
def trained(tiny_model: ModelFactory, windows: Tensor) -> PreTrainedModel:
    """A model of five blocks that has learnt the text."""
    model = tiny_model("llama", num_hidden_layers=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        batch = windows[torch.arange(16 * step, 16 * step + 16) % len(windows)]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()


def rebuilt(model: PreTrainedModel, order: list[int], silent: tuple[int, ...] = ()) -> Any:
    """The blocks of `model` in this order; those at the positions `silent` do nothing."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(order)
    larger = type(model)(config).eval()
    state = {n: t for n, t in model.state_dict().items() if ".layers." not in n}
    for new, old in enumerate(order):
        for name, tensor in architecture_of(model).blocks(model)[old].state_dict().items():
            closes = new in silent and name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            state[f"model.layers.{new}.{name}"] = torch.zeros_like(tensor) if closes else tensor
    larger.load_state_dict(state)
    return larger


def loss_with(model: Any, windows: Tensor, gates: Tensor) -> Tensor:
    with gated(model, gates):
        logits = model(windows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


# --- the gated model ---------------------------------------------------------------------------


def test_open_gates_are_the_model_and_a_closed_one_removes_its_block(
    tiny_model: ModelFactory, architecture: str, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    survivors = (0, 1, 3)
    pruned = cut(model, Cut(plan_of(model).keep(survivors), survivors))
    closed = torch.tensor([1.0, 1.0, 0.0, 1.0])
    with torch.no_grad():
        dense = model(windows).logits
        with gated(model, torch.ones(4)):
            torch.testing.assert_close(model(windows).logits, dense, rtol=0, atol=1e-5)
        with gated(model, closed):
            got = model(windows).logits
        torch.testing.assert_close(got, pruned(windows).logits, rtol=0, atol=1e-5)
        # The first window with all blocks, the second without one.
        with gated(model, torch.stack([torch.ones(4), closed])):
            mixed = model(windows[:2]).logits
        assert torch.equal(model(windows).logits, dense)  # the hooks are gone
    torch.testing.assert_close(mixed, torch.stack([dense[0], got[1]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["shared", "ffn"])
def test_restructured_models_have_gates_too(
    tiny_model: ModelFactory, windows: Tensor, form: str
) -> None:
    model = tiny_model("llama")
    if form == "shared":
        smaller = cut(model, Cut(plan_of(model).share(1, [2]), (0, 1, 2, 3)))
    else:
        shapes = {
            "up.weight": (8, 32), "up.bias": (8,), "down.weight": (32, 8), "down.bias": (32,)
        }  # fmt: skip
        tensors = {f"blocks.2.ffn.{name}": torch.ones(shape) for name, shape in shapes.items()}
        smaller = cut(model, Cut(plan_of(model).replace(2, 3, "ffn", 8), (0, 1, None, 3), tensors))
    survivors = (0, 1, 3)
    pruned = cut(smaller, Cut(plan_of(smaller).keep(survivors), survivors))
    with torch.no_grad():
        got = loss_with(smaller, windows, torch.tensor([1.0, 1.0, 0.0, 1.0]))
        expected = pruned(windows, labels=windows).loss
    assert float(got) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("num_kept", [1, 4, 7])
def test_the_budget_holds_exactly(num_kept: int) -> None:
    log_t2 = 3 * torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gates = gates_of(log_t2, num_kept)
    assert float(gates.sum()) == pytest.approx(num_kept, abs=1e-9)
    # g = 1 / (1 + eps / t^2): one eps for all of them.
    eps = log_t2 - torch.logit(gates)
    torch.testing.assert_close(eps, eps[0].expand(8), rtol=0, atol=1e-5)


def test_gradient_agrees_with_finite_differences(tiny_model: ModelFactory, windows: Tensor) -> None:
    # GPT-2 computes in float64 throughout; RMSNorm would round to float32.
    model = tiny_model("gpt2").double()
    log_t2 = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gates = gates_of(log_t2, 3).requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_with(model, windows, gates), gates)
    slopes = along_budget(gates.detach(), gradient)
    for block in range(4):
        values = []
        for sign in (1, -1):
            moved = log_t2.clone()
            moved[block] += sign * 1e-4
            with torch.no_grad():
                values.append(float(loss_with(model, windows, gates_of(moved, 3))))
        slope = (values[0] - values[1]) / 2e-4
        assert slope == pytest.approx(float(slopes[block]), rel=1e-3, abs=1e-8)


# --- training ----------------------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("num_kept", [3, 4])
def test_training_ends_at_0_and_1_on_budget(
    trained: PreTrainedModel, windows: Tensor, num_kept: int, form: str
) -> None:
    found = train_gates(trained, windows, num_kept, QUICK[form]).values
    assert sum(found) / 5 == pytest.approx(num_kept / 5, abs=0.02)
    assert all(value < 0.1 or value > 0.95 for value in found)
    assert sum(value > 0.5 for value in found) == num_kept


@both_forms
@pytest.mark.parametrize("planted", [(1, 3, 5), (0, 4, 7)])
def test_blocks_that_do_nothing_have_the_lowest_gates(
    trained: PreTrainedModel, windows: Tensor, planted: tuple[int, ...], form: str
) -> None:
    own = iter(range(5))
    order = [0 if position in planted else next(own) for position in range(8)]
    model = rebuilt(trained, order, planted)
    with torch.no_grad():  # they really do nothing
        torch.testing.assert_close(model(windows).logits, trained(windows).logits)
    for seed in (0, 1):
        found = train_gates(model, windows, 5, QUICK[form], seed=seed)
        assert set(found.order()[:3]) == set(planted), found.values


@both_forms
def test_of_two_blocks_that_do_the_same_one_stays(
    trained: PreTrainedModel, windows: Tensor, form: str
) -> None:
    """Each can go without a loss, both cannot: scores of single blocks remove both."""
    alone = deletion_losses(trained, windows, range(5))
    needed = max(alone, key=alone.__getitem__)
    twins = {needed, needed + 1}
    model = rebuilt(trained, sorted([*range(5), needed]))
    single = deletion_losses(model, windows, range(6))
    assert set(sorted(single, key=single.__getitem__)[:2]) == twins
    removed = set(train_gates(model, windows, 4, QUICK[form]).order()[:2])
    assert len(removed & twins) == 1


@pytest.mark.parametrize("num_kept", [3, 4])
def test_sampled_gates_find_the_best_set_of_all(
    trained: PreTrainedModel, windows: Tensor, num_kept: int
) -> None:
    losses = {}
    with torch.no_grad():
        for gone in itertools.combinations(range(5), 5 - num_kept):
            gates = torch.tensor([float(block not in gone) for block in range(5)])
            losses[gone] = float(loss_with(trained, windows, gates))
    for seed in (0, 1):
        found = train_gates(trained, windows, num_kept, QUICK["sampled"], seed=seed)
        closed = tuple(sorted(found.order()[: 5 - num_kept]))
        assert losses[closed] <= min(losses.values()) + 0.01


@pytest.mark.parametrize("silent", [(), (0, 1)])
def test_of_two_blocks_the_one_that_is_missed_less_goes(
    tiny_model: ModelFactory, windows: Tensor, silent: tuple[int, ...]
) -> None:
    """The spread of two costs, or of equal ones, is no use as a temperature."""
    model = rebuilt(tiny_model("llama"), [0, 1], silent)
    losses = deletion_losses(model, windows, range(2))
    found = train_gates(model, windows, 1, QUICK["sampled"])
    assert sum(found.values) == pytest.approx(1)
    assert losses[found.order()[0]] == min(losses.values())


@both_forms
def test_a_killed_training_ends_as_one_that_was_not(
    tiny_model: ModelFactory, windows: Tensor, tmp_path: Path, form: str
) -> None:
    settings = GateTraining(form=form, steps=25, batch_tokens=64)
    whole = train_gates(tiny_model("qwen2"), windows, 3, settings)
    again = train_gates(tiny_model("qwen2"), windows, 3, settings)
    assert whole == again

    def stop(what: str, done: int, total: int) -> None:
        if what == "train gates" and done == 17:
            raise InterruptedError

    model = tiny_model("qwen2")
    model.get_input_embeddings().weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(InterruptedError):
        train_gates(model, windows, 3, settings, work=tmp_path, progress=stop)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(module._forward_hooks for module in model.modules())
    told: list[tuple[str, int]] = []
    resumed = train_gates(
        model, windows, 3, settings, work=tmp_path, progress=lambda *a: told.append(a[:2])
    )
    assert told[0] == ("train gates", 11)
    assert resumed == whole
    other = train_gates(tiny_model("qwen2"), windows, 3, settings, seed=1, work=tmp_path)
    assert other != whole


@both_forms
def test_a_bfloat16_model_trains(tiny_model: ModelFactory, windows: Tensor, form: str) -> None:
    model = tiny_model("gemma2").bfloat16()
    settings = GateTraining(form=form, steps=20, batch_tokens=64)
    found = train_gates(model, windows, 3, settings)
    assert sum(found.values) == pytest.approx(3, abs=1e-6)


def test_a_budget_without_a_choice_is_refused(tiny_model: ModelFactory, windows: Tensor) -> None:
    for num_kept in (0, 4):
        with pytest.raises(InputError, match=f"1 to 3 of 4 blocks, got {num_kept}"):
            train_gates(tiny_model("llama"), windows, num_kept, GateTraining())


@both_forms
def test_a_model_without_a_finite_loss_is_refused(
    tiny_model: ModelFactory, windows: Tensor, form: str
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    with pytest.raises(InputError, match="gated model must be finite"):
        train_gates(model, windows, 3, QUICK[form])


def test_the_temperature_falls_geometrically() -> None:
    schedule = GateTraining(steps=100, hold=0.1, last_temperature=0.01)
    assert [schedule.temperature(step) for step in (0, 9, 10)] == [1, 1, 1]
    assert schedule.temperature(50) == pytest.approx(0.1)
    assert [schedule.temperature(step) for step in (90, 99)] == pytest.approx([0.01, 0.01])


def test_the_pull_rises_geometrically() -> None:
    schedule = GateTraining(steps=100, hold=0.1, first_pull=1, last_pull=10_000)
    assert [schedule.pull(step) for step in (0, 9)] == [0, 0]
    assert schedule.pull(10) == pytest.approx(1)
    assert schedule.pull(50) == pytest.approx(100)
    assert schedule.pull(90) == schedule.pull(99) == pytest.approx(10_000)


def test_order_and_agreement() -> None:
    assert Gates((0.5, 0.1, 0.1, 0.9), []).order() == (1, 2, 0, 3)
    assert mean_jaccard([frozenset({1, 2}), frozenset({2, 3}), frozenset({1, 2})]) == pytest.approx(
        (1 / 3 + 1 + 1 / 3) / 3
    )
    assert mean_jaccard([frozenset({1})]) == 1
