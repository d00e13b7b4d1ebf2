"""Which engine runs which structure: a table of differences and tokens per second.

python benchmarks/engines.py [FOLDER ...] [--forms vllm,gguf,deci,openelm,mlx] [--json FILE]

Each folder (of runs/models/..., say) is written in each form and compared with transformers in its
engine, by the log-probabilities of a fixed text and by greedy tokens. Without folders one model of
every structure is made, with random weights and the tokenizer of the reference model. Engines are
in the Pythons that FOLDSTACK_VLLM_PYTHON, FOLDSTACK_LLAMA_CPP_PYTHON and FOLDSTACK_MLX_PYTHON name;
what is not here is left out.
"""

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from foldstack.compression.checkpoints.checkpoint import load_model, load_tokenizer, save_model
from foldstack.compression.export.engines import ENGINES, ask, engine_of, rates_in_turns
from foldstack.compression.export.exported import (
    GREEDY_TOKENS,
    TEXT,
    export_model,
    greedy_tokens,
    log_probabilities_of,
)
from foldstack.compression.export.forms import ENGINES_OF, Form, NoSuchForm
from foldstack.compression.reference import MODEL_FOLDER
from foldstack.compression.structure.modeling_foldstack import FoldstackForCausalLM
from foldstack.compression.structure.surgery import config_for, plan_of

ROOT = Path(__file__).parents[1]
# Engines' attention on CPUs wants heads of 32, 64, ...: narrow ones are padded to them.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
TURNS = 3
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
    """What vLLM makes of each folder as it is, all in one process: it takes long to start."""
    requests = []
    for folder in folders:
        tokens = load_tokenizer(folder)(TEXT)["input_ids"]
        requests.append(
            {"model": str(folder), "tokens": tokens, "generate": GREEDY_TOKENS, "texts": []}
        )
    checks = [request | {"do": "check"} for request in requests]
    speeds = [
        {**request, "do": "speed", "models": {"this": request["model"]}, "turns": TURNS}
        for request in requests
    ]
    seen = ask(ENGINES["vLLM"], python, checks)
    rates = ask(ENGINES["vLLM"], python, speeds)
    return [judged(*answers) for answers in zip(folders, seen, rates, strict=True)]


def judged(folder: Path, seen: dict[str, Any], timed: dict[str, Any]) -> dict[str, Any]:
    """An engine's answer beside transformers'."""
    if "error" in seen:
        return {"verdict": f"fails: {seen['error'][:90]}"}
    model = load_model(folder, dtype=torch.float32)
    ids = torch.tensor([load_tokenizer(folder)(TEXT)["input_ids"]])
    expected = log_probabilities_of(model, ids)
    difference = float((torch.tensor(seen["log_probabilities"]) - expected).abs().max())
    is_equal = difference < EQUAL and greedy_tokens(model, ids) == seen["greedy"]
    return {
        "verdict": "equal, as it is" if is_equal else "DIFFERS",
        "difference": difference,
        "tokens_per_second": median(timed["rates"]["this"]) if "rates" in timed else None,
    }


def exported(folder: Path, form: Form, work: Path) -> dict[str, Any]:
    """What the form's engine makes of what the folder is exported as."""
    out = work / f"{folder.name}-{form.name}"
    try:
        report = export_model(folder, form, out)
    except NoSuchForm as error:
        return {"verdict": f"refused: {str(error).partition(': ')[2] or error}"[:110]}
    except RuntimeError as error:
        return {"verdict": f"fails: {error}"[:110]}
    engine = engine_of(form)
    rates: dict[str, list[float]] = {}
    tokens = load_tokenizer(folder)(TEXT)["input_ids"]
    path = {"this": report.path(out, folder)}
    if engine is not None:
        rates = rates_in_turns(engine, path, tokens, generate=GREEDY_TOKENS, turns=TURNS)
    difference = max(check.difference for check in report.checks)
    is_equal = all(check.greedy_is_equal for check in report.checks) and difference < EQUAL
    grew = report.parameters_after / report.parameters_before - 1
    return {
        "verdict": f"{'equal' if is_equal else 'DIFFERS'} as {report.form}"
        + (f", {grew:+.0%} parameters" if abs(grew) > 5e-4 else ""),
        "difference": difference,
        "tokens_per_second": median(rates["this"]) if rates else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--forms", default="vllm,gguf,deci,openelm,mlx,stock")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    forms = [Form.of(name) for name in arguments.forms.split(",")]
    with tempfile.TemporaryDirectory(prefix="foldstack-engines-") as folder:
        work = Path(folder)
        folders = [f.resolve() for f in arguments.folders] or made(work)
        rows: dict[str, dict[str, Any]] = {f.name: {} for f in folders}
        for form in forms:
            if form.target != "stock" and (engine := engine_of(form)) is None:
                names = " and ".join(ENGINES[n].how_to_have_it for n in ENGINES_OF[form.target])
                print(f"{form.name}: left out, {names}")
            elif form.target == "vllm":
                assert engine is not None
                for f, seen in zip(folders, in_vllm(folders, str(engine.python())), strict=True):
                    rows[f.name][form.name] = seen
            else:
                for f in folders:
                    rows[f.name][form.name] = exported(f, form, work)
    for name, engines in rows.items():
        for engine_name, found in engines.items():
            numbers = ""
            if "difference" in found:
                numbers = f"{found['difference']:9.1e} nats"
            if found.get("tokens_per_second"):
                numbers += f" {found['tokens_per_second']:7.1f} tok/s"
            print(f"{name:<18} {engine_name:<10} {numbers:<32} {found['verdict']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
