"""Perplexity of every method's variants on one model and two texts, in one run.

    python benchmarks/methods.py --model DIR --calibration FILE --test FILE --sparsity 0.2 0.4 \\
        [--measured_on linears|model] [--variant 'svd_llm update=closed_form' ...] \\
        [--recovery_steps 48 --seeds 0 1 2] [--json]

Protocol: the documents of a text (its lines, or what stands between <|endoftext|>) joined by a
blank line, tokenised at once, cut into windows of one length; --num_calibration windows from the
start of the one text, --num_test from the start of the other; mean next-token loss inside a window.
--sampler svd_llm draws the calibration windows as that method's released code does (its seed is 3).
With --measured_on linears the sparsity is a fraction of the linears inside the blocks, as in most
papers, and is translated. With --recovery_steps every result, and the dense model, then trains on
the same further windows of the calibration text. "reference" is a model, python-stdlib:train and
python-stdlib:test are texts. Without --variant every method runs as it comes; --variant paper_forms
adds those that switch our departures off.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.checkpoint import load_model, load_tokenizer
from foldstack.compression.corpus import PYTHON_STDLIB, TextSource, documents
from foldstack.compression.method import Evidence, Method
from foldstack.compression.methods import METHODS
from foldstack.compression.model_folder import resolve
from foldstack.compression.ranking import rank_blocks
from foldstack.compression.recovery import Recovery, recover
from foldstack.compression.size import Size, size_of
from foldstack.compression.statistics import KINDS, gather
from foldstack.compression.surgery import cut

# Methods that make a model larger are not compared with those that make it smaller.
SHRINKING = tuple(name for name in METHODS if name != "flexigpt_extend")
# One departure switched off each; the last of a method switches off all.
PAPER_FORMS = (
    "svd_llm allocation=paper",
    "svd_llm dense_target=0",
    "svd_llm update=none",
    "svd_llm update=none allocation=v2",
    "svd_llm update=none allocation=paper",
    "basis_sharing pooling=paper",
    "basis_sharing dense_target=0",
    "basis_sharing update=none",
    "basis_sharing update=none coefficients=paper",
    "basis_sharing update=none pooling=paper coefficients=paper allocation=paper",
    "modegpt allocation=uniform",
    "modegpt query_key_weight=1",
    "modegpt pair_score=sum",
    "modegpt value_subspace=values",
    "modegpt query_key_weight=1 pair_score=sum value_subspace=values",
    "llm_streamline replacement=none",
    "llm_streamline replacement=ffn",
    "llm_streamline replacement=layer loss=llm",
    "llm_streamline initial=paper learning_rate=2e-4",
)
RECOVERY_BATCH = 8


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


def cross_entropy(model: PreTrainedModel, windows: Tensor) -> float:
    """Mean loss of the tokens that have one before them in their window, in nats."""
    with torch.no_grad():
        losses = [float(model(batch, labels=batch).loss) * len(batch) for batch in windows.split(8)]
    return math.fsum(losses) / len(windows)


def settings_of(variant: str) -> tuple[str, dict[str, Any]]:
    """ "svd_llm update=none" as a name and its settings."""
    name, *pairs = variant.split()
    settings = dict(pair.split("=", 1) for pair in pairs)
    return name, {
        key: json.loads(text) if _is_json(text) else text for key, text in settings.items()
    }


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def variants_of(given: list[str] | None) -> list[str]:
    """The variants to run: those that were named, or every method as it comes."""
    named = [name for name in given or [] if name != "paper_forms"]
    forms = PAPER_FORMS if given and "paper_forms" in given else ()
    return [*(named or SHRINKING), *forms]


class Bench:
    """One model, the windows that it is compressed with, and those that it is tested on."""

    def __init__(self, options: argparse.Namespace) -> None:
        folder = resolve(options.model)
        self.model, tokenizer = load_model(folder), load_tokenizer(folder)
        tokens, count = options.window_tokens, options.num_calibration
        texts = texts_of(options.calibration, options.items)
        drawn = count, options.sampler_seed
        self.calibration = (
            sampled_windows(tokenizer, Path(options.calibration), tokens, *drawn)
            if options.sampler == "svd_llm"
            else token_windows(tokenizer, texts, tokens, 0, count)
        )
        self.steps: int = options.recovery_steps
        num_training = self.steps * RECOVERY_BATCH
        self.training = token_windows(tokenizer, texts, tokens, count, num_training)
        if len(self.training) < num_training:
            raise SystemExit(
                f"--recovery_steps {self.steps} need {num_training} windows after the first "
                f"{count}; {options.calibration} has {len(self.training)}"
            )
        test = texts_of(options.test, options.items)
        self.test = token_windows(tokenizer, test, tokens, 0, options.num_test)
        found = gather(self.model, self.calibration, KINDS)
        self.evidence = Evidence(self.calibration, found, rank_blocks(found))
        self.dense: Size = size_of(self.model)

    def perplexity(self, model: PreTrainedModel) -> float:
        return math.exp(cross_entropy(model, self.test))

    def recovered(self, model: PreTrainedModel, seed: int) -> float:
        """Perplexity after training on the same windows as everybody."""
        settings = Recovery(steps=self.steps, batch_size=RECOVERY_BATCH, seed=seed)
        trained = copy.deepcopy(model)
        recover(trained, self.training, settings)
        return self.perplexity(trained)

    def measure(self, method: Method) -> dict[str, float]:
        started = time.perf_counter()
        smaller = cut(self.model, method.compress(self.model, self.evidence))
        seconds = time.perf_counter() - started
        size = size_of(smaller)
        linears = size.block_linear_parameters / self.dense.block_linear_parameters
        figures = {
            "sparsity": 1 - size.parameters / self.dense.parameters,
            "linear_sparsity": 1 - linears,
            "perplexity": self.perplexity(smaller),
            "seconds": seconds,
        }
        if self.steps:
            figures["recovered"] = self.recovered(smaller, method.seed)
        return figures

    def measure_dense(self, seeds: list[int]) -> dict[str, float]:
        figures = {
            "sparsity": 0.0,
            "linear_sparsity": 0.0,
            "perplexity": self.perplexity(self.model),
        }
        if self.steps:
            trained = [self.recovered(self.model, seed) for seed in seeds]
            figures["recovered"] = statistics.mean(trained)
        return figures


def over_seeds(
    bench: Bench, name: str, settings: dict[str, Any], seeds: list[int]
) -> dict[str, Any]:
    """Means over the seeds; "_range" is the largest less the smallest value."""
    try:
        runs = [bench.measure(METHODS[name](seed=seed, **settings)) for seed in seeds]
    except ValueError as error:  # a setting, or a sparsity out of reach
        return {"error": str(error)}
    figures: dict[str, Any] = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    for key in {"perplexity", "recovered"} & figures.keys():
        values = [run[key] for run in runs]
        figures[f"{key}_range"] = max(values) - min(values)
    return figures


def table(figures: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    heads = ("sparsity", "linear_sparsity", "perplexity", "recovered", "seconds")
    yield "| variant | removed | of linears | perplexity | after recovery | seconds |"
    yield "|---|---|---|---|---|---|"
    for variant, row in figures.items():
        if "error" in row:
            yield f"| {variant} | {row['error']} | | | | |"
            continue
        cells = [_cell(row, head) for head in heads]
        yield f"| {variant} | {' | '.join(cells)} |"


def _cell(row: dict[str, Any], head: str) -> str:
    if head not in row:
        return ""
    spread = row.get(f"{head}_range")
    value = f"{row[head]:.1%}" if "sparsity" in head else f"{row[head]:.4g}"
    return value + (f" (range {spread:.2g})" if spread else "")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory, hub id, or reference")
    parser.add_argument("--calibration", required=True, help="text file, or python-stdlib:train")
    parser.add_argument("--test", required=True, help="text file, or python-stdlib:test")
    parser.add_argument("--items", choices=("lines", "documents"), default="lines")
    parser.add_argument("--sampler", choices=("first", "svd_llm"), default="first")
    parser.add_argument("--sampler_seed", type=int, default=3, help="of the svd_llm sampler")
    parser.add_argument("--window_tokens", type=int, default=256)
    parser.add_argument("--num_calibration", type=int, default=128)
    parser.add_argument("--num_test", type=int, default=200)
    parser.add_argument("--sparsity", type=float, nargs="+", required=True)
    parser.add_argument("--measured_on", choices=("linears", "model"), default="model")
    parser.add_argument("--variant", action="append", help="method and settings; may be repeated")
    parser.add_argument("--recovery_steps", type=int, default=0, help="of 8 windows; 0: none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse()
    bench = Bench(options)
    scale = 1.0
    if options.measured_on == "linears":
        scale = bench.dense.block_linear_parameters / bench.dense.parameters
    figures: dict[str, dict[str, Any]] = {"dense": bench.measure_dense(options.seeds)}
    for sparsity in options.sparsity:
        for variant in variants_of(options.variant):
            name, settings = settings_of(variant)
            settings["sparsity"] = sparsity * scale
            label = f"{variant} {sparsity:g}"
            figures[label] = over_seeds(bench, name, settings, options.seeds)
            if not options.json:
                print(label, figures[label], flush=True)
    print(json.dumps(figures, indent=2) if options.json else "\n".join(["", *table(figures)]))


if __name__ == "__main__":
    main()
