"""What is exported is an artifact like any other, and so is what its engine decodes it with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foldstack.compression.checkpoints import checkpoint
from foldstack.compression.checkpoints.checkpoint import ReloadReport
from foldstack.compression.errors import InputError
from foldstack.compression.export import engines
from foldstack.flows.comparison.rows import row_of
from foldstack.flows.config.run_config import parse_config
from foldstack.flows.planning.preflight import check
from foldstack.flows.running.branches import Layout, lay_out
from foldstack.flows.running.stage_runs import Outcome
from foldstack.tasks.stage import run_stage

Lay = Callable[..., Layout]


@pytest.fixture
def lay(model_folder: Callable[..., Path], tmp_path: Path) -> Lay:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    source = {"corpus": str(text)}
    folder = model_folder("llama")

    def of(**changes: Any) -> Layout:
        data: dict[str, Any] = {
            "model": {"name": str(folder), "device": "cpu"},
            "calibration": {"source": source, "num_windows": 4, "window_tokens": 16},
            "evaluation": {"perplexity": {"source": source, "protocol": {"window_tokens": 16}}},
            "methods": ["svd_llm"],
            "sparsities": [0.25],
            "export": ["vllm"],
            "output": {"home": str(tmp_path / "home")},
        }
        return lay_out(parse_config(data | changes))

    return of


@pytest.fixture
def has_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is here, and decodes at the rates that it is told."""
    monkeypatch.setattr(engines, "version_in", lambda _, module: "0.32" * (module == "vllm"))
    monkeypatch.setattr(
        engines, "answer_of", lambda *_: {"rates": {"dense": [10.0, 40.0], "this": [15.0, 60.0]}}
    )


@pytest.mark.usefixtures("has_vllm")
def test_exports_are_stages_and_their_speeds_run_alone(lay: Lay) -> None:
    layout = lay(export=["vllm", "gguf-Q4_K_M"], methods=["shortgpt"])
    branch = layout.branches[1]
    assert list(branch.exports) == ["vllm", "gguf-q4_k_m"]
    assert list(branch.engine_speeds) == ["vllm"]  # llama.cpp is not here
    names = [stage.stage for stage in layout.before_speeds]
    assert names.count("export_model") == 4
    assert "benchmark_engine" not in names
    speed = branch.engine_speeds["vllm"]
    assert speed.dense == layout.branches[0].exports["vllm"].artifact(layout.store)
    assert speed.exported == branch.exports["vllm"].artifact(layout.store)
    # Another version of the engine: what is written is compared again.
    other = branch.exports["vllm"].model_copy(update={"engines": ("vllm 0.33",)})
    assert other.fingerprint != branch.exports["vllm"].fingerprint
    # So it is after a change of what engines run, which nothing of ours imports.
    code = {name.rpartition(".")[2] for name in other._code()}
    assert {"in_engine", "foldstack_mlx", "modeling_foldstack"} <= code


@pytest.mark.usefixtures("has_vllm")
def test_a_row_has_what_the_engine_said_and_why_there_is_none(
    lay: Lay, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foldstack.compression.export import exported

    monkeypatch.setattr(exported, "_checked", lambda report, *_: report)
    layout = lay(export=["vllm", "deci"], methods=[{"name": "slicegpt"}])
    seen = ReloadReport(1.0, 0.0, 0.0, True, (1,), 1, "X", 0.0)
    monkeypatch.setattr(checkpoint, "check_reload", lambda *_, **__: seen)
    dense, sliced = layout.branches
    stages = [*layout.windows, *layout.shards, layout.statistics, layout.ranking]
    stages += [sliced.compress, *dense.exports.values(), *sliced.exports.values()]
    stages += [*dense.engine_speeds.values(), *sliced.engine_speeds.values()]
    outcomes = {s.fingerprint: Outcome("done", run_stage(s, layout.store)) for s in stages if s}
    row = row_of(layout, sliced, outcomes)
    assert row.engines["vllm/decode_speedup"] == 1.5
    assert row.engines["vllm/dense_decode_tokens_per_second"] == 25
    assert "residual stream is narrower" in str(row.engines["deci/refused"])
    assert "deci/decode_speedup" not in row.engines


def test_a_target_chooses_multiples_and_refuses_what_it_does_not_keep(lay: Lay) -> None:
    layout = lay(target="deci", methods=["svd_llm"], export=[])
    assert layout.config.variants[0].method.model_dump()["rank_multiple"] == 256
    with pytest.raises(InputError, match="deci does not keep its factored or sliced linears"):
        check(layout)
    methods = [{"name": "svd_llm", "rank_multiple": 3}]
    assert lay(target="vllm", methods=methods).config.variants[0].method.rank_multiple == 3
    check(lay(target="gguf-q4_k_m", methods=["shortgpt"], export=[]))


def test_unknown_forms_are_refused(lay: Lay) -> None:
    changed: list[dict[str, Any]] = [{"export": ["onyx"]}, {"target": "onyx"}]
    for changes in changed:
        with pytest.raises(InputError, match="onyx is no form to export to"):
            lay(**changes)
