"""A stack whose databases other versions of Prefect and MLflow made is brought up to ours."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
OLD = {"mlflow": "3.1.4", "prefect": "3.4.0"}
"""Some migrations of both programs, and of MLflow's table of users, lie between these and ours."""
OF_THEN = ("sqlalchemy<2.1", "fastapi<0.116")
"""What those versions say that they take newer ones of, and do not."""
MAKE = """
import os
import sys
from mlflow import MlflowClient
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

address, home, password = sys.argv[1:]
client = MlflowClient(tracking_uri=address + "/mlflow")
experiment = client.create_experiment("of old", artifact_location="mlflow-artifacts:/of-old")
run = client.create_run(experiment, run_name="an old run")
client.log_metric(run.info.run_id, "bits", 1.5)
client.set_terminated(run.info.run_id)
users = SqlAlchemyStore()
users.init_db(f"sqlite:///{home}/mlflow-users.db")
users.create_user("admin", password, is_admin=True)

from prefect import flow

@flow(name="of old", flow_run_name="an old flow run")
def old():
    return 1

old()
"""
FIND = """
import mlflow
from prefect.client.orchestration import get_client

(run,) = mlflow.search_runs(experiment_names=["of old"], output_format="list")
with get_client(sync_client=True) as client:
    flows = {each.name: each.state_name for each in client.read_flow_runs()}
print(run.info.run_name, run.data.metrics["bits"], flows["an old flow run"])
"""
PREPARE = """
import sys
from contextlib import ExitStack
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import asyncio, os, subprocess
from backup import database_server
from stack import initialise, make_databases, stack_in

home = Path(sys.argv[2])
stack = stack_in(home)
initialise(stack)
with database_server(stack):
    asyncio.run(make_databases(stack))
    address = stack.database("")[:-1]
    settings = {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_DATABASE_CONNECTION_URL": stack.database("prefect", "postgresql+asyncpg"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }
    command = [sys.argv[3], "-c", sys.argv[4], address, str(home), stack.secrets["mlflow"]]
    subprocess.run(command, env=os.environ | settings, check=True, cwd=home)
"""


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uv = Path(sys.executable).with_name("uv")
    program = str(uv) if uv.exists() else shutil.which("uv")
    if program is None:
        pytest.skip("needs uv")
    folder = tmp_path_factory.mktemp("old") / "venv"
    subprocess.run([program, "venv", "--quiet", folder], check=True)
    python = folder / "bin" / "python"
    wanted = [*(f"{name}=={number}" for name, number in OLD.items())]
    wanted += ["psycopg2-binary", "asyncpg", "flask-wtf", *OF_THEN]
    install = [program, "pip", "install", "--quiet", "--python", python, *wanted]
    subprocess.run(install, check=True)
    return python


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1800)
def test_databases_of_older_versions_are_upgraded_and_keep_what_they_hold(
    old_python: Path, folder: Path
) -> None:
    if not (shutil.which("postgres") or list(Path("/usr/lib/postgresql").glob("*/bin/postgres"))):
        pytest.skip("needs Postgres: apt-get install postgresql")
    prepare = [sys.executable, "-c", PREPARE, str(DEPLOY), str(folder), str(old_python), MAKE]
    subprocess.run(prepare, check=True, cwd=folder)
    (folder / "versions.json").write_text(json.dumps(OLD))
    script = [sys.executable, str(DEPLOY / "local_stack.py"), "--home", str(folder)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("files and logs are in"):
                break
        try:
            assert process.poll() is None, said
            assert f"upgrading the databases: prefect {OLD['prefect']} -> " in said
            find = [*script, "--run", sys.executable, "-c", FIND]
            done = subprocess.run(find, capture_output=True, text=True)
            assert done.stdout.strip() == "an old run 1.5 Completed", done.stderr
        finally:
            process.terminate()
            process.wait(120)
