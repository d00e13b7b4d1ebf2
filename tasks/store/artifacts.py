"""The store of artifacts: directories published all at once under the digest of their making.

    <root>/artifacts/<stage>/<fingerprint>/   finished, with manifest.json; never written to again
    <root>/work/<stage>/<fingerprint>/<uuid>/ state that a killed run resumes from
    <root>/tmp/                               being built; swept when its maker is dead
    <root>/damaged/                           found damaged and set aside
    <root>/leases/, <root>/records/           who makes what (leases.py); Prefect's result records

Several processes, also of several machines, may share a store. Where it has an address of object
storage too, what is made goes there, and what is not here is looked for there.
"""

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from foldstack.compression.errors import InputError
from foldstack.tasks.environment.hardware import hardware
from foldstack.tasks.environment.home import (
    HOME_VARIABLE,
    disk_full,
    foldstack_home,
    is_disk_full,
    store_url,
    telling_disk_full,
)
from foldstack.tasks.store.leases import Held, Lease, leased, living_holder
from foldstack.tasks.store.manifest import (
    MANIFEST,
    Facts,
    Manifest,
    describe_files,
    find_damage,
    now,
    publish_folder,
    read_manifest,
    recorded_versions,
    show_folder,
)
from foldstack.tasks.store.object_storage import object_storage

logger = logging.getLogger(__name__)

RUN_AGAIN = "run the same command again to make it anew"


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
        """Name of its leases, and the start of the names of folders that will become it."""
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
    url: str = ""
    """Object storage that machines without a common disk share, e.g. s3://bucket/prefix; `root` is
    then what this machine has of it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.expanduser().resolve())

    @classmethod
    def default(cls) -> "ArtifactStore":
        return cls(foldstack_home() / "store", store_url())

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
            self._keep(artifact)
            return artifact
        if os.path.lexists(artifact.folder):
            self.set_aside(artifact)
        return artifact if self._find_elsewhere(artifact) else None

    def holds(self, artifact: Artifact) -> bool:
        """True when it is here undamaged, or in the object storage; changes nothing."""
        return artifact.damage(thorough=False) is None or (
            bool(self.url) and object_storage(self.url).has(artifact.stage, artifact.fingerprint)
        )

    def publish(
        self,
        stage: str,
        fingerprint: str,
        produce: Callable[[Path, Path], Facts],
        *,
        label: str = "",
        ingredients: Mapping[str, Any] | None = None,
        inputs: tuple[str, ...] = (),
        on_wait: Callable[[str], None] = lambda holder: None,
    ) -> Artifact:
        """Make the artifact with `produce(folder, work)`, unless another process has just made it.

        The artifact appears whole or not at all, whenever this process dies. What `produce` puts
        into `work` it finds there again after a kill.

        Args:
            stage: the kind of stage.
            fingerprint: digest of everything that determines the output.
            produce: writes the files.
            label, ingredients, inputs: for the manifest.
            on_wait: told every second who is making it, "host:pid", while that is somebody else.

        Raises:
            InputError: the disk is full, or the store cannot be written to.
        """
        artifact = self.artifact(stage, fingerprint)
        known = {
            "label": label or str(artifact),
            "ingredients": dict(ingredients or {}),
            "inputs": inputs,
        }
        while True:
            with self._leased(artifact, on_wait) as leases:
                try:
                    if not (self._is_finished(artifact) or self._fetch(artifact)):
                        self._make(artifact, produce, known)
                    self._keep(artifact)
                    return artifact
                except Exception:
                    if not any(lease.is_lost() for lease in leases):
                        raise
            logger.warning("%s: another process took over while this one was paused", artifact)

    def _make(
        self, artifact: Artifact, produce: Callable[[Path, Path], Facts], known: dict[str, Any]
    ) -> None:
        work = self._work_folder(artifact)
        building = self._building_folder(artifact)
        try:
            started = time.perf_counter()
            facts = self._run(produce, building, work)
            with self._explained():
                manifest = Manifest(
                    **known,
                    stage=artifact.stage,
                    fingerprint=artifact.fingerprint,
                    created=now(),
                    seconds=time.perf_counter() - started,
                    versions=recorded_versions(),
                    hardware=hardware(),
                    facts=facts,
                    files=describe_files(building),
                )
                publish_folder(building, artifact.folder, manifest)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):  # somebody took over, and has just come to know that it is made
            work.parent.rmdir()

    def _keep(self, artifact: Artifact) -> None:
        """Have it in the object storage too."""
        if self.url:
            object_storage(self.url).keep(artifact.folder, artifact.manifest())

    def _find_elsewhere(self, artifact: Artifact) -> bool:
        if not (self.url and object_storage(self.url).has(artifact.stage, artifact.fingerprint)):
            return False
        try:
            with self._explained():
                lease = Lease.take(self.lease_folder(artifact.key))
        except Held:  # who publishes waits for it
            return False
        try:
            return self._fetch(artifact)
        finally:
            lease.release()

    def _fetch(self, artifact: Artifact) -> bool:
        """Bring it here from the object storage; the lease of it is ours."""
        if not self.url:
            return False
        building = self._building_folder(artifact)
        try:
            is_there = object_storage(self.url).fetch(
                artifact.stage, artifact.fingerprint, building
            )
            if is_there:
                with self._explained():
                    show_folder(building, artifact.folder)
            return is_there
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def set_aside(self, artifact: Artifact) -> None:
        """Move a damaged artifact to damaged/, so that it is made anew; says so in the log."""
        try:
            lease = Lease.take(self.lease_folder(artifact.key))
        except (OSError, Held) as error:  # a read-only store; or it is being made anew
            logger.warning("%s is damaged and stays where it is: %s", artifact, error)
            return
        try:
            self._set_aside_damaged(artifact)
        except OSError as error:
            logger.warning("%s is damaged and stays where it is: %s", artifact, error)
        finally:
            lease.release()

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

    def _work_folder(self, artifact: Artifact) -> Path:
        """State to resume from, under a name that an earlier, paused maker does not know."""
        parent = self.root / "work" / artifact.stage / artifact.fingerprint
        folder = parent / uuid.uuid4().hex[:8]
        with self._explained():
            parent.mkdir(parents=True, exist_ok=True)
            earlier = sorted(parent.iterdir(), key=lambda path: path.stat().st_mtime)
            if earlier:
                earlier.pop().rename(folder)
            folder.mkdir(exist_ok=True)
        for older in earlier:
            shutil.rmtree(older, ignore_errors=True)
        return folder

    def _building_folder(self, artifact: Artifact) -> Path:
        folder = self.root / "tmp" / f"{artifact.key}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        with self._explained():
            self._sweep(held=artifact)
            folder.mkdir(parents=True)
        return folder

    def _sweep(self, *, held: Artifact) -> None:
        """Remove what dead processes were building: nobody has their lease, or we have it now."""
        for leftover in (self.root / "tmp").glob("*"):
            key = leftover.name.rsplit("-", 2)[0]
            if key == held.key or living_holder(self.lease_folder(key)) is None:
                shutil.rmtree(leftover, ignore_errors=True)

    def lease_folder(self, key: str) -> Path:
        """Where the leases of one artifact are."""
        return self.root / "leases" / key

    @contextmanager
    def _leased(self, artifact: Artifact, on_wait: Callable[[str], None]) -> Iterator[list[Lease]]:
        """Hold the lease of this machine, or of its shared disk, and that of the object storage."""
        told: set[str] = set()

        def wait_for(holder: str) -> None:
            if holder not in told:
                logger.info("%s is being made by %s: waiting for it", artifact, holder)
                told.add(holder)
            on_wait(holder)

        with ExitStack() as stack:
            with self._explained():
                leases = [stack.enter_context(leased(self.lease_folder(artifact.key), wait_for))]
            if self.url:
                everywhere = object_storage(self.url).leases(artifact.key)
                leases.append(stack.enter_context(leased(everywhere, wait_for)))
            yield leases

    def _run(self, produce: Callable[[Path, Path], Facts], folder: Path, work: Path) -> Facts:
        """Call `produce`; a full disk may come from any library, in that library's own words."""
        with telling_disk_full(self.root):
            return produce(folder, work)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn a failure to write to the store into a sentence."""
        try:
            yield
        except OSError as error:
            if is_disk_full(error):
                raise InputError(disk_full(self.root)) from error
            raise InputError(
                f"the store must be a folder that can be written to, and {self.root} is not "
                f"({error.strerror or error}); set {HOME_VARIABLE} to another place"
            ) from error
