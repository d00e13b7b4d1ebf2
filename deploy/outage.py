"""What survives when parts of the local stack die, the machine goes down, and its disk is lost?

    python deploy/outage.py [--json] [--home DIR]

starts what `local_stack.py` does, and a nightly run with a small config. While it runs, each part
is killed (kill -9), one after the other, and the stack has to bring it back. Under a second night,
of which nothing is in the store, everything is killed at once, as a machine does that loses its
power; the stack is started again, and that night has to go on by itself. Then all of it is saved,
restored into an empty home, and the same night run there: it has to find everything. Prints what
became of each.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import backup
import httpx
import psutil  # type: ignore[import-untyped]
from local_stack import temporary_or
from scheduled_run import CHECK_SECONDS, SMALL_CONFIG, runs_in_mlflow
from stack import Stack, postgres, stack_in, web_servers, worker

from foldstack.compression.errors import InputError
from foldstack.flows.cli.claims import PARTS_FILE
from foldstack.flows.cli.processes import Server, answers
from foldstack.flows.cli.servers import ending_on_signals
from foldstack.tasks.store.artifacts import ArtifactStore
from foldstack.tasks.store.garbage import list_artifacts

SCRIPT = Path(__file__).resolve().parent / "local_stack.py"
PARTS: dict[str, Callable[[Stack], Server]] = {
    "MLflow": lambda stack: web_servers(stack)[1],
    "Postgres": postgres,
    "Prefect": lambda stack: web_servers(stack)[0],
    "Worker": worker,
}
"""In the order in which they are killed."""
METHODS = ("shortgpt", "svd_llm", "modegpt")
FIRST = SMALL_CONFIG | {
    "name": "outage check",
    "methods": [{"name": name} for name in METHODS],
    "sparsities": [0.1, 0.2, 0.3],
}
SECOND = FIRST | {
    "name": "outage check, again",
    "calibration": {"num_windows": 9, "window_tokens": 64},
}
BACK_SECONDS = 300.0
MADE_BEFORE_THE_END = 4
"""Artifacts of the second night that are there when everything is killed."""


@contextmanager
def stack_of_its_own(home: Path) -> Iterator["subprocess.Popen[str]"]:
    """The script in a process that can be killed; our environment knows its servers.

    Raises:
        InputError: it does not start.
    """
    command = [sys.executable, str(SCRIPT), "--home", str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("files and logs are in"):
                break
        else:
            raise InputError(f"the stack in {home} did not start; see {home / 'logs'}")
        os.environ.update(stack_in(home).client)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(120)


def begin(config: dict[str, Any]) -> Any:
    """Have a night with this config scheduled; gives its flow run's id at once."""
    from prefect.deployments import run_deployment

    parameters = {"config": config}
    return run_deployment("nightly/nightly", parameters=parameters, timeout=0, as_subflow=False).id


def state_of(run_id: Any) -> Any:
    """The state of a flow run, also while the server is still coming back."""
    return asyncio.run(_state_of(run_id))


async def _state_of(run_id: Any) -> Any:
    from prefect.client.orchestration import get_client

    deadline = time.monotonic() + BACK_SECONDS
    async with get_client() as client:
        while True:
            try:
                return (await client.read_flow_run(run_id)).state
            except httpx.HTTPError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(1)


def end_of(run_id: Any) -> str:
    """The name of the state that a flow run ends in.

    Raises:
        InputError: it does not end.
    """
    deadline = time.monotonic() + CHECK_SECONDS
    while time.monotonic() < deadline:
        if (state := state_of(run_id)).is_final():
            return str(state.name)
        time.sleep(1)
    raise InputError(f"a flow run did not end within {CHECK_SECONDS:.0f} s; see the logs")


def wait_for_artifacts(home: Path, number: int) -> None:
    """Return as soon as the store holds so many.

    Raises:
        InputError: it never does.
    """
    deadline = time.monotonic() + CHECK_SECONDS
    while len(artifacts_in(home)) < number:
        if time.monotonic() > deadline:
            raise InputError(f"the store holds no {number} artifacts after {CHECK_SECONDS:.0f} s")
        time.sleep(0.5)


def kill_one(home: Path, name: str, run_id: Any) -> dict[str, Any]:
    """Kill a part under a flow run, and wait until the stack has brought it back."""
    under_way = not state_of(run_id).is_final()
    before = int(parts_in(home)[name]["pid"])
    health = PARTS[name](stack_in(home)).health
    os.kill(before, 9)
    killed, seconds = time.monotonic(), None
    while seconds is None and time.monotonic() < killed + BACK_SECONDS:
        time.sleep(0.2)
        with suppress(OSError, KeyError, ValueError):
            if int(parts_in(home)[name]["pid"]) != before and answers(health):
                seconds = time.monotonic() - killed
    return {"part": name, "under_way": under_way, "back_after_seconds": seconds}


def kill_everything(process: "subprocess.Popen[str]") -> int:
    """As a machine does that loses its power: nobody is asked, and nobody is left to clean up.

    Gives the number of processes.
    """
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for each in family:
        each.suspend()  # so that none sees another one go, and does something about it
    for each in family:
        each.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=30)
    return len(family)


def artifacts_in(home: Path) -> dict[str, Any]:
    """When each artifact of the store was made."""
    store = ArtifactStore(home / "results" / "store")
    rows = list_artifacts(store) if store.root.exists() else []
    return {row.artifact.key: row.manifest.created for row in rows if row.manifest is not None}


def parts_in(home: Path) -> dict[str, dict[str, Any]]:
    noted: dict[str, dict[str, Any]] = json.loads((home / "stack" / PARTS_FILE).read_text())
    return noted


def kept(before: dict[str, Any], after: dict[str, Any]) -> int:
    """How many of the artifacts before are there as they were, and not made anew."""
    return sum(after.get(key) == made for key, made in before.items())


def outage(home: Path, saved: Path, empty: Path) -> dict[str, Any]:
    """The figures of all blows."""
    figures: dict[str, Any] = {}
    with stack_of_its_own(home) as process:
        night = begin(FIRST)
        wait_for_artifacts(home, 1)
        figures["parts"] = [kill_one(home, name, night) for name in PARTS]
        figures["first_night"] = end_of(night)
        first = artifacts_in(home)
        night = begin(SECOND)
        wait_for_artifacts(home, len(first) + MADE_BEFORE_THE_END)
        before = artifacts_in(home)
        figures["processes_killed"] = kill_everything(process)
    with stack_of_its_own(home):
        figures["second_night"] = end_of(night)  # the same flow run: it goes on
        after = artifacts_in(home)
        figures["restart"] = {"artifacts": len(before), "kept": kept(before, after)}
        runs = {run["name"] for run in runs_in_mlflow("foldstack/reference")}
        figures["saved"] = backup.save(home, saved)
    figures["restored_from"] = backup.restore(empty, saved)
    with stack_of_its_own(empty):
        found = {run["name"] for run in runs_in_mlflow("foldstack/reference")}
        figures["mlflow_runs"] = {"before": len(runs), "restored": len(runs & found)}
        figures["night_before"] = str(state_of(night).name)
        figures["third_night"] = end_of(begin(SECOND))
        again = artifacts_in(empty)
        figures["restore"] = {"artifacts": len(after), "kept": kept(after, again)}
        figures["restore"]["made_anew"] = len(again) - len(after)
    return figures


STORES = ("restart", "restore")


def is_good(figures: dict[str, Any]) -> bool:
    nights = {figures[name] for name in ("first_night", "second_night", "third_night")}
    parts, runs = figures["parts"], figures["mlflow_runs"]
    return (
        all(each["under_way"] and each["back_after_seconds"] is not None for each in parts)
        and nights == {"Completed"} == {figures["night_before"]}
        and all(figures[part]["kept"] == figures[part]["artifacts"] for part in STORES)
        and figures["restore"]["made_anew"] == 0
        and runs["restored"] == runs["before"] > 0
    )


def told(figures: dict[str, Any]) -> str:
    lines = []
    for each in figures["parts"]:
        seconds = each["back_after_seconds"]
        back = "never came back" if seconds is None else f"was back after {seconds:.1f} s"
        when = "" if each["under_way"] else " (the night was over by then)"
        lines.append(f"{each['part']} was killed and {back}{when}")
    restart, restore, runs = (figures[name] for name in (*STORES, "mlflow_runs"))
    return "\n".join(
        [
            *lines,
            f"the night that ran meanwhile ended as {figures['first_night']}",
            f"all {figures['processes_killed']} processes were killed under a second night and the "
            f"stack started again: that night went on and ended as {figures['second_night']}, and "
            f"{restart['kept']} of {restart['artifacts']} artifacts are as they were",
            f"saved in {figures['saved']['seconds']:.1f} s and restored into an empty home: "
            f"{restore['kept']} of {restore['artifacts']} artifacts and {runs['restored']} of "
            f"{runs['before']} MLflow runs are there, the second night is "
            f"{figures['night_before']}, and the same night run there ended as "
            f"{figures['third_night']} and made {restore['made_anew']} artifacts",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, help="where files are; by default a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        with ending_on_signals(), temporary_or(arguments.home) as folder:
            homes = [folder / name for name in ("stack", "saved", "restored")]
            for home in homes:
                if home.exists():
                    raise InputError(f"{home} is there already: choose another --home")
            folder.mkdir(parents=True, exist_ok=True)
            figures = outage(*homes)
    except InputError as error:
        sys.exit(f"outage: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(json.dumps(figures, default=str) if arguments.json else told(figures))
    sys.exit(0 if is_good(figures) else 1)


if __name__ == "__main__":
    main()
