"""Tokens per second of compressed structures beside dense, and of perplexity beside forward.

Structures have random weights: a method's outline says their shapes, and no data are needed. Every
structure takes turns with the dense model, and ratios are taken turn by turn; their medians are
held against what they should be: at 15 % nothing decodes slower than 0.97 times dense, at 30 %
what has lost FLOPs is faster than 1.05 times, and a prompt is read in at least 0.85 of what the
FLOPs that are left promise. Perplexity is that of the reference model on the standard library,
against its plain forward pass over the same windows.

    python benchmarks/throughput.py [--shape small|reference|llama-1b|FOLDER] [--blocks N]
        [--methods modegpt svd_llm ...] [--sparsities 0.15 0.3] [--json] [--threads 1] [--repeats 5]
"""

import argparse
import cProfile
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from foldstack.compression import reference
from foldstack.compression.checkpoints.checkpoint import load_model, load_tokenizer
from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.generation import generate_greedily
from foldstack.compression.evaluation.perplexity import measure_perplexity
from foldstack.compression.evaluation.records import PerplexityProtocol
from foldstack.compression.methods import METHODS
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.size import count_parameters, size_of
from foldstack.compression.structure.surgery import build_on_meta, config_for

METHOD_NAMES = (
    "modegpt", "svd_llm", "basis_sharing", "slicegpt", "direct_share", "block_sharing", "flexigpt",
    "foldgpt", "shortgpt",
)  # fmt: skip
PROMPT_TOKENS, NEW_TOKENS = 128, 24
PERPLEXITY_TOKENS = 8_192
LEAST_DECODE, LEAST_DECODE_OF_FEWER_FLOPS, LEAST_PREFILL = 0.97, 1.05, 0.85
FEW = 0.2
"""Sparsities below it are held against the first of these, those above it against the second."""


def shape_of(name: str, blocks: int | None) -> PreTrainedConfig:
    """The config of a dense model; `blocks` replaces its depth."""
    common: dict[str, Any] = {"max_position_embeddings": 512, "tie_word_embeddings": True}
    if name == "small":  # 32 million parameters, of which nine tenths are in the blocks
        config: Any = LlamaConfig(
            vocab_size=4000, hidden_size=512, intermediate_size=1408, num_hidden_layers=10,
            num_attention_heads=8, **common,
        )  # fmt: skip
    elif name == "llama-1b":  # TinyLlama's
        config = LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
            num_attention_heads=32, num_key_value_heads=4, **common,
        )  # fmt: skip
    else:
        config = AutoConfig.from_pretrained(
            reference.MODEL_FOLDER if name == "reference" else Path(name)
        )
    if blocks is not None:
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:blocks]
    return config


def structures(
    dense: PreTrainedConfig, methods: Sequence[str], sparsities: Sequence[float]
) -> Iterator[tuple[str, float, PreTrainedConfig]]:
    """What the methods make of the dense model: method, sparsity, config."""
    meta = build_on_meta(dense)
    for sparsity in sparsities:
        for name in methods:
            try:
                plan = METHODS[name](sparsity=sparsity).outline(meta)
            except InputError as refused:
                print(f"{name} {sparsity}: {refused}")
                continue
            yield name, sparsity, config_for(dense, plan)


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


class _Kernels(TorchDispatchMode):
    """Counts the operations that compute or copy something; views do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def per_block(model: PreTrainedModel) -> tuple[float, float]:
    """Kernels, and calls of Python and C functions, of one decoding step, per block."""
    prompt = torch.zeros(1, PROMPT_TOKENS, dtype=torch.long)
    blocks, steps = len(architecture_of(model).blocks(model)), 4
    generate_greedily(model, prompt, 2)

    def of_both(new_tokens: int) -> tuple[int, int]:
        with _Kernels() as kernels:
            generate_greedily(model, prompt, new_tokens)
        profile = cProfile.Profile()
        profile.runcall(generate_greedily, model, prompt, new_tokens)
        return kernels.count, sum(entry.callcount for entry in profile.getstats())

    few, many = of_both(2), of_both(2 + steps)
    kernels, calls = ((m - f) / steps / blocks for f, m in zip(few, many, strict=True))
    return kernels, calls


def prefill_flops(model: PreTrainedModel) -> float:
    """Of the linears in the blocks for each token of the prompt, and of the head for the last."""
    head: Any = model.get_output_embeddings()
    of_head = 2 * head.weight.numel()
    return (size_of(model).flops_per_token - of_head) * PROMPT_TOKENS + of_head


@dataclass(frozen=True)
class Row:
    """A structure beside the dense model; ratios of speeds are above 1 where it is faster."""

    method: str
    sparsity: float
    batch_size: int
    parameters: float
    """Share of the dense model's that is left."""
    flops: float
    """Share of the dense model's that is left, for a prompt."""
    decode: float
    prefill: float
    kernels_per_block: float
    calls_per_block: float

    @property
    def least_decode(self) -> float | None:
        if self.batch_size > 1:
            return None
        if self.sparsity < FEW:
            return LEAST_DECODE
        return LEAST_DECODE_OF_FEWER_FLOPS if self.flops < 1 - self.sparsity / 2 else None

    @property
    def least_prefill(self) -> float:
        return LEAST_PREFILL / self.flops

    @property
    def missed(self) -> str:
        """What is below its bar."""
        bars = {"decode": self.least_decode, "prefill": self.least_prefill}
        return " ".join(
            name for name, bar in bars.items() if bar is not None and getattr(self, name) < bar
        )


def against_dense(
    config: PreTrainedConfig,
    methods: Sequence[str],
    sparsities: Sequence[float],
    batch_sizes: Sequence[int],
    new_tokens: int,
    repeats: int,
) -> Iterator[Row]:
    dense = random_model(config)
    yield Row("dense", 0.0, 1, 1.0, 1.0, 1.0, 1.0, *per_block(dense))
    for method, sparsity, structure in structures(config, methods, sparsities):
        model = random_model(structure)
        kernels, calls = per_block(model)
        for batch_size in batch_sizes:
            prompt = torch.randint(config.vocab_size, (batch_size, PROMPT_TOKENS))
            turns = [
                [generate_greedily(m, prompt, new_tokens) for m in (dense, model)]
                for _ in range(1 + repeats)
            ][1:]
            yield Row(
                method,
                sparsity,
                batch_size,
                count_parameters(model) / count_parameters(dense),
                prefill_flops(model) / prefill_flops(dense),
                float(np.median([d.decode / m.decode for d, m in turns])),
                float(np.median([d.prefill / m.prefill for d, m in turns])),
                kernels,
                calls,
            )


def perplexity_over_forward(repeats: int) -> dict[str, float]:
    """Time of measuring perplexity over that of the forward pass on the same windows."""
    folder = reference.MODEL_FOLDER
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    protocol = PerplexityProtocol(max_tokens=PERPLEXITY_TOKENS)
    text = [
        Path(json.__file__).with_name(name).read_text() for name in ("decoder.py", "encoder.py")
    ]
    text = text * (1 + 4 * PERPLEXITY_TOKENS // sum(map(len, text)))
    windows = torch.randint(
        model.config.vocab_size,
        (PERPLEXITY_TOKENS // protocol.window_tokens, protocol.window_tokens),
    )
    ratios, rates = [], []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        with torch.inference_mode():
            for batch in windows.split(protocol.batch_size):
                model(batch, use_cache=False)
        between = time.perf_counter()
        result = measure_perplexity(model, tokenizer, text, protocol)
        took = time.perf_counter() - between
        ratios.append(took / (between - started) * windows.numel() / result.num_tokens)
        rates.append(result.num_tokens / took)
    return {
        "perplexity_over_forward": float(np.median(ratios[1:])),
        "perplexity_tokens_per_second": float(np.median(rates[1:])),
    }


def show(rows: Iterator[Row]) -> list[Row]:
    """Print the rows as they come."""
    print(
        f"{'structure':<22}{'batch':>6}{'left':>7}{'FLOPs':>7}{'decode x':>10}{'bar':>6}"
        f"{'prefill x':>11}{'bar':>6}{'kernels':>9}{'calls':>7}  below"
    )
    shown = []
    for row in rows:
        bar = "-" if row.least_decode is None else f"{row.least_decode:.2f}"
        print(
            f"{row.method + f' {row.sparsity}':<22}{row.batch_size:>6}{row.parameters:>7.2f}"
            f"{row.flops:>7.2f}{row.decode:>10.2f}{bar:>6}{row.prefill:>11.2f}"
            f"{row.least_prefill:>6.2f}{row.kernels_per_block:>9.1f}{row.calls_per_block:>7.0f}"
            f"  {row.missed}",
            flush=True,
        )
        shown.append(row)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="small", help="small, reference, llama-1b or a folder")
    parser.add_argument("--blocks", type=int, help="instead of the shape's own")
    parser.add_argument("--methods", nargs="+", default=METHOD_NAMES, choices=METHOD_NAMES)
    parser.add_argument("--sparsities", type=float, nargs="+", default=(0.15, 0.3))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(1,))
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--no-perplexity", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = {} if arguments.no_perplexity else perplexity_over_forward(arguments.repeats)
    rows = against_dense(
        shape_of(arguments.shape, arguments.blocks),
        arguments.methods,
        arguments.sparsities,
        arguments.batch_sizes,
        arguments.new_tokens,
        arguments.repeats,
    )
    if arguments.json:
        print(json.dumps({**figures, "structures": [asdict(row) for row in rows]}, indent=1))
        return
    for name, value in figures.items():
        print(f"{name:<44} {value:14.3f}")
    show(rows)


if __name__ == "__main__":
    main()
