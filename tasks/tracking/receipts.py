"""Which records a tracking server already holds, known without importing its client.

MLflow's import takes longer than a whole cached sweep needs.
"""

import base64
import hashlib
import json
import os
import sqlite3
import urllib.error
import urllib.parse
import urllib.request
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from foldstack.tasks.environment.redaction import redacted
from foldstack.tasks.tracking.run_record import RunRecord

ANSWER_SECONDS = 3.0


class Receipts:
    """Which records a tracking server already holds in full, remembered in a small JSON file."""

    def __init__(self, folder: Path, uri: str, experiment: str) -> None:
        key = hashlib.sha256(f"{uri}\n{experiment}".encode()).hexdigest()[:16]
        self.uri = uri
        self.path = folder / f"{key}.json"
        try:
            self._entries: dict[str, dict[str, Any]] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self._entries = {}
        self._checked = not self._entries

    def run_id(self, record: RunRecord) -> str | None:
        """Run that holds `record` in full, or None when something is to be logged."""
        entry = self._entries.get(record.fingerprint)
        if entry is None or entry["digest"] != record.digest:
            return None
        if record.sweep and record.sweep not in entry["sweeps"]:
            return None
        if record.uploads and not entry.get("uploaded"):
            return None
        self._forget_lost_runs()
        return str(entry["run_id"]) if record.fingerprint in self._entries else None

    @property
    def experiment_id(self) -> str | None:
        return next((str(e["experiment_id"]) for e in self._entries.values()), None)

    def add(self, record: RunRecord, run_id: str, experiment_id: str) -> None:
        before = self._entries.get(record.fingerprint, {})
        known = before.get("sweeps", [])
        self._entries[record.fingerprint] = {
            "uri": redacted(self.uri),
            "run_id": run_id,
            "experiment_id": experiment_id,
            "digest": record.digest,
            "sweeps": sorted({*known, record.sweep} - {""}),
            "uploaded": record.uploads or before.get("uploaded", False),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(self._entries, indent=1, sort_keys=True))
        partial.replace(self.path)

    def _forget_lost_runs(self) -> None:
        """Drop receipts for runs that the server no longer has; asked once per process."""
        if self._checked:
            return
        self._checked = True
        ids = {entry["run_id"] for entry in self._entries.values()}
        there = runs_still_there(self.uri, ids)
        self._entries = {k: v for k, v in self._entries.items() if v["run_id"] in there}


def servers_in(folder: Path) -> set[str]:
    """Addresses of the tracking servers that hold something of what was logged from a home."""
    found = set()
    for file in folder.glob("*.json"):
        with suppress(OSError, ValueError, AttributeError):
            found |= {entry.get("uri", "") for entry in json.loads(file.read_text()).values()}
    return found - {""}


def runs_still_there(uri: str, run_ids: set[str]) -> set[str]:
    """The given runs that still exist and are not deleted.

    A kind of store that is not known here is believed to have kept everything.
    """
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme == "sqlite":
        path = Path(uri.removeprefix("sqlite:///"))
        if not path.exists():
            return set()
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as database:
                rows = database.execute(
                    "SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active'"
                ).fetchall()
        except sqlite3.Error:
            return set()
        return run_ids & {row[0] for row in rows}
    if parts.scheme in ("http", "https"):
        return {run_id for run_id in run_ids if _is_active_over_http(uri, run_id)}
    return run_ids


def _is_active_over_http(uri: str, run_id: str) -> bool:
    url = f"{redacted(uri).rstrip('/')}/api/2.0/mlflow/runs/get?run_id={run_id}"
    try:
        request = urllib.request.Request(url, headers=_login())
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            info = json.load(answer)["run"]["info"]
    except urllib.error.HTTPError as error:
        return error.code != 404  # refused for want of credentials is not the same as gone
    except (OSError, ValueError, KeyError):
        return True  # away: nothing can be repaired now
    return str(info.get("lifecycle_stage")) == "active"


def _login() -> dict[str, str]:
    """The header by which MLflow's own client logs in, from the same variables."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if not user:
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
