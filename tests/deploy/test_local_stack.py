"""The local stack for real: parts killed, everything killed, saved, restored. Slow: Postgres."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from prefect.client.schemas.objects import FlowRun

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").iterdir())


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_what_systemd_takes(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    for each in UNITS:  # the programs of /opt and the user are not here
        text = each.read_text().replace("/opt/foldstack/bin/python", sys.executable)
        (tmp_path / each.name).write_text(text.replace("=foldstack\n", "=root\n"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / unit.name],
        capture_output=True, text=True,
    )  # fmt: skip
    told = [line for line in done.stderr.splitlines() if str(tmp_path) in line or unit.name in line]
    assert told == []


def test_units_run_scripts_that_are_there_with_options_they_have() -> None:
    for unit in UNITS:
        for line in unit.read_text().splitlines():
            if line.startswith("ExecStart="):
                _, script, *words = line.removeprefix("ExecStart=").split()
                text = (DEPLOY / Path(script).name).read_text()
                for word in [each for each in words if each.startswith("--")]:
                    is_port = word.endswith("_port") and "_port" in text
                    assert is_port or word in text or word == "--upload", f"{unit.name}: {word}"


@contextmanager
def stack(home: Path) -> Iterator["subprocess.Popen[str]"]:
    """The script, once all of it is up; killed at the end if it still runs."""
    command = [sys.executable, str(DEPLOY / "local_stack.py"), "--home", str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("files and logs are in"):
                break
        else:
            raise AssertionError("".join(said))
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(120)


def parts_of(home: Path) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = json.loads((home / "stack" / "parts.json").read_text())
    return parts


def client(home: Path, *words: str) -> str:
    command = [sys.executable, str(DEPLOY / "local_stack.py"), "--home", str(home), "--run"]
    done = subprocess.run([*command, sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def backup(*words: str) -> None:
    command = [sys.executable, str(DEPLOY / "backup.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LOG_A_RUN = """
import mlflow
mlflow.set_experiment("before the backup")
with mlflow.start_run(run_name="kept"):
    mlflow.log_metric("bits", 1.5)
    mlflow.log_text("a file of the run", "note.txt")
"""
FIND_IT = """
import mlflow
(run,) = mlflow.search_runs(experiment_names=["before the backup"], output_format="list")
note = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/note.txt")
print(run.info.run_name, run.data.metrics["bits"], note)
"""
DEPLOYMENTS = """
import asyncio
from prefect.client.orchestration import get_client
async def main():
    async with get_client() as client:
        print(sorted(each.name for each in await client.read_deployments()))
asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_stack_is_taken_over_saved_and_restored(folder: Path) -> None:
    if not (shutil.which("postgres") or list(Path("/usr/lib/postgresql").glob("*/bin/postgres"))):
        pytest.skip("needs Postgres: apt-get install postgresql")
    home, saved, again = folder / "home", folder / "saved", folder / "again"
    with stack(home) as first:
        client(home, "-c", LOG_A_RUN)
        pages = {name: part["page"] for name, part in parts_of(home).items()}
        pids = [int(part["pid"]) for part in parts_of(home).values()]
        command = [sys.executable, str(DEPLOY / "local_stack.py"), "--home", str(home)]
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 1
        assert f"runs already for {home} (process {first.pid})" in second.stderr
        assert pages["MLflow"] in second.stderr
        first.send_signal(signal.SIGKILL)
        first.wait()
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=60)
    assert not any(psutil.pid_exists(pid) for pid in pids), "orphans"
    with stack(home):
        assert {name: part["page"] for name, part in parts_of(home).items()} == pages
        backup("save", "--home", str(home), "--to", str(saved))
    assert (saved.stat().st_mode & 0o077) == 0
    shutil.rmtree(home)
    backup("restore", "--home", str(again), "--from", str(saved))
    with stack(again):
        assert client(again, "-c", FIND_IT).strip() == "kept 1.5 a file of the run"
        assert "nightly" in client(again, "-c", DEPLOYMENTS)


def test_a_backup_overwrites_nothing_and_is_whole_or_refused(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "something").touch()
    (tmp_path / "saved").mkdir()
    for words, said in [
        (("save", "--home", "home", "--to", "saved"), "there is no local stack"),
        (("restore", "--home", "home", "--from", "saved"), "is no whole backup"),
    ]:
        command = [sys.executable, str(DEPLOY / "backup.py"), *words]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"COLUMNS": "80"},
        )
        assert done.returncode == 1
        assert said in done.stderr


def test_a_run_is_under_way_where_its_own_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart of the machine another process may have the number of the run's."""
    monkeypatch.syspath_prepend(str(DEPLOY))
    import interrupted  # type: ignore[import-not-found]

    number = uuid4()
    environment = os.environ | {interrupted.RUN_VARIABLE: str(number)}
    pipe = subprocess.PIPE
    with subprocess.Popen(["cat"], stdin=pipe, stdout=pipe, bufsize=0, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"there\n")
        assert process.stdout.readline() == b"there\n"  # within exec a process has no environment
        pid = f"a-host:{process.pid}"
        mine, other = (
            FlowRun(id=each, flow_id=uuid4(), infrastructure_pid=pid) for each in (number, uuid4())
        )
        assert interrupted.is_computed(mine)
        assert not interrupted.is_computed(other)
        process.kill()
        process.wait()
        assert not interrupted.is_computed(mine)
    assert not interrupted.is_computed(FlowRun(id=number, flow_id=uuid4()))
