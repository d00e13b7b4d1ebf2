"""Load model folders in vLLM and say what it computes.

Run as a script by a Python that has vLLM: `python -P vllm_check.py`, with one request in JSON a
line on standard input: the `folder`, the `tokens` of a text and `generate` (how many tokens). It
imports nothing of ours. Each is answered by a line of JSON: log-probabilities of the tokens after
the first, greedy tokens, and tokens per second of decoding; or "error", what kept it from that.
"""

import gc
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What vLLM makes of the folder."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    tokens = request["tokens"]
    model = LLM(
        request["folder"],
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=len(tokens) + request["generate"],
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.1,
    )
    prompt = TokensPrompt(prompt_token_ids=tokens)
    asked = {"temperature": 0, "detokenize": False, "ignore_eos": True}
    once = SamplingParams(max_tokens=1, prompt_logprobs=1, **asked)
    (first,) = model.generate(prompt, once, use_tqdm=False)
    started = time.perf_counter()
    (second,) = model.generate(
        prompt, SamplingParams(max_tokens=request["generate"], **asked), use_tqdm=False
    )
    seconds = time.perf_counter() - started
    places = zip(tokens[1:], first.prompt_logprobs[1:], strict=True)
    report = {
        "log_probabilities": [float(seen[token].logprob) for token, seen in places],
        "greedy": list(second.outputs[0].token_ids),
        "tokens_per_second": request["generate"] / seconds,
    }
    del model
    gc.collect()
    return report


if __name__ == "__main__":
    for line in sys.stdin:
        try:
            told = answer(json.loads(line))
        except BaseException as error:
            told = {"error": (str(error).strip().splitlines() or [type(error).__name__])[-1]}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
