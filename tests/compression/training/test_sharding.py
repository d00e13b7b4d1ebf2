"""A model spread over processes: its units, what it computes, its checkpoints. Two processes that
train one are in tests/tasks/test_recover_model.py."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.training.adapters import Adapters
from foldstack.compression.training.distillation import Blend, head_of
from foldstack.compression.training.objective import FIGURES, Objective, Tail
from foldstack.compression.training.recovery import Recovery
from foldstack.compression.training.sharding import (
    mesh_of,
    parts_of,
    spread_objective,
    take_back,
    together,
)
from foldstack.compression.training.training_checkpoints import Checkpoints
from foldstack.compression.training.training_loop import Training

ModelFactory = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone, which puts blocks together and takes them apart as many would."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture
def windows() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 97, (8, 12), generator=generator)


def opened(model: PreTrainedModel) -> Adapters:
    return Adapters(model, rank=3, alpha=6, dropout=0.0, train_vectors=True, in_float32=False)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_spread_model_has_the_loss_and_the_gradients_of_the_whole_one(
    structured: Callable[..., Any],
    structure: str,
    windows: Tensor,
    mesh: DeviceMesh,
) -> None:
    """A block that borrows from another finds a part of a weight where the two are no unit."""
    dtype = torch.bfloat16 if structure == "virtual_blocks" else torch.float32
    model = structured(structure)
    autocast_to = None if dtype == torch.float32 else dtype
    head, adapters = head_of(model.to(dtype)), opened(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    last = len(architecture_of(model).blocks(model)) - 1
    blend, tail = Blend(0.5), Tail(0.5, ((last, last),))
    teacher = structured(structure).to(dtype)
    whole = Objective(model, head, blend, teacher, autocast_to, tail)
    expected, _ = whole(windows)
    expected.backward()
    spread = spread_objective(model, blend, teacher, autocast_to, tail, mesh, CPU)
    for _ in range(2):  # what was put together once is taken apart again
        spread.zero_grad()
        loss, _ = spread(windows)
        loss.backward()
    torch.testing.assert_close(loss, expected)
    parts = parts_of(spread, model, adapters.trainable)
    for name, parameter in adapters.trainable.items():
        torch.testing.assert_close(parts[name].grad.full_tensor(), parameter.grad, msg=name)
    with torch.no_grad():
        for part in parts.values():
            part.add_(1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # parts have memory of their own
    take_back(parts, adapters.trainable)
    for name, parameter in adapters.trainable.items():
        assert torch.equal(parameter, parts[name].full_tensor())
    assert adapters.trainable


def test_blocks_that_share_weights_are_one_unit(structured: Callable[..., Any]) -> None:
    expected = {
        "factored": [[0], [1], [2], [3]],
        "shared_basis": [[0], [1, 2], [3]],
        "virtual_blocks": [[0], [1, 3], [2]],
        "shared_heads": [[0, 1, 2, 3]],
    }
    for structure, groups in expected.items():
        model = structured(structure)
        blocks = list(architecture_of(model).blocks(model))
        assert together(blocks) == [[blocks[place] for place in group] for group in groups]


@pytest.mark.parametrize(
    ("told", "num_processes"),
    [({}, 2), ({"ACCELERATE_USE_FSDP": "true"}, 1), ({"ACCELERATE_USE_FSDP": "true"}, 2)],
)
def test_a_model_is_spread_where_fsdp_of_version_2_was_launched(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], num_processes: int
) -> None:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    accelerator: Any = SimpleNamespace(num_processes=num_processes, device=CPU)
    if not told or num_processes == 1:
        assert mesh_of(accelerator) is None
        return
    with pytest.raises(InputError, match="launch it with --fsdp_version 2"):
        mesh_of(accelerator)


def test_a_resumed_training_begins_with_what_was_saved(
    tiny_model: ModelFactory, windows: Tensor, mesh: DeviceMesh, tmp_path: Path
) -> None:
    """The pass over windows held back leaves norms together, and these were used once more."""
    model = tiny_model("llama", num_hidden_layers=2)
    head, adapters = head_of(model), opened(model)
    spread = spread_objective(model, Blend(0.0), None, None, None, mesh, CPU)
    parts = parts_of(spread, model, adapters.trainable)
    training = Training(
        objective=spread,
        trainable=parts,
        optimizer=torch.optim.AdamW(parts.values()),
        schedule=Recovery().schedule,
        accelerator=SimpleNamespace(),  # type: ignore[arg-type]
        figure_names=FIGURES,
        is_spread=True,
    )
    saved = {f"value/{name}": part.detach() + 0.1 for name, part in parts.items()}
    for moment in ("exp_avg", "exp_avg_sq"):
        saved |= {f"{moment}/{name}": torch.zeros_like(part) for name, part in parts.items()}
    checkpoints = Checkpoints(tmp_path, "digest", 1)
    checkpoints.write(saved, [{"step": 1}], seconds=2.0)
    with torch.no_grad():
        spread(windows)
        for parameter in adapters.trainable.values():
            parameter.add_(0.1)
        expected, _ = Objective(model, head, Blend(0.0))(windows)
    assert training._resume(checkpoints.newest()) == ([{"step": 1}], 2.0)
    torch.testing.assert_close(spread(windows)[0], expected)


def test_a_checkpoint_of_parts_is_read_as_a_whole(mesh: DeviceMesh, tmp_path: Path) -> None:
    """A run that two processes began goes on in one, or three; a part that is gone is noticed."""
    whole = {"a": torch.arange(6.0).view(3, 2), "b": torch.tensor([7.0])}
    parts = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}
    checkpoints = Checkpoints(tmp_path, "digest", 1)
    checkpoints.write(parts, [{"step": 1}], seconds=2.0)
    saved = checkpoints.newest()
    assert saved is not None
    (file,) = saved.folder.glob("*.safetensors")
    assert saved.record["files"] == [file.name]
    for read in (
        {name: torch.zeros_like(tensor) for name, tensor in whole.items()},
        {name: torch.zeros_like(tensor) for name, tensor in parts.items()},
    ):
        saved.read_into(read)
        for name, tensor in read.items():
            found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(found, whole[name])
    checkpoints.write(whole, [{"step": 1}, {"step": 2}])
    again = {name: torch.zeros_like(tensor) for name, tensor in parts.items()}
    newest = checkpoints.newest()
    assert newest is not None
    newest.read_into(again)
    assert all(torch.equal(again[name].full_tensor(), whole[name]) for name in whole)
    (newest.folder / "tensors.safetensors").unlink()
    assert checkpoints.newest() is None
