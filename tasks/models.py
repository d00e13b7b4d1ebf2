"""Where the model of a stage's input lies, and how it is opened."""

from pathlib import Path
from typing import TYPE_CHECKING

from foldstack.tasks.artifacts import Artifact
from foldstack.tasks.execution import Dtype, Execution, torch_dtype
from foldstack.tasks.stage import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_FOLDER = "model"


def model_folder(model: ModelRef | Artifact) -> Path:
    """The Hugging Face directory of a model, or of the one inside an artifact.

    Raises:
        InputError: it is gone or damaged.
    """
    return model.open() / MODEL_FOLDER if isinstance(model, Artifact) else model.open()


def open_model(model: ModelRef | Artifact, dtype: Dtype, execution: Execution) -> "PreTrainedModel":
    """The model, on the device and in the precision that were asked for."""
    from foldstack.compression.checkpoint import load_model

    device = execution.begin()
    return load_model(model_folder(model), dtype=torch_dtype(dtype), device=device)
