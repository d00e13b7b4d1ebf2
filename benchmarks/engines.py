"""Which engine runs which structure: a table of differences and tokens per second.

python benchmarks/engines.py [FOLDER ...] [--vllm PYTHON] [--llama_cpp PYTHON] [--json FILE]

Each folder (of runs/models/..., say) is compared with transformers in each engine by the
log-probabilities of a fixed text and by greedy tokens. vLLM loads the folder as it is; llama.cpp
what `foldstack export --to gguf` makes of it. Without folders one model of every structure is made,
with random weights and the tokenizer of the reference model. An engine without a Python that has it
is left out.
"""

import argparse
import importlib.util
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from foldstack.compression.checkpoints.checkpoint import load_model, load_tokenizer, save_model
from foldstack.compression.errors import InputError
from foldstack.compression.export import vllm_check
from foldstack.compression.export.exported import (
    GREEDY_TOKENS,
    TEXT,
    export_model,
    greedy_tokens,
    log_probabilities_of,
)
from foldstack.compression.reference import MODEL_FOLDER
from foldstack.compression.structure.modeling_foldstack import FoldstackForCausalLM
from foldstack.compression.structure.surgery import config_for, plan_of

ROOT = Path(__file__).parents[1]
# Engines' attention on CPUs wants heads of 32, 64, ...: narrow ones are padded to them.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
EQUAL = 1e-4
"""Nats: what a float32 engine may differ by."""


def made(work: Path) -> list[Path]:
    """A folder for each structure that the tests know."""
    spec = importlib.util.spec_from_file_location("plans", ROOT / "tests/compression/conftest.py")
    assert spec is not None
    assert spec.loader is not None
    plans = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plans)
    vocabulary = len(load_tokenizer(MODEL_FOLDER))
    dense = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", vocab_size=vocabulary, **SIZES), dtype=torch.float32
    )
    folders = []
    for name, plan_for in plans.STRUCTURES.items():
        torch.manual_seed(0)
        config = config_for(dense.config, plan_for(dense, plan_of(dense)))
        model = FoldstackForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
        save_model(model, work / name, tokenizer_from=MODEL_FOLDER)
        folders.append(work / name)
    return folders


def in_vllm(folders: list[Path], python: str) -> list[dict[str, Any]]:
    """What vLLM says to each folder, all in one process."""
    requests = []
    for folder in folders:
        tokens = load_tokenizer(folder)(TEXT)["input_ids"]
        requests.append({"folder": str(folder), "tokens": tokens, "generate": GREEDY_TOKENS})
    finished = subprocess.run(
        [python, "-P", vllm_check.__file__],
        input="".join(json.dumps(request) + "\n" for request in requests),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]


def judged(folder: Path, seen: dict[str, Any]) -> dict[str, Any]:
    """An engine's answer beside transformers'."""
    if "error" in seen:
        return {"verdict": f"fails: {seen['error'][:90]}"}
    model = load_model(folder, dtype=torch.float32)
    ids = torch.tensor([load_tokenizer(folder)(TEXT)["input_ids"]])
    expected = log_probabilities_of(model, ids)
    difference = float((torch.tensor(seen["log_probabilities"]) - expected).abs().max())
    is_equal = difference < EQUAL and greedy_tokens(model, ids) == seen["greedy"]
    return {
        "verdict": "equal" if is_equal else "DIFFERS",
        "difference": difference,
        "tokens_per_second": seen["tokens_per_second"],
    }


def in_llama_cpp(folder: Path, python: str, work: Path) -> dict[str, Any]:
    """What llama.cpp makes of the folder's GGUF file."""
    try:
        report = export_model(folder, "gguf", work / f"{folder.name}-gguf", engine_python=python)
    except InputError as error:
        return {"verdict": f"refused: {str(error).partition(': ')[2] or error}"[:100]}
    except RuntimeError as error:
        return {"verdict": f"fails: {error}"[:100]}
    is_equal = (report.difference or 0) < EQUAL and report.greedy_is_equal
    is_same_size = report.parameters_after == report.parameters_before
    return {
        "verdict": f"{'equal' if is_equal else 'DIFFERS'} as {report.form}"
        + ("" if is_same_size else ", multiplied out"),
        "difference": report.difference,
        "tokens_per_second": report.tokens_per_second,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--vllm", default="")
    parser.add_argument("--llama_cpp", default="")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="foldstack-engines-") as folder:
        work = Path(folder)
        folders = [f.resolve() for f in arguments.folders] or made(work)
        rows: dict[str, dict[str, Any]] = {f.name: {} for f in folders}
        if arguments.llama_cpp:
            for f in folders:
                rows[f.name]["llama.cpp"] = in_llama_cpp(f, arguments.llama_cpp, work)
        if arguments.vllm:
            for f, seen in zip(folders, in_vllm(folders, arguments.vllm), strict=True):
                rows[f.name]["vLLM"] = judged(f, seen)
    for name, engines in rows.items():
        for engine, found in engines.items():
            numbers = ""
            if "difference" in found:
                numbers = f"{found['difference']:9.1e} nats {found['tokens_per_second']:7.1f} tok/s"
            print(f"{name:<18} {engine:<10} {numbers:<32} {found['verdict']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
