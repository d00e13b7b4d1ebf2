"""Load a GGUF file in llama.cpp and say what it computes; quantise it before, if asked.

Run as a script by a Python that has `llama-cpp-python`: `python -P llama_cpp_check.py`, with one
request in JSON on standard input: the `file`, the `tokens` of a text, `texts` for the tokenizer,
`generate` (how many tokens), and `quantise` (a scheme) with `source`, the file to quantise. It
imports nothing of ours. Prints one line of JSON: log-probabilities of the tokens after the first,
greedy tokens, the tokens of the texts, and tokens per second of decoding.
"""

import json
import sys
import time
from typing import Any

import numpy as np


def quantise(source: str, file: str, scheme: str) -> None:
    """llama.cpp's own quantiser."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{scheme.upper()}")
    failed = llama_cpp.llama_model_quantize(source.encode(), file.encode(), parameters)
    if failed:
        raise RuntimeError(f"llama.cpp could not quantise to {scheme}")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp makes of the file."""
    import llama_cpp

    if request.get("quantise"):
        quantise(request["source"], request["file"], request["quantise"])
    tokens = request["tokens"]
    model = llama_cpp.Llama(
        request["file"],
        n_ctx=len(tokens) + request["generate"] + 8,
        logits_all=True,
        verbose=False,
        # By default keys and values are kept in float16: the largest part of the difference.
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    model.eval(tokens)
    logits = np.array(model.scores[: len(tokens)], dtype=np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    written = [int(logits[-1].argmax())]
    started = time.perf_counter()
    for _ in range(request["generate"] - 1):
        model.eval([written[-1]])
        written.append(int(np.array(model.scores[model.n_tokens - 1]).argmax()))
    seconds = time.perf_counter() - started
    return {
        "log_probabilities": [
            float(log_probabilities[place, token]) for place, token in enumerate(tokens[1:])
        ],
        "greedy": written,
        "tokens": [model.tokenize(text.encode(), add_bos=True) for text in request["texts"]],
        "tokens_per_second": (request["generate"] - 1) / seconds,
        "version": llama_cpp.__version__,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.loads(sys.stdin.readline()))) + "\n")
