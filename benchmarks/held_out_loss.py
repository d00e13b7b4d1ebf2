"""One model, the windows that it is compressed with and those that it is tested on; no command.

Protocol: the documents of a text (its lines, or what stands between <|endoftext|>) joined by a
blank line, tokenised at once, cut into windows of one length; mean next-token loss inside a window.
`methods.py` and `claims.py` measure with it.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.checkpoints.checkpoint import load_model, load_tokenizer
from foldstack.compression.checkpoints.model_folder import resolve
from foldstack.compression.methods import METHODS
from foldstack.compression.methods.method import Evidence, Method, no_progress
from foldstack.compression.methods.search.scoring import scored
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.statistics.sensitivity import Sensitivity
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import Size, size_of
from foldstack.compression.structure.surgery import cut
from foldstack.compression.text.calibration import WindowSpec
from foldstack.compression.text.corpus import PYTHON_STDLIB, SELF, TextSource, documents
from foldstack.compression.text.self_written import write_windows
from foldstack.compression.training.recovery import Recovery, recover

RECOVERY_BATCH = 8
DATA = (
    "model", "calibration", "test", "items", "sampler", "sampler_seed", "window_tokens",
    "num_calibration", "num_test", "recovery_steps",
)  # fmt: skip
"""Options that say what is measured on what."""

Key = tuple[Any, ...]
Figures = dict[str, Any]


def texts_of(text: str, items: str) -> list[str]:
    """The documents of a file, or of a split of the standard library ("python-stdlib:test")."""
    name, _, split = text.partition(":")
    if name == PYTHON_STDLIB:
        return documents(TextSource(split=split or "train"))
    raw = Path(text).read_text(encoding="utf-8")
    parts = raw.split("\n") if items == "lines" else raw.split("<|endoftext|>")
    return [part for part in parts if part] if items == "lines" else [p.strip() for p in parts]


def token_windows(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], tokens: int, start: int, count: int
) -> Tensor:
    """`count` windows, or as many as there are, from window `start` on."""
    ids = tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // tokens * tokens]).view(-1, tokens)
    return windows[start : start + count]


def sampled_windows(
    tokenizer: PreTrainedTokenizerBase, file: Path, tokens: int, count: int, seed: int
) -> Tensor:
    """Windows drawn as SVD-LLM's released code draws them: at random characters, BOS first."""
    text = "\n\n".join(file.read_text(encoding="utf-8").split("\n"))
    random = Random(seed)
    drawn: list[list[int]] = []
    while len(drawn) < count:
        start = random.randint(0, len(text) - tokens * 10 - 1)
        ids = tokenizer(text[start : start + tokens * 10], verbose=False)["input_ids"]
        if len(ids) >= tokens:
            drawn.append(ids[:tokens])
    return torch.tensor(drawn)


def self_written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
    count: int,
) -> Tensor:
    """Windows that the model writes, at the temperature behind the colon of "self:0.8"."""
    temperature = float(options.calibration.partition(":")[2] or 1)
    bos = "none" if tokenizer.bos_token_id is None else "document"
    spec = WindowSpec(num_windows=count, window_tokens=options.window_tokens, bos=bos)
    return write_windows(model, tokenizer, spec, temperature=temperature).tokens.long()


def losses_of(model: PreTrainedModel, windows: Tensor) -> list[float]:
    """Per window, the mean loss of the tokens that have one before them in it, in nats."""
    losses: list[float] = []
    with torch.no_grad():
        for batch in windows.split(8):
            logits = model(batch).logits[:, :-1].float()
            of_tokens = cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
            )
            losses += of_tokens.view(len(batch), -1).mean(1).tolist()
    return losses


def perplexity_of(losses: list[float]) -> float:
    """Of windows of one length, from their mean losses."""
    return math.exp(math.fsum(losses) / len(losses))


def add_data_options(parser: argparse.ArgumentParser, **defaults: str | int) -> None:
    """Which model, texts and windows; model and texts must be given where they have no default."""
    for name, what in (
        ("model", "directory, hub id, or reference"),
        ("calibration", "text file, python-stdlib:train, or self[:temperature]: the model writes"),
        ("test", "text file, or python-stdlib:test"),
    ):
        is_asked = name not in defaults
        parser.add_argument(f"--{name}", required=is_asked, default=defaults.get(name), help=what)
    parser.add_argument("--items", choices=("lines", "documents"), default="lines")
    parser.add_argument("--sampler", choices=("first", "svd_llm"), default="first")
    parser.add_argument("--sampler_seed", type=int, default=3, help="of the svd_llm sampler")
    for name, usual in (("window_tokens", 256), ("num_calibration", 128), ("num_test", 200)):
        parser.add_argument(f"--{name}", type=int, default=defaults.get(name, usual))
    parser.add_argument(
        "--recovery_steps",
        type=int,
        default=defaults.get("recovery_steps", 0),
        help=f"of {RECOVERY_BATCH} windows; 0: none",
    )
    parser.add_argument(
        "--scores", type=Path, help="folder of what variants cost: made once, of these very windows"
    )


def add_results_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, help="file of JSON lines to go on from")


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


class Results:
    """What was measured so far, by all settings; in `options.results` as well if it is a file.

    Args:
        names: of the parts of a key.
        data: the options that every figure depends on.
    """

    def __init__(
        self, options: argparse.Namespace, names: tuple[str, ...], data: tuple[str, ...]
    ) -> None:
        self.file: Path | None = options.results
        self.names = names
        self.data = {name: getattr(options, name) for name in data}
        self.rows: dict[Key, Figures] = {}
        for line in self._text().splitlines():
            if not is_json(line):  # the end of a run that was killed while it wrote
                continue
            row = json.loads(line)
            if row.items() >= self.data.items() and row.keys() >= set(names):
                self.rows[tuple(row[name] for name in names)] = row["figures"]

    def add(self, key: Key, figures: Figures) -> None:
        self.rows[key] = figures
        if self.file is None:
            return
        row = {**self.data, **dict(zip(self.names, key, strict=True)), "figures": figures}
        start = "\n" if self._text()[-1:] not in ("", "\n") else ""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{start}{json.dumps(row)}\n")

    def _text(self) -> str:
        if self.file is None or not self.file.exists():
            return ""
        return self.file.read_text(encoding="utf-8")


class Bench:
    """A model and its windows: for calibration, for recovery, and for the test."""

    def __init__(self, options: argparse.Namespace) -> None:
        folder = resolve(options.model)
        self.model, tokenizer = load_model(folder), load_tokenizer(folder)
        tokens, count = options.window_tokens, options.num_calibration
        self.steps: int = options.recovery_steps
        self.scores: Path | None = options.scores
        num_training = self.steps * RECOVERY_BATCH
        self.progress: Callable[[str, int, int], None] = no_progress
        if options.calibration.partition(":")[0] == SELF:
            written = self_written(self.model, tokenizer, options, count + num_training)
            self.calibration, self.training = written[:count], written[count:]
        else:
            texts = texts_of(options.calibration, options.items)
            drawn = count, options.sampler_seed
            self.calibration = (
                sampled_windows(tokenizer, Path(options.calibration), tokens, *drawn)
                if options.sampler == "svd_llm"
                else token_windows(tokenizer, texts, tokens, 0, count)
            )
            self.training = token_windows(tokenizer, texts, tokens, count, num_training)
        if len(self.training) < num_training:
            raise SystemExit(
                f"--recovery_steps {self.steps} need {num_training} windows after the first "
                f"{count}; {options.calibration} has {len(self.training)}"
            )
        test = texts_of(options.test, options.items)
        self.test = token_windows(tokenizer, test, tokens, 0, options.num_test)
        self.dense: Size = size_of(self.model)

    @cached_property
    def evidence(self) -> Evidence:
        found = gather(self.model, self.calibration, KINDS)
        return Evidence(self.calibration, found, rank_blocks(found), progress=self._tell)

    def evidence_for(self, method: Method) -> Evidence:
        """The same with the scores that a method asks for, made once, or in another run of the same
        data (`--scores`)."""
        folder = self.scores
        if folder is not None and self.evidence.sensitivity is None and folder.exists():
            self.evidence = replace(self.evidence, sensitivity=Sensitivity.load(folder))
        before = self.evidence.sensitivity
        if method.scores:
            self.evidence = scored(self.evidence, self.model, method.scores)
        after = self.evidence.sensitivity
        if folder is not None and after is not None and after is not before:
            after.save(folder)
        return self.evidence

    def perplexity(self, model: PreTrainedModel) -> float:
        return perplexity_of(self.losses(model))

    def losses(self, model: PreTrainedModel) -> list[float]:
        """Of every test window."""
        return losses_of(model, self.test)

    def compressed(
        self, name: str, sparsity: float, seed: int = 0, **settings: Any
    ) -> tuple[PreTrainedModel, Plan]:
        """What a method makes of the model."""
        method = METHODS[name](sparsity=sparsity, seed=seed, **settings)
        change = method.compress(self.model, self.evidence_for(method))
        return cut(self.model, change), change.plan

    def recovered(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        """A copy, trained on the same windows as everybody's."""
        settings = Recovery(
            steps=self.steps, batch_size=RECOVERY_BATCH, seed=seed, validation_fraction=0
        )
        trained = copy.deepcopy(model)
        recover(trained, self.training, settings, progress=self._tell)
        return trained

    def _tell(self, what: str, done: int, total: int) -> None:
        self.progress(what, done, total)
