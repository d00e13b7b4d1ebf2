"""What orchestration costs: a sweep's wall time minus the time inside its stages, per task.

Small sweeps of the reference model run in a fresh home, one stage at a time and in this process,
against a temporary Prefect server and an MLflow file: the first one, which also makes MLflow's
database and imports what draws pages; one of other sparsities, which is computed as well; that one
again, which is found in the store; and one of twelve sparsities. Everything that is not a stage's
own work counts: fingerprints, Prefect, the store's digests and manifests, the comparison, its
pictures, MLflow.

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


def sweep_config(home: Path, sparsities: list[float]) -> dict[str, Any]:
    """Little work in many stages."""
    return {
        "name": "overhead",
        "model": {"name": "reference", "device": "cpu"},
        "calibration": {"num_windows": 4, "window_tokens": 32},
        "methods": ["shortgpt", "svd_llm"],
        "sparsities": sparsities,
        "evaluation": {"perplexity": {"protocol": {"window_tokens": 64, "max_tokens": 512}}},
        "speed": {"enabled": False},
        "output": {"home": str(home)},
        "workers": 1,
    }


def run_once(home: Path, sparsities: list[float]) -> dict[str, float]:
    """One sweep: its wall time, the time inside stages, and how many of them were computed."""
    from foldstack.flows.config.run_config import parse_config
    from foldstack.flows.running.branches import lay_out
    from foldstack.flows.running.progress import Silent
    from foldstack.flows.sweep import run_sweep

    started = time.perf_counter()
    layout = lay_out(parse_config(sweep_config(home, sparsities)))
    stored = {s.fingerprint for s in layout.stages if s.artifact(layout.store).folder.exists()}
    run_sweep(layout, Silent())
    wall = time.perf_counter() - started
    made = [stage for stage in layout.stages if stage.fingerprint not in stored]
    inside = sum(stage.artifact(layout.store).manifest().seconds for stage in made)
    return {"wall": wall, "inside": inside, "computed": len(made), "tasks": len(layout.stages)}


def measure() -> dict[str, float]:
    """The figures of the four sweeps."""
    from foldstack.flows.running.prefect_server import TemporaryServer

    with (
        tempfile.TemporaryDirectory(prefix="foldstack-overhead-") as home,
        TemporaryServer() as server,
    ):
        server.ready()
        first = run_once(Path(home), [0.15, 0.3])
        computed, cached = (run_once(Path(home), [0.2, 0.35]) for _ in range(2))
        larger = run_once(Path(home), [0.1 + step / 40 for step in range(12)])
    return {
        "first_wall_seconds": first["wall"],
        "first_overhead_seconds_per_task": _overhead(first),
        "computed_tasks": computed["computed"],
        "computed_wall_seconds": computed["wall"],
        "computed_overhead_seconds_per_task": _overhead(computed),
        "larger_tasks": larger["computed"],
        "larger_wall_seconds": larger["wall"],
        "larger_overhead_seconds_per_task": _overhead(larger),
        "cached_tasks": cached["tasks"],
        "cached_wall_seconds": cached["wall"],
        "cached_seconds_per_task": cached["wall"] / cached["tasks"],
    }


def _overhead(figures: dict[str, float]) -> float:
    return (figures["wall"] - figures["inside"]) / figures["computed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    figures = measure()
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        print(f"{name:<36} {value:10.3f}")


if __name__ == "__main__":
    main()
