"""A small sweep in a process of its own, and what it left behind: for faults.py, concurrency.py."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from foldstack.compression.storage.digest import digest_file, digest_json
from foldstack.flows.comparison.files import load
from foldstack.tasks.store.artifacts import ArtifactStore
from foldstack.tasks.store.garbage import StoredArtifact, collect_garbage, list_artifacts

MARK = "FOLDSTACK_SMALL_SWEEP"
RUN_SECONDS = 300.0
TIMES = "seconds"
"""What is named so is another number at every run."""
MACHINE = "system/"
"""What stages took of the machine, too: told of those that last, as all do on a busy machine."""


def config_of(home: Path, **changes: Any) -> dict[str, Any]:
    """Little work: most of its time goes to loading programs. `changes` replace whole sections."""
    text = home.parent / "text.txt"
    if not text.exists():
        lines = (f"def item_{n}(value):\n    return value * {n} + {n % 7}" for n in range(300))
        text.write_text("\n\n".join(lines))
    source = {"corpus": str(text), "separator": "\n\n"}
    windows = {"num_windows": 8, "window_tokens": 32}
    return {
        "name": "small",
        "model": {"name": "reference", "device": "cpu"},
        "calibration": {"source": source, **windows},
        "methods": ["shortgpt"],
        "sparsities": [0.15],
        "evaluation": {
            "perplexity": {"source": source, "protocol": {"window_tokens": 64, "max_tokens": 512}}
        },
        "speed": {"enabled": False},
        "output": {"home": str(home)},
        "workers": 1,
    } | changes


@dataclass
class SmallSweep:
    """One sweep in `home`, to be started again and again; `name` tells it from others there."""

    home: Path
    changes: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    name: str = "sweep"
    _told: int = 0
    """How long the log was at the last start."""

    def start(self) -> "subprocess.Popen[bytes]":
        """`foldstack run`; what it says is appended to <home>.log."""
        file = self.beside("yaml")
        file.write_text(json.dumps(config_of(self.home, **self.changes)))  # JSON is YAML
        with self.open_log() as log:
            return subprocess.Popen(
                [sys.executable, "-m", "foldstack.flows.cli.app", "run", str(file), "--json"],
                env=self.marked(),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip

    def wait_for_work(self, process: "subprocess.Popen[bytes]") -> None:
        """Return when its programs are loaded, as its first line in the log tells, or it ended."""
        while process.poll() is None and self.log.stat().st_size == self._told:
            time.sleep(0.01)

    def marked(self) -> dict[str, str]:
        """The environment by which its processes are known; temporary files are beside the home."""
        temporary = self.beside("tmp")
        temporary.mkdir(exist_ok=True)
        known = {MARK: self.mark, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        return os.environ | self.environment | known

    def beside(self, what: str) -> Path:
        return self.home.with_suffix(f".{self.name}.{what}")

    @property
    def log(self) -> Path:
        return self.beside("log")

    def open_log(self) -> BinaryIO:
        log = self.log.open("ab")
        self._told = log.tell()
        return log

    @property
    def mark(self) -> str:
        """What the sweep's processes are known by."""
        return f"{self.home} {self.name}"

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.home / "store")

    def finished(self) -> dict[str, str]:
        """When each artifact was made, as its manifest says: made anew, it says another time."""
        return {
            row.artifact.key: row.manifest.created.isoformat() if row.manifest else "unreadable"
            for row in list_artifacts(self.store)
        }

    def seconds_under_way(self) -> float:
        """How long the artifacts that are not finished have been worked at: what a kill costs."""
        begun = 0.0
        for folder in (self.store.root / "tmp").glob("*"):
            with suppress(OSError):  # a lease's folder changes when the lease is taken
                lease = self.store.lease_folder(folder.name.rsplit("-", 2)[0])
                begun += time.time() - lease.stat().st_mtime
        return begun

    def processes(self) -> Iterator[int]:
        """Every process of the sweep that is still there."""
        mark = f"{MARK}={self.mark}\0".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and mark in (entry / "environ").read_bytes() + b"\0":
                    yield int(entry.name)

    def workers(self) -> list[int]:
        """Its processes that compute stages."""
        found = []
        for process in self.processes():
            with suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes():
                    found.append(process)
        return found

    def end_processes(self) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def result(self) -> dict[str, Any]:
        """Digests of the artifacts' files, the comparison and MLflow's runs, without times."""
        (report,) = (self.home / "sweeps").iterdir()
        rows = [row.model_dump(exclude={"folder", TIMES}) for row in load(report).rows]
        return {
            "artifacts": self.digests(),
            "rows": [_without_times(row) for row in rows],
            "runs": self.runs(),
        }

    def digests(self) -> dict[str, dict[str, str]]:
        return {row.artifact.key: _digests(row.artifact.folder) for row in self.rows()}

    def runs(self) -> dict[str, Any]:
        """State and metrics of each run that MLflow has, by name.

        A sweep that loses a process which computes ends with a failure, which MLflow keeps: such
        runs do not count."""
        from mlflow import MlflowClient

        uri = self.environment.get("MLFLOW_TRACKING_URI", f"sqlite:///{self.home}/mlflow.db")
        client = MlflowClient(tracking_uri=uri)
        name = config_of(self.home, **self.changes).get("tracking", {}).get("experiment")
        experiment = client.get_experiment_by_name(name or "foldstack/reference")
        if experiment is None:
            return {}
        found = client.search_runs(
            [experiment.experiment_id], filter_string="attributes.status != 'FAILED'"
        )
        runs = {
            run.info.run_name: [run.info.status, _without_times(run.data.metrics)] for run in found
        }
        return runs if len(runs) == len(found) else {"runs logged twice": len(found) - len(runs)}

    def orphans(self) -> list[str]:
        """What garbage collection leaves of this store though nothing needs it, and then all the
        rest although everything is to go; what is left in the folder of temporary files.
        """
        collect_garbage(self.store)
        keys = {row.artifact.key for row in self.rows()}
        orphans = [
            str(file.relative_to(self.home))
            for kind in ("work", "tmp", "damaged", "records", "leases")
            for file in (self.store.root / kind).rglob("*")
            if file.is_file() and not any(key in _key_in(file) for key in keys)
            if file.parent.name != "records"  # why a task failed, for which only its age counts
        ]
        temporary = self.beside("tmp")
        orphans += [str(file) for file in temporary.rglob("*") if file.is_file()]
        collect_garbage(self.store, keep_days=-1)
        return orphans + [str(f.relative_to(self.home)) for f in self.store.root.rglob("*.*")]

    def rows(self) -> list[StoredArtifact]:
        return list_artifacts(self.store)


def _key_in(file: Path) -> str:
    """A text with the key in it, of records/<stage>/<fingerprint>.json and leases/<key>/7.free."""
    return f"{file.parent.name}-{file.name}" if file.suffix == ".json" else str(file.parent)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest; of what a reload told, without how long it took."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"]
    return {
        file.relative_to(folder).as_posix(): digest_json(
            _without_times(json.loads(file.read_text()))
        )
        if file.name == "reload_check.json"
        else digest_file(file)
        for file in sorted(files)
    }


def _without_times(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_times(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if TIMES not in name and not name.startswith(MACHINE)
    }
