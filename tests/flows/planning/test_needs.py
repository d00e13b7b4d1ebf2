"""What a run needs is known before it begins, and refused when it is not there."""

import errno
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from foldstack.compression.checkpoints import checkpoint
from foldstack.compression.checkpoints.checkpoint import load_model
from foldstack.compression.errors import InputError
from foldstack.compression.methods import METHODS
from foldstack.compression.methods.method import Evidence
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.flows.config.run_config import parse_config
from foldstack.flows.planning import needs, stage_arithmetic
from foldstack.flows.planning.forecast import expected_models, expected_stages
from foldstack.flows.planning.machine_rates import Rates
from foldstack.flows.planning.needs import needs_of
from foldstack.flows.planning.preflight import check
from foldstack.flows.running.branches import Layout, lay_out
from foldstack.tasks.environment.home import disk_full, telling_disk_full

Usage = namedtuple("Usage", "total used free")
PLENTY = Usage(1 << 50, 0, 1 << 50)


@pytest.fixture
def data(model_folder: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 400)
    source: dict[str, Any] = {"corpus": str(text)}
    return {
        "model": {"name": str(model_folder("llama")), "device": "cpu"},
        "calibration": {"source": source, "num_windows": 4, "window_tokens": 16},
        "evaluation": {"perplexity": {"source": source, "protocol": {"window_tokens": 16}}},
        "methods": ["shortgpt"],
        "sparsities": [0.25],
        "output": {"home": str(tmp_path / "home")},
    }


@pytest.fixture
def layout(data: dict[str, Any]) -> Layout:
    return lay_out(parse_config(data))


def test_the_size_of_the_statistics_is_known(
    layout: Layout, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "statistics"
    windows = torch.zeros(4, 16, dtype=torch.long)
    gather(tiny_model("llama"), windows, {"gram"}, folder=folder).save(folder)
    written = sum(file.stat().st_size for file in folder.glob("grams-*"))
    expected = needs_of(layout)[layout.statistics.fingerprint].disk_bytes
    assert expected <= written <= 1.05 * expected


def test_weights_count_whole_only_where_a_method_holds_them(
    model_folder: Callable[..., Path], data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 0)  # else the whole tiny model is one shard
    layout = lay_out(parse_config(data | {"methods": ["shortgpt", "laco"]}))
    found = needs_of(layout)
    in_turn, at_once = (
        found[branch.compress.fingerprint].memory_bytes - needs.PROCESS_BYTES
        for branch in layout.branches
        if branch.compress is not None
    )
    model = load_model(model_folder("llama"))
    dense, block = (
        sum(p.nbytes for p in module.parameters()) for module in (model, model.model.layers[0])
    )
    assert in_turn == block
    assert dense < at_once < 2 * dense


@pytest.mark.parametrize("name", ["svd_llm", "basis_sharing"])
def test_what_an_update_multiplies_is_told_before(
    name: str, tiny_model: Callable[..., Any]
) -> None:
    """By how much more towards the dense model's outputs, whose hidden states go along."""
    model = tiny_model("llama")
    windows = torch.randint(97, (16, 64), generator=torch.Generator().manual_seed(0))
    statistics = gather(model, windows, {"gram", "similarity"})
    evidence = Evidence(windows, statistics, rank_blocks(statistics))

    def multiplied(work: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work()
        return counter.get_total_flops()

    with_head = multiplied(lambda: model(windows))
    in_blocks = with_head - 2 * windows.numel() * model.lm_head.weight.numel()
    told, found = [], []
    for target in (0.0, 0.5):
        method = METHODS[name](sparsity=0.3, dense_target=target)
        work = method.arithmetic(model, windows.numel())
        told.append(work.float64 + work.products + work.passes * in_blocks)
        found.append(multiplied(lambda method=method: method.compress(model, evidence)))
    assert told[1] - told[0] == pytest.approx(found[1] - found[0], rel=0.02)


def test_what_hidden_states_that_go_along_are_used_for_takes_memory(data: dict[str, Any]) -> None:
    variants = [{"name": "svd_llm", "update": update} for update in ("none", "closed_form")]
    layout = lay_out(parse_config(data | {"methods": variants}))
    found = needs_of(layout)
    alone, along = (
        found[branch.compress.fingerprint].memory_bytes
        for branch in layout.branches
        if branch.compress is not None
    )
    config = load_model(Path(data["model"]["name"])).config
    widths = [3 * [config.hidden_size], [config.intermediate_size]]
    sums = 2 * 8 * sum(width**2 for each in widths for width in each)  # of x' x'^T, and shifted
    assert along - alone > sums


def test_a_model_of_half_precision_takes_half(
    model_folder: Callable[..., Path], data: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    shutil.copytree(model_folder("llama"), folder)
    load_model(folder).to(torch.bfloat16).save_pretrained(folder)
    disk = []
    for name in (model_folder("llama"), folder):
        layout = lay_out(parse_config(data | {"model": {"name": str(name), "device": "cpu"}}))
        compress = layout.branches[1].compress
        assert compress is not None
        disk.append(needs_of(layout)[compress.fingerprint].disk_bytes)
    assert disk[0] == 2 * disk[1]


def test_the_time_of_closed_forms_grows_with_the_width(data: dict[str, Any]) -> None:
    layout = lay_out(parse_config(data | {"methods": ["modegpt", "svd_llm", "shortgpt"]}))
    seconds = {
        stage.label: stage.seconds
        for stage in expected_stages(layout, expected_models(layout))
        if stage.stage == "compress_model"
    }
    modegpt, svd_llm, shortgpt = seconds.values()
    assert svd_llm > modegpt > shortgpt > 0


def test_times_are_made_of_the_rates_of_the_machine(
    data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = {"prompt_tokens": 8, "new_tokens": 4, "warmup": 1, "repeats": 3, "load_repeats": 2}
    layout = lay_out(parse_config(data | {"speed": speed}))
    free = Rates(
        block_seconds=0,
        stream_block_seconds=0,
        float32=float("inf"),
        float64=float("inf"),
        head_seconds=0,
        lone_seconds=0,
        fresh_seconds=0,
    )

    monkeypatch.setattr(stage_arithmetic, "characters_per_second", lambda *_: 1e9)

    def seconds(rates: Rates) -> dict[str, float]:
        monkeypatch.setattr(stage_arithmetic, "measure_rates", lambda *_: rates)
        return {s.label: s.seconds for s in expected_stages(layout, expected_models(layout))}

    before = seconds(free)
    fresh = seconds(replace(free, fresh_seconds=100))
    assert {s.label: fresh[s.label] - before[s.label] for s in layout.stages} == {
        s.label: 100 if s.stage in ("compress_model", "benchmark_speed") else 0
        for s in layout.stages
    }
    reading = seconds(replace(free, head_seconds=1))["bench dense"] - before["bench dense"]
    assert reading == pytest.approx(8 * (1 + 3 + 1))
    calibration = layout.config.calibration
    tokens = calibration.num_windows * calibration.window_tokens
    blocks = load_model(Path(data["model"]["name"])).config.num_hidden_layers
    streamed = seconds(replace(free, stream_block_seconds=1))["gather statistics"]
    assert streamed - before["gather statistics"] == pytest.approx(tokens * blocks)
    assert seconds(replace(free, block_seconds=1))["gather statistics"] == pytest.approx(
        before["gather statistics"]
    )
    writing = seconds(replace(free, lone_seconds=1))["bench dense"] - before["bench dense"]
    model = load_model(Path(data["model"]["name"]))
    linears = sum(each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear))
    of_head = linears / (linears - model.lm_head.weight.numel())
    assert writing == pytest.approx(4 * (1 + 3 + 1) * model.config.num_hidden_layers * of_head)


def test_a_text_takes_as_long_as_it_has_characters(
    layout: Layout, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_arithmetic, "characters_per_second", lambda *_: 10.0)
    stages = expected_stages(layout, expected_models(layout))
    collect = next(stage for stage in stages if stage.stage == "collect_calibration")
    characters = len(Path(data["calibration"]["source"]["corpus"]).read_text())
    assert collect.seconds == pytest.approx(
        characters / 10 + stage_arithmetic.OPENING_SECONDS, rel=0.01
    )


def test_a_run_that_fits_is_not_refused(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: PLENTY)
    monkeypatch.setattr(needs, "available_memory", lambda _: 1 << 50)
    check(layout)
    monkeypatch.setattr(needs, "available_memory", lambda _: None)  # where nobody says
    check(layout)


def test_short_memory_is_refused_with_the_knob(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: PLENTY)
    monkeypatch.setattr(needs, "available_memory", lambda _: 1 << 20)
    with pytest.raises(
        InputError,
        match=r"gather statistics takes 0\.\d GiB of memory.*lower statistics\.batch_size",
    ):
        check(layout)


def test_a_short_disk_is_refused(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "available_memory", lambda _: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 1000, 0))
    said = (
        r"too little space is left on the disk of .*: .* take about \d+\.\d MiB, and 0\.0 MiB are"
    )
    with pytest.raises(InputError, match=said):
        check(layout)


def test_a_disk_that_is_full_already_is_no_other_mistake(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(file: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(Path, "write_bytes", write)
    home = layout.config.output.home
    with pytest.raises(InputError, match=f"^{re.escape(disk_full(home))}$"):
        check(layout)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),  # of write(), which knows no name
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
)
def test_a_full_disk_that_no_file_is_named_for_is_that_of_the_results(error: Exception) -> None:
    with (
        pytest.raises(InputError, match=f"^{re.escape(disk_full('/data'))}$"),
        telling_disk_full(Path("/data")),
    ):
        raise error


def test_another_failure_stays_as_it_is() -> None:
    with pytest.raises(KeyError), telling_disk_full(Path("/data")):
        raise KeyError("no such row")


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_every_model_is_counted_in_the_precision_that_it_will_have(
    dtype: str, model_folder: Callable[..., Path], data: dict[str, Any]
) -> None:
    folder = Path(data["model"]["name"])
    load_model(folder, dtype=torch.bfloat16).save_pretrained(folder)
    data["model"]["dtype"] = dtype
    for model in expected_models(lay_out(parse_config(data))).values():
        assert model.bytes == (2 if dtype == "auto" else 4) * model.parameters
