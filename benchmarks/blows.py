"""What faults.py does to a small sweep: each blow runs it, strikes, and says what it found."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from small_sweep import RUN_SECONDS, SmallSweep

from foldstack.tasks.environment.home import WORDS_OF_LIBRARIES, disk_full, disk_too_small

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
SERVERS = {"prefect": "Prefect", "mlflow": "MLflow", "postgres": "Postgres"}
"""Kinds of blows, and what local_stack.py calls the parts that they hit."""

OUTAGE_SECONDS = (0.5, 6.0)
LARGE_BYTES, FULL_BYTES = 1 << 30, 1 << 12


@dataclass
class Struck:
    """What one blow did."""

    hit: bool
    """False when the run was over before the blow came."""
    finished: dict[str, str]
    """What was finished then, and when it was made."""
    lost_seconds: float = 0.0
    exit_code: int | None = None
    """Of the run, where it ended by itself."""
    damaged: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    refused: bool = False
    """True when the run saw before it began that it could not end."""


@dataclass
class Scene:
    """Where a blow strikes."""

    sweep: SmallSweep
    chance: random.Random
    moment: Callable[[], float]
    """Seconds after the beginning of the work at which to strike, drawn anew."""
    home_bytes: int
    """What a finished home takes on a disk."""
    afterwards: ExitStack
    servers: "Servers"

    def run_until(self, moment: float) -> "subprocess.Popen[bytes]":
        process = self.sweep.start()
        self.sweep.wait_for_work(process)
        deadline = time.monotonic() + moment
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return process


class Servers:
    """Those of deploy/local_stack.py, or none."""

    def __init__(self, stack: Any = None, parts: Any = None) -> None:
        self._parts = parts
        self.environment: dict[str, str] = {} if stack is None else stack.client

    @classmethod
    @contextmanager
    def up(cls, home: Path) -> Iterator["Servers"]:
        sys.path.insert(0, str(DEPLOY))
        import local_stack
        from stack import stack_in

        stack = stack_in(home)
        with local_stack.up(stack) as parts:
            os.environ.update(stack.client)  # for the look at MLflow's runs
            yield cls(stack, parts)

    def changes(self, name: str) -> dict[str, Any]:
        """Of a sweep's config: each has an experiment of its own on a shared MLflow server."""
        return {"tracking": {"experiment": f"faults/{name}"}} if self.environment else {}

    def kill(self, kind: str) -> None:
        self._parts.kill(SERVERS[kind])

    def restart(self, kind: str) -> None:
        self._parts.restart(SERVERS[kind])


def kill_flow(scene: Scene) -> Struck:
    process = scene.run_until(scene.moment())
    lost, hit = scene.sweep.seconds_under_way(), process.poll() is None
    process.kill()
    code = process.wait()
    return Struck(hit, scene.sweep.finished(), lost, exit_code=None if hit else code)


def kill_worker(scene: Scene) -> Struck:
    """The flow goes on without it, and ends by itself."""
    process = scene.run_until(scene.moment())
    while process.poll() is None and not (workers := scene.sweep.workers()):
        time.sleep(0.05)
    if process.poll() is not None:
        return Struck(False, scene.sweep.finished(), exit_code=process.returncode)
    lost, finished = scene.sweep.seconds_under_way(), scene.sweep.finished()
    os.kill(scene.chance.choice(workers), signal.SIGKILL)
    return Struck(True, finished, lost, exit_code=process.wait(RUN_SECONDS))


def damage_files(scene: Scene, change: Callable[[Path, random.Random], None]) -> Struck:
    """In a home in which the sweep has ended; dates stay, as when a disk fails."""
    code = scene.sweep.start().wait(RUN_SECONDS)
    finished = scene.sweep.finished()
    folder = scene.sweep.store.root / "artifacts"
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    hurt = scene.chance.sample(files, scene.chance.randint(1, 2))
    for file in hurt:
        times = file.stat()
        change(file, scene.chance)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    damaged = {"-".join(file.relative_to(folder).parts[:2]) for file in hurt}
    return Struck(True, finished, exit_code=code, damaged=damaged)


def truncate(scene: Scene) -> Struck:
    def cut(file: Path, chance: random.Random) -> None:
        os.truncate(file, chance.randrange(file.stat().st_size))

    return damage_files(scene, cut)


def flip(scene: Scene) -> Struck:
    def flip_bit(file: Path, chance: random.Random) -> None:
        place, bit = chance.randrange(file.stat().st_size), 1 << chance.randrange(8)
        with file.open("r+b") as stream:
            stream.seek(place)
            byte = stream.read(1)[0]
            stream.seek(place)
            stream.write(bytes([byte ^ bit]))

    return damage_files(scene, flip_bit)


def fill_disk(scene: Scene) -> Struck:
    """The home is a tmpfs, too small from the beginning or full from a random moment on.

    Afterwards it has room enough. A run that is refused for want of room has not been hit."""
    home = scene.sweep.home
    if not home.is_mount():
        home.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", home], check=True)
        scene.afterwards.callback(subprocess.run, ["umount", "-l", home], check=True)
    used = LARGE_BYTES - _free(home, LARGE_BYTES)
    told = scene.sweep.log.stat().st_size if scene.sweep.log.exists() else 0
    if scene.chance.random() < 0.5:
        left = max(scene.home_bytes - used, 1 << 15)
        _free(home, int(used + scene.chance.uniform(0.02, 0.95) * left))
        process = scene.sweep.start()
    else:
        process = scene.run_until(scene.moment())
        _fill(home)
    code = process.wait(RUN_SECONDS)
    finished = scene.sweep.finished()
    said = scene.sweep.log.read_bytes()[told:].decode(errors="replace")
    _free(home, LARGE_BYTES)
    if _begin(disk_too_small(home, 0, 0)) in said:
        wrong = [] if code == 2 else [f"refused for want of room with exit code {code}"]
        return Struck(False, finished, exit_code=code, wrong=wrong, refused=True)
    full = _begin(disk_full(home)) in said
    hit = code != 0 or full or any(words in said for words in WORDS_OF_LIBRARIES)
    silent = code != 0 and not full
    return Struck(hit, finished, exit_code=code, wrong=["no sentence on the disk"] * silent)


def _begin(sentence: str) -> str:
    """What does not depend on the place and the numbers."""
    return sentence.partition(" of ")[0]


def _fill(mount: Path) -> None:
    """Leave hardly any room; what is written meanwhile makes the first tries fail."""
    for _ in range(100):
        with suppress(subprocess.CalledProcessError):
            _free(mount, LARGE_BYTES - _free(mount, LARGE_BYTES) + FULL_BYTES)
            return
    raise RuntimeError(f"{mount} was written to faster than it could be filled")


def _free(mount: Path, size: int) -> int:
    """Give the file system that size; what of it is free then."""
    subprocess.run(["mount", "-o", f"remount,size={size}", mount], check=True)
    status = os.statvfs(mount)
    return status.f_bavail * status.f_bsize


def kill_server(scene: Scene, kind: str) -> Struck:
    """It comes back after some seconds; the flow may have lived through it."""
    process = scene.run_until(scene.moment())
    lost, hit = scene.sweep.seconds_under_way(), process.poll() is None
    scene.servers.kill(kind)
    finished = scene.sweep.finished()
    time.sleep(scene.chance.uniform(*OUTAGE_SECONDS))
    scene.servers.restart(kind)
    code = process.wait(RUN_SECONDS)
    return Struck(hit, finished, lost if code != 0 else 0.0, exit_code=code)


BLOWS: dict[str, Callable[[Scene], Struck]] = {
    "flow": kill_flow,
    "worker": kill_worker,
    "truncate": truncate,
    "flip": flip,
    "disk": fill_disk,
    "prefect": lambda scene: kill_server(scene, "prefect"),
    "mlflow": lambda scene: kill_server(scene, "mlflow"),
    "postgres": lambda scene: kill_server(scene, "postgres"),
}
