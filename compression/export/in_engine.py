"""Load models in an engine that is not ours and say what it computes.

Run as a script by a Python that has the engine: `python -P in_engine.py NAME`, with one request in
JSON a line on standard input, each answered by a line of JSON on standard output; or by "error",
what kept it from that. It imports nothing of ours. Code that a model brings is run where the model
is among the "trusted". Requests say what they want under "do":

- check: the `model`, the `tokens` of a text, `generate` (how many tokens) and `texts`; the answer
  has the log-probabilities of the tokens after the first, the tokens that follow greedily, the
  tokens of the texts where the engine reads text by itself;
- speed: several `models` by name, `tokens`, `generate`, and `turns`; all are loaded, and decode in
  turns: tokens per second of each in every turn;
- quantise (llama.cpp): the `source`, the `file` to write, the `scheme`, and the names of tensors
  that are to stay `precise`.
"""

import gc
import json
import math
import os
import re
import sys
import time
from typing import Any

import numpy as np

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, model: str, room: int, precise: bool, trusted: bool) -> None:
        import llama_cpp

        self.model = llama_cpp.Llama(
            model,
            n_ctx=room + 8,
            logits_all=True,
            verbose=False,
            n_threads=int(os.environ.get("OMP_NUM_THREADS", 0)) or None,
            # By default keys and values are kept in float16: the largest part of the difference.
            **(dict.fromkeys(("type_k", "type_v"), llama_cpp.GGML_TYPE_F32) if precise else {}),
        )

    def log_probabilities(self, tokens: list[int]) -> list[float]:
        self.model.reset()
        self.model.eval(tokens)
        return _of_next(np.array(self.model.scores[: len(tokens)]), tokens)

    def greedy(self, tokens: list[int], count: int) -> tuple[list[int], float]:
        self.model.reset()
        self.model.eval(tokens)
        written = [self._best()]
        started = time.perf_counter()
        for _ in range(count - 1):
            self.model.eval([written[-1]])
            written.append(self._best())
        return written, (count - 1) / (time.perf_counter() - started)

    def _best(self) -> int:
        return int(np.array(self.model.scores[self.model.n_tokens - 1]).argmax())

    def read(self, texts: list[str]) -> list[list[int]] | None:
        return [self.model.tokenize(text.encode(), add_bos=True) for text in texts]

    @staticmethod
    def quantise(source: str, file: str, scheme: str, precise: list[str]) -> None:
        import llama_cpp

        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{scheme.upper()}")
        override = llama_cpp.llama_model_tensor_override
        patterns = [f"^{re.escape(name)}$".encode() for name in precise]
        kept = [override(pattern, llama_cpp.GGML_TYPE_F32) for pattern in patterns]
        parameters.tt_overrides = (override * (len(kept) + 1))(*kept)  # the last one has no pattern
        if llama_cpp.llama_model_quantize(source.encode(), file.encode(), parameters):
            raise RuntimeError(f"llama.cpp could not quantise to {scheme}")


class Vllm:
    """A model folder in vLLM."""

    def __init__(self, model: str, room: int, precise: bool, trusted: bool) -> None:
        from vllm import LLM

        self.model = LLM(
            model,
            trust_remote_code=trusted,
            dtype="float32" if precise else "auto",
            enforce_eager=True,
            max_model_len=room,
            skip_tokenizer_init=True,
            gpu_memory_utilization=0.1,
        )

    def _generate(self, tokens: list[int], count: int, **asked: Any) -> Any:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        settings = SamplingParams(
            max_tokens=count, temperature=0, detokenize=False, ignore_eos=True, **asked
        )
        prompt = TokensPrompt(prompt_token_ids=tokens)
        (answer,) = self.model.generate(prompt, settings, use_tqdm=False)
        return answer

    def log_probabilities(self, tokens: list[int]) -> list[float]:
        seen = self._generate(tokens, 1, prompt_logprobs=1).prompt_logprobs[1:]
        places = zip(tokens[1:], seen, strict=True)
        return [float(of_place[token].logprob) for token, of_place in places]

    def greedy(self, tokens: list[int], count: int) -> tuple[list[int], float]:
        times = []
        for number in (1, count):
            started = time.perf_counter()
            answer = self._generate(tokens, number)
            times.append(time.perf_counter() - started)
        return list(answer.outputs[0].token_ids), (count - 1) / max(times[1] - times[0], 1e-9)

    def read(self, texts: list[str]) -> list[list[int]] | None:
        return None  # with the folder's own tokenizer, as transformers does


class Mlx:
    """A model folder in mlx-lm."""

    def __init__(self, model: str, room: int, precise: bool, trusted: bool) -> None:
        from pathlib import Path

        import mlx.core as mx
        from mlx_lm.utils import load_model

        self.model, _ = load_model(Path(model), trust_remote_code=trusted)
        if precise:
            self.model.set_dtype(mx.float32)

    def log_probabilities(self, tokens: list[int]) -> list[float]:
        import mlx.core as mx

        logits = self.model(mx.array([tokens]))[0].astype(mx.float32)
        return _of_next(np.array(logits), tokens)

    def greedy(self, tokens: list[int], count: int) -> tuple[list[int], float]:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.model)
        read, written = tokens, []
        started = 0.0
        for _ in range(count):
            best = self.model(mx.array([read]), cache=cache)[0, -1].argmax()
            written.append(int(best.item()))
            read = written[-1:]
            started = started or time.perf_counter()
        return written, (count - 1) / (time.perf_counter() - started)

    def read(self, texts: list[str]) -> list[list[int]] | None:
        return None


ENGINES: dict[str, Any] = {"llama.cpp": LlamaCpp, "vLLM": Vllm, "mlx-lm": Mlx}


def _of_next(logits: Any, tokens: list[int]) -> list[float]:
    """Log-probabilities of the tokens after the first, by [tokens, vocabulary]."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    sums = np.log(np.exp(shifted).sum(-1))
    return [float(shifted[at, token] - sums[at]) for at, token in enumerate(tokens[1:])]


def check(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What the engine makes of the model."""
    tokens, count = request["tokens"], request["generate"]
    path = request["model"]
    model = engine(path, len(tokens) + count, True, path in request["trusted"])
    seen = model.log_probabilities(tokens)
    if not all(map(math.isfinite, seen)):
        raise RuntimeError("its log-probabilities are not finite")
    return {
        "log_probabilities": seen,
        "greedy": model.greedy(tokens, count)[0],
        "tokens": model.read(request["texts"]),
    }


def speed(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of each model in every turn, after one that does not count."""
    tokens, count = request["tokens"], request["generate"]
    room = len(tokens) + count
    loaded = {
        name: engine(path, room, False, path in request["trusted"])
        for name, path in request["models"].items()
    }
    rates: dict[str, list[float]] = {name: [] for name in loaded}
    for _ in range(request["turns"] + 1):
        for name, model in loaded.items():
            rates[name].append(model.greedy(tokens, count)[1])
    return {"rates": {name: values[1:] for name, values in rates.items()}}


def quantise(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Write a file of fewer bits by the engine's own quantiser."""
    engine.quantise(*(request[name] for name in ("source", "file", "scheme", "precise")))
    return {}


def main() -> None:
    engine = ENGINES[sys.argv[1]]
    # What engines print goes elsewhere: standard output is for answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            told = {"check": check, "speed": speed, "quantise": quantise}[request["do"]](
                engine, request
            )
        except BaseException as error:
            told = {"error": (str(error).strip().splitlines() or [type(error).__name__])[-1]}
        answers.write(json.dumps(told) + "\n")
        answers.flush()
        gc.collect()


if __name__ == "__main__":
    main()
