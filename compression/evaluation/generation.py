"""A greedy continuation with its two parts timed apart, and the random prompt that it follows."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Assisted:
    """One greedy continuation of a model, alone and with another one that guesses ahead."""

    alone: float
    """Seconds."""
    assisted: float
    """Seconds."""
    tokens: int
    passes: int
    """Of the model itself, when it was assisted."""
    is_same_text: bool


@torch.inference_mode()
def generate_assisted(
    model: PreTrainedModel,
    assistant: PreTrainedModel,
    prompt: Int[Tensor, "1 prompt"],
    new_tokens: int,
    clock: Clock = time.perf_counter,
) -> Assisted:
    """A continuation by assisted decoding: the assistant writes ahead, the model keeps what it
    would have written itself (Leviathan et al. 2023, arXiv 2211.17192; here greedily)."""
    calls: list[None] = []
    handle = model.register_forward_hook(lambda *_: calls.append(None))
    settings: dict[str, Any] = {
        "max_new_tokens": new_tokens, "do_sample": False,
        "attention_mask": torch.ones_like(prompt),
    }  # fmt: skip
    started = now(model, clock)
    alone = model.generate(prompt, **settings)  # type: ignore[operator]
    halfway = now(model, clock)
    calls.clear()
    assisted = model.generate(prompt, assistant_model=assistant, **settings)  # type: ignore[operator]
    finished = now(model, clock)
    handle.remove()
    same = torch.equal(alone, assisted)
    return Assisted(
        halfway - started, finished - halfway, alone.shape[1] - prompt.shape[1], len(calls), same
    )


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
