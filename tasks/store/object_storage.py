"""Artifacts on object storage, S3 or whatever else fsspec speaks: for machines that share no disk.

    <url>/artifacts/<stage>/<fingerprint>/<seal>/...        the files of one making of an artifact
    <url>/artifacts/<stage>/<fingerprint>/manifest.json     put last; its seal says which one counts
    <url>/leases/<stage>-<fingerprint>/                     who is making it (object_leases.py)
    <url>/damaged/<stage>-<fingerprint>-<uuid>.json         manifests of artifacts that were damaged

To put one object is atomic, and no two makings share a file: two machines that make the same
artifact at the same time (one of them was paused, and its lease taken over) both work, and either's
manifest is right. What is fetched is compared with its manifest before it is used.
"""

import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from foldstack.compression.errors import InputError
from foldstack.tasks.environment.redaction import redacted
from foldstack.tasks.store.manifest import MANIFEST, Manifest, find_damage, now, parse_manifest
from foldstack.tasks.store.object_leases import ObjectLeases, put_at

logger = logging.getLogger(__name__)

TOUCH_AFTER = timedelta(days=1)
"""Between two renewals of the date by which `gc` knows that an artifact is used."""
UPLOAD_LASTS = timedelta(days=1)
"""Files without a manifest may be on their way for so long."""


@dataclass
class Making:
    """What lies under the place of one artifact."""

    last_used: datetime | None = None
    """When its manifest was put or renewed; None where there is no manifest."""
    size_bytes: int = 0
    newest: dict[str, datetime] = field(default_factory=dict)
    """By seal, when a file of that making was put last."""


class ObjectStorage:
    """The artifacts under one address, e.g. s3://bucket/prefix.

    Credentials and the endpoint come from the environment (AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL), or from where else the libraries find them.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with self._explained():
            self._files, root = _file_system(self.url)
        self._root = root.rstrip("/")

    def check(self) -> None:
        """Write an object and remove it.

        Raises:
            InputError: that does not work.
        """
        probe = f"{self._root}/probes/{uuid.uuid4().hex}"
        with self._explained():
            self._files.pipe_file(probe, b"probe")
            self._files.rm_file(probe)

    def has(self, stage: str, fingerprint: str) -> bool:
        """True when the artifact is there; what it is worth is seen when it is fetched."""
        with self._explained():
            return bool(self._files.exists(self._manifest(stage, fingerprint)))

    def keep(self, folder: Path, manifest: Manifest) -> None:
        """Put the finished artifact in `folder` there, or note that it was used.

        Raises:
            InputError: it cannot be written to.
        """
        place = self._manifest(manifest.stage, manifest.fingerprint)
        with self._explained():
            try:
                used = put_at(self._files.info(place))
            except FileNotFoundError:
                self._put_files(folder, manifest)
            else:
                if now() - used < TOUCH_AFTER or self._manifest_at(place) != manifest:
                    return
            self._files.pipe_file(place, manifest.sealed_bytes())

    def fetch(self, stage: str, fingerprint: str, folder: Path) -> bool:
        """Bring the artifact into `folder`, which exists; False when it is not there.

        A damaged one is set aside, with a warning that names it, and counts as not there.

        Raises:
            InputError: the storage does not answer.
        """
        place = self._manifest(stage, fingerprint)
        with self._explained():
            try:
                content = self._files.cat_file(place)
            except FileNotFoundError:
                return False
            damage = self._fetch_files(content, place, folder)
            damage = damage or find_damage(folder, stage, fingerprint, thorough=True)
            if damage is not None:
                self._set_aside(stage, fingerprint, content, damage)
        return damage is None

    def leases(self, key: str) -> ObjectLeases:
        """Those of the artifact of this key, for all machines."""
        return ObjectLeases(self._files, f"{self._root}/leases/{key}", self._explained)

    def remove_old_leases(self, before: datetime) -> None:
        """Remove those of artifacts that are not there, if nobody had them since."""
        there = {"-".join(name) for name in self.makings()}
        newest: dict[str, datetime] = {}
        with self._explained():
            for path, info in self._files.find(f"{self._root}/leases", detail=True).items():
                key = path.split("/")[-2]
                newest[key] = max(newest.get(key, put_at(info)), put_at(info))
            for key, moment in newest.items():
                if key not in there and moment < before:
                    self._files.rm(f"{self._root}/leases/{key}", recursive=True)

    def makings(self) -> dict[tuple[str, str], Making]:
        """All artifacts by stage and fingerprint, also those without a manifest."""
        found: dict[tuple[str, str], Making] = {}
        with self._explained():
            listed: Mapping[str, Any] = self._files.find(f"{self._root}/artifacts", detail=True)
        for path, info in listed.items():
            parts = path[len(self._root) :].strip("/").split("/")[1:]
            if len(parts) < 3:
                continue
            making = found.setdefault((parts[0], parts[1]), Making())
            making.size_bytes += info["size"]
            if parts[2:] == [MANIFEST]:
                making.last_used = put_at(info)
            else:
                before = making.newest.get(parts[2], put_at(info))
                making.newest[parts[2]] = max(before, put_at(info))
        return found

    def manifest(self, stage: str, fingerprint: str) -> Manifest | None:
        """What the artifact says about itself; None when that cannot be read."""
        with self._explained():
            return self._manifest_at(self._manifest(stage, fingerprint))

    def remove(self, stage: str, fingerprint: str) -> None:
        """Remove the artifact, its manifest first."""
        with self._explained():
            if self._files.exists(place := self._manifest(stage, fingerprint)):
                self._files.rm_file(place)
            self._files.rm(self._place(stage, fingerprint), recursive=True)

    def remove_leftovers(self, stage: str, fingerprint: str, making: Making) -> None:
        """Remove the files of makings that do not count and are on their way no more."""
        manifest = self.manifest(stage, fingerprint)
        counts = "" if manifest is None else _folder_of(manifest)
        for name, newest in making.newest.items():
            if name != counts and now() - newest > UPLOAD_LASTS:
                with self._explained():
                    self._files.rm(f"{self._place(stage, fingerprint)}/{name}", recursive=True)

    def _put_files(self, folder: Path, manifest: Manifest) -> None:
        place = f"{self._place(manifest.stage, manifest.fingerprint)}/{_folder_of(manifest)}"
        for file in manifest.files:
            self._files.put_file(str(folder / file.name), f"{place}/{file.name}")

    def _fetch_files(self, content: bytes, place: str, folder: Path) -> str | None:
        """Why it cannot be fetched, or None."""
        try:
            manifest = parse_manifest(content)
        except ValueError as error:
            return f"its manifest cannot be read ({error})"
        for file in manifest.files:
            target = folder / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            source = f"{place.rpartition('/')[0]}/{_folder_of(manifest)}/{file.name}"
            try:
                self._files.get_file(source, str(target))
            except FileNotFoundError:
                return f"{file.name} is missing"
        (folder / MANIFEST).write_bytes(content)
        return None

    def _set_aside(self, stage: str, fingerprint: str, content: bytes, damage: str) -> None:
        """Take its manifest away, unless somebody has made it anew meanwhile."""
        place = self._manifest(stage, fingerprint)
        if self._files.cat_file(place) != content:
            return
        aside = f"{self._root}/damaged/{stage}-{fingerprint}-{uuid.uuid4().hex[:8]}.json"
        self._files.pipe_file(aside, content)
        self._files.rm_file(place)
        logger.warning(
            "%s/%s is damaged in %s (%s): it is made anew, and its manifest was moved to %s",
            stage, fingerprint[:12], self.url, damage, aside,
        )  # fmt: skip

    def _manifest_at(self, place: str) -> Manifest | None:
        try:
            return parse_manifest(self._files.cat_file(place))
        except (FileNotFoundError, ValueError):
            return None

    def _place(self, stage: str, fingerprint: str) -> str:
        return f"{self._root}/artifacts/{stage}/{fingerprint}"

    def _manifest(self, stage: str, fingerprint: str) -> str:
        return f"{self._place(stage, fingerprint)}/{MANIFEST}"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn whatever the libraries say into a sentence."""
        try:
            yield
        except ImportError as error:
            raise InputError(
                f"the store at {self.url} needs a package that is missing ({error}); for S3: pip "
                "install 'foldstack[s3]'"
            ) from None
        except InputError:
            raise
        except Exception as error:  # each storage has errors of its own
            said = redacted(f"{type(error).__name__}: {error}").splitlines()[0]
            raise InputError(
                f"the store at {self.url} cannot be used ({said}); check that the bucket exists "
                "and that the environment holds its credentials (AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY) and, where it is not Amazon's, AWS_ENDPOINT_URL"
            ) from None


@lru_cache(maxsize=8)
def object_storage(url: str) -> ObjectStorage:
    """The storage at this address, connected once per process.

    Raises:
        InputError: the address is of a kind that is not known here.
    """
    return ObjectStorage(url)


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    # What another machine has put there must be seen at once.
    found: tuple[Any, str] = url_to_fs(url, use_listings_cache=False)
    return found


def _folder_of(manifest: Manifest) -> str:
    return manifest.seal[:32]
