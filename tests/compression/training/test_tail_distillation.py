"""Tail-layer distillation in recovery (foldgpt.md, section 5.2, acceptance test 8)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import Cut, cut, plan_of
from foldstack.compression.training.adapters import Adapters
from foldstack.compression.training.distillation import (
    Blend,
    block_outputs,
    head_of,
    hidden_distance,
    tail_pairs,
)
from foldstack.compression.training.objective import FIGURES, Objective, Tail
from foldstack.compression.training.recovery import Recovery, recover

ModelFactory = Callable[..., PreTrainedModel]
QUICK = Recovery(steps=4, batch_size=2, lora_rank=4, precision="float32", tail_distillation=1.0)
DISTANCE = FIGURES.index("tail_distance")


@pytest.fixture
def windows() -> Tensor:
    starts = torch.randint(0, 97, (12, 1), generator=torch.Generator().manual_seed(1))
    return (starts + 7 * torch.arange(16)) % 97


def without(model: PreTrainedModel, *gone: int) -> PreTrainedModel:
    kept = tuple(p for p in range(len(plan_of(model).blocks)) if p not in gone)
    return cut(model, Cut(plan_of(model).keep(kept), kept))


def objective_of(
    student: PreTrainedModel, teacher: PreTrainedModel, m: int, plan: Plan | None = None
) -> Objective:
    pairs = tail_pairs(plan or plan_of(student), plan_of(teacher), m)
    return Objective(student, head_of(student), Blend(0.0), teacher, tail=Tail(0.5, pairs))


# --- which block answers to which --------------------------------------------------------------


def test_a_kept_block_answers_to_the_same_block_of_the_teacher() -> None:
    dense = Plan.identity("llama", 8)
    student = dense.keep([0, 1, 3, 6])
    assert tail_pairs(student, dense, 3) == ((1, 1), (2, 3), (3, 7))
    assert tail_pairs(student, dense, 9) == ((0, 0), (1, 1), (2, 3), (3, 7))
    assert tail_pairs(student, dense, 1) == ((3, 7),)


def test_a_replacement_answers_to_the_last_block_of_its_run() -> None:
    dense = Plan.identity("llama", 6)
    student = dense.replace(1, 4, "ffn", 8).share(2, [3])
    assert tail_pairs(student, dense, 3) == ((1, 3), (2, 4), (3, 5))


def test_a_pruned_teacher_must_have_the_blocks_of_the_student() -> None:
    dense = Plan.identity("llama", 6)
    assert tail_pairs(dense.keep([0, 2, 5]), dense.keep([0, 2, 4, 5]), 3) == (
        (0, 0),
        (1, 1),
        (2, 3),
    )
    with pytest.raises(InputError, match="block 3 of the base model, which the teacher of 4"):
        tail_pairs(dense.keep([0, 3, 5]), dense.keep([0, 2, 4, 5]), 3)


# --- the distance ------------------------------------------------------------------------------


def test_distance_by_hand() -> None:
    u, v = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    # the second token: cosine 0 and |(1, -2)|^2 / 4
    assert float(hidden_distance(u, v)) == pytest.approx((1 + 5 / 4) / 2)
    assert float(hidden_distance(v, v)) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(hidden_distance(u, v * torch.tensor([[1.0], [0.0]])))


def test_gradient_of_the_distance_agrees_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: hidden_distance(x, v), u.requires_grad_(True))


def test_outputs_are_those_of_the_blocks(
    tiny_model: ModelFactory, architecture: str, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    with torch.no_grad():
        expected = model(windows, output_hidden_states=True).hidden_states
        with block_outputs(model, [1, 3]) as seen:
            model(windows)
        model(windows[:, :3])  # seen no more
    torch.testing.assert_close(seen[1], expected[2])
    normed = architecture_of(model).final_norm(model)(seen[3])
    torch.testing.assert_close(normed, expected[4])  # ours is the one before the norm


def test_a_student_that_is_its_teacher_is_at_no_distance(
    tiny_model: ModelFactory, architecture: str, windows: Tensor
) -> None:
    loss, figures = objective_of(tiny_model(architecture), tiny_model(architecture), 4)(windows)
    assert float(figures[DISTANCE]) == pytest.approx(0, abs=1e-6)
    assert float(loss.detach()) == pytest.approx(float(figures[1]), abs=1e-6)
    other = objective_of(tiny_model(architecture), tiny_model(architecture, seed=1), 4)
    loss, figures = other(windows)
    assert float(figures[DISTANCE]) > 0.1
    assert float(loss.detach()) == pytest.approx(
        float(figures[1] + figures[DISTANCE] / 2), abs=1e-5
    )
    assert float(other(windows, use_teacher=False)[1][DISTANCE]) == 0


def test_gradient_of_the_objective_agrees_with_finite_differences(
    tiny_model: ModelFactory, windows: Tensor
) -> None:
    # GPT-2 computes in float64 throughout; RMSNorm would round to float32.
    teacher = tiny_model("gpt2").double()
    student = without(tiny_model("gpt2").double(), 1)
    adapters = Adapters(student, rank=3, alpha=6, dropout=0.0, train_vectors=True, in_float32=True)
    objective = objective_of(student, teacher, 2, plan_of(teacher).keep([0, 2, 3]))
    objective(windows)[0].backward()
    for parameter in list(adapters.vectors.values())[::5]:
        step = torch.randn_like(parameter)
        assert parameter.grad is not None
        slope = float((parameter.grad * step).sum())
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(step, alpha=sign * 1e-5)
                values.append(float(objective(windows)[0]))
                parameter.add_(step, alpha=-sign * 1e-5)
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-4, abs=1e-8)


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pruned", "shared", "replaced"])
def test_training_brings_the_tail_nearer(
    tiny_model: ModelFactory, windows: Tensor, form: str
) -> None:
    teacher = tiny_model("llama")
    plan, generator = plan_of(teacher), torch.Generator().manual_seed(3)
    if form == "pruned":
        student, plan = without(teacher, 2), plan.keep([0, 1, 3])
    elif form == "shared":
        plan = plan.share(1, [2], "scaled")
        ones = {
            f"blocks.{p}.{part}_output.weight": torch.ones(32)
            for p in (1, 2)
            for part in ("attention", "mlp")
        }
        student = cut(teacher, Cut(plan, (0, 1, 2, 3), ones))
    else:
        shapes = {
            "up.weight": (24, 32),
            "up.bias": (24,),
            "down.weight": (32, 24),
            "down.bias": (32,),
        }
        tensors = {
            f"blocks.1.ffn.{name}": torch.randn(shape, generator=generator) / 6
            for name, shape in shapes.items()
        }
        plan = plan.replace(1, 3, "ffn", 24)
        student = cut(teacher, Cut(plan, (0, None, 3), tensors))
    settings = QUICK.model_copy(
        update={"steps": 30, "tail_distillation": 5.0, "tail_blocks": 2, "learning_rate": 1e-2}
    )
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    history = recover(student, windows, settings, teacher=teacher, plan=plan).history
    assert history[-1]["tail_distance"] < 0.7 * history[0]["tail_distance"]
    trained = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert all(name in trained for name in before if "norm" in name or "_output." in name)


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    tiny_model: ModelFactory, windows: Tensor, tmp_path: Path
) -> None:
    teacher, settings = tiny_model("llama"), QUICK.model_copy(update={"checkpoint_every": 2})
    plan = plan_of(teacher).keep([0, 2, 3])
    whole = recover(without(teacher, 1), windows, settings, teacher=teacher, plan=plan)

    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise InterruptedError

    model = without(teacher, 1)
    with pytest.raises(InterruptedError):
        recover(model, windows, settings, teacher=teacher, plan=plan, work=tmp_path, progress=stop)
    resumed = recover(model, windows, settings, teacher=teacher, plan=plan, work=tmp_path)
    assert resumed.history == whole.history
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("teacher", "sentence"),
    [
        (None, "tail_distillation 1.0 needs a teacher"),
        ({"hidden_size": 64}, "hidden sizes 64 and 32"),
        ({"num_hidden_layers": 6}, "come from 6 and 4 blocks"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    tiny_model: ModelFactory, windows: Tensor, teacher: dict[str, Any] | None, sentence: str
) -> None:
    given = None if teacher is None else tiny_model("llama", **teacher)
    with pytest.raises(InputError, match=sentence):
        recover(tiny_model("llama"), windows, QUICK, teacher=given)
