"""How fast models read and write, how long they take to load and how much memory they need.

Models that are compared are timed in turns within one run (A B A B ...), so that a machine that
slows down slows all of them, and their ratio is taken turn by turn. Memory is measured in a process
per model, so that no model is charged for another.
"""

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.checkpoints.checkpoint import load_config, load_model
from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.generation import (
    Clock,
    Generation,
    generate_greedily,
    make_prompt,
    now,
)
from foldstack.compression.evaluation.memory_probe import peak_memory
from foldstack.compression.hardware import Hardware, hardware_of

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SpeedSpec(_Record):
    """What is timed: the prompt is random, so are its tokens the same for all models."""

    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=24, ge=2)
    """Tokens written greedily after the prompt."""
    batch_sizes: tuple[int, ...] = Field(default=(1,), min_length=1)
    repeats: int = Field(default=7, ge=1)
    """Turns that count."""
    warmup: int = Field(default=1, ge=0)
    """Turns before them that do not."""
    load_repeats: int = Field(default=3, ge=1)
    """Times each model is loaded, from files that the system has in memory by then."""
    seed: int = 0


class Spread(_Record):
    """A measured quantity over all turns."""

    median: float
    lower_quartile: float
    upper_quartile: float
    """Half of all turns lie between the quartiles (linear interpolation)."""
    num_repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median and quartiles of `values`."""
        only = [values[0]] * 3
        lower, median, upper = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else only
        )
        return cls(
            median=median, lower_quartile=lower, upper_quartile=upper, num_repeats=len(values)
        )


class Ratios(_Record):
    """This model over the baseline, turn by turn; above 1 = this model is faster."""

    prefill: Spread
    decode: Spread


class BatchSpeed(_Record):
    """Speed at one batch size; rates count the tokens of all sequences."""

    batch_size: int
    time_to_first_token_seconds: Spread
    """From the prompt to the first new token: the prefill."""
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    """Of the tokens after the first, which are read from and appended to the KV cache."""
    baseline_decode_tokens_per_second: Spread
    """What the baseline reached in the same turns: what this model's rate is to be held against."""
    speedup: Ratios


class SpeedResult(_Record):
    """What one model costs to run."""

    batches: tuple[BatchSpeed, ...]
    load_seconds: Spread
    peak_memory_bytes: int
    """Most that loading the model and running the largest batch added."""
    memory_kind: Literal["resident", "accelerator"]
    """What was added to: the process's resident memory, or what torch took on the accelerator."""
    weight_bytes_on_disk: int
    dtype: str
    baseline: str
    """Name of the model that speedups are relative to."""
    spec: SpeedSpec
    hardware: Hardware


def measure_speed(
    models: Mapping[str, Path],
    spec: SpeedSpec,
    *,
    baseline: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> dict[str, SpeedResult]:
    """Speed and memory of model folders, side by side; all of them are in memory at once.

    Args:
        models: folders by name, in the order in which they take turns.
        spec: what is timed.
        baseline: name of the model that the others are compared with; None = the first.
        device: to run on.
        dtype: to load in; None = as saved.
        clock: seconds.
        progress: told of turns done.

    Raises:
        InputError: no model, a prompt longer than a model's context, or a damaged folder.
    """
    baseline = baseline or next(iter(models), "")
    if baseline not in models:
        raise InputError(f"the baseline is one of the models {list(models)}, got {baseline!r}")
    vocabulary = min(_check_context(folder, spec) for folder in models.values())
    memory = peak_memory(list(models.values()), spec.model_dump(), vocabulary, device, dtype)
    loaded, load_seconds = _load_in_turns(models, spec, device, dtype, clock)
    hardware = hardware_of(device)
    batches: dict[str, list[BatchSpeed]] = {name: [] for name in models}
    for number, batch_size in enumerate(spec.batch_sizes):
        prompt = make_prompt(spec.prompt_tokens, batch_size, vocabulary, spec.seed).to(device)

        def turn(name: str, prompt: Int[Tensor, "batch prompt"] = prompt) -> Generation:
            return generate_greedily(loaded[name], prompt, spec.new_tokens, clock)

        def report(done: int, total: int, number: int = number) -> None:
            if progress is not None:
                progress("speed", number * total + done, len(spec.batch_sizes) * total)

        turns = in_turns(list(models), turn, spec, report)
        for name in models:
            batches[name].append(_batch_speed(turns[name], turns[baseline], prompt))
    return {
        name: SpeedResult(
            batches=tuple(batches[name]),
            load_seconds=Spread.of(load_seconds[name]),
            peak_memory_bytes=memory[folder],
            memory_kind="resident" if device == "cpu" else "accelerator",
            weight_bytes_on_disk=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            dtype=str(loaded[name].dtype).removeprefix("torch."),
            baseline=baseline,
            spec=spec,
            hardware=hardware,
        )
        for name, folder in models.items()
    }


def in_turns(
    names: Sequence[str],
    turn: Callable[[str], Generation],
    spec: SpeedSpec,
    report: Callable[[int, int], None],
) -> dict[str, list[Generation]]:
    """One turn for each name, and again, and again; without those that warm up."""
    kept: dict[str, list[Generation]] = {name: [] for name in names}
    rounds = spec.warmup + spec.repeats
    for number in range(rounds):
        for name in names:
            generation = turn(name)
            if number >= spec.warmup:
                kept[name].append(generation)
        report(number + 1, rounds)
    return kept


def _batch_speed(
    turns: Sequence[Generation],
    baseline: Sequence[Generation],
    prompt: Int[Tensor, "batch prompt"],
) -> BatchSpeed:
    written = turns[0].tokens.numel() - len(prompt)
    pairs = list(zip(turns, baseline, strict=True))
    return BatchSpeed(
        batch_size=len(prompt),
        time_to_first_token_seconds=Spread.of([turn.prefill for turn in turns]),
        prefill_tokens_per_second=Spread.of([prompt.numel() / turn.prefill for turn in turns]),
        decode_tokens_per_second=Spread.of([written / turn.decode for turn in turns]),
        baseline_decode_tokens_per_second=Spread.of([written / other.decode for other in baseline]),
        speedup=Ratios(
            prefill=Spread.of([other.prefill / turn.prefill for turn, other in pairs]),
            decode=Spread.of([other.decode / turn.decode for turn, other in pairs]),
        ),
    )


def _load_in_turns(
    models: Mapping[str, Path],
    spec: SpeedSpec,
    device: str,
    dtype: torch.dtype | None,
    clock: Clock,
) -> tuple[dict[str, PreTrainedModel], dict[str, list[float]]]:
    seconds: dict[str, list[float]] = {name: [] for name in models}
    loaded: dict[str, PreTrainedModel] = {}
    for _ in range(spec.load_repeats):
        for name, folder in models.items():
            loaded.pop(name, None)
            started = clock()
            model = load_model(folder, dtype=dtype, device=device)
            seconds[name].append(now(model, clock) - started)
            loaded[name] = model
    return loaded, seconds


def _check_context(folder: Path, spec: SpeedSpec) -> int:
    """The size of the vocabulary of a model whose context holds prompt and answer."""
    config = load_config(folder)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and spec.prompt_tokens + spec.new_tokens > context:
        raise InputError(
            f"prompt_tokens + new_tokens may be at most {context}, the context of {folder}, "
            f"got {spec.prompt_tokens} + {spec.new_tokens}"
        )
    return int(config.vocab_size)
