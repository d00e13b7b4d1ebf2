"""Compare the reference model with xz: `python -m foldstack.compression.reference.against_xz`.

Both take the same text: every module of the validation and test splits, in order of split and
path. For xz the modules stand in one file (preset 9e, what `xz -9e` does, container included), so
that it finds what one module shares with another. The model reads each module by itself, after a
BOS token, in windows of its context that overlap by half: but for the first window of a module,
only tokens of a window's second half are scored, so that each has half a context or more before
it. Every token of every module is scored and every UTF-8 byte counted; neither the model's size
nor that of xz is.
"""

# ruff: noqa: T201 - talks to a person
import argparse
import json
import logging
import lzma
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from foldstack.compression.reference import MODEL_FOLDER
from foldstack.compression.reference.stdlib_corpus import stdlib_digest, stdlib_split

SPLITS = ("validation", "test")


def model_bits(model: PreTrainedModel, tokens: Tensor, context: int) -> float:
    """Give what the model needs to say `tokens[1:]`, in bits, `tokens[0]` being the BOS token."""
    half = context // 2
    nats = 0.0
    scored_to = 1
    for start in range(0, len(tokens), half):
        window = tokens[start : start + context + 1]
        if start + len(window) <= scored_to:
            break
        with torch.inference_mode():
            logits = model(input_ids=window[None, :-1]).logits[0].float()
        first = scored_to - start
        nats += float(
            torch.nn.functional.cross_entropy(
                logits[first - 1 :], window[first:].long(), reduction="sum"
            )
        )
        scored_to = start + len(window)
    return nats / math.log(2)


def figures(folder: Path) -> dict[str, float | str]:
    """Give bits per byte of the model and of xz, per split and over both."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    result: dict[str, float | str] = {}
    bits, everything = 0.0, b""
    for split in SPLITS:
        texts = list(stdlib_split(split).values())
        split_bits = 0.0
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            tokens = torch.tensor([tokenizer.bos_token_id, *ids])
            split_bits += model_bits(model, tokens, model.config.max_position_embeddings)
        data = "".join(texts).encode()
        result[f"{split}_digest"] = stdlib_digest(split)
        result[f"{split}_bytes"] = len(data)
        result[f"{split}_model_bits_per_byte"] = split_bits / len(data)
        result[f"{split}_xz_bits_per_byte"] = xz_bits(data) / len(data)
        bits, everything = bits + split_bits, everything + data
    result["bytes"] = len(everything)
    result["model_bits_per_byte"] = bits / len(everything)
    result["xz_bits_per_byte"] = xz_bits(everything) / len(everything)
    return result


def xz_bits(data: bytes) -> int:
    """Give the size of `data` under `xz -9e`, in bits."""
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    """Read the command line and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="a model's folder")
    parser.add_argument("--json", action="store_true", help="print the figures for machines")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    result = figures(arguments.model)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{'text':<12}{'bytes':>10}{'model':>10}{'xz -9e':>10}   bits per byte")
    for name, prefix in (*((split, f"{split}_") for split in SPLITS), ("both", "")):
        model, xz = result[f"{prefix}model_bits_per_byte"], result[f"{prefix}xz_bits_per_byte"]
        print(f"{name:<12}{result[f'{prefix}bytes']:>10}{model:>10.4f}{xz:>10.4f}")


if __name__ == "__main__":
    main()
