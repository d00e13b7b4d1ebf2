"""Tokens per second of compressed structures beside dense, and of perplexity beside forward.

Structures have random weights: a method's outline says their shapes, and no data are needed. Every
structure takes turns with the dense model, and ratios are taken turn by turn. Perplexity is that of
the reference model on the standard library, against its plain forward pass over the same windows.

    python benchmarks/throughput.py [--json] [--threads 1] [--repeats 5]
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from foldstack.compression import reference
from foldstack.compression.checkpoints.checkpoint import load_model, load_tokenizer
from foldstack.compression.evaluation.generation import generate_greedily
from foldstack.compression.evaluation.perplexity import measure_perplexity
from foldstack.compression.evaluation.records import PerplexityProtocol
from foldstack.compression.methods import METHODS
from foldstack.compression.structure.size import count_parameters
from foldstack.compression.structure.surgery import build_on_meta, config_for

SPARSITIES = (0.3, 0.5)
PROMPT_TOKENS, NEW_TOKENS = 128, 16
BATCH_SIZES = (1, 4)
PERPLEXITY_TOKENS = 8_192


def llama() -> LlamaConfig:
    """32 million parameters, of which nine tenths are in the blocks."""
    return LlamaConfig(
        vocab_size=4000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=10,
        num_attention_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def structures(dense: LlamaConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """What the methods make of the dense model, by name."""
    meta = build_on_meta(dense)
    for name in ("modegpt", "svd_llm", "basis_sharing", "shortgpt"):
        for sparsity in SPARSITIES:
            yield (
                f"{name}_{sparsity}",
                config_for(dense, METHODS[name](sparsity=sparsity).outline(meta)),
            )


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def against_dense(repeats: int) -> dict[str, float]:
    """Ratios to the dense model of the same turns; above 1 is faster."""
    config = llama()
    dense = random_model(config)
    figures: dict[str, float] = {"dense_parameters": count_parameters(dense)}
    for name, structure in structures(config):
        model = random_model(structure)
        figures[f"{name}_parameters"] = count_parameters(model) / count_parameters(dense)
        for batch_size in BATCH_SIZES:
            prompt = torch.randint(config.vocab_size, (batch_size, PROMPT_TOKENS))
            turns = [
                [generate_greedily(m, prompt, NEW_TOKENS) for m in (dense, model)]
                for _ in range(1 + repeats)
            ][1:]
            place = f"{name}_batch_{batch_size}"
            figures[f"{place}_prefill"] = float(
                np.median([d.prefill / m.prefill for d, m in turns])
            )
            figures[f"{place}_decode"] = float(np.median([d.decode / m.decode for d, m in turns]))
    return figures


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = perplexity_over_forward(arguments.repeats) | against_dense(arguments.repeats)
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        print(f"{name:<44} {value:14.3f}")


if __name__ == "__main__":
    main()
