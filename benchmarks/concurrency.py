"""Sweeps at the same time in one store: is each artifact made once, and who waits for whom?

    python benchmarks/concurrency.py [--json] [--scene overlap dead paused] [--keep DIR]

    overlap   three `foldstack run` with overlapping configs start at once
    dead      of two, the one that holds a lease is killed (kill -9) while the other waits for it
    paused    of two, the one that holds a lease is stopped (SIGSTOP); the other takes over after
              90 s without a heartbeat, and when it has ended, the first one goes on

Everything is counted in the logs of the stages: who made what, who waited. An artifact that a dead
or a paused holder had begun is begun twice; it must be published once, and everybody must end with
the same result.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_sweep import RUN_SECONDS, SmallSweep

from foldstack.flows.running.prefect_server import TemporaryServer
from foldstack.tasks.store.leases import STALE_SECONDS

MADE = re.compile(r": made in [\d.]+ s as (\S+/[0-9a-f]+)")
TAKEN = re.compile(r": another process has just made it, as (\S+/[0-9a-f]+)")
WAITED = re.compile(r"(\S+/[0-9a-f]+) is being made by \S+: waiting for it")
LOUD = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "foldstack",
    "PREFECT_LOGGING_COLORS": "false",
    "COLUMNS": "400",
}


class Flows:
    """Sweeps in one home, told apart by their names."""

    def __init__(self, home: Path, methods: dict[str, list[str]]) -> None:
        self.sweeps = {
            name: SmallSweep(home, {"methods": chosen}, LOUD, name)
            for name, chosen in methods.items()
        }
        self.started = time.monotonic()
        self.processes = {name: sweep.start() for name, sweep in self.sweeps.items()}

    def heard(self, name: str, what: re.Pattern[str]) -> list[str]:
        """The artifacts of which the sweep's log says so."""
        return what.findall(self.sweeps[name].log.read_text(errors="replace"))

    def wait_for_waiting(self) -> tuple[str, str]:
        """Who holds the lease of an artifact that the other one waits for, as soon as that is so.

        Raises:
            SystemExit: they ended without that.
        """
        one, other = self.sweeps
        while all(process.poll() is None for process in self.processes.values()):
            for holder, waiting in ((one, other), (other, one)):
                for artifact in self.heard(waiting, WAITED):
                    over = self.heard(waiting, TAKEN) + self.heard(holder, MADE)
                    if artifact not in over and self.is_under_way(artifact):
                        return holder, waiting
            time.sleep(0.05)
        raise SystemExit(f"no sweep waited for the other one; see {self.sweeps[one].log}")

    def is_under_way(self, artifact: str) -> bool:
        stage, fingerprint = artifact.split("/")
        store = next(iter(self.sweeps.values())).store
        return any((store.root / "tmp").glob(f"{stage}-{fingerprint}*"))

    def figures(self) -> dict[str, Any]:
        """Counts, once every process has ended."""
        codes = {name: process.wait(RUN_SECONDS) for name, process in self.processes.items()}
        any_sweep = next(iter(self.sweeps.values()))
        there = any_sweep.finished()
        made = Counter(artifact for name in self.sweeps for artifact in self.heard(name, MADE))
        damages = [row.artifact.damage(thorough=True) for row in any_sweep.rows()]
        aside = list((any_sweep.store.root / "damaged").glob("*"))
        return {
            "flows": len(self.sweeps),
            "exit_codes": codes,
            "artifacts": len(there),
            "made": sum(made.values()),
            "made_more_than_once": sum(times > 1 for times in made.values()),
            "waited": sum(len(self.heard(name, WAITED)) for name in self.sweeps),
            "taken_from_another": sum(len(self.heard(name, TAKEN)) for name in self.sweeps),
            "damaged": sum(damage is not None for damage in damages) + len(aside),
            "seconds": time.monotonic() - self.started,
        }


def overlap(home: Path) -> dict[str, Any]:
    flows = Flows(home, {"a": ["shortgpt"], "b": ["shortgpt", "uidl"], "c": ["uidl", "shortgpt"]})
    figures = flows.figures()
    good = figures["made"] == figures["artifacts"] and set(figures["exit_codes"].values()) == {0}
    return figures | {"good": good and figures["made_more_than_once"] == 0}


def dead(home: Path) -> dict[str, Any]:
    flows = Flows(home, {"a": ["shortgpt"], "b": ["shortgpt"]})
    holder, waiting = flows.wait_for_waiting()
    before = flows.sweeps[holder].finished()
    struck = time.monotonic()
    flows.processes[holder].kill()
    (artifact,) = flows.heard(waiting, WAITED)[-1:]
    while artifact not in flows.heard(waiting, MADE) and flows.processes[waiting].poll() is None:
        time.sleep(0.05)
    figures = flows.figures() | {"until_made_by_the_other_seconds": time.monotonic() - struck}
    kept = {key: made for key, made in flows.sweeps[waiting].finished().items() if key in before}
    good = figures["exit_codes"][waiting] == 0 and kept == before
    return figures | {"good": good and figures["made_more_than_once"] == 0}


def paused(home: Path) -> dict[str, Any]:
    flows = Flows(home, {"a": ["shortgpt"], "b": ["shortgpt"]})
    holder, waiting = flows.wait_for_waiting()
    stopped = list(flows.sweeps[holder].processes())
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    struck = time.monotonic()
    code = flows.processes[waiting].wait(RUN_SECONDS + STALE_SECONDS)
    seconds, before = time.monotonic() - struck, flows.sweeps[waiting].finished()
    for process in stopped:
        os.kill(process, signal.SIGCONT)
    figures = flows.figures() | {"until_the_other_ended_seconds": seconds}
    unchanged = before == flows.sweeps[holder].finished()
    good = code == 0 and unchanged and set(figures["exit_codes"].values()) == {0}
    return figures | {"good": good and figures["damaged"] == 0}


SCENES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "overlap": overlap,
    "dead": dead,
    "paused": paused,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--scene", nargs="+", choices=list(SCENES), default=list(SCENES))
    parser.add_argument("--keep", type=Path, help="folder for homes and logs that stays")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is stopped
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="foldstack-concurrency-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_HOME", str(folder / "prefect"))
    with TemporaryServer() as server:
        server.ready()
        figures = {name: SCENES[name](folder / name) for name in arguments.scene}
    if arguments.keep is None:
        shutil.rmtree(folder)
    if arguments.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, each in figures.items():
            print(f"{name}: " + ", ".join(f"{what} {value}" for what, value in each.items()))
    sys.exit(0 if all(each["good"] for each in figures.values()) else 1)


if __name__ == "__main__":
    main()
