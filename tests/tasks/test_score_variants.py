"""Scores are evidence on demand: made once for all who ask, and only where somebody does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foldstack.compression.checkpoints import checkpoint
from foldstack.compression.checkpoints.checkpoint import ReloadReport
from foldstack.compression.methods.search import scoring
from foldstack.flows.config.run_config import parse_config
from foldstack.flows.planning.forecast import dry_run
from foldstack.flows.running.branches import Layout, lay_out
from foldstack.tasks.benchmark_speed import load_seconds
from foldstack.tasks.score_variants import PLOT_FILE, TABLE_FILE, load_sensitivity
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
            "calibration": {"source": source, "num_windows": 8, "window_tokens": 16},
            "sensitivity": {"tokens": 64},
            "evaluation": {"perplexity": {"source": source, "protocol": {"window_tokens": 16}}},
            "methods": [{"name": "search", "library": ["widths"], "rounds": 1}],
            "sparsities": [0.2, 0.3],
            "output": {"home": str(tmp_path / "home")},
        }
        return lay_out(parse_config(data | changes))

    return of


def run_up_to_scores(layout: Layout) -> None:
    for stage in (*layout.windows, *layout.shards, layout.statistics, layout.ranking):
        run_stage(stage, layout.store)
    for stage in layout.scores:
        run_stage(stage, layout.store)


def test_nothing_is_scored_that_nobody_asks_for(lay: Lay) -> None:
    assert lay(methods=["shortgpt", "modegpt"]).scores == ()
    assert [s.label for s in lay().scores] == ["score widths"]
    search = {"name": "search", "library": ["widths", "removals"]}
    both = lay(methods=[search, "shortgpt"], sensitivity={"tokens": 64, "shards": 2})
    assert [s.label for s in both.scores] == [
        "score widths 1/2", "score widths 2/2", "score removals 1/2", "score removals 2/2",
    ]  # fmt: skip


def test_one_scoring_serves_every_sparsity(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checkpoint,
        "check_reload",
        lambda *_, **__: ReloadReport(1.0, 0.0, 0.0, True, (1,), 1, "X", 0.0),
    )
    layout = lay()
    run_up_to_scores(layout)
    (scored,) = layout.scores
    artifact = run_stage(scored, layout.store)
    assert {TABLE_FILE, PLOT_FILE} <= {file.name for file in artifact.folder.iterdir()}
    made: list[str] = []
    monkeypatch.setattr(scoring, "score_variants", lambda *_, **__: made.append("again"))
    realised = []
    for branch in layout.branches[1:]:
        assert branch.compress is not None
        assert branch.compress.sensitivity == (artifact,)
        facts = run_stage(branch.compress, layout.store).manifest().facts
        realised.append(facts["realised_sparsity"])
    assert realised == pytest.approx([0.2, 0.3], abs=0.005)
    assert made == []


def test_shards_of_the_blocks_add_up(lay: Lay) -> None:
    whole, parts = lay(), lay(sensitivity={"tokens": 64, "shards": 2})
    run_up_to_scores(whole)
    run_up_to_scores(parts)
    tables = []
    for layout in (whole, parts):
        found = load_sensitivity(tuple(s.artifact(layout.store) for s in layout.scores))
        assert found is not None
        tables.append(found.table())
    assert tables[0] == tables[1]


def test_the_stage_is_forecast(lay: Lay) -> None:
    layout = lay()
    (expected,) = [s for s in dry_run(layout.config).stages if s.stage == "score_variants"]
    assert expected.seconds > 0
    assert expected.memory_bytes > 1 << 20


def test_times_are_measured_where_a_budget_asks_for_them(lay: Lay) -> None:
    """Without it a budget of seconds is refused at the end of a run, when all else is done."""
    method = {"name": "search", "library": ["removals"], "rounds": 0}
    assert lay(methods=[method]).times == ()
    layout = lay(
        methods=[{**method, "budget": {"prefill_seconds": 0.8}}],
        speed={"prompt_tokens": 6, "new_tokens": 2, "repeats": 1, "warmup": 0},
    )
    (timed,) = layout.times
    assert layout.stages.index(timed) < layout.stages.index(layout.shards[0])
    assert timed not in layout.before_speeds
    artifact = run_stage(timed, layout.store)
    assert artifact.manifest().facts["models"] == 2
    found = load_seconds((artifact,))
    assert found is not None
    assert set(found.prefill) == {"absent"}
    compress = layout.branches[1].compress
    assert compress is not None
    assert compress.seconds == (artifact,)
    (expected,) = [s for s in dry_run(layout.config).stages if s.stage == "time_variants"]
    assert expected.memory_bytes > 1 << 20
