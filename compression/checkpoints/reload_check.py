"""Load model folders in this process and compare each with what its maker saw.

Run as a script, without foldstack: `python -P reload_check.py`. It imports nothing of ours on
purpose, so that it sees what any user of transformers sees. Each line of its standard input is a
request in JSON: a model's `folder`, `trust_remote_code`, `texts` for the folder's tokenizer, and
`probe`, a safetensors file with `input_ids` [1, tokens] and the maker's `logits` [1, tokens,
vocab]. It is answered by one line of JSON from a process that has loaded nothing before: a fork of
this one; or, where a process with threads cannot be forked, this one, which then ends.
"""

import inspect
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
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
    # Since transformers 5.24 the cache has another name.
    is_new = "cache" in inspect.signature(type(model).forward).parameters
    name = "cache" if is_new else "past_key_values"
    cache, steps = None, []
    for start, stop in zip(starts, [*starts[1:], tokens], strict=True):
        output = model(input_ids[:, start:stop], use_cache=True, **{name: cache})
        cache = next(output[key] for key in ("cache", "past_key_values") if key in output)
        steps.append(output.logits.float())
    return torch.cat(steps, dim=1)


def answer(request: dict[str, Any]) -> str:
    """The report on one folder as JSON, or what kept it from being made, under "error"."""
    try:
        folder, trusted = Path(request["folder"]), request["trust_remote_code"]
        seen = check(folder, load_file(request["probe"]), trusted)
        seen["tokens"] = tokens(folder, request["texts"], trusted)
    except BaseException as error:
        return json.dumps({"error": traceback.format_exception_only(error)[-1].strip()})
    return json.dumps(seen)


def answer_in_a_fork(request: dict[str, Any]) -> str:
    """The same from a process that ends with it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writing, "w") as telling:
            telling.write(answer(request))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        text = told.read()
    _, status = os.waitpid(child, 0)
    return text or json.dumps({"error": f"exit status {os.waitstatus_to_exitcode(status)}"})


if __name__ == "__main__":
    for line in sys.stdin:
        can_fork = sys.platform == "linux"
        told = (answer_in_a_fork if can_fork else answer)(json.loads(line))
        sys.stdout.write(told + "\n")
        sys.stdout.flush()
        if not can_fork:
            break
