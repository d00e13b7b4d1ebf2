"""What an artifact says about itself: its files, where it came from, what was measured."""

import errno
import hashlib
import json
import logging
import os
import platform
import re
import stat
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from foldstack.compression.storage.digest import digest_file
from foldstack.compression.storage.durable import sync_file, sync_folder

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RECORDED_PACKAGES = (
    "accelerate",
    "datasets",
    "foldstack",
    "lm-eval",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
# Above this, a file that nobody touched since publication is trusted until it is read.
CHECKED_AT_ONCE_BYTES = 64 << 20
MANIFEST_BYTES = 16 << 20
"""A longer manifest is not read: ours have some kilobytes."""
PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
"""What weights must not be in: to read a pickle is to run whatever its maker wants."""
UNSEALED = "0" * 64
SEAL = re.compile(rb'"seal": ?"([0-9a-f]{64})"\s*\}\s*\Z')

Facts = dict[str, float | int | str | bool | None]

# Files found intact by this process: path, inode, size, time of change, digest.
_intact: set[tuple[str, int, int, int, str]] = set()


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Path inside the artifact, with forward slashes."""
    size_bytes: int = Field(ge=0, lt=1 << 63)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        path = PurePosixPath(name)
        leaves = (
            path.is_absolute() or ".." in path.parts or not path.parts or set(name) & set("\\:\0")
        )
        if leaves or name != str(path):
            raise ValueError(f"a file of an artifact must be inside its folder, got {name!r}")
        if path.suffix.lower() in PICKLES:
            raise ValueError(f"weights must be safetensors, and {name} is named like a pickle")
        return name


class Manifest(BaseModel):
    """Everything that is known of an artifact; the last file to be written into it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )

    version: Literal[1] = 1
    stage: str
    fingerprint: str
    label: str
    """The same for a person, e.g. "compress shortgpt 0.25"."""
    created: datetime
    seconds: float = Field(ge=0, allow_inf_nan=False)
    """Wall time that producing it took."""
    ingredients: dict[str, Any]
    """What the fingerprint is the digest of."""
    inputs: tuple[str, ...]
    """The artifacts and models that it was made from, "stage/fingerprint"."""
    versions: dict[str, str]
    hardware: str
    facts: Facts
    files: tuple[FileEntry, ...]
    seal: str = Field(default=UNSEALED, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the manifest's bytes with zeros in this place: facts are results too, and a bit
    that flips in them must not become another result."""

    @field_validator("files")
    @classmethod
    def _each_file_once(cls, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        names = [file.name for file in files]
        if len(set(names)) < len(names) or MANIFEST in names:
            raise ValueError(f"each file must be named once, and {MANIFEST} not at all")
        return files

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def sealed_bytes(self) -> bytes:
        """The content of its file, with the seal."""
        plain = self.model_copy(update={"seal": UNSEALED}).model_dump_json(indent=1).encode()
        return _with_seal(plain, hashlib.sha256(plain).hexdigest())


def describe_files(folder: Path) -> tuple[FileEntry, ...]:
    """Name, size and digest of every file below `folder`; each is also flushed to the disk."""
    assert not (folder / MANIFEST).exists(), f"{MANIFEST} is written by the store, nobody else"
    return tuple(_describe(folder, folder / name) for name in sorted(_files_below(folder)))


def publish_folder(building: Path, final: Path, manifest: Manifest) -> None:
    """Seal a built folder with its manifest and let it appear at its final place at once."""
    (building / MANIFEST).write_bytes(manifest.sealed_bytes())
    sync_file(building / MANIFEST)
    show_folder(building, final)


def show_folder(building: Path, final: Path) -> None:
    """Let a whole artifact appear at its final place at once."""
    sync_folder(building)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        building.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # While this process was paused another one took over, and was first.
        logger.warning("%s was published by another process meanwhile", final)
    sync_folder(final.parent)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`.

    It may come from anybody who can write to the store, and is trusted with nothing.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no manifest, or not as it was written; says why in one line.
    """
    return parse_manifest(_plain_bytes(folder / MANIFEST))


def parse_manifest(content: bytes) -> Manifest:
    """The manifest whose file has this content.

    Raises:
        ValueError: as of `read_manifest`.
    """
    try:
        data = json.loads(content, object_pairs_hook=_each_key_once)
        json.dumps(data, ensure_ascii=False).encode()  # half a character could not be printed
        manifest = Manifest.model_validate(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(f"{place}: {first['msg']}") from None
    if hashlib.sha256(_with_seal(content, UNSEALED)).hexdigest() != manifest.seal:
        raise ValueError("it has other contents than when it was written")
    return manifest


def find_damage(folder: Path, stage: str, fingerprint: str, *, thorough: bool) -> str | None:
    """Why the artifact in `folder` cannot be used, or None.

    Sizes are compared always. Digests are compared once per process and file; unless `thorough`,
    not those of big files that were not written to since publication.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "it is not in the store"
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({str(error).splitlines()[0]})"
    if (manifest.stage, manifest.fingerprint) != (stage, fingerprint):
        return f"its manifest is that of {manifest.stage}/{manifest.fingerprint[:12]}"
    published = manifest.created.timestamp() + 2  # clocks of file systems are coarse
    try:
        there = _files_below(folder)
    except (OSError, ValueError) as error:
        return str(error)
    if missing := [file.name for file in manifest.files if file.name not in there]:
        return f"{missing[0]} is missing"
    strangers = there.keys() - {MANIFEST, *(file.name for file in manifest.files)}
    if strangers:  # what a folder holds decides what a library loads from it
        return f"{min(strangers)} is not in its manifest"
    damages = (
        _damage_of(folder / file.name, there[file.name], file, published, thorough)
        for file in manifest.files
    )
    return next((damage for damage in damages if damage), None)


def _damage_of(
    file: Path, status: os.stat_result, entry: FileEntry, published: float, thorough: bool
) -> str | None:
    if status.st_size != entry.size_bytes:
        return f"{entry.name} has {status.st_size} bytes instead of {entry.size_bytes}"
    untouched = status.st_mtime <= published and status.st_size > CHECKED_AT_ONCE_BYTES
    if (thorough or not untouched) and not _has_digest(file, status, entry.sha256):
        return f"{entry.name} has other contents than when it was written"
    return None


def now() -> datetime:
    return datetime.now(UTC)


@lru_cache(maxsize=256)
def package_version(distribution: str) -> str:
    """Public version of an installed distribution: "2.13.0", also for the build "2.13.0+cpu"."""
    try:
        return metadata.version(distribution).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "not installed"


def recorded_versions() -> dict[str, str]:
    versions = {name: package_version(name) for name in RECORDED_PACKAGES}
    return {"python": platform.python_version()} | versions


def _files_below(folder: Path) -> dict[str, os.stat_result]:
    """The files of an artifact by their names in its manifest; links are not followed.

    Raises:
        ValueError: there is something that is neither a file nor a folder.
        OSError: a folder cannot be read.
    """
    found = {}
    for directory, folders, names in os.walk(folder, onerror=_raise):
        for name in [*folders, *names]:
            path = Path(directory, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                found[path.relative_to(folder).as_posix()] = status
            elif not stat.S_ISDIR(status.st_mode):
                raise ValueError(f"{path.relative_to(folder)} is not a plain file")
    return found


def _raise(error: OSError) -> None:
    raise error


def _plain_bytes(file: Path) -> bytes:
    """The content of a small plain file: a link, a pipe or a device is not waited for."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MANIFEST_BYTES:
            raise ValueError(f"it must be a plain file of at most {MANIFEST_BYTES >> 20} MiB")
        return stream.read()


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers of a key that stands there twice may see different values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {max(keys, key=keys.count)!r} stands there twice")
    return found


def _with_seal(content: bytes, seal: str) -> bytes:
    found = SEAL.search(content)
    if found is None:
        raise ValueError("it carries no seal")
    return content[: found.start(1)] + seal.encode() + content[found.end(1) :]


def _describe(folder: Path, file: Path) -> FileEntry:
    sync_file(file)
    name = file.relative_to(folder).as_posix()
    return FileEntry(name=name, size_bytes=file.stat().st_size, sha256=digest_file(file))


def _has_digest(file: Path, status: os.stat_result, sha256: str) -> bool:
    key = (str(file), status.st_ino, status.st_size, status.st_mtime_ns, sha256)
    if key not in _intact:
        if digest_file(file) != sha256:
            return False
        _intact.add(key)
    return True
