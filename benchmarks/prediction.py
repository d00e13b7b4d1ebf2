"""What `foldstack plan` expects of every stage beside what it takes: seconds, memory, disk.

Three sweeps, each in a home of its own: the reference model, and a random Llama of 100 million
parameters with its tokenizer, in float32 and in bfloat16. The plan is made first, when nothing is
known of earlier runs. Then every stage runs in a process of its own, in the order of the sweep,
with the libraries imported beforehand, as in a worker that a sweep keeps. Memory is the peak
resident memory that the kernel tells; seconds are CPU time, with one thread the wall time of a
machine that does nothing else; disk is the size of its artifact.

    python benchmarks/prediction.py [--json] [--sweeps reference llama] [--methods svd_llm]

Every stage is told on stderr as it ends.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foldstack.compression.checkpoints.checkpoint import save_model
from foldstack.compression.evaluation.memory_probe import PROBE, peak_resident_bytes
from foldstack.compression.reference import MODEL_FOLDER
from foldstack.flows.config.run_config import parse_config
from foldstack.flows.planning.forecast import dry_run
from foldstack.flows.running.branches import Layout, lay_out
from foldstack.tasks.stage import run_stage

FORK = multiprocessing.get_context("fork")
SWEEPS = ("reference", "llama", "llama_bf16")
METHODS = ("shortgpt", "svd_llm", "modegpt", "basis_sharing")
FACTOR = 1.5
UNITS = {"seconds": 1, "memory_bytes": 1 << 20, "disk_bytes": 1 << 20}


def sweep_config(name: str, methods: list[str], home: Path) -> dict[str, Any]:
    """Every kind of stage once or more; a few minutes of one core."""
    is_small = name == "reference"
    window_tokens = 128 if is_small else 256
    windows = {"num_windows": 32, "window_tokens": window_tokens}
    return {
        "model": {"name": "reference" if is_small else str(home / "model"), "device": "cpu"},
        "calibration": windows,
        "methods": methods,
        "sparsities": [0.25],
        "recovery": {"steps": 4, "batch_size": 2, "distillation": 0.5, "windows": windows},
        "evaluation": {
            "perplexity": {"protocol": {"window_tokens": window_tokens, "max_tokens": 4096}}
        },
        "speed": {"prompt_tokens": 64, "new_tokens": 8, "repeats": 2, "load_repeats": 1},
        "output": {"home": str(home)},
        "workers": 2,  # one thread each
    }


def make_model(folder: Path, dtype: str) -> None:
    """A random Llama of 100 million parameters that reads with the reference tokenizer."""
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=512,
        dtype=dtype,
    )
    save_model(LlamaForCausalLM(config).eval(), folder, tokenizer_from=MODEL_FOLDER)


def layout_of(name: str, methods: list[str], home: Path) -> Layout:
    return lay_out(parse_config(sweep_config(name, methods, home)))


def run_here(layout: Layout, number: int, told: Connection) -> None:
    """One stage in this process, and what it took."""
    before = cpu_seconds()
    artifact = run_stage(layout.stages[number], layout.store)
    PROBE.end()
    files = (file for file in artifact.folder.rglob("*") if file.is_file())
    told.send(
        {
            "seconds": cpu_seconds() - before,
            "memory_bytes": peak_resident_bytes(),
            "disk_bytes": sum(file.stat().st_size for file in files),
        }
    )


def cpu_seconds() -> float:
    """Of this process and those that it has started and that have ended."""
    return sum(os.times()[:4])


def in_fork(target: Callable[..., None], *arguments: Any) -> Any:
    """What `target` tells from a process of its own, which has the libraries loaded."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=target, args=(*arguments, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit("a stage failed") from None
    finally:
        process.join()


def plan_here(layout: Layout, told: Connection) -> None:
    told.send([stage.model_dump() for stage in dry_run(layout.config).stages])


def make_here(folder: Path, dtype: str, told: Connection) -> None:
    make_model(folder, dtype)
    told.send(None)


def compare(name: str, methods: list[str]) -> list[dict[str, Any]]:
    """Expected and taken, a row per stage."""
    with tempfile.TemporaryDirectory(prefix="foldstack-prediction-") as folder:
        home = Path(folder)
        if name != "reference":
            in_fork(make_here, home / "model", "bfloat16" if name == "llama_bf16" else "float32")
        layout = layout_of(name, methods, home)
        rows = []
        for number, expected in enumerate(in_fork(plan_here, layout)):
            taken = in_fork(run_here, layout, number)
            row = {"sweep": name, "stage": expected["label"], "kind": expected["stage"]}
            for what, value in taken.items():
                row[what], row[f"expected_{what}"] = value, expected[what]
            rows.append(row)
            print(as_line(row), flush=True, file=sys.stderr)
    return rows


def as_line(row: dict[str, Any]) -> str:
    """Measured, and expected over measured."""
    cells = [row["sweep"], row["stage"]]
    for what, unit in UNITS.items():
        ratio = row[f"expected_{what}"] / row[what] if row[what] else float("nan")
        cells += [f"{row[what] / unit:.1f}", f"{ratio:.2f}"]
    return "| " + " | ".join(cells) + " |"


def summary(rows: list[dict[str, Any]]) -> str:
    """How many stages are told within the factor."""
    lines = []
    for what in UNITS:
        ratios = [row[f"expected_{what}"] / row[what] for row in rows if row[what]]
        inside = sum(1 / FACTOR <= ratio <= FACTOR for ratio in ratios)
        lines.append(f"{what}: {inside} of {len(ratios)} within a factor of {FACTOR}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    arguments = parser.parse_args()
    heads = ("sweep", "stage", "seconds", "x", "MiB", "x", "disk MiB", "x")
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads), file=sys.stderr)
    rows = [row for name in arguments.sweeps for row in compare(name, arguments.methods)]
    print(json.dumps(rows, indent=1) if arguments.json else summary(rows))


if __name__ == "__main__":
    main()
