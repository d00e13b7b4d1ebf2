"""The store of artifacts: directories published all at once under the digest of their making.

    <root>/artifacts/<stage>/<fingerprint>/   finished, with manifest.json; never written to again
    <root>/work/<stage>/<fingerprint>/        state that a killed run resumes from
    <root>/tmp/                               being built; swept when its maker is dead
    <root>/damaged/                           found damaged and set aside
    <root>/locks/, <root>/records/            one lock per fingerprint; Prefect's result records

Several processes may share a store. A lock is the kernel's, so a killed process holds none.
"""

import errno
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

from foldstack.compression.errors import InputError
from foldstack.tasks.manifest import (
    MANIFEST,
    Facts,
    Manifest,
    describe_files,
    find_damage,
    hardware,
    now,
    read_manifest,
    recorded_versions,
)

logger = logging.getLogger(__name__)

HOME_VARIABLE = "FOLDSTACK_HOME"
RUN_AGAIN = "run the same command again to make it anew"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def foldstack_home() -> Path:
    """Where results go: the environment's FOLDSTACK_HOME, or runs/ in the current directory."""
    return Path(os.environ.get(HOME_VARIABLE) or "runs").expanduser().resolve()


class Artifact(BaseModel):
    """Place of a stage's output in a store, known before the output is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    stage: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    fingerprint: str = Field(pattern=r"^[0-9a-f]{16,64}$")
    root: Path
    """The store's folder."""

    @property
    def folder(self) -> Path:
        """Where its files are, once it is made; `open` also looks whether they are."""
        return self.root / "artifacts" / self.stage / self.fingerprint

    @property
    def key(self) -> str:
        """Name of its lock, and the start of the names of folders that will become it."""
        return f"{self.stage}-{self.fingerprint}"

    def manifest(self) -> Manifest:
        """What is known of it, without a look at the other files."""
        try:
            return read_manifest(self.folder)
        except (OSError, ValueError) as error:
            raise InputError(f"{self} is not in the store: {error}; {RUN_AGAIN}") from error

    def damage(self, *, thorough: bool) -> str | None:
        """Why it cannot be used, or None; `thorough` compares every byte (once per process)."""
        return find_damage(self.folder, self.stage, self.fingerprint, thorough=thorough)

    def open(self) -> Path:
        """Its folder, after every file was compared with the manifest (once per process).

        Raises:
            InputError: it was never made, was deleted, or is damaged; a damaged one is set aside.
        """
        damage = self.damage(thorough=True)
        if damage is None:
            return self.folder
        if os.path.lexists(self.folder):
            ArtifactStore(self.root).set_aside(self)
        raise InputError(f"{self} cannot be used: {damage}; {RUN_AGAIN}")

    def __str__(self) -> str:
        return f"{self.stage}/{self.fingerprint[:12]}"


@dataclass(frozen=True)
class ArtifactStore:
    """All artifacts under one folder; cheap to make, and to send to another process."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.expanduser().resolve())

    @classmethod
    def default(cls) -> "ArtifactStore":
        return cls(foldstack_home() / "store")

    def artifact(self, stage: str, fingerprint: str) -> Artifact:
        """Where this output is or will be."""
        return Artifact(stage=stage, fingerprint=fingerprint, root=self.root)

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The finished artifact, or None; a damaged one is set aside and counts as none."""
        artifact = self.artifact(stage, fingerprint)
        damage = artifact.damage(thorough=False)
        if damage is None:
            with suppress(OSError):
                os.utime(artifact.folder / MANIFEST)  # `gc` keeps what was used of late
            return artifact
        if os.path.lexists(artifact.folder):
            self.set_aside(artifact)
        return None

    def work_folder(self, stage: str, fingerprint: str) -> Path:
        """Folder that outlives a kill and goes when the artifact is published."""
        folder = self.root / "work" / stage / fingerprint
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def publish(
        self,
        stage: str,
        fingerprint: str,
        produce: Callable[[Path], Facts],
        *,
        label: str = "",
        ingredients: Mapping[str, Any] | None = None,
        inputs: tuple[str, ...] = (),
    ) -> Artifact:
        """Make the artifact with `produce(folder)`, unless another process has just made it.

        The artifact appears whole or not at all, whenever this process dies.

        Raises:
            InputError: the disk is full, or the store cannot be written to.
        """
        artifact = self.artifact(stage, fingerprint)
        with self.locked(artifact):
            if self._is_finished(artifact):
                return artifact
            building = self._building_folder(artifact)
            try:
                started = time.perf_counter()
                facts = self._run(produce, building)
                seconds = time.perf_counter() - started
                with self._explained():
                    manifest = Manifest(
                        stage=stage,
                        fingerprint=fingerprint,
                        label=label or str(artifact),
                        created=now(),
                        seconds=seconds,
                        ingredients=dict(ingredients or {}),
                        inputs=inputs,
                        versions=recorded_versions(),
                        hardware=hardware(),
                        facts=facts,
                        files=describe_files(building),
                    )
                    _publish_folder(building, artifact.folder, manifest)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            shutil.rmtree(self.root / "work" / stage / fingerprint, ignore_errors=True)
        return artifact

    def set_aside(self, artifact: Artifact) -> None:
        """Move a damaged artifact to damaged/, so that it is made anew; says so in the log."""
        try:
            with self.locked(artifact, wait=False):
                self._set_aside_damaged(artifact)
        except (OSError, InputError) as error:  # a read-only store; or it is being made anew
            logger.warning("%s is damaged and stays where it is: %s", artifact, error)

    def _set_aside_damaged(self, artifact: Artifact) -> None:
        """Look once more, now that nobody else can replace it; then move it."""
        damage = artifact.damage(thorough=True)
        if damage is None or not os.path.lexists(artifact.folder):
            return
        place = self.root / "damaged" / f"{artifact.key}-{uuid.uuid4().hex[:8]}"
        place.parent.mkdir(exist_ok=True)
        artifact.folder.rename(place)
        logger.warning("%s is damaged (%s): it was moved to %s", artifact, damage, place)

    def _is_finished(self, artifact: Artifact) -> bool:
        with self._explained():
            self._set_aside_damaged(artifact)
        return artifact.folder.exists()

    def _building_folder(self, artifact: Artifact) -> Path:
        folder = self.root / "tmp" / f"{artifact.key}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        with self._explained():
            self._sweep(held=artifact)
            folder.mkdir(parents=True)
        return folder

    def _sweep(self, *, held: Artifact) -> None:
        """Remove what dead processes were building: those whose lock is free, or is now ours."""
        for leftover in (self.root / "tmp").glob("*"):
            key = leftover.name.rsplit("-", 2)[0]
            ours = key == held.key
            with suppress(Timeout), nullcontext() if ours else self.lock(key).acquire(timeout=0):
                shutil.rmtree(leftover, ignore_errors=True)

    def lock(self, key: str) -> FileLock:
        """Lock of one artifact, which the kernel frees when its holder dies."""
        file = self.root / "locks" / f"{key}.lock"
        with self._explained():
            file.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(file)

    @contextmanager
    def locked(self, artifact: Artifact, *, wait: bool = True) -> Iterator[None]:
        """Hold the artifact's lock.

        Raises:
            Timeout: somebody else holds it, and `wait` is off.
        """
        lock = self.lock(artifact.key)
        with self._explained():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if not wait:
                    raise
                logger.info("%s is being made by another process: waiting for it", artifact)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _run(self, produce: Callable[[Path], Facts], folder: Path) -> Facts:
        """Call `produce`; a full disk may come from any library, in that library's own words."""
        try:
            return produce(folder)
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in DISK_FULL
            if full or "No space left on device" in str(error):
                raise InputError(self._disk_full()) from error
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn a failure to write to the store into a sentence."""
        try:
            yield
        except Timeout:
            raise
        except OSError as error:
            if error.errno in DISK_FULL:
                raise InputError(self._disk_full()) from error
            raise InputError(
                f"the store must be a folder that can be written to, and {self.root} is not "
                f"({error.strerror or error}); set {HOME_VARIABLE} to another place"
            ) from error

    def _disk_full(self) -> str:
        return (
            f"no space is left on the disk of {self.root}; `foldstack cache gc` frees some, or set "
            f"{HOME_VARIABLE} to a place on another disk"
        )


def _publish_folder(building: Path, final: Path, manifest: Manifest) -> None:
    """Seal a built folder with its manifest and let it appear at its final place at once."""
    with (building / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(manifest.model_dump_json(indent=1))
        stream.flush()
        os.fsync(stream.fileno())
    _flush_folder(building)
    final.parent.mkdir(parents=True, exist_ok=True)
    building.rename(final)
    _flush_folder(final.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
