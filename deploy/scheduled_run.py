"""Does everything that runs by itself go through? On Postgres, both servers and a worker.

    python deploy/scheduled_run.py [--json] [--home DIR] [--keep] [--killed]

starts what `local_stack.py` does, gives the deployment `nightly` one more schedule, each minute and
with a small config, waits until the scheduler has started it and the worker has finished it, and
looks its runs up in MLflow. Then it has the worker refresh the comparison, registers the alerts
with an address of its own, runs the deployment `by-config` with a config that must fail, and waits
for what is sent to that address. With --killed it kills (kill -9) a run together with its worker,
so that nobody is left to tell, and waits for the alert of the heartbeat that stops. With --keep
everything stays up afterwards, until Ctrl-C.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import alerts
from local_stack import temporary_or, up
from stack import Stack, stack_in

from foldstack.compression.errors import InputError
from foldstack.flows.cli.processes import Parts
from foldstack.flows.cli.servers import ending_on_signals

SMALL_CONFIG = {
    "name": "scheduled check",
    "model": {"name": "reference", "device": "cpu"},
    "calibration": {"num_windows": 8, "window_tokens": 64},
    "methods": [{"name": "shortgpt"}, {"name": "svd_llm"}],
    "sparsities": [0.15, 0.3],
    "evaluation": {"perplexity": {"protocol": {"window_tokens": 128, "max_tokens": 1024}}},
    "speed": {"enabled": False},
}
UNREACHABLE = SMALL_CONFIG | {"name": "must fail", "methods": [{"name": "shortgpt"}]}
UNREACHABLE |= {"sparsities": [0.95]}
NOT_CACHED = SMALL_CONFIG | {"name": "is killed"}
NOT_CACHED |= {"calibration": {"num_windows": 9, "window_tokens": 64}}
CHECK_SECONDS = 900.0
ALERT_SECONDS = 60.0
HEARTBEAT_SECONDS = 30
"""The least that Prefect takes; alerts.py has a run be silent for 10/3 of it."""


async def run_by_schedule(deployment_name: str) -> dict[str, Any]:
    """Schedule the deployment each minute, wait for its first run, and take the schedule back."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import IntervalSchedule

    each_minute = DeploymentScheduleCreate(
        schedule=IntervalSchedule(interval=timedelta(minutes=1)),
        parameters={"config": SMALL_CONFIG},
        slug="check",
    )
    started = time.monotonic()
    async with get_client() as client:
        deployment = await client.read_deployment_by_name(deployment_name)
        (schedule,) = await client.create_deployment_schedules(deployment.id, [each_minute])
        try:
            run = await _first_finished_run(client, deployment.id, started + CHECK_SECONDS)
        finally:
            await client.delete_deployment_schedule(deployment.id, schedule.id)
        return {
            "flow_run_id": str(run.id),
            "flow_run_name": run.name,
            "state": run.state_name,
            "message": (run.state.message or "") if run.state else "",
            "by_scheduler": run.auto_scheduled,
            "wait_seconds": time.monotonic() - started,
            "run_seconds": run.total_run_time.total_seconds(),
        }


async def _first_finished_run(client: Any, deployment_id: Any, deadline: float) -> Any:
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.states import StateType

    over = [StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED]
    while time.monotonic() < deadline:
        runs = await client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment_id])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=over))
            ),
        )
        if runs:
            return runs[0]
        await asyncio.sleep(1)
    raise InputError(f"no scheduled run ended within {CHECK_SECONDS:.0f} s; see the logs")


def refresh() -> dict[str, Any]:
    """Have the worker refresh the comparison; how that ended, and the table it made."""
    from prefect.artifacts import Artifact
    from prefect.deployments import run_deployment

    run = run_deployment(
        "refresh comparison/refresh", timeout=CHECK_SECONDS, poll_interval=1, as_subflow=False
    )
    table = Artifact.get("all-sweeps")
    return {
        "state": run.state_name,
        "message": (run.state.message or "") if run.state else "",
        "rows": [] if table is None else json.loads(table.data),
    }


def alert_of_a_failure() -> dict[str, Any]:
    """Let a run fail; what the automation sent, and how long after the run's end."""
    from prefect.deployments import run_deployment

    with listener() as (address, heard):
        asyncio.run(alerts.register(address))
        run = run_deployment(
            "sweep/by-config",
            parameters={"config": UNREACHABLE},
            timeout=CHECK_SECONDS,
            poll_interval=1,
            as_subflow=False,
        )
        ended = time.monotonic()
        text = _text_of_next(heard, ALERT_SECONDS)
        return {
            "flow_run_name": run.name,
            "state": run.state_name,
            "text": text,
            "after_seconds": time.monotonic() - ended,
        }


def alert_of_a_kill(parts: Parts) -> dict[str, Any]:
    """Kill a run with its worker, which comes back; what was sent, and how long after the kill."""
    from prefect.deployments import run_deployment

    with listener() as (address, heard):
        asyncio.run(alerts.register(address))
        run = run_deployment(
            "sweep/by-config", parameters={"config": NOT_CACHED}, timeout=0, as_subflow=False
        )
        process = asyncio.run(_process_with_heartbeat(run.id, time.monotonic() + CHECK_SECONDS))
        parts.kill("Worker")
        os.kill(process, signal.SIGKILL)
        killed = time.monotonic()
        text = _text_of_next(heard, 10 / 3 * HEARTBEAT_SECONDS + ALERT_SECONDS)
        after_seconds = time.monotonic() - killed
        parts.restart("Worker")
    return {
        "flow_run_name": run.name,
        "state": asyncio.run(_state_name(run.id)),
        "text": text,
        "after_seconds": after_seconds,
    }


async def _process_with_heartbeat(run_id: Any, deadline: float) -> int:
    """The process of a run, as soon as the server has heard its heart beat."""
    from prefect.client.orchestration import get_client
    from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter

    name = EventNameFilter(name=["prefect.flow-run.heartbeat"])
    of_the_run = EventResourceFilter(id=[f"prefect.flow-run.{run_id}"])
    async with get_client() as client:
        while time.monotonic() < deadline:
            until_now = EventFilter(event=name, resource=of_the_run)
            if (await client.read_events(until_now, limit=1)).events:
                run = await client.read_flow_run(run_id)
                return int(str(run.infrastructure_pid).rpartition(":")[2])
            await asyncio.sleep(1)
    raise InputError(f"no heartbeat of a run within {CHECK_SECONDS:.0f} s; see the logs")


async def _state_name(run_id: Any) -> str | None:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        return (await client.read_flow_run(run_id)).state_name


def _text_of_next(heard: "Queue[bytes]", seconds: float) -> str:
    """What the next alert says; empty when none comes."""
    try:
        return str(json.loads(heard.get(timeout=seconds))["text"])
    except Empty:
        return ""


@contextmanager
def listener() -> Iterator[tuple[str, "Queue[bytes]"]]:
    """An address on loopback, and what is posted to it."""
    heard: Queue[bytes] = Queue()

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/alerts", heard
        server.shutdown()


def runs_in_mlflow(experiment: str) -> list[dict[str, Any]]:
    """What MLflow's server knows of an experiment: name, state, metrics and links of its runs."""
    from mlflow import MlflowClient

    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    return [
        {
            "name": run.info.run_name,
            "run_id": run.info.run_id,
            "experiment_id": run.info.experiment_id,
            "status": run.info.status,
            "sweeps": run.data.tags.get("foldstack.sweeps", ""),
            "bits_per_byte": run.data.metrics.get("quality/bits_per_byte"),
            "flow_run_url": run.data.tags.get("prefect.flow_run_url", ""),
            "files": len(client.list_artifacts(run.info.run_id)),
        }
        for run in client.search_runs([found.experiment_id])
    ]


def see_one_through(stack: Stack, to_kill: Parts | None) -> dict[str, Any]:
    """The figures of one scheduled run, a refresh and the alerts, on a stack that is up."""
    os.environ.update(stack.client)
    figures = asyncio.run(run_by_schedule("nightly/nightly"))
    return figures | {
        "mlflow_runs": runs_in_mlflow("foldstack/reference"),
        "prefect": stack.client["PREFECT_API_URL"].removesuffix("/api"),
        "mlflow": stack.client["MLFLOW_TRACKING_URI"],
        "refresh": refresh(),
        "alert": alert_of_a_failure(),
        **({"killed": alert_of_a_kill(to_kill)} if to_kill else {}),
    }


def told(figures: dict[str, Any]) -> str:
    runs, refreshed, alert = (figures[part] for part in ("mlflow_runs", "refresh", "alert"))
    finished = sum(run["status"] == "FINISHED" for run in runs)
    return (
        f"the scheduled run {figures['flow_run_name']!r} ended as {figures['state']} "
        f"{figures['message']}\n{finished} of its {len(runs)} runs in MLflow are finished\n"
        f"start of everything {figures['up_seconds']:.0f} s, "
        f"from the schedule to the end of the run {figures['wait_seconds']:.0f} s\n"
        f"the refresh ended as {refreshed['state']}, {len(refreshed['rows'])} rows\n"
        f"{alert['flow_run_name']!r} ended as {alert['state']}, and {alert['after_seconds']:.0f} s "
        f"later this was sent:\n{alert['text']}"
        + ("\n" + told_of_a_kill(figures["killed"]) if "killed" in figures else "")
    )


def told_of_a_kill(alert: dict[str, Any]) -> str:
    return (
        f"{alert['flow_run_name']!r} was killed with its worker and is {alert['state']}; "
        f"{alert['after_seconds']:.0f} s after the kill this was sent:\n{alert['text']}"
    )


def is_good(figures: dict[str, Any]) -> bool:
    wanted = {"refresh": "Completed", "alert": "Failed", "killed": "Crashed"}
    seen = {part: state for part, state in wanted.items() if part in figures}
    ended_so = all(figures[part]["state"] == state for part, state in seen.items())
    sent = all(figures[part].get("text", "none is sent") for part in seen)
    return figures["state"] == "Completed" and ended_so and sent and bool(figures["mlflow_runs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, help="where files are; by default a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object, on one line")
    parser.add_argument("--keep", action="store_true", help="stay up afterwards, until Ctrl-C")
    parser.add_argument("--killed", action="store_true", help="kill a run with its worker, too")
    arguments = parser.parse_args()
    if arguments.killed:
        os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = str(HEARTBEAT_SECONDS)
    started = time.monotonic()
    try:
        with (
            ending_on_signals(),
            temporary_or(arguments.home) as home,
            up(stack := stack_in(home)) as parts,
        ):
            up_seconds = time.monotonic() - started
            to_kill = parts if arguments.killed else None
            figures = {"up_seconds": up_seconds, **see_one_through(stack, to_kill)}
            print(json.dumps(figures) if arguments.json else told(figures), flush=True)
            if arguments.keep:
                parts.watch()
    except InputError as error:
        sys.exit(f"scheduled_run: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if is_good(figures) else 1)


if __name__ == "__main__":
    main()
