"""Memory and processors that the control group of this process leaves it: those of a container."""

from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
"""Version 1 says that there is no limit by a number larger than any memory."""


def memory_left() -> int | None:
    """Bytes that may still be taken before a limit is reached; None where there is none.

    Pages of files that were read count as used, and are given back when memory is needed.
    """
    left: list[int] = []
    for folder in groups("memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < UNLIMITED:
            left.append(max(0, limit - used + _reclaimable(folder / "memory.stat")))
    return min(left, default=None)


def processors() -> float | None:
    """Processors that the process may use all the time; None where nothing limits it."""
    found: list[float] = []
    for folder in groups("cpu"):
        words = _text(folder / "cpu.max").split()
        if not words:
            quota, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
            words = [*_text(quota).split(), *_text(period).split()]
        if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def groups(controller: str) -> Iterator[Path]:
    """The folder of this process's group and of those above it, version 2 before version 1."""
    for line in _text(MEMBERSHIP).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and controller not in controllers.split(","):
            continue
        root = ROOT if number == "0" else ROOT / controllers
        own = root / path.strip("/")
        # A container may see its own group as the root, or under the name that its host has for it.
        own = own if own.is_dir() else root
        while own != root:
            yield own
            own = own.parent
        yield root


def _reclaimable(stat: Path) -> int:
    for line in _text(stat).splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _number(*files: Path) -> int | None:
    texts = (_text(file).strip() for file in files)
    return next((int(text) for text in texts if text.isdigit()), None)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
