"""What the command line says to mistakes: each is tried for real, in a process of its own.

A mistake must end with exit code 2 and one sentence, before anything is computed. The models are
copies of the reference model that were damaged in one way each.

    python benchmarks/bad_inputs.py [--json]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from foldstack.compression.reference import MODEL_FOLDER

SECONDS_AT_MOST = 300.0
NO_SERVER = "http://127.0.0.1:9/api"
MISSING, MISSHAPEN = "a tensor is missing", "a tensor of another shape"
NOT_FINITE = "weights that are not finite"
BASE = """\
methods: [shortgpt]
sparsities: [0.15]
calibration: {num_windows: 4, window_tokens: 32}
evaluation: {perplexity: {protocol: {window_tokens: 64, max_tokens: 512}}}
speed: {enabled: false}
"""


@dataclass(frozen=True)
class Case:
    """One mistake, and the command that makes it."""

    mistake: str
    overrides: tuple[str, ...] = ()
    config: str | None = BASE
    """Content of the config file; None = there is no such file."""
    is_seen_by_a_stage: bool = False
    """Only the first stage that reads the data can know: a Prefect server is started before."""


@dataclass(frozen=True)
class Outcome:
    """What the command did."""

    mistake: str
    exit_code: int
    said: str
    seconds: float
    models_made: int
    """Model folders in the store afterwards."""

    @property
    def is_refused(self) -> bool:
        """Exit code 2 and one line that starts with the program's name."""
        lines = self.said.strip().splitlines()
        is_sentence = bool(lines) and lines[-1].startswith("foldstack: ")
        return (
            self.exit_code == 2
            and is_sentence
            and NO_SERVER not in self.said
            and not self.models_made
        )


def damaged(folder: Path, name: str, damage: Callable[[Path], Any]) -> str:
    """A copy of the reference model with one thing wrong, as an override."""
    copy = folder / name
    shutil.copytree(MODEL_FOLDER, copy)
    damage(copy)
    return f"model.name={copy}"


def with_config(**changes: Any) -> Callable[[Path], Any]:
    """The damage of other values in config.json."""

    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """The damage of other tensors in the weights' file."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def truncate(folder: Path) -> None:
    """Half of the weights' file."""
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def pickle_weights(folder: Path) -> None:
    """Weights as a pickle and nothing else."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def gguf_of_nothing(folder: Path) -> None:
    """Weights as a GGUF file that holds nothing."""
    (folder / "model.safetensors").unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")


def remove(*names: str) -> Callable[[Path], Any]:
    """The damage of missing files."""
    return lambda folder: [(folder / name).unlink() for name in names]


def damaged_models(folder: Path) -> list[Case]:
    """Models that cannot be compressed."""
    first = "model.layers.0.mlp.up_proj.weight"
    damages: dict[str, Callable[[Path], Any]] = {
        "a mixture of experts": with_config(model_type="mixtral"),
        "an encoder-decoder": with_config(model_type="t5"),
        "an encoder": with_config(model_type="bert"),
        "an unheard-of architecture": with_config(model_type="nonesuch"),
        "no weights": remove("model.safetensors"),
        "half of the weights' file": truncate,
        MISSING: with_tensors(lambda tensors: tensors.pop(first)),
        MISSHAPEN: with_tensors(
            lambda tensors: tensors.update({first: tensors[first][:-1].clone()})
        ),
        "weights that are not finite": with_tensors(
            lambda tensors: tensors[first].fill_(torch.nan)
        ),
        "weights as a pickle": pickle_weights,
        "config.json is no JSON": lambda copy: (copy / "config.json").write_text("{"),
        "no config.json": remove("config.json"),
        "weights that cannot be dequantised": with_config(
            quantization_config={"quant_method": "gptq", "bits": 4}
        ),
        "a GGUF file that is none": gguf_of_nothing,
        "no tokenizer": remove("tokenizer.json", "tokenizer_config.json"),
        "a tokenizer with more tokens than the model": with_config(vocab_size=100),
    }
    return [
        Case(
            mistake,
            (damaged(folder, f"model-{number}", damage),),
            is_seen_by_a_stage=mistake in (MISSING, MISSHAPEN, NOT_FINITE),
        )
        for number, (mistake, damage) in enumerate(damages.items())
    ]


def cases(folder: Path) -> list[Case]:
    """Every mistake."""
    empty, short = folder / "empty.txt", folder / "short.txt"
    empty.write_text("\n")
    short.write_text("Once upon a time.")
    file = folder / "a-file"
    file.write_text("")
    return [
        Case("no such config", config=None),
        Case("broken YAML", config="methods: [shortgpt\n"),
        Case("a key twice", config=BASE + "sparsities: [0.3]\n"),
        Case("an unknown key", ("calibraton.num_windows=4",)),
        Case("an unknown key further down", ("evaluation.perplexity.protocl={}",)),
        Case("an override without a value", ("sparsities",)),
        Case("an unknown method", ("methods=[shortgtp]",)),
        Case("an unknown setting of a method", ("methods=[{name: svd_llm, updat: none}]",)),
        Case("an unknown benchmark", ("evaluation.benchmarks=[stdlib_continuatoin]",)),
        Case("a sparsity of 0", ("sparsities=[0]",)),
        Case("a sparsity above 1", ("sparsities=[30]",)),
        Case("a sparsity out of the method's reach", ("sparsities=[0.97]",)),
        Case("no method", ("methods=[]",)),
        Case("windows longer than the context", ("calibration.window_tokens=100000",)),
        Case("a device that is not there", ("model.device=cuda:9",)),
        Case("no such model folder", ("model.name=./no-such-folder",)),
        Case("a hub that is not reached", ("model.name=nobody/no-such-model",)),
        Case("no such text", (f"calibration.source.corpus={folder / 'none.txt'}",)),
        Case("an empty text", (f"calibration.source.corpus={empty}",)),
        Case(
            "a text too short for a window",
            (f"calibration.source.corpus={short}",),
            is_seen_by_a_stage=True,
        ),
        Case("results cannot be written", (f"output.home={file / 'home'}",)),
        *damaged_models(folder),
    ]


def attempt(case: Case, folder: Path) -> Outcome:
    """Run the command of a case; most never get so far as to ask a server, and have none."""
    config, home = folder / "config.yaml", folder / "home"
    config.unlink(missing_ok=True)
    if case.config is not None:
        config.write_text(case.config)
    shutil.rmtree(home, ignore_errors=True)
    server = {} if case.is_seen_by_a_stage else {"PREFECT_API_URL": NO_SERVER}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "foldstack.flows.cli.app", "run", str(config), *case.overrides],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS_AT_MOST,
        env=os.environ | {"FOLDSTACK_HOME": str(home)} | server,
    )
    return Outcome(
        mistake=case.mistake,
        exit_code=done.returncode,
        said=done.stderr.strip(),
        seconds=round(time.perf_counter() - started, 1),
        models_made=len(list((home / "store" / "artifacts" / "compress_model").glob("*"))),
    )


def main() -> None:
    """Print what was said to every mistake; exit status 1 when one was not refused so."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for case in cases(folder):
            outcome = attempt(case, folder)
            outcomes.append(outcome)
            if not arguments.json:
                mark = "" if outcome.is_refused else "  <-- NOT REFUSED IN A SENTENCE"
                said = outcome.said.replace(str(folder), "...")
                print(
                    f"{outcome.mistake}: exit code {outcome.exit_code}{mark}\n    {said}",
                    flush=True,
                )
    refused = sum(outcome.is_refused for outcome in outcomes)
    if arguments.json:
        figures = {"bad_inputs_tried": len(outcomes), "bad_inputs_refused_in_a_sentence": refused}
        print(json.dumps({**figures, "cases": [asdict(outcome) for outcome in outcomes]}, indent=1))
    else:
        print(f"{refused} of {len(outcomes)} refused in a sentence")
    sys.exit(refused != len(outcomes))


if __name__ == "__main__":
    main()
