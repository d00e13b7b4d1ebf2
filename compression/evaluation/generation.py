"""A greedy continuation with its two parts timed apart, and the random prompt that it follows."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.structure.modeling_foldstack import cache_name

Clock = Callable[[], float]


@dataclass(frozen=True)
class Generation:
    """One greedy continuation, and how long its two parts took, in seconds."""

    tokens: Int[Tensor, "batch new_tokens"]
    prefill: float
    decode: float


@torch.inference_mode()
def generate_greedily(
    model: PreTrainedModel,
    prompt: Int[Tensor, "batch prompt"],
    new_tokens: int,
    clock: Clock = time.perf_counter,
) -> Generation:
    """What `generate` writes greedily without stopping, with prefill and decoding timed apart."""
    started = now(model, clock)
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    tokens = [output.logits[:, -1:].argmax(-1)]
    first_token = now(model, clock)
    name = cache_name(type(model))
    for _ in range(new_tokens - 1):
        output = model(input_ids=tokens[-1], use_cache=True, **{name: output[name]})
        tokens.append(output.logits[:, -1:].argmax(-1))
    finished = now(model, clock)
    return Generation(torch.cat(tokens, dim=1), first_token - started, finished - first_token)


def now(model: PreTrainedModel, clock: Clock) -> float:
    """The time at which `model` has computed everything that it was told to."""
    if model.device.type == "cuda":  # which returns before it has computed anything
        torch.cuda.synchronize(model.device)
    return clock()


def make_prompt(
    num_tokens: int, batch_size: int, vocabulary: int, seed: int
) -> Int[Tensor, "batch prompt"]:
    """Random tokens, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch_size, num_tokens), generator=generator)
