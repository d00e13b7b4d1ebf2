"""Perplexity of every method's variants at one sparsity, on one model and two text files.

    python benchmarks/methods.py --model DIR --calibration FILE --test FILE --sparsity 0.2 \\
        [--measured_on linears|model] [--variant 'svd_llm update=closed_form' ...] [--json]

Protocol: the documents of a file (split at --separator) joined by a blank line, tokenised at once,
cut into windows of one length; --num_calibration windows from the start of the one file, --num_test
from the start of the other; mean next-token loss inside a window; no recovery. --sampler svd_llm
draws the calibration windows as that method's released code does (its seed is 3). With
--measured_on linears the sparsity is a fraction of the linears inside the blocks, as in most
papers, and is translated.
"""

import argparse
import json
import math
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.checkpoint import load_model, load_tokenizer
from foldstack.compression.method import Evidence, Method
from foldstack.compression.methods import METHODS
from foldstack.compression.ranking import rank_blocks
from foldstack.compression.size import Size, size_of
from foldstack.compression.statistics import KINDS, gather
from foldstack.compression.surgery import cut

VARIANTS = (
    "shortgpt",
    "svd_llm",
    "svd_llm allocation=paper",
    "svd_llm update=closed_form",
    "llm_streamline replacement=none",
    "llm_streamline replacement=layer",
    "llm_streamline replacement=layer loss=llm",
    "llm_streamline replacement=ffn",
    "block_sharing keep_head=1 keep_tail=1",
    "modegpt",
    "modegpt allocation=uniform",
    "modegpt query_key_weight=1",
    "modegpt allocation=uniform query_key_weight=1",
)


def token_windows(
    tokenizer: PreTrainedTokenizerBase, file: Path, items: str, tokens: int, count: int
) -> Tensor:
    raw = file.read_text(encoding="utf-8")
    parts = raw.split("\n") if items == "lines" else raw.split("<|endoftext|>")
    kept = [part for part in parts if part] if items == "lines" else [p.strip() for p in parts]
    ids = tokenizer("\n\n".join(kept), verbose=False)["input_ids"]
    count = min(count, len(ids) // tokens)
    return torch.tensor(ids[: count * tokens]).view(count, tokens)


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


def measure(
    model: PreTrainedModel, method: Method, evidence: Evidence, test: Tensor, dense: Size
) -> dict[str, Any]:
    started = time.perf_counter()
    smaller = cut(model, method.compress(model, evidence))
    seconds = time.perf_counter() - started
    size = size_of(smaller)
    return {
        "perplexity": math.exp(cross_entropy(smaller, test)),
        "sparsity": 1 - size.parameters / dense.parameters,
        "linear_sparsity": 1 - size.block_linear_parameters / dense.block_linear_parameters,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--items", choices=("lines", "documents"), default="lines")
    parser.add_argument("--sampler", choices=("first", "svd_llm"), default="first")
    parser.add_argument("--seed", type=int, default=3, help="of the svd_llm sampler")
    parser.add_argument("--window_tokens", type=int, default=256)
    parser.add_argument("--num_calibration", type=int, default=128)
    parser.add_argument("--num_test", type=int, default=200)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--measured_on", choices=("linears", "model"), default="model")
    parser.add_argument("--variant", action="append", help="method and settings; may be repeated")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    tokens = options.window_tokens
    test = token_windows(tokenizer, options.test, options.items, tokens, options.num_test)
    if options.sampler == "svd_llm":
        drawn = options.num_calibration, options.seed
        calibration = sampled_windows(tokenizer, options.calibration, tokens, *drawn)
    else:
        drawn = options.items, tokens, options.num_calibration
        calibration = token_windows(tokenizer, options.calibration, *drawn)
    statistics = gather(model, calibration, KINDS)
    evidence = Evidence(calibration, statistics, rank_blocks(statistics))
    dense = size_of(model)
    sparsity = options.sparsity
    if options.measured_on == "linears":
        sparsity *= dense.block_linear_parameters / dense.parameters
    figures: dict[str, dict[str, Any]] = {
        "dense": {"perplexity": math.exp(cross_entropy(model, test)), "sparsity": 0.0}
    }
    for variant in options.variant or VARIANTS:
        name, settings = settings_of(variant)
        try:
            method = METHODS[name](sparsity=sparsity, **settings)
            figures[variant] = measure(model, method, evidence, test, dense)
        except ValueError as error:
            figures[variant] = {"error": str(error)}
        if not options.json:
            print(variant, figures[variant], flush=True)
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        print("dense", figures["dense"])


if __name__ == "__main__":
    main()
