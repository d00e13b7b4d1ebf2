"""What gathering statistics costs: against the arithmetic that it consists of, and in memory.

A Llama-shaped random model in float32 on this machine's CPU. The floor of a pass is the time of its
matrix products alone, each timed by itself in the same shape: every linear of the blocks on every
batch, and for every distinct input the whole product X^T X. Attention scores, norms, activations,
cosines, sums and files are above the floor. What one method alone would gather is timed once for
each set of kinds that methods need, and counted for every method with that need. Floor and pass
take turns. Times are CPU time of one thread, which others on the machine disturb little.

    python benchmarks/gathering.py [--json] [--only speed memory]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foldstack.compression.checkpoints.checkpoint import load_model
from foldstack.compression.evaluation.memory_probe import peak_resident_bytes
from foldstack.compression.methods import METHODS
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.size import count_parameters

NUM_BLOCKS = (2, 4, 8)
NUM_WINDOWS = (4, 8, 16)
WINDOW_TOKENS = 512
BATCH_SIZE = 4
REPEATS = 3
MEMORY_WINDOW_TOKENS = 128
"""Where memory is measured: what does not depend on the number of windows is told apart sooner."""


def llama(num_blocks: int) -> LlamaForCausalLM:
    """Random weights; 124 million with eight blocks."""
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=num_blocks,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW_TOKENS,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def windows(count: int, tokens: int = WINDOW_TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(16_000, (count, tokens), generator=generator)


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def median(call: Callable[[], object]) -> float:
    call()
    return float(np.median([seconds(call) for _ in range(REPEATS)]))


def floor_of_batch(model: LlamaForCausalLM) -> float:
    """Seconds of the matrix products of one batch in one block."""
    architecture = architecture_of(model)
    block = architecture.blocks(model)[0]
    tokens, total = BATCH_SIZE * WINDOW_TOKENS, 0.0
    seen = set()
    with torch.no_grad():
        for site in architecture.linears:
            weight = architecture.weight(block.get_submodule(site.name))
            x = torch.randn(tokens, weight.shape[1])
            total += median(lambda x=x, weight=weight: x @ weight.T)
            if site.reads not in seen:
                seen.add(site.reads)
                total += median(lambda x=x: x.T @ x)
    return total


def gathered(model: LlamaForCausalLM, count: int, kinds: frozenset[str]) -> float:
    """Seconds of a pass that writes its Grams to disk."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds(
            lambda: gather(
                model, windows(count), kinds, batch_size=BATCH_SIZE, folder=Path(folder)
            ).save(Path(folder))
        )


def speed() -> dict[str, float]:
    """Times of passes, and what they are of the floor and of one another."""
    model, most = llama(NUM_BLOCKS[-1]), NUM_WINDOWS[-1]
    gathered(model, BATCH_SIZE, KINDS)
    needs = [frozenset(method.needs) for method in METHODS.values()]
    of_needs = {need: gathered(model, most, need) for need in set(needs) if need}
    alone = sum(of_needs[need] for need in needs if need)
    batches = (most // BATCH_SIZE) * NUM_BLOCKS[-1]
    turns = [(floor_of_batch(model), gathered(model, most, KINDS)) for _ in range(REPEATS)]
    floor = batches * float(np.median([of_batch for of_batch, _ in turns]))
    together = float(np.median([took for _, took in turns]))
    ratios = [took / (batches * of_batch) for of_batch, took in turns]
    per_window = [gathered(model, count, KINDS) / count for count in NUM_WINDOWS]
    per_block = [gathered(llama(count), most, KINDS) / count for count in NUM_BLOCKS]
    return {
        "parameters": count_parameters(model),
        "tokens": most * WINDOW_TOKENS,
        "floor_seconds": floor,
        "seconds": together,
        "over_floor": float(np.median(ratios)),
        "over_floor_least": min(ratios),
        "over_floor_most": max(ratios),
        "methods_alone_seconds": alone,
        "of_methods_alone": together / alone,
        **{
            f"ms_per_token_of_{n}_windows": 1e3 * s / WINDOW_TOKENS
            for n, s in zip(NUM_WINDOWS, per_window, strict=True)
        },
        **{f"seconds_per_block_of_{n}": s for n, s in zip(NUM_BLOCKS, per_block, strict=True)},
    }


def memory() -> dict[str, float]:
    """Peak resident memory of fresh processes, in MiB, by blocks and by windows."""
    peaks = {}
    with tempfile.TemporaryDirectory() as work:
        for count in NUM_BLOCKS:
            llama(count).save_pretrained(Path(work) / str(count))
        for blocks, count in [
            *((blocks, NUM_WINDOWS[-1]) for blocks in NUM_BLOCKS),
            *((NUM_BLOCKS[-1], count) for count in NUM_WINDOWS[:-1]),
        ]:
            command = [sys.executable, __file__, "--peak", Path(work) / str(blocks), str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[f"peak_mib_{blocks}_blocks_{count}_windows"] = float(done.stdout)
    return {**peaks, "peak_growth": max(peaks.values()) / min(peaks.values())}


def peak(folder: Path, count: int) -> float:
    """Peak resident memory of this process after a pass, in MiB."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work)
        gather(
            load_model(folder), windows(count, MEMORY_WINDOW_TOKENS), KINDS,
            batch_size=BATCH_SIZE, folder=out, work=out,
        )  # fmt: skip
    return peak_resident_bytes() / 2**20


PARTS = {"speed": speed, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(Path(arguments.peak[0]), int(arguments.peak[1])))
        return
    torch.set_num_threads(1)
    figures = {name: value for part in arguments.only for name, value in PARTS[part]().items()}
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        print(f"{name:<36} {value:14.3f}")


if __name__ == "__main__":
    main()
