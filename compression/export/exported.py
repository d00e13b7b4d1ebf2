"""`export_model`: write a model folder in another form, load it in its engines, and compare.

Engines run in processes of their own. Beside what was written lie `export.json`: what it was made
from, and what the comparison found or how it can be made; and a card that says the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from foldstack.compression.checkpoints.checkpoint import (
    check_reload,
    load_model,
    load_tokenizer,
    model_fingerprint,
    save_model,
)
from foldstack.compression.errors import InputError
from foldstack.compression.export.block_configs import write_deci, write_openelm
from foldstack.compression.export.engines import ENGINES, answer_of
from foldstack.compression.export.export_report import Check, ExportReport
from foldstack.compression.export.forms import ENGINES_OF, Form, NoSuchForm, Target
from foldstack.compression.export.gguf_file import elements_in, write_gguf
from foldstack.compression.export.mlx_folder import write_mlx
from foldstack.compression.export.multiplied_out import multiplied_out
from foldstack.compression.structure.size import count_parameters

GREEDY_TOKENS = 16
FARTHEST = 0.05
"""Nats: an engine that differs by more, where nothing was quantised, computes another model."""
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
class _Written:
    file: str
    form: str
    parameters: int
    precise: tuple[str, ...] = ()
    """Tensors that are not to be quantised."""


def export_model(
    folder: Path,
    form: Form,
    out: Path,
    *,
    engine_python: str | None = None,
) -> ExportReport:
    """Write the model in `folder` for other programs into the new folder `out`.

    Args:
        form: stock is the family's own class, larger and with the same logits; gguf a file for
            llama.cpp; vllm the folder as it is; deci and openelm folders whose blocks have widths
            of their own (vLLM, SGLang, mlx-lm); mlx one for mlx-lm, whatever the structure.
        engine_python: a Python that has the engine; by default that of the engine's variable, or
            this one.

    Raises:
        NoSuchForm: the structure, the family or the tokenizer has no such form.
        InputError: `out` holds something, or quantising is asked for without llama.cpp.
        RuntimeError: an engine does not run what was written, or computes something else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already: give a folder that is new or empty")
    if form.scheme is not None and ENGINES["llama.cpp"].python(engine_python) is None:
        raise InputError(f"quantising is done by llama.cpp; {ENGINES['llama.cpp'].how_to_have_it}")
    model = load_model(folder)
    before = count_parameters(model)
    try:
        written = _WRITERS[form.target](model, folder, out)
    except InputError as error:
        raise NoSuchForm(str(error)) from None
    file = _quantised(out, written, form.scheme, engine_python)
    report = ExportReport(
        target=form.target,
        scheme=form.scheme,
        file=file,
        form=written.form,
        source=model_fingerprint(folder),
        parameters_before=before,
        parameters_after=written.parameters,
        bytes=_bytes_of(out / file if file else folder),
        vocabulary=model.config.get_text_config(decoder=True).vocab_size,
    )
    report = _checked(report, model.float(), folder, out, engine_python)
    out.mkdir(parents=True, exist_ok=True)
    report.save(out, folder.name)
    return report


def _stock(model: PreTrainedModel, folder: Path, out: Path) -> _Written:
    stock = multiplied_out(model)
    save_model(stock, out, tokenizer_from=folder)
    reloaded = check_reload(stock, out, tokenizer_from=folder)
    return _Written(".", type(stock).__name__, reloaded.parameters)


def _gguf(model: PreTrainedModel, folder: Path, out: Path) -> _Written:
    file = out / f"{folder.name}.gguf"
    written = write_gguf(model, folder, load_tokenizer(folder), file, folder.name)
    return _Written(file.name, written.architecture, elements_in(file), written.precise)


def _as_it_is(model: PreTrainedModel, folder: Path, out: Path) -> _Written:
    return _Written("", type(model).__name__, count_parameters(model))


def _folder(
    write: Callable[[PreTrainedModel, Path, Path], tuple[str, int]],
) -> Callable[[PreTrainedModel, Path, Path], _Written]:
    return lambda model, folder, out: _Written(".", *write(model, folder, out))


_WRITERS: dict[Target, Callable[[PreTrainedModel, Path, Path], _Written]] = {
    "stock": _stock,
    "gguf": _gguf,
    "vllm": _as_it_is,
    "deci": _folder(write_deci),
    "openelm": _folder(write_openelm),
    "mlx": _folder(write_mlx),
}


def _quantised(out: Path, written: _Written, scheme: str | None, given: str | None) -> str:
    """The file of fewer bits in place of the plain one."""
    file = written.file
    if scheme is None:
        return file
    smaller = f"{Path(file).stem}-{scheme}.gguf"
    engine = ENGINES["llama.cpp"]
    python = engine.python(given)
    assert python is not None
    request = {"do": "quantise", "source": str(out / file), "file": str(out / smaller)}
    answer_of(engine, python, {**request, "scheme": scheme, "precise": written.precise})
    (out / file).unlink()
    return smaller


def _bytes_of(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _checked(
    report: ExportReport, model: PreTrainedModel, folder: Path, out: Path, given: str | None
) -> ExportReport:
    """With what its engines make of it; `model` is what it was made from, in float32."""
    target = Form.of(report.target).target
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    expected = log_probabilities_of(model, ids), greedy_tokens(model, ids)
    tokens = [list(map(int, tokenizer(text)["input_ids"])) for text in TEXTS]
    if target == "stock":
        stock = load_model(out, dtype=torch.float32)
        seen = log_probabilities_of(stock, ids), greedy_tokens(stock, ids)
        difference = float((seen[0] - expected[0]).abs().max())
        check = Check("transformers", _transformers(), difference, seen[1] == expected[1], True)
        return _judged(replace(report, checks=(check,)))
    engines = [ENGINES[name] for name in ENGINES_OF[target]]
    here = [engine for engine in engines if engine.python(given) is not None]
    missing = [engine.how_to_have_it for engine in engines if engine not in here]
    checks = []
    for engine in here:
        request = {"do": "check", "model": str(report.path(out, folder)), "tokens": ids[0].tolist()}
        answer = answer_of(
            engine, str(engine.python(given)),
            {**request, "texts": TEXTS, "generate": GREEDY_TOKENS},
        )  # fmt: skip
        checks.append(
            Check(
                engine.name,
                engine.version(given),
                float((torch.tensor(answer["log_probabilities"]) - expected[0]).abs().max()),
                answer["greedy"] == expected[1],
                None if answer["tokens"] is None else answer["tokens"] == tokens,
            )
        )
    return _judged(replace(report, checks=tuple(checks), unchecked=tuple(missing)))


def _judged(report: ExportReport) -> ExportReport:
    for check in report.checks:
        if report.scheme is None and not check.difference <= FARTHEST:
            raise RuntimeError(
                f"{check.engine} computes something else from {report.form}: log-probabilities "
                f"differ by {check.difference:.2g} nats"
            )
    return report


def _transformers() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


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
