"""Speed: what is timed is what `generate` does, in turns, and the numbers follow from the clock."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation import memory_probe, speed
from foldstack.compression.evaluation.speed import (
    Generation,
    SpeedResult,
    SpeedSpec,
    Spread,
    generate_greedily,
    in_turns,
    make_prompt,
    measure_speed,
)
from foldstack.compression.structure.surgery import Cut, cut, plan_of

SHORT = SpeedSpec(prompt_tokens=6, new_tokens=5, repeats=3, warmup=1, load_repeats=1)


def stock_greedy(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    written: Any = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return torch.as_tensor(written[:, prompt.shape[1] :])


def test_decoding_writes_what_generate_writes(
    architecture: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    # No token ends a text here: `generate` would forbid itself that token instead of stopping.
    model = tiny_model(architecture, eos_token_id=None)
    model.generation_config.eos_token_id = None
    prompt = make_prompt(9, batch_size=5, vocabulary=97, seed=1)
    prompt[prompt == 1] = 2  # OPT's padding
    ours = generate_greedily(model, prompt, new_tokens=7).tokens
    assert torch.equal(ours, stock_greedy(model, prompt, new_tokens=7))
    assert len(ours.unique()) > 1


def test_decoding_of_a_restructured_model_writes_what_generate_writes(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    dense = tiny_model("llama", eos_token_id=None)
    model = cut(dense, Cut(plan_of(dense).share(1, [2]), tuple(range(4))))
    prompt = make_prompt(9, batch_size=1, vocabulary=97, seed=1)
    ours = generate_greedily(model, prompt, new_tokens=7).tokens
    assert torch.equal(ours, stock_greedy(model, prompt, new_tokens=7))


def test_models_take_turns_and_warming_up_does_not_count() -> None:
    order: list[str] = []
    reports: list[tuple[int, int]] = []

    def turn(name: str) -> Generation:
        order.append(name)
        return Generation(torch.zeros(1, 1, dtype=torch.int64), float(len(order)), 0.0)

    turns = in_turns(["a", "b"], turn, SHORT, lambda *report: reports.append(report))
    assert order == ["a", "b"] * 4
    assert [turn.prefill for turn in turns["a"]] == [3.0, 5.0, 7.0]
    assert [turn.prefill for turn in turns["b"]] == [4.0, 6.0, 8.0]
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_median_and_quartiles_by_hand() -> None:
    spread = Spread.of([5.0, 1.0, 2.0, 4.0])
    assert (spread.lower_quartile, spread.median, spread.upper_quartile) == (1.75, 3.0, 4.25)
    assert spread.num_repeats == 4
    one = Spread.of([3.0])
    assert (one.lower_quartile, one.median, one.upper_quartile) == (3.0, 3.0, 3.0)


@pytest.fixture
def no_memory_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "peak_memory", lambda folders, *_: {folder: 7 for folder in folders})


def scripted_clock(*seconds: float) -> Callable[[], float]:
    """A clock that is so much later each time somebody looks; at first it shows 0."""
    ticks: Iterator[float] = iter(seconds)
    now = 0.0

    def look() -> float:
        nonlocal now
        now += next(ticks)
        return now

    return look


@pytest.mark.usefixtures("no_memory_probe")
def test_rates_and_ratios_follow_from_the_clock(model_folder: Callable[..., Path]) -> None:
    dense, small = model_folder("llama"), model_folder("llama", num_hidden_layers=2)
    spec = SpeedSpec(
        prompt_tokens=6, new_tokens=5, batch_sizes=(2,), repeats=3, warmup=1, load_repeats=1
    )
    loads = [0, 10, 0, 4]
    warmup = [0, 100, 100, 0, 100, 100]
    # Start, prefill and decode seconds of dense and small, in turns.
    turns = [[0, 2, 8, 0, 1, 2], [0, 4, 16, 0, 4, 2], [0, 6, 4, 0, 2, 8]]
    clock = scripted_clock(*loads, *warmup, *(seconds for turn in turns for seconds in turn))
    found = measure_speed({"dense": dense, "small": small}, spec, clock=clock)

    first, second = found["dense"].batches[0], found["small"].batches[0]
    assert first.batch_size == 2
    assert first.time_to_first_token_seconds.median == 4
    assert first.prefill_tokens_per_second.median == 12 / 4
    assert second.decode_tokens_per_second.median == 2 * 4 / 2
    assert second.decode_tokens_per_second.lower_quartile == (1 + 4) / 2
    assert first.speedup.decode == Spread.of([1.0] * 3)
    # Turn by turn 2/1, 4/4, 6/2 and 8/2, 16/2, 4/8; not the ratio of the medians.
    assert second.speedup.prefill == Spread.of([2.0, 1.0, 3.0])
    assert second.speedup.decode == Spread.of([4.0, 8.0, 0.5])
    assert found["dense"].load_seconds.median == 10
    assert found["small"].load_seconds.median == 4
    assert found["small"].weight_bytes_on_disk == (small / "model.safetensors").stat().st_size
    assert found["small"].weight_bytes_on_disk < found["dense"].weight_bytes_on_disk


@pytest.mark.usefixtures("no_memory_probe")
def test_result_names_its_conditions_and_survives_json(model_folder: Callable[..., Path]) -> None:
    seen: list[tuple[str, int, int]] = []
    found = measure_speed(
        {"a": model_folder("llama", seed=1), "b": model_folder("llama", seed=2)},
        SHORT.model_copy(update={"batch_sizes": (1, 3)}),
        baseline="b",
        dtype=torch.bfloat16,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )["a"]
    assert found.baseline == "b"
    assert found.dtype == "bfloat16"
    assert found.hardware.cpu
    assert found.hardware.num_threads == torch.get_num_threads()
    assert [batch.batch_size for batch in found.batches] == [1, 3]
    assert all(batch.decode_tokens_per_second.median > 0 for batch in found.batches)
    assert SpeedResult.model_validate_json(found.model_dump_json()) == found
    assert seen[-1] == ("speed", 8, 8)


def test_memory_is_measured_in_processes_of_their_own(model_folder: Callable[..., Path]) -> None:
    small = model_folder("llama")
    large = model_folder("llama", intermediate_size=20_056)  # 4 blocks of 7.68 MB more
    folders = [large, small]
    ballast = torch.ones(30_000_000)  # this process' memory is not theirs
    found = memory_probe.peak_memory(folders, SHORT.model_dump(), 288, "cpu")
    again = memory_probe.peak_memory([small], SHORT.model_dump(), 288, "cpu")
    del ballast
    assert again[small] == pytest.approx(found[small], abs=3_000_000)  # whatever ran before
    assert 0 < found[small] < 10_000_000
    assert found[large] - found[small] == pytest.approx(30_720_000, rel=0.3)


def test_the_memory_process_outlives_the_temporary_folder_it_was_started_with(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage in a worker has one of its own, which goes with it."""
    folder = model_folder("llama")
    memory_probe.PROBE.end()
    for name in ("first", "second"):
        temporary = tmp_path / name
        temporary.mkdir()
        monkeypatch.setenv("TMPDIR", str(temporary))
        monkeypatch.setattr(memory_probe.tempfile, "tempdir", str(temporary))
        assert memory_probe.peak_memory([folder], SHORT.model_dump(), 97, "cpu")[folder] > 0
        shutil.rmtree(temporary)
    memory_probe.PROBE.end()


def test_a_memory_process_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nread request\necho 'no such device' >&2\nexit 3\n")
    python.chmod(0o700)
    memory_probe.PROBE.end()
    monkeypatch.setattr(memory_probe.sys, "executable", str(python))
    with pytest.raises(RuntimeError, match="memory cannot be measured: no such device"):
        memory_probe.peak_memory([tmp_path], SHORT.model_dump(), 288, "cpu")


def test_bad_input_is_told_in_a_sentence(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llama")
    with pytest.raises(InputError, match=r"may be at most 128, the context of .*, got 128 \+ 24"):
        measure_speed({"dense": folder}, SpeedSpec())
    with pytest.raises(InputError, match=r"baseline is one of the models \['a'\], got 'b'"):
        measure_speed({"a": folder}, SHORT, baseline="b")
    with pytest.raises(InputError, match="baseline is one of the models"):
        measure_speed({}, SHORT)
