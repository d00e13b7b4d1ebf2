"""What lies in the store, and what of it can go."""

import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from foldstack.tasks.store.artifacts import Artifact, ArtifactStore
from foldstack.tasks.store.leases import Held, Lease, living_holder
from foldstack.tasks.store.manifest import MANIFEST, Manifest, now, read_manifest
from foldstack.tasks.store.object_storage import object_storage

IN_USE_DAYS = 1.0
"""What was used since then stays however full the store is: a sweep may be at it."""


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


def list_object_storage(store: ArtifactStore) -> list[StoredArtifact]:
    """The same of the store's object storage.

    Raises:
        InputError: it does not answer.
    """
    storage = object_storage(store.url)
    rows = [
        StoredArtifact(
            store.artifact(*name), storage.manifest(*name), making.size_bytes, making.last_used
        )
        for name, making in storage.makings().items()
        if making.last_used is not None
    ]
    return sorted(rows, key=lambda row: row.last_used, reverse=True)


def collect_garbage(
    store: ArtifactStore,
    *,
    keep_days: float = 30,
    keep: Collection[str] = (),
    held: Collection[str] = (),
    max_bytes: int | None = None,
    dry_run: bool = False,
) -> list[Removal]:
    """Remove what no run of the last `keep_days` used: artifacts, work of killed runs, rubbish.

    What another process is making stays. Damaged artifacts and what dead processes
    were building go whatever their age.

    Args:
        store: where to clean.
        keep_days: age, counted from the last use, from which something goes.
        keep: fingerprints, or their beginnings, of artifacts that stay, with what they were made
            from.
        held: fingerprints of artifacts that stay, and they alone.
        max_bytes: size of all artifacts together from which more of them go, those first that were
            not used for longest; what was used in the last day stays.
        dry_run: only say what would go.
    """
    before = now() - timedelta(days=keep_days)
    removals = [
        *_old_artifacts(store, before, keep, held, max_bytes),
        *_orphaned_work(store, before),
        *_leftovers(store),
        *(_removal("damaged", path) for path in (store.root / "damaged").glob("*")),
    ]
    done = removals if dry_run else [removal for removal in removals if _remove(store, removal)]
    rest = [*_useless_records(store, done, before), *_useless_leases(store, before)]
    done += rest if dry_run else [removal for removal in rest if _remove(store, removal)]
    return done + (_clean_object_storage(store, before, keep, held, dry_run) if store.url else [])


def _clean_object_storage(
    store: ArtifactStore,
    before: datetime,
    keep: Collection[str],
    held: Collection[str],
    dry_run: bool,
) -> list[Removal]:
    """Old artifacts there, and files that nobody's manifest speaks of."""
    storage, removals = object_storage(store.url), []
    rows = list_object_storage(store)
    kept = _with_inputs(rows, keep) | set(held)
    for row in rows:
        stage, fingerprint = row.artifact.stage, row.artifact.fingerprint
        if row.last_used < before and fingerprint not in kept:
            label = row.manifest.label if row.manifest else "unreadable"
            path = Path(store.url.partition("://")[2], stage, fingerprint)
            removals.append(Removal("artifact", path, row.size_bytes, label))
            if not dry_run:
                storage.remove(stage, fingerprint)
    if not dry_run:
        for name, making in storage.makings().items():
            storage.remove_leftovers(*name, making)
        storage.remove_old_leases(before)
    return removals


def _old_artifacts(
    store: ArtifactStore,
    before: datetime,
    keep: Collection[str],
    held: Collection[str],
    max_bytes: int | None,
) -> Iterator[Removal]:
    """Those that are too old, then the oldest of the rest until it is small enough."""
    rows = list_artifacts(store)
    kept = _with_inputs(rows, keep) | set(held)
    size = sum(row.size_bytes for row in rows)
    recently = now() - timedelta(days=IN_USE_DAYS)
    for row in reversed(rows):
        is_too_much = max_bytes is not None and size > max_bytes and row.last_used < recently
        if row.artifact.fingerprint in kept or not (row.last_used < before or is_too_much):
            continue
        size -= row.size_bytes
        label = row.manifest.label if row.manifest else "unreadable"
        yield Removal("artifact", row.artifact.folder, row.size_bytes, label)


def _with_inputs(rows: Sequence[StoredArtifact], keep: Collection[str]) -> set[str]:
    """The fingerprints that begin so, and those of everything that they were made from."""
    known = {row.artifact.fingerprint: row.manifest for row in rows}
    waiting = [name for name in known if name.startswith(tuple(keep))]
    kept: set[str] = set()
    while waiting:
        name = waiting.pop()
        manifest = known.get(name)
        if name not in kept and manifest is not None:
            waiting.extend(reference.rpartition("/")[2] for reference in manifest.inputs)
        kept.add(name)
    return kept


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
    if (store.root / "locks").is_dir():  # of the time before there were leases
        yield _removal("leftover", store.root / "locks")


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
