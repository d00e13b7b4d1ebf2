"""What an artifact says about itself: its files, where it came from, what was measured."""

import errno
import logging
import os
import platform
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from foldstack.compression.digest import digest_file

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

Facts = dict[str, float | int | str | bool | None]

# Files found intact by this process: path, inode, size, time of change, digest.
_intact: set[tuple[str, int, int, int, str]] = set()


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Path inside the artifact, with forward slashes."""
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        path = PurePosixPath(name)
        leaves = (
            path.is_absolute() or ".." in path.parts or not path.parts or set(name) & set("\\:")
        )
        if leaves or name != str(path):
            raise ValueError(f"a file of an artifact must be inside its folder, got {name!r}")
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
    seconds: float
    """Wall time that producing it took."""
    ingredients: dict[str, Any]
    """What the fingerprint is the digest of."""
    inputs: tuple[str, ...]
    """The artifacts and models that it was made from, "stage/fingerprint"."""
    versions: dict[str, str]
    hardware: str
    facts: Facts
    files: tuple[FileEntry, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def describe_files(folder: Path) -> tuple[FileEntry, ...]:
    """Name, size and digest of every file below `folder`; each is also flushed to the disk."""
    assert not (folder / MANIFEST).exists(), f"{MANIFEST} is written by the store, nobody else"
    return tuple(_describe(folder, file) for file in sorted(_files_below(folder)))


def publish_folder(building: Path, final: Path, manifest: Manifest) -> None:
    """Seal a built folder with its manifest and let it appear at its final place at once."""
    with (building / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(manifest.model_dump_json(indent=1))
        stream.flush()
        os.fsync(stream.fileno())
    _flush_folder(building)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        building.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # While this process was paused another one took over, and was first.
        logger.warning("%s was published by another process meanwhile", final)
    _flush_folder(final.parent)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no manifest.
    """
    return Manifest.model_validate_json((folder / MANIFEST).read_bytes())


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
    damages = (_damage_of(folder / file.name, file, published, thorough) for file in manifest.files)
    return next((damage for damage in damages if damage), None)


def _damage_of(file: Path, entry: FileEntry, published: float, thorough: bool) -> str | None:
    try:
        status = file.lstat()
    except OSError as error:
        return f"{entry.name}: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return f"{entry.name} is not a plain file"
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


@lru_cache(maxsize=1)
def hardware() -> str:
    """The machine in words, without its name: "AMD EPYC 7B13, 2 cores, 23 GiB, no GPU"."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [_processor(), f"{os.cpu_count()} cores", f"{memory:.0f} GiB"]
    torch = sys.modules.get("torch")  # imported where a GPU was used; not for a sentence
    if torch is None or not torch.cuda.is_available():
        return ", ".join([*parts, "no GPU"])
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(parts + gpus)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _files_below(folder: Path) -> Iterator[Path]:
    for directory, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(directory, name)
            assert not path.is_symlink(), f"an artifact holds files, and {path} is a link"
            if path.is_file():
                yield path


def _describe(folder: Path, file: Path) -> FileEntry:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
    name = file.relative_to(folder).as_posix()
    return FileEntry(name=name, size_bytes=file.stat().st_size, sha256=digest_file(file))


def _has_digest(file: Path, status: os.stat_result, sha256: str) -> bool:
    key = (str(file), status.st_ino, status.st_size, status.st_mtime_ns, sha256)
    if key not in _intact:
        if digest_file(file) != sha256:
            return False
        _intact.add(key)
    return True


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
