"""What lies in the store, and what of it can go."""

import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from foldstack.tasks.artifacts import Artifact, ArtifactStore
from foldstack.tasks.leases import Held, Lease, living_holder
from foldstack.tasks.manifest import MANIFEST, Manifest, now, read_manifest


@dataclass(frozen=True)
class StoredArtifact:
    """One row of `foldstack cache ls`."""

    artifact: Artifact
    manifest: Manifest | None
    """None when it cannot be read: the next use sets the artifact aside."""
    size_bytes: int
    last_used: datetime


@dataclass(frozen=True)
class Removal:
    """One thing that `collect_garbage` removed, or would remove."""

    kind: Literal["artifact", "work", "leftover", "damaged", "record", "lease"]
    path: Path
    size_bytes: int
    label: str


def list_artifacts(store: ArtifactStore) -> list[StoredArtifact]:
    """Every artifact in the store, the one used last first."""
    rows = []
    for folder in _two_levels(store.root / "artifacts"):
        with suppress(OSError, ValidationError):  # gone meanwhile, or not an artifact's name
            artifact = store.artifact(folder.parent.name, folder.name)
            rows.append(_row(artifact))
    return sorted(rows, key=lambda row: row.last_used, reverse=True)


def collect_garbage(
    store: ArtifactStore,
    *,
    keep_days: float = 30,
    keep: Collection[str] = (),
    dry_run: bool = False,
) -> list[Removal]:
    """Remove what no run of the last `keep_days` used: artifacts, work of killed runs, rubbish.

    What another process is making stays. Damaged artifacts and what dead processes
    were building go whatever their age.

    Args:
        store: where to clean.
        keep_days: age, counted from the last use, from which something goes.
        keep: fingerprints, or their beginnings, of artifacts that stay.
        dry_run: only say what would go.
    """
    before = now() - timedelta(days=keep_days)
    removals = [
        *_old_artifacts(store, before, keep),
        *_orphaned_work(store, before),
        *_leftovers(store),
        *(_removal("damaged", path) for path in (store.root / "damaged").glob("*")),
    ]
    done = removals if dry_run else [removal for removal in removals if _remove(store, removal)]
    rest = [*_useless_records(store, done, before), *_useless_leases(store, before)]
    return done + (rest if dry_run else [removal for removal in rest if _remove(store, removal)])


def _old_artifacts(
    store: ArtifactStore, before: datetime, keep: Collection[str]
) -> Iterator[Removal]:
    for row in list_artifacts(store):
        if row.last_used < before and not row.artifact.fingerprint.startswith(tuple(keep)):
            label = row.manifest.label if row.manifest else "unreadable"
            yield Removal("artifact", row.artifact.folder, row.size_bytes, label)


def _orphaned_work(store: ArtifactStore, before: datetime) -> Iterator[Removal]:
    """State to resume from: of use until its artifact is there, or too old to matter."""
    for folder in _two_levels(store.root / "work"):
        finished = (store.root / "artifacts" / folder.parent.name / folder.name).exists()
        if (finished or _last_change(folder) < before) and not _is_in_use(store, _key_of(folder)):
            yield _removal("work", folder)


def _leftovers(store: ArtifactStore) -> Iterator[Removal]:
    for folder in (store.root / "tmp").glob("*"):
        if not _is_in_use(store, folder.name.rsplit("-", 2)[0]):
            yield _removal("leftover", folder)


def _useless_records(
    store: ArtifactStore, removed: list[Removal], before: datetime
) -> Iterator[Removal]:
    """Records of artifacts that are gone, and the errors that Prefect keeps of failed tasks."""
    for file in (store.root / "records").glob("*"):
        if file.is_file() and _last_change(file) < before:
            yield _removal("record", file)
    gone = {removal.path for removal in removed}
    for file in _two_levels(store.root / "records"):
        artifact = store.root / "artifacts" / file.parent.name / file.stem
        if artifact in gone or not artifact.exists():
            yield _removal("record", file)


def _useless_leases(store: ArtifactStore, before: datetime) -> Iterator[Removal]:
    """Leases of what was never made, or is gone."""
    for folder in (store.root / "leases").glob("*"):
        place = Path(*folder.name.rpartition("-")[::2])
        is_of_use = any((store.root / kind / place).exists() for kind in ("artifacts", "work"))
        if not is_of_use and _last_change(folder) < before and living_holder(folder) is None:
            yield _removal("lease", folder)


def _remove(store: ArtifactStore, removal: Removal) -> bool:
    """Remove one thing, first from its place and then from the disk; False when it is in use."""
    match removal.kind:
        case "damaged" | "leftover":
            shutil.rmtree(removal.path, ignore_errors=True)
        case "record":
            removal.path.unlink(missing_ok=True)
        case "lease":
            return _discard_lease(removal.path)
        case "artifact" | "work":
            return _remove_from_its_place(store, removal.path)
    return True


def _discard_lease(folder: Path) -> bool:
    try:
        Lease.take(folder).discard()
    except Held:
        return False
    return True


def _remove_from_its_place(store: ArtifactStore, path: Path) -> bool:
    key = _key_of(path)
    doomed = store.root / "tmp" / f"{key}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    doomed.parent.mkdir(exist_ok=True)
    try:
        lease = Lease.take(store.lease_folder(key))
    except Held:
        return False
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return False
    finally:
        lease.discard()
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def _row(artifact: Artifact) -> StoredArtifact:
    folder = artifact.folder
    try:
        manifest, used = read_manifest(folder), (folder / MANIFEST).stat().st_mtime
    except (OSError, ValueError):
        manifest, used = None, folder.stat().st_mtime
    return StoredArtifact(artifact, manifest, _size_bytes(folder), _moment(used))


def _removal(
    kind: Literal["work", "leftover", "damaged", "record", "lease"], path: Path
) -> Removal:
    return Removal(kind, path, _size_bytes(path), path.name)


def _two_levels(folder: Path) -> Iterator[Path]:
    """<folder>/<stage>/<fingerprint>"""
    return folder.glob("*/*")


def _key_of(folder: Path) -> str:
    return f"{folder.parent.name}-{folder.name}"


def _is_in_use(store: ArtifactStore, key: str) -> bool:
    return living_holder(store.lease_folder(key)) is not None


def _size_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.lstat().st_size for file in files)


def _last_change(folder: Path) -> datetime:
    return _moment(max(path.lstat().st_mtime for path in (folder, *folder.rglob("*"))))


def _moment(timestamp: float) -> datetime:
    return datetime.fromtimestamp(timestamp, UTC)
