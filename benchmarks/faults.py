"""Kills, full disks and damaged files at random moments, and whether a rerun makes good for them.

    python benchmarks/faults.py [--json] [--kind flow ...] [--kills 8] [--seed 0] [--log FILE]
    python benchmarks/faults.py --of chain --kind flow truncate flip disk --kills 60

A small sweep is run once in peace. Then, round after round, it is run in a fresh home and hit at
random moments, a few times in a row, and then run to its end:

    flow, worker               kill -9 of the flow's process, of a process that computes stages
    truncate, flip             files of finished artifacts are cut short, or one bit in them flips
    disk                       the disk of the home (a tmpfs; needs root) is too small, or full from
                               a moment on; a run that is refused for want of room counts apart
    prefect, mlflow, postgres  kill -9 of a server of deploy/local_stack.py, which then comes back

A round is survived when the last run gives what the undisturbed one gave (the same fingerprints,
the same bytes in every artifact, the same comparison, the same runs in MLflow), when no artifact
that was finished and sound has been made again, when nothing half-written was found or read, and
when no process, no temporary file and nothing that `foldstack cache gc` does not find is left.
With --of chain, stages that only wait and write take the place of the sweep (no model, no Prefect),
so that many blows can be tried in little time.

"Lost" is how long the artifacts that were not finished had been worked at when the blow came: what
is to be computed again, if no work was left to resume from. Rounds are appended to --log, and the
summary is of everything that is in it, so that kinds can be run one at a time.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from blows import BLOWS, SERVERS, Scene, Servers
from small_sweep import RUN_SECONDS, SmallSweep
from stage_chain import StageChain

from foldstack.flows.running.prefect_server import TemporaryServer

BLOWS_PER_ROUND = 3
WHAT = {"sweep": SmallSweep, "chain": StageChain}


@dataclass
class Round:
    """What became of one home."""

    kind: str
    number: int
    blows: int = 0
    lost_seconds: list[float] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)
    """Of the runs that ended by themselves; the last one's must be 0."""
    wrong: list[str] = field(default_factory=list)
    refused: int = 0
    """Runs that saw before they began that they could not end: no blows."""


@dataclass(frozen=True)
class Undisturbed:
    """The sweep in peace."""

    result: dict[str, Any]
    seconds: float
    work_seconds: float
    """Without the loading of programs."""
    home_bytes: int

    @classmethod
    def run(cls, sweep: SmallSweep) -> "Undisturbed":
        started = time.monotonic()
        process = sweep.start()
        sweep.wait_for_work(process)
        begun = time.monotonic()
        process.wait(RUN_SECONDS)
        if process.returncode != 0:
            sys.exit(f"the undisturbed sweep ended with {process.returncode}; see {sweep.log}")
        ended = time.monotonic()
        size = sum(file.lstat().st_blocks * 512 for file in sweep.home.rglob("*"))
        return cls(sweep.result(), ended - started, ended - begun, size)

    def moment(self, chance: random.Random, sweep: SmallSweep) -> float:
        """When to strike, in seconds since the work began: while something is left to be done."""
        left = 1 - len(sweep.finished()) / len(self.result["artifacts"])
        return chance.uniform(0, 1) * max(left, 0.1) * self.work_seconds


def run_round(
    kind: str, number: int, blows: int, sweep: SmallSweep, peace: Undisturbed, scene: Scene
) -> Round:
    """Hit a home so many times, then run it to the end and look."""
    done = Round(kind, number)
    sound: dict[str, str] = {}
    for _ in range(3 * blows):
        struck = BLOWS[kind](scene)
        done.wrong += struck.wrong + remade(sound, struck.finished)
        sound = {key: at for key, at in struck.finished.items() if key not in struck.damaged}
        if struck.exit_code is not None:
            done.exit_codes.append(struck.exit_code)
        done.refused += struck.refused
        if struck.hit:
            done.blows += 1
            done.lost_seconds.append(struck.lost_seconds)
        if done.blows == blows:
            break
    done.exit_codes.append(sweep.start().wait(RUN_SECONDS))
    done.wrong += whats_wrong(sweep, peace, sound, may_be_damaged=kind in ("truncate", "flip"))
    return done


def remade(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What was finished and sound, and is gone or was made at another time now."""
    return [f"{key} was not kept" for key, made in before.items() if after.get(key) != made]


def whats_wrong(
    sweep: SmallSweep, peace: Undisturbed, sound: dict[str, str], may_be_damaged: bool
) -> list[str]:
    """Everything in which the sweep's end differs from the undisturbed one; empties its store."""
    wrong, result = remade(sound, sweep.finished()), sweep.result()
    wrong += [f"other {part}" for part in peace.result if result[part] != peace.result[part]]
    if not may_be_damaged and list((sweep.store.root / "damaged").glob("*")):
        wrong.append("something half-written was found")
    if "Traceback" in (log := sweep.log.read_text(errors="replace")):
        wrong.append("a traceback: " + log.partition("Traceback")[2].strip().splitlines()[-1][:200])
    deadline = time.monotonic() + 20
    while list(sweep.processes()) and time.monotonic() < deadline:
        time.sleep(0.5)
    wrong += [f"process {process} is left" for process in sweep.processes()]
    return wrong + [f"{orphan} is left" for orphan in sweep.orphans()]


def run_kinds(
    kinds: list[str], arguments: argparse.Namespace, folder: Path, servers: Servers
) -> None:
    """A run in peace, then so many blows of each kind."""
    name = f"peace before {kinds[0]}"
    what = WHAT[arguments.of]
    sweep = what(folder / name, servers.changes(name), servers.environment)
    with ended(sweep):
        peace = Undisturbed.run(sweep)
    for kind in kinds:
        run_kind(kind, arguments, folder, servers, peace)


@contextmanager
def ended(sweep: SmallSweep) -> Iterator[None]:
    """Nothing of the sweep runs on afterwards, however that is reached."""
    try:
        yield
    finally:
        sweep.end_processes()


def run_kind(
    kind: str, arguments: argparse.Namespace, folder: Path, servers: Servers, peace: Undisturbed
) -> None:
    """So many blows of one kind, a few on each home."""
    number, left = 0, arguments.kills
    while left > 0 and number < 3 * arguments.kills:  # not every run lives until it is hit
        number += 1
        name = f"{kind}-{arguments.seed}-{number}"
        sweep = WHAT[arguments.of](folder / name, servers.changes(name), servers.environment)
        chance = random.Random(name)
        moment = partial(peace.moment, chance, sweep)
        with ended(sweep), ExitStack() as afterwards:
            scene = Scene(sweep, chance, moment, peace.home_bytes, afterwards, servers)
            done = run_round(kind, number, min(left, BLOWS_PER_ROUND), sweep, peace, scene)
        left -= done.blows
        record = {
            "of": arguments.of,
            "seed": arguments.seed,
            "undisturbed_seconds": peace.seconds,
            **asdict(done),
        }
        with arguments.log.open("a") as log:
            log.write(json.dumps(record) + "\n")
        said = "; ".join(done.wrong) or "survived"
        print(f"{kind} round {number}: {done.blows} blows, {said}", file=sys.stderr, flush=True)
        if not done.wrong:
            shutil.rmtree(sweep.home)


def summary(log: Path) -> dict[str, Any]:
    """Of all rounds in the log, by kind and altogether."""
    rounds = [json.loads(line) for line in log.read_text().splitlines()]
    kinds = {}
    for name in dict.fromkeys(name_of(entry) for entry in rounds):
        of_kind = [entry for entry in rounds if name_of(entry) == name]
        lost = [seconds for entry in of_kind for seconds in entry["lost_seconds"]]
        kinds[name] = {
            "tried": sum(entry["blows"] for entry in of_kind),
            "survived": sum(entry["blows"] for entry in of_kind if not entry["wrong"]),
            "refused": sum(entry.get("refused", 0) for entry in of_kind),
            "lost_seconds_mean": sum(lost) / max(len(lost), 1),
            "lost_seconds_most": max(lost, default=0.0),
            "undisturbed_seconds": of_kind[-1]["undisturbed_seconds"],
            "wrong": sorted({what for entry in of_kind for what in entry["wrong"]}),
        }
    tried, survived = (sum(k[what] for k in kinds.values()) for what in ("tried", "survived"))
    return {"tried": tried, "survived": survived, "kinds": kinds}


def name_of(entry: dict[str, Any]) -> str:
    """What was hit, and how; the first logs were of sweeps only and did not say it."""
    return f"{entry.get('of', 'sweep')}: {entry['kind']}"


def show(figures: dict[str, Any]) -> None:
    print(f"{'kind':<16} {'survived':>10} {'lost: mean':>12} {'most':>8} {'undisturbed':>13}")
    for kind, each in figures["kinds"].items():
        of = f"{each['survived']} of {each['tried']}"
        mean, most = each["lost_seconds_mean"], each["lost_seconds_most"]
        whole = each["undisturbed_seconds"]
        print(f"{kind:<16} {of:>10} {mean:>10.2f} s {most:>6.2f} s {whole:>11.1f} s")
        if each["refused"]:
            print(f"    {each['refused']} runs were refused before they began")
        for what in each["wrong"]:
            print(f"    {what}")
    print(f"{figures['survived']} of {figures['tried']} survived")


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--of", choices=list(WHAT), default="sweep", help="what is hit")
    parser.add_argument("--kind", nargs="+", choices=list(BLOWS), default=list(BLOWS))
    parser.add_argument("--kills", type=int, default=8, help="blows of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="rounds are appended to it, one JSON object each")
    parser.add_argument("--keep", type=Path, help="folder for homes and logs that stays")
    return parser.parse_args(words)


def main() -> None:
    arguments = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is stopped
    with ExitStack() as parts:
        temporary = tempfile.mkdtemp(prefix="foldstack-faults-")
        parts.callback(shutil.rmtree, temporary, ignore_errors=True)
        Path(temporary).chmod(0o711)  # Postgres's user passes through
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        arguments.log = arguments.log or folder / "rounds.jsonl"
        kinds = [kind for kind in arguments.kind if kind not in SERVERS]
        if arguments.of == "chain":
            run_kinds([kind for kind in kinds if kind != "worker"], arguments, folder, Servers())
        elif kinds:
            os.environ.setdefault("PREFECT_HOME", str(folder / "prefect"))
            parts.enter_context(TemporaryServer()).ready()
            run_kinds(kinds, arguments, folder, Servers())
        kinds = [kind for kind in arguments.kind if kind in SERVERS]
        if kinds and arguments.of == "sweep":
            servers = parts.enter_context(Servers.up(folder / "stack"))
            run_kinds(kinds, arguments, folder, servers)
        figures = summary(arguments.log)
    print(json.dumps(figures, indent=1)) if arguments.json else show(figures)
    sys.exit(0 if figures["tried"] == figures["survived"] else 1)


if __name__ == "__main__":
    main()
