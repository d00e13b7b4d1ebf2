"""A stage of the pipeline: what it is made from, and so whether it was made already."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from foldstack.compression.errors import InputError
from foldstack.compression.storage.digest import PACKAGE, code_sources, digest_json
from foldstack.tasks.store.artifacts import Artifact, ArtifactStore
from foldstack.tasks.store.manifest import Facts, package_version

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


def no_progress(what: str, done: int, total: int) -> None:
    """Tell nobody."""


class ModelRef(BaseModel):
    """A model that no stage made: the packaged one, a local directory, or a hub download."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """As the user wrote it."""
    folder: Path
    fingerprint: str
    """Digest of its files: the same model under another name or path is the same model."""
    origin: str = ""
    """What its weights were dequantised from, in a sentence; empty where they are as they came."""

    @classmethod
    def of(cls, model: str, revision: str | None = None) -> "ModelRef":
        """Find the model and read its files.

        Raises:
            InputError: there is no such model, or its files are incomplete.
        """
        from foldstack.compression.checkpoints.checkpoint import model_fingerprint
        from foldstack.compression.checkpoints.model_folder import resolve

        folder = resolve(model, revision)
        return cls(name=model, folder=folder, fingerprint=model_fingerprint(folder))

    def open(self) -> Path:
        """Its folder; the twin of `Artifact.open`.

        Raises:
            InputError: the folder is gone.
        """
        if not self.folder.is_dir():
            raise InputError(f"model {self.name} must be a folder, and {self.folder} is gone")
        return self.folder


class Stage(BaseModel, ABC):
    """One computation with one output: its fields are its parameters and its inputs.

    Inputs are fields (or values inside fields) that have a fingerprint: `Artifact`, `ModelRef`.
    An `Artifact` is known before it is made, so a whole chain can be laid out in advance:

        windows = Calibrate(model=model, windows=128)
        statistics = GatherStatistics(model=model, calibration=windows.artifact(store))
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    stage: ClassVar[str]
    """Name of the kind of stage and of its folder in the store, e.g. "compress"."""
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    """Distributions whose version changes the output."""
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset()
    """Fields that do not change the output, e.g. the device."""

    @abstractmethod
    def modules(self) -> tuple[str, ...]:
        """Library modules that do the work; what they import counts by itself."""

    @abstractmethod
    def produce(self, folder: Path, work: Path, progress: Progress) -> Facts:
        """Write the output's files into `folder`; return small facts worth knowing without them.

        `work` holds what a killed run left behind, and is deleted at the end.
        """

    @property
    def label(self) -> str:
        """Name for a person, e.g. "compress shortgpt 0.25"; stages override it."""
        return self.stage

    @property
    def fingerprint(self) -> str:
        """Digest of everything that determines the output."""
        return digest_json({"stage": self.stage, **self.ingredients()})

    def ingredients(self) -> dict[str, Any]:
        """What the fingerprint is made of, to be read and compared by a person."""
        counted = [name for name in type(self).model_fields if name not in self.outside_fingerprint]
        return {
            "parameters": {name: _plain(getattr(self, name)) for name in counted},
            "code": self._code(),
            "versions": {name: package_version(name) for name in self.packages},
        }

    def inputs(self) -> tuple[str, ...]:
        """The artifacts and models that it is made from, "stage/fingerprint"."""
        fields = (getattr(self, name) for name in type(self).model_fields)
        return tuple(dict.fromkeys(_references(tuple(fields))))

    def in_smaller_batches(self, halvings: int) -> Self:
        """The same stage with less at once, where the size of a batch changes no result."""
        size = getattr(self, "batch_size", 1)
        if "batch_size" not in self.outside_fingerprint or halvings == 0:
            return self
        return self.model_copy(update={"batch_size": max(1, size >> halvings)})

    def artifact(self, store: ArtifactStore) -> Artifact:
        """Where its output is, or will be once it has run."""
        return store.artifact(self.stage, self.fingerprint)

    def _code(self) -> dict[str, str]:
        """Digests of the library code, and of the stage's own file: that one names the modules of
        every method and setting, so what it imports does not count.
        """
        own = type(self).__module__
        alone = [own] if own.startswith(f"{PACKAGE}.") else []
        return code_sources(self.modules(), alone=alone)


def run_stage(stage: Stage, store: ArtifactStore, progress: Progress = no_progress) -> Artifact:
    """The stage's artifact: from the store, or made now.

    Raises:
        InputError: the store cannot be written to, or the stage's input is at fault.
    """
    fingerprint, ingredients = stage.fingerprint, stage.ingredients()
    found = store.find(stage.stage, fingerprint)
    if found is not None:
        logger.info("%s: found in the store as %s", stage.label, found)
        return found
    is_made_here = False

    def produce(folder: Path, work: Path) -> Facts:
        nonlocal is_made_here
        is_made_here = True
        return stage.produce(folder, work, progress)

    artifact = store.publish(
        stage.stage,
        fingerprint,
        produce,
        label=stage.label,
        ingredients=ingredients,
        inputs=stage.inputs(),
        on_wait=lambda holder: progress(f"waiting for {holder}, which makes it", 0, 1),
    )
    if is_made_here:
        logger.info("%s: made in %.1f s as %s", stage.label, artifact.manifest().seconds, artifact)
    else:
        logger.info("%s: another process has just made it, as %s", stage.label, artifact)
    return artifact


def _reference(value: Any) -> str | None:
    """ "stage/fingerprint" of an input; None for a parameter."""
    if not hasattr(value, "fingerprint"):
        return None
    return f"{getattr(value, 'stage', 'model')}/{value.fingerprint}"


def _references(value: Any) -> Iterator[str]:
    reference = _reference(value)
    if reference is not None:
        yield reference
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _references(getattr(value, name))
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _references(inner)


def _plain(value: Any) -> Any:
    """The value in JSON types, with inputs as their references."""
    reference = _reference(value)
    if reference is not None:
        return reference
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(inner) for inner in value)
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, PurePath):
        return value.as_posix()
    assert value is None or isinstance(value, (bool, int, float, str)), (
        f"a stage's field must be made of JSON types, got {type(value).__name__}"
    )
    return value
