"""Load model folders in this process and compare each with what its maker saw.

Run as a script in a fresh process, without foldstack: `python -P reload_check.py FOLDER PROBE
[FOLDER PROBE ...]`. It imports nothing of ours on purpose, so that it sees what any user of
transformers sees. `PROBE` is a safetensors file with `input_ids` [1, tokens] and the maker's
`logits` [1, tokens, vocab], and in its head as JSON `texts` for the folder's tokenizer. Prints one
JSON object per folder, in their order, one a line.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

GREEDY_TOKENS = 8


def check(folder: Path, probe: dict[str, torch.Tensor], trust_remote_code: bool) -> dict[str, Any]:
    """The reloaded model against the probe, against its own cached decoding, and its size."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust_remote_code, dtype="auto", use_safetensors=True
    ).eval()
    # What the folder's own says (stop strings, several sequences) has no say in what it computes.
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=GREEDY_TOKENS)
    input_ids = probe["input_ids"].long()
    with torch.inference_mode():
        logits = model(input_ids, use_cache=False).logits.float()
        cached = cached_logits(model, input_ids)
        generated = model.generate(input_ids, attention_mask=torch.ones_like(input_ids))
    return {
        "logits_scale": probe["logits"].abs().max().item(),
        "logits_difference": (logits - probe["logits"]).abs().max().item(),
        "cached_difference": (cached - logits).abs().max().item(),
        "is_finite": bool(logits.isfinite().all()),
        "generated_tokens": generated[0, input_ids.shape[1] :].tolist(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "class_name": type(model).__name__,
    }


def tokens(folder: Path, texts: list[str], trust_remote_code: bool) -> list[list[int]]:
    """What the folder's tokenizer makes of texts; it is not opened where there are none."""
    if not texts:
        return []
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return [list(map(int, tokenizer(text)["input_ids"])) for text in texts]


def cached_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prefill of half the tokens, then of the others one by one from the KV cache."""
    tokens = input_ids.shape[1]
    starts = [0, *range(tokens // 2, tokens)]
    cache, steps = None, []
    for start, stop in zip(starts, [*starts[1:], tokens], strict=True):
        output = model(input_ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits.float())
    return torch.cat(steps, dim=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folders_and_probes", type=Path, nargs="+", metavar="FOLDER PROBE")
    parser.add_argument("--trust_remote_code", action="store_true")
    arguments = parser.parse_args()
    given = arguments.folders_and_probes
    for folder, probe in zip(given[::2], given[1::2], strict=True):
        report = check(folder, load_file(probe), arguments.trust_remote_code)
        with safe_open(probe, "pt") as head:
            texts = json.loads((head.metadata() or {}).get("texts", "[]"))
        report["tokens"] = tokens(folder, texts, arguments.trust_remote_code)
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()
