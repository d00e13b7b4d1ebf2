"""A sweep on the workers of a Dask scheduler: two against one, and with one of them killed.

A scheduler and worker processes are started on this machine, on loopback; the same small sweep of
the reference model runs on one worker, on two, and on two of which one is killed (SIGKILL) in the
middle of a stage. Each time everything is computed, in a store of its own. A stage that was begun
twice is known by the number of its last lease.

    python benchmarks/fanout.py [--json]
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

START_SECONDS = 120.0
SECONDS_BEFORE_DEATH = 2.0
IMPORTED = (
    "torch",
    "transformers",
    "safetensors",
    "foldstack.flows.sweep",
    "foldstack.flows.comparison.rows",
)


def sweep_config(home: Path, address: str) -> dict[str, Any]:
    """Four variants, and the windows in two shards."""
    windows = {"num_windows": 64, "window_tokens": 128}
    return {
        "name": "fan-out",
        "model": {"name": "reference", "device": "cpu"},
        "calibration": windows,
        "statistics": {"shards": 2},
        "methods": ["shortgpt", "svd_llm"],
        "sparsities": [0.15, 0.3],
        "evaluation": {"perplexity": {"protocol": {"window_tokens": 256, "max_tokens": 8192}}},
        "speed": {"enabled": False},
        "tracking": {"enabled": False},
        "execution": {"engine": "dask", "address": address},
        "output": {"home": str(home)},
    }


@contextmanager
def scheduler(folder: Path) -> Iterator[Path]:
    """A Dask scheduler on loopback; gives the file that tells workers where it is."""
    file = folder / "scheduler.json"
    command = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    with dask([*command, "--scheduler-file", str(file)]):
        deadline = time.monotonic() + START_SECONDS
        while not file.exists():
            assert time.monotonic() < deadline, "the scheduler did not start"
            time.sleep(0.1)
        yield file


@contextmanager
def workers(number: int, scheduler_file: Path) -> Iterator[None]:
    """So many workers, with what stages import imported: that takes as long as a short stage."""
    from distributed import Client

    folder = tempfile.mkdtemp(prefix="dask-", dir=scheduler_file.parent)
    command = [
        "worker", "--scheduler-file", str(scheduler_file), "--host", "127.0.0.1", "--no-dashboard",
        "--nworkers", str(number), "--nthreads", "1", "--local-directory", folder,
        "--preload", "foldstack.flows.prefect_defaults",
    ]  # fmt: skip
    with dask(command), Client(address_in(scheduler_file), set_as_default=False) as client:
        client.wait_for_workers(number, timeout=START_SECONDS)
        client.run(import_for_stages)
        yield
    shutil.rmtree(folder, ignore_errors=True)


def import_for_stages() -> None:
    """Import in a worker what its first stages would import."""
    import importlib

    for name in IMPORTED:
        importlib.import_module(name)


@contextmanager
def dask(arguments: list[str]) -> Iterator[None]:
    """A process of Dask's, which ends at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_" + arguments[0], *arguments[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def address_in(scheduler_file: Path) -> str:
    """Where the scheduler listens."""
    address: str = json.loads(scheduler_file.read_text())["address"]
    return address


def run_once(home: Path, address: str) -> dict[str, Any]:
    """One sweep: its wall time, its stages, and what it found."""
    from foldstack.flows.config.run_config import parse_config
    from foldstack.flows.planning.preflight import check
    from foldstack.flows.running.branches import lay_out
    from foldstack.flows.running.progress import Silent
    from foldstack.flows.sweep import run_sweep

    started = time.perf_counter()
    layout = lay_out(parse_config(sweep_config(home, address)))
    check(layout)
    comparison = run_sweep(layout, Silent())
    return {
        "wall": time.perf_counter() - started,
        "inside": sum(s.artifact(layout.store).manifest().seconds for s in layout.stages),
        "stages": len(layout.stages),
        "begun_again": begun_again(layout.store.root / "leases"),
        "bits_per_byte": [row.number("bits_per_byte") for row in comparison.rows],
    }


def begun_again(leases: Path) -> list[str]:
    """The artifacts that more than one process set about to make."""
    last = {
        folder.name: max(int(file.name.partition(".")[0]) for file in folder.iterdir())
        for folder in leases.iterdir()
    }
    return sorted(name.rpartition("-")[0] for name, number in last.items() if number > 1)


class Killer(threading.Thread):
    """Kills the worker that has been compressing a model for a while."""

    def __init__(self, leases: Path) -> None:
        super().__init__(daemon=True)
        self._leases = leases
        self.victim = ""
        self.seconds_lost = 0.0

    def run(self) -> None:
        """Wait for such a worker, and kill it."""
        seen: dict[Path, float] = {}
        while not self.victim:
            for lease in self._leases.glob("compress_model-*/1"):
                seen.setdefault(lease, time.monotonic())
                lost = time.monotonic() - seen[lease]
                if lost > SECONDS_BEFORE_DEATH and lease.exists():
                    os.kill(json.loads(lease.read_text())["pid"], signal.SIGKILL)
                    self.victim, self.seconds_lost = lease.parent.name, lost
                    return
            time.sleep(0.05)


def measure() -> dict[str, Any]:
    """The figures of the three sweeps."""
    from foldstack.flows.running.prefect_server import TemporaryServer

    with tempfile.TemporaryDirectory(prefix="foldstack-fanout-") as name, TemporaryServer() as api:
        folder = Path(name)
        api.ready()
        with scheduler(folder) as file:
            address = address_in(file)
            with workers(1, file):
                one = run_once(folder / "one", address)
            with workers(2, file):
                two = run_once(folder / "two", address)
                killer = Killer(folder / "killed" / "store" / "leases")
                killer.start()
                killed = run_once(folder / "killed", address)
    pairs = zip(two["bits_per_byte"], killed["bits_per_byte"], strict=True)
    return {
        "stages": one["stages"],
        "one_worker_seconds": one["wall"],
        "two_workers_seconds": two["wall"],
        "speed_up": one["wall"] / two["wall"],
        "inside_stages_seconds_one": one["inside"],
        "inside_stages_seconds_two": two["inside"],
        "with_one_killed_seconds": killed["wall"],
        "killed_stage": killer.victim.partition("-")[0],
        "killed_after_seconds": killer.seconds_lost,
        "stages_begun_again": killed["begun_again"],
        "stages_begun_again_undisturbed": one["begun_again"] + two["begun_again"],
        "largest_difference_bits_per_byte": max(abs(a - b) for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    figures = measure()
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        print(f"{name:<34} {value:10.3f}" if isinstance(value, float) else f"{name:<34} {value!s}")


if __name__ == "__main__":
    main()
