"""How fast this machine is, measured for a moment, in what stages are made of."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

MATMUL_SIZE = 768
SECONDS = 0.3
"""That each measurement goes on."""
TOKENS_AT_ONCE = 1024
SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 16, 20_000
LIBRARIES = "from transformers import AutoModelForCausalLM, GenerationMixin, LlamaForCausalLM"
"""What a process imports that loads a model and nothing of ours."""


@dataclass(frozen=True)
class Rates:
    """Of one thread pool and one precision."""

    block_seconds: float
    """That one token takes through one block of the dense model, forward."""
    stream_block_seconds: float
    """The same where blocks are streamed over all windows: there a CPU multiplies in float32 what a
    model keeps in half precision (`stream.cpu_precision`)."""
    float32: float
    """Operations per second of a matrix product."""
    float64: float
    head_seconds: float
    """That one token takes from the hidden state to the logits."""
    lone_seconds: float
    """That one token takes through one block by itself, as in decoding."""
    fresh_seconds: float
    """Of computing until a new process has the libraries."""


def measure_rates(
    config: "PreTrainedConfig", dtype: "torch.dtype", window_tokens: int, threads: int
) -> Rates:
    """The rates for a model of this config that computes in `dtype` on windows of this length."""
    import torch

    text, before = config.get_text_config(decoder=True), torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        block, lone = _block_seconds(config, dtype, window_tokens)
        is_half = dtype in (torch.bfloat16, torch.float16)
        streamed = _block_seconds(config, torch.float32, window_tokens)[0] if is_half else block
        return Rates(
            block_seconds=block,
            stream_block_seconds=streamed,
            float32=_matmul_rate(torch.float32),
            float64=_matmul_rate(torch.float64),
            head_seconds=2 * text.hidden_size * text.vocab_size / _linear_rate(dtype),
            lone_seconds=lone,
            fresh_seconds=_fresh_seconds(),
        )
    finally:
        torch.set_num_threads(before)


def characters_per_second(tokenizer: "PreTrainedTokenizerBase", documents: Sequence[str]) -> float:
    """Of text into tokens, by one pass over some of it: words that come again cost less."""
    some = documents[:: max(1, len(documents) // SAMPLE_DOCUMENTS)]
    sample = [text[:SAMPLE_CHARACTERS] for text in some]
    started = time.process_time()  # of all threads that a tokenizer may take
    tokenizer(sample, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return sum(map(len, sample)) / (time.process_time() - started)


def operations_per_second(device: str) -> float:
    """Of matrix products in float32 on the cores of this machine; without end on another device,
    which computes a hundred times as much."""
    from foldstack.tasks.environment.execution import device_named

    if device_named(device) != "cpu":
        return math.inf
    import torch

    return _matmul_rate(torch.float32)


def _matmul_rate(dtype: "torch.dtype") -> float:
    import torch

    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype) for _ in range(2))
    return 2 * MATMUL_SIZE**3 / _seconds_of(lambda: torch.mm(a, b))


def _linear_rate(dtype: "torch.dtype") -> float:
    """Of a linear, as a head is one: a CPU may take ten times as long for a half-precision product
    of matrices that lie the other way."""
    import torch

    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype) for _ in range(2))
    return 2 * MATMUL_SIZE**3 / _seconds_of(lambda: torch.nn.functional.linear(a, b))


def _block_seconds(
    config: "PreTrainedConfig", dtype: "torch.dtype", window_tokens: int
) -> tuple[float, float]:
    """Of one token among many, and of one alone, through a block of this shape. All its weights
    are alike: what they are changes no time."""
    import torch

    from foldstack.compression.statistics.stream import BlockStream
    from foldstack.compression.structure.architectures import architecture_of, base_config_of
    from foldstack.compression.structure.plan import Plan
    from foldstack.compression.structure.surgery import build_on_meta, config_for

    base = base_config_of(config)
    plan = Plan.identity(architecture_of(base).model_type, base.num_hidden_layers)
    one: Any = config_for(base, plan.keep([0]))
    one.vocab_size, one.pad_token_id = 8, None
    model: Any = build_on_meta(one).to_empty(device="cpu")
    model = model.to(dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)

    def seconds_per_token(count: int, tokens: int) -> float:
        windows = torch.zeros(count, tokens, dtype=torch.long)
        stream = BlockStream(model, windows, batch_size=count)
        block, (batch,) = stream.blocks[0], stream.hidden

        def forward() -> None:
            with torch.no_grad():
                stream.call(block, batch)

        return _seconds_of(forward) / windows.numel()

    together = max(1, TOKENS_AT_ONCE // window_tokens)
    return seconds_per_token(together, window_tokens), seconds_per_token(1, 1)


@cache
def _fresh_seconds() -> float:
    before = os.times()
    subprocess.run([sys.executable, "-P", "-c", LIBRARIES], check=False, capture_output=True)
    after = os.times()
    used = (after.children_user, after.children_system)
    return sum(used) - before.children_user - before.children_system


def _seconds_of(work: Callable[[], Any]) -> float:
    """Of this thread, which does its share of whatever a pool does: on a machine that does nothing
    else, the time that passes. What runs beside it meanwhile will not do so for all of a run.

    The least of several times: what disturbs it only ever adds.
    """
    work()
    took: list[float] = []
    begun = time.perf_counter()
    while len(took) < 2 or time.perf_counter() - begun < SECONDS:
        started = time.thread_time()
        work()
        took.append(time.thread_time() - started)
    return min(took)
