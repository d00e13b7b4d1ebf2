"""Recovery: what is trained and what is not, the loss, the schedule, and being killed."""

import copy
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from foldstack.compression.errors import InputError
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.modeling_foldstack import Borrowed
from foldstack.compression.structure.surgery import (
    BUILDING,
    Cut,
    build_on_meta,
    config_for,
    cut,
    plan_of,
)
from foldstack.compression.training import distillation, teacher_states
from foldstack.compression.training.adapters import Adapters, FoldingLora, linear_names
from foldstack.compression.training.distillation import (
    Blend,
    Head,
    Reference,
    head_of,
    last_hidden_state,
)
from foldstack.compression.training.objective import Objective
from foldstack.compression.training.recovery import (
    Recovery,
    _held_back,
    autocast_dtype,
    recover,
)
from foldstack.compression.training.training_checkpoints import Checkpoints
from foldstack.compression.training.training_loop import Schedule

ModelFactory = Callable[..., PreTrainedModel]

QUICK = Recovery(
    steps=6,
    batch_size=2,
    lora_rank=4,
    learning_rate=3e-3,
    precision="float32",
    validation_fraction=0,
)
WINDOW_TOKENS = 16
SHALLOW = {
    "llama": {"num_hidden_layers": 2},
    "qwen2": {"num_hidden_layers": 2},
    "gpt2": {"n_layer": 2},
}


@pytest.fixture
def windows() -> Tensor:
    """A toy text: each token follows from the one before it."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, 97, (12, 1), generator=generator)
    return (starts + 7 * torch.arange(WINDOW_TOKENS)) % 97


@pytest.fixture
def shared_model(tiny_model: ModelFactory) -> PreTrainedModel:
    """Block 0 has a low-rank linear, 2 uses the linears of 1, and an FFN stands for 3."""
    model = tiny_model("llama")
    plan = plan_of(model).share(1, [2]).factor({(0, "mlp.up_proj"): 5}).replace(3, 4, "ffn", 24)
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "blocks.0.mlp.up_proj.first.weight": (5, 32),
        "blocks.0.mlp.up_proj.second.weight": (56, 5),
        "blocks.3.ffn.up.weight": (24, 32),
        "blocks.3.ffn.up.bias": (24,),
        "blocks.3.ffn.down.weight": (32, 24),
        "blocks.3.ffn.down.bias": (32,),
    }
    tensors = {name: torch.randn(s, generator=generator) / 6 for name, s in shapes.items()}
    return cut(model, Cut(plan, (0, 1, 2, None), tensors))


def virtual_model(model: PreTrainedModel) -> PreTrainedModel:
    """Block 1 borrows from block 2 with adapters and normed outputs; 2 has scaled outputs."""
    linears = [site.name for site in architecture_of(model).linears]
    plan = plan_of(model).borrow({1: 2}, dict.fromkeys(linears, 2), "normed")
    blocks = list(plan.blocks)
    blocks[2] = blocks[2].model_copy(update={"outputs": "scaled"})
    plan = plan.model_copy(update={"blocks": tuple(blocks)})
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    planned = build_on_meta(config_for(model.config, plan))
    for position, block in enumerate(architecture_of(model).blocks(planned)):
        for name, placeholder in block.state_dict().items():
            if ".adapter." in name or "_output." in name:
                noise = torch.randn(placeholder.shape, generator=generator)
                tensors[f"blocks.{position}.{name}"] = noise / 4
    return cut(model, Cut(plan, (0, 1, 2, 3), tensors))


def open_adapters(model: PreTrainedModel, **settings: Any) -> Adapters:
    defaults = {"rank": 3, "alpha": 6, "dropout": 0.0, "train_vectors": True, "in_float32": True}
    return Adapters(model, **(defaults | settings))


def randomise(adapters: Adapters) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for matrix in adapters.matrices.values():
            matrix.copy_(torch.randn(matrix.shape, generator=generator) / 10)


def copy_of_state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert changed == []


# --- what is trained ---------------------------------------------------------------------------


def test_names_of_linears_are_exact_among_twelve_blocks(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama", num_hidden_layers=12)
    names = linear_names(model)
    assert len(names) == len(set(names)) == 12 * 7
    assert all(name.startswith("model.layers.") for name in names)
    adapters = open_adapters(model)  # checks that peft took exactly these
    assert sum(".layers.1." in name for name in adapters.matrices) == 2 * 7
    adapters.discard()


def test_merging_keeps_the_logits_and_the_names(
    tiny_model: ModelFactory, architecture: str, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    before, model_class = copy_of_state(model), type(model)
    adapters = open_adapters(model)
    randomise(adapters)
    with torch.no_grad():
        adapted = model(windows).logits
        adapters.merge()
        merged = model(windows).logits
        plain = tiny_model(architecture)(windows).logits
    assert (adapted - plain).abs().max() > 1e-2
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    assert type(model) is model_class
    assert list(model.state_dict()) == list(before)
    assert not hasattr(model, "peft_config")
    linears = {f"{name}.weight" for name in linear_names(model)}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in linears), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folded_adapters_compute_what_peft_computes(
    tiny_model: ModelFactory,
    windows: Tensor,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(family)
    adapters = open_adapters(model)
    randomise(adapters)
    folded = model(windows).logits
    monkeypatch.setattr("foldstack.compression.training.adapters.FOLD_UP_TO", 0)
    torch.testing.assert_close(folded, model(windows).logits, rtol=0, atol=1e-4)
    adapters.discard()


def test_discarding_leaves_the_model_as_it_came(
    tiny_model: ModelFactory, architecture: str
) -> None:
    model = tiny_model(architecture)
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = copy_of_state(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    adapters = open_adapters(model)
    randomise(adapters)
    with torch.no_grad():
        for vector in adapters.vectors.values():
            vector.add_(1)
    adapters.discard()
    assert_same_bytes(model.state_dict(), before)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert model.training


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "gpt2", "opt"])
def test_training_changes_blocks_and_norms_and_nothing_else(
    tiny_model: ModelFactory, windows: Tensor, family: str
) -> None:
    model = tiny_model(family)
    before = copy_of_state(model)
    ends = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) or module is model.get_output_embeddings()
    ]
    recover(model, windows, QUICK)
    for name, tensor in model.state_dict().items():
        is_frozen = name.startswith(tuple(ends))
        assert torch.equal(tensor, before[name]) == is_frozen, name


def test_norms_stay_when_they_are_not_trained(tiny_model: ModelFactory, windows: Tensor) -> None:
    model = tiny_model("qwen2")
    before = copy_of_state(model)
    recover(model, windows, QUICK.model_copy(update={"train_norms": False}))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".layers." not in name or tensor.ndim == 1)


@pytest.mark.parametrize("distilled", [0.0, 0.5])
def test_zero_steps_are_the_identity(
    tiny_model: ModelFactory, windows: Tensor, distilled: float
) -> None:
    model = tiny_model("llama")
    before = copy_of_state(model)
    settings = QUICK.model_copy(update={"steps": 0, "distillation": distilled})
    result = recover(model, windows, settings, teacher=tiny_model("qwen2"), validation=windows)
    assert_same_bytes(model.state_dict(), before)
    assert result.history == []
    assert result.tokens == 0
    assert result.validation_before == result.validation_after


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_bfloat16_model_keeps_its_type_and_its_frozen_bytes(
    tiny_model: ModelFactory, windows: Tensor, precision: str
) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    before = copy_of_state(model)
    recover(model, windows, QUICK.model_copy(update={"precision": precision}))
    after = model.state_dict()
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name])
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


# --- restructured models -----------------------------------------------------------------------


def test_shared_weights_have_one_adapter_and_stay_shared(
    shared_model: PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    names = linear_names(shared_model)
    # 7 + 1 in block 0 (one is two factors), 7 in block 1, none in block 2, 2 in the FFN.
    assert len(names) == 8 + 7 + 0 + 2
    assert not any(".layers.2." in name for name in names)
    keys, parameters = list(shared_model.state_dict()), shared_model.num_parameters()
    owner, borrower = architecture_of(shared_model).blocks(shared_model)[1:3]
    before = owner.self_attn.q_proj.weight.detach().clone()

    adapters = open_adapters(shared_model)
    assert len(adapters.matrices) == 2 * len(names)
    assert borrower.self_attn.q_proj.target is owner.self_attn.q_proj
    adapters.discard()

    recover(shared_model, windows, QUICK)
    assert isinstance(borrower.self_attn.q_proj, Borrowed)
    assert borrower.self_attn.q_proj.target is owner.self_attn.q_proj
    assert type(owner.self_attn.q_proj) is torch.nn.Linear
    assert not torch.equal(owner.self_attn.q_proj.weight, before)
    assert list(shared_model.state_dict()) == keys
    assert shared_model.num_parameters() == parameters

    shared_model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(keys)
        assert sum(file.get_tensor(key).numel() for key in keys) == parameters


def test_merging_a_restructured_model_keeps_its_logits(
    shared_model: PreTrainedModel, windows: Tensor
) -> None:
    with torch.no_grad():
        plain = shared_model(windows).logits
        adapters = open_adapters(shared_model)
        randomise(adapters)
        adapted = shared_model(windows).logits
        adapters.merge()
        merged = shared_model(windows).logits
    assert (adapted - plain).abs().max() > 1e-2
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fold_up_to", [0, 2**20])
def test_a_virtual_block_sees_the_adapter_of_its_base(
    tiny_model: ModelFactory,
    architecture: str,
    windows: Tensor,
    fold_up_to: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Normed outputs on a borrowing block, scaled ones on its base, which comes later."""
    monkeypatch.setattr("foldstack.compression.training.adapters.FOLD_UP_TO", fold_up_to)
    model = virtual_model(tiny_model(architecture))
    blocks = architecture_of(model).blocks(model)
    with torch.no_grad():
        plain = model(windows).logits
        adapters = open_adapters(model)
        randomise(adapters)
        adapted = model(windows).logits
        torch.testing.assert_close(copy.deepcopy(model)(windows).logits, adapted)
        adapters.merge()
        merged = model(windows).logits
    assert (adapted - plain).abs().max() > 1e-2
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    assert not any(isinstance(module, LoraLayer) for module in blocks.modules())


@pytest.mark.parametrize("survivors", ["lora_merge", "none", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_training_holds_is_known_from_the_meta_device(
    tiny_model: ModelFactory,
    windows: Tensor,
    survivors: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = virtual_model(tiny_model("llama")).to(dtype)
    on_meta = build_on_meta(model.config).to(dtype)
    expected = open_adapters(on_meta, survivors=survivors).num_bytes
    adapters = open_adapters(model, survivors=survivors)
    made: list[Tensor] = []
    kept: dict[int, Tensor] = {}

    def make(self: FoldingLora, base: Any, fold: Any = FoldingLora._folded) -> Tensor:
        made.append(fold(self, base))
        return made[-1]

    def keep(tensor: Tensor) -> Tensor:
        if any(tensor.data_ptr() == weight.data_ptr() for weight in made):
            kept[tensor.data_ptr()] = tensor
        return tensor

    monkeypatch.setattr(FoldingLora, "_folded", make)
    optimizer = torch.optim.AdamW(adapters.trainable.values())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(windows[:2], labels=windows[:2]).loss
    loss.backward()
    optimizer.step()
    moments = [state for each in optimizer.state.values() for state in each.values()]
    held = [*model.parameters(), *kept.values(), *adapters._values_before.values()]
    held += [p.grad for p in model.parameters() if p.grad is not None]
    held += [moment for moment in moments if moment.ndim]
    assert sum(tensor.nbytes for tensor in held) == expected


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("survivors", ["lora_merge", "none", "full"])
def test_virtual_blocks_train_in_full_whatever_trains_besides(
    tiny_model: ModelFactory, windows: Tensor, family: str, survivors: str
) -> None:
    model = virtual_model(tiny_model(family))
    before = copy_of_state(model)
    virtual = architecture_of(model).blocks(model)[1]
    own = {name for name, p in model.named_parameters() if p in set(virtual.parameters())}
    assert any("adapter" in name for name in own)
    linears = {f"{name}.weight" for name in linear_names(model)} - own
    settings = QUICK.model_copy(update={"train_survivors": survivors, "train_norms": False})
    recover(model, windows, settings)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == own | (set() if survivors == "none" else linears)
    assert list(model.state_dict()) == list(before)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


@pytest.mark.parametrize("survivors", ["lora_merge", "none", "full"])
def test_a_virtual_model_whose_recovery_fails_is_as_it_came(
    tiny_model: ModelFactory, windows: Tensor, survivors: str
) -> None:
    model = virtual_model(tiny_model("llama")).to(torch.bfloat16)
    before = copy_of_state(model)
    settings = QUICK.model_copy(
        update={"train_survivors": survivors, "virtual_learning_rate": 1e30}
    )
    with pytest.raises(InputError, match="diverged"):
        recover(model, windows, settings)
    assert_same_bytes(model.state_dict(), before)


def test_nothing_to_train_is_refused(tiny_model: ModelFactory, windows: Tensor) -> None:
    settings = QUICK.model_copy(update={"train_survivors": "none"})
    with pytest.raises(InputError, match="trains virtual blocks alone, and this model has none"):
        recover(tiny_model("llama"), windows, settings)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "shared"])
def test_loss_goes_down_on_a_learnable_text(
    tiny_model: ModelFactory, shared_model: PreTrainedModel, windows: Tensor, family: str
) -> None:
    model = shared_model if family == "shared" else tiny_model(family, **SHALLOW[family])
    settings = Recovery(steps=40, batch_size=4, lora_rank=8, learning_rate=1e-2)
    result = recover(model, windows, settings, validation=windows)
    assert result.validation_before is not None
    assert result.validation_after is not None
    assert result.validation_after < 0.7 * result.validation_before
    assert not result.is_worse
    with torch.no_grad():
        merged = float(model(windows, labels=windows).loss)
    assert merged == pytest.approx(result.validation_after, rel=2e-2)


# --- the loss ----------------------------------------------------------------------------------


def test_loss_is_that_of_the_model(
    tiny_model: ModelFactory, architecture: str, windows: Tensor
) -> None:
    model = tiny_model(architecture).double()
    objective = Objective(model, head_of(model), Blend(0.0))
    _, figures = objective(windows)
    with torch.no_grad():
        expected = float(model(windows, labels=windows).loss)
    assert float(figures[1]) == pytest.approx(expected, rel=1e-5)


def test_slicing_changes_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = blend_inputs()
    results = []
    for at_a_time in (1, 40, 10**6):
        monkeypatch.setattr(distillation, "LOGITS_ON_CPU", at_a_time)
        hidden = arguments[0].clone().requires_grad_(True)
        loss, _ = Blend(0.3, 2.0)(hidden, *arguments[1:])
        (3 * loss).backward()
        results.append((loss.detach(), hidden.grad))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


def blend_inputs() -> tuple[Tensor, Tensor, Head, Reference]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(0, 11, (7,), generator=generator)
    student = Head(draw(11, 4), draw(11), softcap=3.0)
    return draw(7, 4), targets, student, Reference(draw(7, 6), Head(draw(11, 6)))


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_gradient_of_the_loss_agrees_with_finite_differences(weight: float) -> None:
    hidden, *rest = blend_inputs()
    blend = Blend(weight, 2.0)
    assert torch.autograd.gradcheck(lambda h: blend(h, *rest)[0], hidden.requires_grad_(True))


def test_gradient_of_an_adapter_agrees_with_finite_differences(
    tiny_model: ModelFactory, windows: Tensor
) -> None:
    # GPT-2 computes in float64 throughout; RMSNorm would round to float32.
    model, teacher = tiny_model("gpt2").double(), tiny_model("gpt2", seed=1).double()
    head = head_of(model)
    adapters = open_adapters(model)
    randomise(adapters)
    objective = Objective(model, head, Blend(0.5, 2.0), teacher)
    objective(windows)[0].backward()
    for parameter in list(adapters.trainable.values())[::9]:
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


def test_blend_by_hand() -> None:
    # One token; student logits (0, 0), teacher logits (ln 9, 0): p = (0.9, 0.1), q = (0.5, 0.5).
    student = Head(torch.zeros(2, 1))
    teacher = Head(torch.tensor([[9.0], [1.0]]).log())
    one = torch.ones(1, 1)
    loss, figures = Blend(0.25)(one, torch.tensor([1]), student, Reference(one, teacher))
    cross_entropy = 0.693147
    divergence = 0.9 * 0.587787 + 0.1 * -1.609438
    expected = [0.75 * cross_entropy + 0.25 * divergence, cross_entropy, divergence]
    torch.testing.assert_close(figures, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert float(loss) == pytest.approx(expected[0], rel=1e-5)


def test_divergence_from_oneself_is_zero(tiny_model: ModelFactory, windows: Tensor) -> None:
    model, teacher = tiny_model("llama"), tiny_model("llama")
    settings = QUICK.model_copy(update={"distillation": 1.0, "temperature": 2.0})
    objective = Objective(model, head_of(model), Blend(1.0, 2.0), teacher)
    loss, figures = objective(windows)
    assert abs(float(loss.detach())) < 1e-6
    assert float(figures[1]) > 1
    before = copy_of_state(model)
    recover(model, windows, settings, teacher=teacher)
    for name, tensor in model.state_dict().items():
        # AdamW follows the sign of rounding errors, so "no gradient" is still a small step.
        assert (tensor - before[name]).abs().max() < 0.05


@pytest.mark.parametrize("in_files", [False, True])
def test_a_teacher_passes_windows_that_come_again_once(
    tiny_model: ModelFactory,
    windows: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_files: bool,
) -> None:
    """Eight steps see each window once or twice, by what is kept as by the teacher itself."""
    if in_files:
        monkeypatch.setattr(teacher_states, "MEMORY_BYTES", 0)
    settings = QUICK.model_copy(
        update={"steps": 8, "distillation": 0.5, "tail_distillation": 1.0, "tail_blocks": 2}
    )
    passed: list[int] = []
    found = []
    for keep in (True, False):
        passed.clear()
        teacher = tiny_model("llama", seed=1)
        teacher.register_forward_hook(
            lambda _module, _args, settings, _output: passed.append(len(settings["input_ids"])),
            with_kwargs=True,
        )
        chosen = settings.model_copy(update={"cache_teacher": keep})
        model = tiny_model("llama")
        found.append(recover(model, windows, chosen, teacher=teacher, work=tmp_path / str(keep)))
        of_head = 2  # `head_of` asks the teacher about one short window, twice
        assert sum(passed) - of_head == (len(windows) if keep else 8 * settings.batch_size)
    for kept, anew in zip(found[0].history, found[1].history, strict=True):
        assert kept["loss"] == pytest.approx(anew["loss"], rel=1e-5)
    assert [path.name for path in (tmp_path / "True").iterdir()] == ["step-00000008"]


def test_distillation_brings_the_student_to_the_teacher(
    tiny_model: ModelFactory, windows: Tensor
) -> None:
    model, teacher = (tiny_model("llama", seed=s, **SHALLOW["llama"]) for s in (0, 1))
    settings = Recovery(
        steps=40, batch_size=4, lora_rank=8, learning_rate=1e-2, distillation=1.0, seed=2
    )
    before = copy_of_state(teacher)
    history = recover(model, windows, settings, teacher=teacher).history
    assert history[-1]["divergence"] < 0.6 * history[0]["divergence"]
    assert_same_bytes(teacher.state_dict(), before)
    assert all(p.grad is None for p in teacher.parameters())


def test_hidden_state_is_what_the_head_reads(tiny_model: ModelFactory, windows: Tensor) -> None:
    model = tiny_model("llama")
    expected = model.model(windows).last_hidden_state
    torch.testing.assert_close(last_hidden_state(model, windows), expected)
    assert model(windows).logits.shape[1] == windows.shape[1]  # the hook is gone


# --- schedule and order ------------------------------------------------------------------------


def schedule(**changes: Any) -> Schedule:
    settings: dict[str, Any] = {
        "steps": 50,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "warmup_fraction": 0.1,
        "min_fraction": 0.1,
        "max_grad_norm": 1.0,
        "seed": 0,
    }
    return Schedule(**(settings | changes))


@pytest.mark.parametrize("accumulation", [1, 3, 16])
@pytest.mark.parametrize("steps", [2, 3, 50])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
def test_schedule_warms_up_and_ends_at_its_minimum(
    accumulation: int, steps: int, warmup: float
) -> None:
    plan = schedule(steps=steps, gradient_accumulation=accumulation, warmup_fraction=warmup)
    rates = [plan.learning_rate_fraction(step) for step in range(steps)]
    assert rates[-1] == 0.1
    assert max(rates) == pytest.approx(1)
    top = rates.index(max(rates))
    assert top == max(min(round(warmup * steps), steps - 1) - 1, 0)
    assert rates[: top + 1] == pytest.approx([(s + 1) / (top + 1) for s in range(top + 1)])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_learning_rates_of_a_run_follow_the_schedule(
    tiny_model: ModelFactory, windows: Tensor
) -> None:
    settings = QUICK.model_copy(update={"gradient_accumulation": 3, "steps": 4})
    history = recover(tiny_model("llama"), windows, settings).history
    rates = [row["learning_rate_fraction"] for row in history]
    assert rates == [settings.schedule.learning_rate_fraction(step) for step in range(4)]
    assert rates[-1] == settings.min_learning_rate_fraction


def test_each_pass_takes_each_window_once_in_an_order_of_its_own() -> None:
    plan = schedule(batch_size=2, gradient_accumulation=2)
    order = torch.cat([plan.windows_of(step, 12).reshape(-1) for step in range(6)])
    first, second = order[:12].tolist(), order[12:].tolist()
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second != list(range(12)) != first
    other = schedule(batch_size=2, gradient_accumulation=2, seed=1)
    assert other.windows_of(0, 12).tolist() != plan.windows_of(0, 12).tolist()


def test_accumulation_equals_a_larger_batch(tiny_model: ModelFactory, windows: Tensor) -> None:
    states = []
    for batch_size, accumulation in [(4, 1), (2, 2), (1, 4)]:
        model = tiny_model("llama").double()
        settings = QUICK.model_copy(
            update={"batch_size": batch_size, "gradient_accumulation": accumulation}
        )
        recover(model, windows, settings)
        states.append(model.state_dict())
    for state in states[1:]:
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, states[0][name], rtol=1e-6, atol=1e-8)


# --- being interrupted -------------------------------------------------------------------------


class InterruptedError_(Exception):
    pass


def stop_at(step: int) -> Callable[[str, int, int], None]:
    def report(what: str, done: int, total: int) -> None:
        if done == step:
            raise InterruptedError_

    return report


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    tiny_model: ModelFactory, windows: Tensor, tmp_path: Path, dropout: float
) -> None:
    settings = QUICK.model_copy(
        update={"steps": 8, "checkpoint_every": 3, "lora_dropout": dropout, "distillation": 0.5}
    )
    teacher = tiny_model("llama", seed=1)
    whole = recover(tiny_model("llama"), windows, settings, teacher=teacher, work=tmp_path / "a")

    model = tiny_model("llama")
    with pytest.raises(InterruptedError_):
        recover(model, windows, settings, teacher=teacher, work=tmp_path / "b", progress=stop_at(5))
    assert_same_bytes(model.state_dict(), tiny_model("llama").state_dict())
    seen: list[int] = []
    resumed = recover(
        model,
        windows,
        settings,
        teacher=teacher,
        work=tmp_path / "b",
        progress=lambda what, done, total: seen.append(done),
    )
    assert seen == [4, 5, 6, 7, 8]
    assert_same_bytes(model.state_dict(), whole.model.state_dict())
    assert resumed.history == whole.history
    assert [folder.name for folder in (tmp_path / "b").iterdir()] == ["step-00000008"]


KILLED_WHILE_WRITING = """
import os, signal, sys
import torch
from transformers import AutoModelForCausalLM
from foldstack.compression.training import training_checkpoints
from foldstack.compression.training.recovery import Recovery, recover

model_folder, windows, settings, work = sys.argv[1:]
write, calls = training_checkpoints.save_file, []

def write_half_of_the_second(tensors, file):
    calls.append(file)
    write(tensors, file)
    if len(calls) == 2:
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

training_checkpoints.save_file = write_half_of_the_second
torch.set_num_threads(1)
recover(
    AutoModelForCausalLM.from_pretrained(model_folder),
    torch.load(windows, weights_only=True),
    Recovery.model_validate_json(settings),
    work=work and __import__("pathlib").Path(work),
)
"""


def test_a_run_killed_while_writing_a_checkpoint_goes_on_from_the_one_before(
    tiny_model: ModelFactory, windows: Tensor, tmp_path: Path
) -> None:
    settings = QUICK.model_copy(update={"checkpoint_every": 2})
    model, work = tiny_model("llama"), tmp_path / "work"
    model.save_pretrained(tmp_path / "model")
    torch.save(windows, tmp_path / "windows.pt")
    killed = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-c", KILLED_WHILE_WRITING),
            *(str(tmp_path / "model"), str(tmp_path / "windows.pt")),
            *(settings.model_dump_json(), str(work)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert sorted(folder.name[:11] for folder in work.iterdir()) == [".unfinished", "step-000000"]
    seen: list[int] = []
    resumed = recover(
        model, windows, settings, work=work, progress=lambda what, done, total: seen.append(done)
    )
    assert seen == [3, 4, 5, 6]
    whole = recover(tiny_model("llama"), windows, settings)
    assert_same_bytes(model.state_dict(), whole.model.state_dict())
    assert resumed.history == whole.history


@pytest.mark.parametrize("what", ["settings", "windows", "model", "teacher"])
def test_checkpoints_of_another_run_are_not_resumed_from(
    tiny_model: ModelFactory,
    windows: Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    settings = QUICK.model_copy(update={"distillation": 0.5, "steps": 2})
    teacher = tiny_model("llama", seed=1)
    recover(tiny_model("llama"), windows, settings, teacher=teacher, work=tmp_path)
    other = {
        "settings": settings.model_copy(update={"learning_rate": 1e-4}),
        "windows": windows.flip(0),
        "model": tiny_model("llama", seed=2),
        "teacher": tiny_model("llama", seed=3),
    }
    seen: list[int] = []
    with caplog.at_level(logging.INFO):
        recover(
            other["model"] if what == "model" else tiny_model("llama"),
            other["windows"] if what == "windows" else windows,
            other["settings"] if what == "settings" else settings,
            teacher=other["teacher"] if what == "teacher" else teacher,
            work=tmp_path,
            progress=lambda what, done, total: seen.append(done),
        )
    assert seen == [1, 2]
    assert "belongs to other settings or data; not resumed from" in caplog.text


def test_how_often_checkpoints_are_written_does_not_matter_to_resuming(
    tiny_model: ModelFactory, windows: Tensor, tmp_path: Path
) -> None:
    recover(tiny_model("llama"), windows, QUICK, work=tmp_path)
    seen: list[int] = []
    settings = QUICK.model_copy(update={"checkpoint_every": 1})
    recover(
        tiny_model("llama"),
        windows,
        settings,
        work=tmp_path,
        progress=lambda what, done, total: seen.append(done),
    )
    assert seen == []


@pytest.mark.parametrize("file", ["record.json", "tensors.safetensors"])
def test_a_torn_checkpoint_is_set_aside_with_a_warning(
    tiny_model: ModelFactory,
    windows: Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    file: str,
) -> None:
    whole = recover(tiny_model("llama"), windows, QUICK, work=tmp_path)
    torn = tmp_path / "step-00000006" / file
    os.truncate(torn, torn.stat().st_size // 2)
    again = recover(tiny_model("llama"), windows, QUICK, work=tmp_path)
    assert "cannot be read" in caplog.text
    assert again.history == whole.history
    assert json.loads((tmp_path / "step-00000006" / "record.json").read_text())["history"]


def test_a_checkpoint_is_on_the_disk_before_the_older_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    checkpoints = Checkpoints(tmp_path / "work", "digest", 1)
    checkpoints.write({"a": torch.zeros(3)}, [{"step": 1}])
    fsync, rename, remove = os.fsync, Path.rename, shutil.rmtree

    def note_sync(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        (file,) = [p for p in [*tmp_path.rglob("*")] if p.stat().st_ino == inode]
        events.append(f"sync {file.name.partition('-')[0]}")
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> Path:
        events.append("rename")
        return rename(source, target)

    def note_removal(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            events.append(f"remove {folder.name}")
        remove(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(shutil, "rmtree", note_removal)
    checkpoints.write({"a": torch.ones(3)}, [{"step": 1}, {"step": 2}])
    assert sorted(events[:2]) == ["sync record.json", "sync tensors.safetensors"]
    assert events[2:] == ["sync .unfinished", "rename", "sync work", "remove step-00000001"]


def test_of_two_checkpoints_the_one_that_is_whole_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, "digest", 1)
    checkpoints.write({"a": torch.zeros(3)}, [{"step": 1}])
    before = tmp_path / "step-00000001"
    shutil.copytree(before, tmp_path / "kept")
    checkpoints.write({"a": torch.ones(3)}, [{"step": 1}, {"step": 2}])
    (tmp_path / "kept").rename(before)  # the machine died before the older one went
    newest = tmp_path / "step-00000002"
    os.truncate(newest / "tensors.safetensors", 20)
    saved = checkpoints.newest()
    assert saved is not None
    assert torch.equal(saved.tensors["a"], torch.zeros(3))
    assert f"{newest} cannot be read" in caplog.text


# --- honesty and mistakes ----------------------------------------------------------------------


@pytest.mark.parametrize("survivors", ["lora_merge", "full"])
def test_a_recovery_that_harms_says_so_and_leaves_the_model_as_it_was(
    tiny_model: ModelFactory,
    windows: Tensor,
    caplog: pytest.LogCaptureFixture,
    survivors: Literal["lora_merge", "full"],
) -> None:
    settings = QUICK.model_copy(update={"learning_rate": 1e-2, "steps": 10})
    model = tiny_model("llama", num_hidden_layers=2)
    recover(model, windows, settings.model_copy(update={"steps": 40}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    contrary = (-windows) % 97
    harmful = settings.model_copy(update={"train_survivors": survivors})
    result = recover(model, contrary, harmful, validation=windows)
    assert result.is_worse
    assert "it made the model worse, which stays as it was" in result.summary
    assert "stays as it was" in caplog.text
    assert_same_bytes(model.state_dict(), before)


def test_windows_that_are_held_back_train_nothing(
    tiny_model: ModelFactory, windows: Tensor
) -> None:
    """Otherwise the loss that decides whether a recovery did any good is that of the training."""
    many = windows.repeat(5, 1)[:40].clone()
    many[:, 0] = torch.arange(40)
    settings = QUICK.model_copy(update={"validation_fraction": 0.05})
    trained, validation = _held_back(many, settings)
    assert validation is not None
    assert (len(trained), len(validation)) == (38, 2)
    together = torch.cat([trained, validation])[:, 0]
    assert together.sort().values.tolist() == list(range(40))
    result = recover(tiny_model("llama", num_hidden_layers=2), many, settings)
    assert result.validation_before is not None
    assert _held_back(many, QUICK)[1] is None


def test_a_loss_that_is_not_finite_names_the_step_and_restores_the_model(
    tiny_model: ModelFactory, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def blow_up(hidden: Tensor, *rest: Any) -> Tensor:
        calls.append(1)
        return original(hidden, *rest) * (float("nan") if len(calls) > 4 else 1)

    model = tiny_model("llama")
    original = Blend.weigh
    monkeypatch.setattr(Blend, "weigh", blow_up)
    with pytest.raises(InputError, match="loss is nan at step 3 of 6; use lower learning rates"):
        recover(model, windows, QUICK)
    assert_same_bytes(model.state_dict(), tiny_model("llama").state_dict())


def test_settings_that_do_not_fit_are_refused_in_a_sentence(
    tiny_model: ModelFactory, windows: Tensor
) -> None:
    model = tiny_model("llama")
    distilled = QUICK.model_copy(update={"distillation": 0.5})
    with pytest.raises(InputError, match="needs a teacher"):
        recover(model, windows, distilled)
    with pytest.raises(InputError, match="have 50 and 97 tokens"):
        recover(model, windows, distilled, teacher=tiny_model("llama", vocab_size=50))
    with pytest.raises(InputError, match="windows of 2 tokens or more, got 12 of 1"):
        recover(model, windows[:, :1], QUICK)


def test_a_head_that_does_more_than_project_is_refused(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 2)
    with pytest.raises(InputError, match="does not know what llama does to its logits"):
        head_of(model)


def test_recovery_leaves_the_random_numbers_of_the_caller_alone(
    tiny_model: ModelFactory, windows: Tensor
) -> None:
    model = tiny_model("llama")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    recover(model, windows, QUICK.model_copy(update={"lora_dropout": 0.1}))
    assert torch.equal(torch.rand(3), expected)


def test_precision_follows_the_settings() -> None:
    cpu = torch.device("cpu")
    assert autocast_dtype("float32", cpu) is None
    assert autocast_dtype("bfloat16", cpu) is torch.bfloat16
    expected = torch.bfloat16 if torch.cpu._is_amx_tile_supported() else None
    assert autocast_dtype("auto", cpu) is expected


# --- several processes -------------------------------------------------------------------------

ONE_OF_TWO = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from foldstack.compression.training.recovery import Recovery, recover

folder = Path(sys.argv[1])
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder / "model")
windows = torch.load(folder / "windows.pt", weights_only=True)
settings = Recovery.model_validate_json((folder / "settings.json").read_text())
recover(model, windows, settings, work=folder / "work")
rank = torch.distributed.get_rank()
assert torch.distributed.get_world_size() == 2
torch.save(model.state_dict(), folder / f"recovered-{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_what_one_trains(
    tiny_model: ModelFactory, windows: Tensor, tmp_path: Path
) -> None:
    settings = QUICK.model_copy(update={"gradient_accumulation": 2, "batch_size": 4})
    tiny_model("llama").save_pretrained(tmp_path / "model")
    torch.save(windows, tmp_path / "windows.pt")
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ONE_OF_TWO, str(tmp_path)],
            env=os.environ
            | launched
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"},
        )
        for rank in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    model = tiny_model("llama")
    recover(model, windows, settings)
    for rank in range(2):
        found = torch.load(tmp_path / f"recovered-{rank}.pt", weights_only=True)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_adapters_get_first_values_while_another_thread_builds_a_model(tiny_model: Any) -> None:
    """A model that is built without them leaves them out for the whole process: loss was NaN."""
    model, building, made = tiny_model("llama"), threading.Event(), threading.Event()

    def build() -> None:
        with BUILDING, no_init_weights():
            building.set()
            made.wait(0.3)

    thread = threading.Thread(target=build)
    thread.start()
    building.wait()
    adapters = open_adapters(model)
    made.set()
    thread.join()
    first = [p for name, p in adapters.matrices.items() if "lora_A" in name]
    assert first
    assert all(0.0 < p.std() < 1.0 for p in first)
