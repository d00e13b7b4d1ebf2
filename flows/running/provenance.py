"""Who ran which code, by the tags that MLflow's own pages show."""

import getpass
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from prefect import runtime

import foldstack.compression.errors as somewhere_in_the_package
from foldstack.tasks.environment.redaction import redacted
from foldstack.tasks.running.prefect_cache import is_deployed

ROOT = Path(somewhere_in_the_package.__file__).resolve().parents[1]
"""The clone, where foldstack is installed from one."""
GIT_SECONDS = 5.0


def provenance() -> dict[str, str]:
    """User, source and, in a clone, the commit; a commit with changes on it says so."""
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": _source()}
    with suppress(KeyError, OSError, ImportError):  # in a container a user may have no name
        tags["mlflow.user"] = getpass.getuser()
    if commit := git_commit():
        tags["mlflow.source.git.commit"] = commit
    return tags


def _source() -> str:
    """The deployment that runs, else the command line."""
    if is_deployed():
        return f"{runtime.flow_run.flow_name}/{runtime.deployment.name}"
    program, *rest = sys.argv
    return redacted(" ".join([Path(program).name, *rest]))


@cache
def git_commit() -> str:
    """The commit of the clone that this code is in; empty where it was installed without one."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return ""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
        capture_output=True, text=True, timeout=GIT_SECONDS,
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else ""
