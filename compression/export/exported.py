"""`export_model`: write a model folder in another form, load it in its engine, and compare.

The engine runs in a process of its own. Beside what was written lies `export.json`: what it was
made from, and what the comparison found or how it can be made.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.checkpoints.checkpoint import (
    check_reload,
    load_model,
    load_tokenizer,
    model_fingerprint,
    save_model,
)
from foldstack.compression.errors import InputError
from foldstack.compression.export import llama_cpp_check
from foldstack.compression.export.gguf_file import why_not_gguf, write_gguf
from foldstack.compression.export.multiplied_out import multiplied_out
from foldstack.compression.structure.size import count_parameters

Target = Literal["stock", "gguf"]
REPORT_FILE = "export.json"
GREEDY_TOKENS = 16
TEXT = "The house was built in 1904, and nobody has lived in it since; the garden grew over the"
TEXTS = (
    TEXT,
    "  two  spaces,\ttabs\nand 3 lines\n\n\nof 12345 67.89 digits",
    "def f(x):\n    return [i**2 for i in range(10) if i != x]  # squares",
    "Zoë naïve façade Ångström, 漢字かな, привет",
    "emoji 🙂👩‍👩‍👧 and symbols ≤ ∑ €",
)
"""Spaces, digits, code, accents, emoji: what tokenizers differ in."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what its engine makes of it beside transformers."""

    target: str
    file: str
    form: str
    """The class or the architecture that the engine loads."""
    source: str
    """Fingerprint of the folder that it was made from."""
    parameters_before: int
    parameters_after: int
    checked_with: str | None = None
    difference: float | None = None
    """Largest difference of a token's log-probability, in nats."""
    greedy_is_equal: bool | None = None
    tokens_are_equal: bool | None = None
    tokens_per_second: float | None = None
    """Of decoding in the engine, where it was measured."""
    unchecked: str | None = None
    """How it can be checked, where the engine is not here."""


def export_model(
    folder: Path,
    target: Target,
    out: Path,
    *,
    quantise: str | None = None,
    engine_python: str | None = None,
) -> ExportReport:
    """Write the model in `folder` for other programs into the new folder `out`.

    Args:
        target: stock writes the family's own class, larger and with the same logits; gguf a file
            for llama.cpp.
        quantise: one of llama.cpp's schemes (q8_0, q4_k_m) for the file, by its own quantiser.
        engine_python: a Python that has the engine; by default this one, if it has.

    Raises:
        InputError: the structure or the tokenizer has no such form, or `out` holds something.
        RuntimeError: what was written computes something else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already: give a folder that is new or empty")
    if quantise is not None and target != "gguf":
        raise InputError("quantise is for --to gguf alone")
    model = load_model(folder)
    write = _write_stock if target == "stock" else _write_gguf
    report = write(model, folder, out, quantise, engine_python)
    text = json.dumps(asdict(report), indent=2) + "\n"
    (out / REPORT_FILE).write_text(text, encoding="utf-8")
    return report


def _write_stock(
    model: PreTrainedModel, folder: Path, out: Path, _quantise: Any, _python: Any
) -> ExportReport:
    stock = multiplied_out(model)
    save_model(stock, out, tokenizer_from=folder)
    reloaded = check_reload(stock, out, tokenizer_from=folder)
    ids = torch.tensor([load_tokenizer(folder)(TEXT)["input_ids"]])
    one, other = (log_probabilities_of(m, ids) for m in (model, stock))
    return ExportReport(
        target="stock",
        file=out.name,
        form=type(stock).__name__,
        source=model_fingerprint(folder),
        parameters_before=count_parameters(model),
        parameters_after=reloaded.parameters,
        checked_with="transformers",
        difference=float((one - other).abs().max()),
        greedy_is_equal=greedy_tokens(model, ids) == greedy_tokens(stock, ids),
        tokens_are_equal=True,
    )


def _write_gguf(
    model: PreTrainedModel, folder: Path, out: Path, quantise: str | None, python: str | None
) -> ExportReport:
    if (reason := why_not_gguf(model)) is not None:
        raise InputError(reason)
    python = python or (sys.executable if importlib.util.find_spec("llama_cpp") else None)
    if quantise is not None and python is None:
        raise InputError(
            "quantising is done by llama.cpp: pip install llama-cpp-python, or name a Python that "
            "has it (--engine-python)"
        )
    tokenizer = load_tokenizer(folder)
    out.mkdir(parents=True, exist_ok=True)
    plain = out / f"{folder.name}.gguf"
    form = write_gguf(model, folder, tokenizer, plain, folder.name)
    file = plain if quantise is None else out / f"{folder.name}-{quantise.lower()}.gguf"
    report = ExportReport(
        target="gguf",
        file=file.name,
        form=form,
        source=model_fingerprint(folder),
        parameters_before=count_parameters(model),
        parameters_after=_elements_in(plain),
        unchecked=f"pip install llama-cpp-python, then: foldstack export {folder} --to gguf",
    )
    if python is None:
        return report
    return _checked(report, model, tokenizer, plain, file, quantise, python)


def _elements_in(file: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)


def _checked(
    report: ExportReport,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plain: Path,
    file: Path,
    quantise: str | None,
    python: str,
) -> ExportReport:
    """What llama.cpp makes of the file beside transformers; the file before quantising goes."""
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    request = {
        "file": str(file),
        "source": str(plain),
        "quantise": quantise,
        "tokens": ids[0].tolist(),
        "texts": TEXTS,
        "generate": GREEDY_TOKENS,
    }
    finished = subprocess.run(
        [python, "-P", llama_cpp_check.__file__],
        input=json.dumps(request) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        last = (finished.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"llama.cpp does not run {file}: {last}")
    seen = json.loads(finished.stdout.splitlines()[-1])
    expected = log_probabilities_of(model, ids)
    difference = float((torch.tensor(seen["log_probabilities"]) - expected).abs().max())
    tokens = [list(map(int, tokenizer(text)["input_ids"])) for text in TEXTS]
    if quantise is not None:
        plain.unlink()
    fields = asdict(report) | {
        "checked_with": f"llama-cpp-python {seen['version']}",
        "difference": difference,
        "greedy_is_equal": greedy_tokens(model, ids) == seen["greedy"],
        "tokens_are_equal": tokens == seen["tokens"],
        "tokens_per_second": seen["tokens_per_second"],
        "unchecked": None,
    }
    return ExportReport(**fields)


@torch.inference_mode()
def log_probabilities_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Of each token after the first, in float64."""
    logits = model(ids, use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


@torch.inference_mode()
def greedy_tokens(model: PreTrainedModel, ids: torch.Tensor) -> list[int]:
    """The tokens that follow, without an end, by whole forward passes."""
    tokens = ids
    for _ in range(GREEDY_TOKENS):
        best = model(tokens, use_cache=False).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, best], dim=1)
    return tokens[0, ids.shape[1] :].tolist()
