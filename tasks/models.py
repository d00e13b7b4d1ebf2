"""Where the model of a stage's input lies, and how it is opened."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from foldstack.tasks.environment.execution import Dtype, Execution, torch_dtype
from foldstack.tasks.stage import ModelRef
from foldstack.tasks.store.artifacts import Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_FOLDER = "model"


def model_folder(model: ModelRef | Artifact) -> Path:
    """The Hugging Face directory of a model, or of the one inside an artifact.

    Raises:
        InputError: it is gone or damaged.
    """
    return model.open() / MODEL_FOLDER if isinstance(model, Artifact) else model.open()


# What compressing takes beside the weights: the compressed model, and sums in float64.
ROOM_FACTOR = 2.5


def open_model(
    model: ModelRef | Artifact,
    dtype: Dtype,
    execution: Execution,
    *,
    blocks: Literal["on the device", "in turn", "where they fit"] = "on the device",
) -> "PreTrainedModel":
    """The model in the precision that was asked for, computing on the device that was.

    Where that is not the CPU, the weights of its blocks are there all the time, or one block at a
    time for whoever passes each of them once; or as the memory of the device allows.
    """
    from foldstack.compression.checkpoints.checkpoint import load_model
    from foldstack.compression.statistics.block_residency import run_blocks_in_turn

    device = execution.begin()
    load = partial(load_model, model_folder(model), dtype=torch_dtype(dtype))
    if device == "cpu" or blocks == "on the device":
        return load(device=device)
    opened = load()
    if blocks == "in turn" or not _has_room(opened, device):
        run_blocks_in_turn(opened, device)
        return opened
    return load(device=device)


def _has_room(model: "PreTrainedModel", device: str) -> bool:
    import torch

    if torch.device(device).type != "cuda":
        return True
    weights = sum(parameter.nbytes for parameter in model.parameters())
    free, _ = torch.cuda.mem_get_info(device)
    return ROOM_FACTOR * weights < free
