"""The stage that makes plain weights of quantised ones, before anything else is planned."""

import logging
from pathlib import Path
from typing import ClassVar

from foldstack.tasks.environment.execution import Dtype, torch_dtype
from foldstack.tasks.models import MODEL_FOLDER
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import ModelRef, Progress, run_stage
from foldstack.tasks.store.artifacts import ArtifactStore
from foldstack.tasks.store.manifest import Facts

logger = logging.getLogger(__name__)


class DequantizeModel(ComputedStage):
    """A plain model directory, of a GGUF file or of a folder whose config names a quantisation."""

    stage: ClassVar[str] = "dequantize_model"
    packages: ClassVar[tuple[str, ...]] = (
        "torch",
        "transformers",
        "gguf",
        "compressed-tensors",
        "bitsandbytes",
    )
    # The digest says which bytes it is made of; where they lie changes nothing.
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"place"})

    place: Path
    """The file or folder."""
    place_digest: str
    dtype: Dtype = "auto"

    def modules(self) -> tuple[str, ...]:
        return ("foldstack.compression.checkpoints.quantized_weights",)

    @property
    def label(self) -> str:
        return f"dequantize {self.place.name}"

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.checkpoints.quantized_weights import dequantize

        progress("read quantised weights", 0, 1)
        return dequantize(self.place, folder / MODEL_FOLDER, torch_dtype(self.dtype))


def find_model(
    store: ArtifactStore, name: str, revision: str | None = None, dtype: Dtype = "auto"
) -> ModelRef:
    """The model of that name: "reference", a directory, a GGUF file or a hub id.

    Quantised weights are dequantised here and now: everything else is planned from a plain folder.
    That is done once; `origin` says what they came from.

    Raises:
        InputError: there is no such model, it is incomplete, or it cannot be dequantised here.
    """
    from foldstack.compression.checkpoints.model_folder import gguf_of, locate, quantization_of

    place = locate(name, revision)
    if gguf_of(place) is None and quantization_of(place) is None:
        return ModelRef.of(name, revision)
    from foldstack.compression.checkpoints.checkpoint import model_fingerprint
    from foldstack.compression.checkpoints.quantized_weights import quantized_digest

    stage = DequantizeModel(place=place, place_digest=quantized_digest(place), dtype=dtype)
    if not store.holds(stage.artifact(store)):
        logger.warning("the weights of %s are dequantised now, once", name)
    made = run_stage(stage, store)
    folder = made.open() / MODEL_FOLDER
    return ModelRef(
        name=name,
        folder=folder,
        fingerprint=model_fingerprint(folder),
        origin=str(made.manifest().facts["sentence"]),
    )
