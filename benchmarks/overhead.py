"""What orchestration costs: a sweep's wall time minus the time inside its stages, per task.

A small sweep of the reference model runs twice in a fresh home, one stage at a time and in this
process, against a temporary Prefect server and an MLflow file: first everything is computed, then
everything is found in the store. Everything that is not a stage's own work counts: fingerprints,
Prefect, the store's digests and manifests, the comparison, its pictures, MLflow.

    python benchmarks/overhead.py [--json]
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def sweep_config(home: Path) -> dict[str, Any]:
    """Little work in many stages."""
    return {
        "name": "overhead",
        "model": {"name": "reference", "device": "cpu"},
        "calibration": {"num_windows": 4, "window_tokens": 32},
        "methods": ["shortgpt", "svd_llm"],
        "sparsities": [0.15, 0.3],
        "evaluation": {"perplexity": {"protocol": {"window_tokens": 64, "max_tokens": 512}}},
        "speed": {"enabled": False},
        "output": {"home": str(home)},
        "workers": 1,
    }


def run_once(home: Path) -> dict[str, float]:
    """One sweep: its wall time, the time inside stages, and how many tasks it has."""
    from foldstack.flows.config.run_config import parse_config
    from foldstack.flows.running.branches import lay_out
    from foldstack.flows.running.progress import Silent
    from foldstack.flows.sweep import run_sweep

    started = time.perf_counter()
    layout = lay_out(parse_config(sweep_config(home)))
    stored = {s.fingerprint for s in layout.stages if s.artifact(layout.store).folder.exists()}
    run_sweep(layout, Silent())
    wall = time.perf_counter() - started
    inside = sum(
        stage.artifact(layout.store).manifest().seconds
        for stage in layout.stages
        if stage.fingerprint not in stored
    )
    return {"wall": wall, "inside": inside, "tasks": len(layout.stages)}


def measure() -> dict[str, float]:
    """The figures of a computed and of a cached sweep."""
    from foldstack.flows.running.prefect_server import TemporaryServer

    with (
        tempfile.TemporaryDirectory(prefix="foldstack-overhead-") as home,
        TemporaryServer() as server,
    ):
        server.ready()
        computed, cached = run_once(Path(home)), run_once(Path(home))
    return {
        "tasks": computed["tasks"],
        "computed_wall_seconds": computed["wall"],
        "computed_inside_seconds": computed["inside"],
        "overhead_seconds_per_task": (computed["wall"] - computed["inside"]) / computed["tasks"],
        "cached_wall_seconds": cached["wall"],
        "cached_seconds_per_task": cached["wall"] / cached["tasks"],
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
        print(f"{name:<28} {value:10.3f}")


if __name__ == "__main__":
    main()
