"""Finalists in a sweep: made, healed a little, and one of them kept, which goes on as any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foldstack.compression.checkpoints import checkpoint
from foldstack.compression.checkpoints.checkpoint import ReloadReport
from foldstack.compression.errors import InputError
from foldstack.flows.config.run_config import parse_config
from foldstack.flows.planning.forecast import dry_run
from foldstack.flows.running.branches import DECIDING_WINDOWS, lay_out
from foldstack.tasks.models import model_folder as folder_in
from foldstack.tasks.recover_model import TABLE_FILE
from foldstack.tasks.stage import run_stage


@pytest.fixture
def config(model_folder: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 120)
    source = {"corpus": str(text)}
    return {
        "model": {"name": str(model_folder("llama")), "device": "cpu"},
        "calibration": {"source": source, "num_windows": 4, "window_tokens": 16},
        "sensitivity": {"tokens": 32},
        "methods": [{"name": "search", "rounds": 0, "refit": "none", "finalists": 2}],
        "sparsities": [0.3],
        "recovery": {"source": source, "steps": 3, "finalist_steps": 1, "batch_size": 2,
                     "windows": {"num_windows": 6, "window_tokens": 16, "seed": 1}},
        "evaluation": {"perplexity": {"source": source, "protocol": {"window_tokens": 16}}},
        "speed": {"enabled": False},
        "output": {"home": str(tmp_path / "home")},
    }  # fmt: skip


def test_the_finalist_that_heals_best_goes_on(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checkpoint,
        "check_reload",
        lambda *_, **__: ReloadReport(1.0, 0.0, 0.0, True, (1,), 1, "X", 0.0),
    )
    layout = lay_out(parse_config(config))
    branch = layout.branches[1]
    parts = list(branch.stages)
    assert parts[:5] == ["finalist_1", "finalist_2", "heal_1", "heal_2", "compress"]
    assert [s.settings.steps for s in branch.contest if s.stage == "recover_model"] == [1, 1]
    waiting = set()
    for stage in layout.before_speeds:  # inputs before what is made from them
        assert set(stage.inputs()) - {f"model/{layout.model.fingerprint}"} <= waiting
        waiting.add(f"{stage.stage}/{stage.fingerprint}")
        if stage not in (branch.after, branch.before, layout.branches[0].before):
            run_stage(stage, layout.store)
    assert branch.compress is not None
    chosen = branch.compress.artifact(layout.store)
    facts = chosen.manifest().facts
    finalists = [s.artifact(layout.store) for s in branch.contest[:2]]
    kept = finalists[int(str(facts["finalist"])) - 1]
    assert facts["parameters"] == kept.manifest().facts["parameters"]
    plans = [(folder_in(made) / "plan.json").read_bytes() for made in (chosen, kept)]
    assert plans[0] == plans[1]
    rows = (chosen.folder / TABLE_FILE).read_text().splitlines()
    assert len(rows) == 1 + 2 * DECIDING_WINDOWS
    expected = {s.label: s for s in dry_run(layout.config).stages}
    assert expected["choose search 0.30"].is_stored


def test_a_contest_without_recovery_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"search 0\.30 has 2 finalists, which recovery heals"):
        parse_config({name: value for name, value in config.items() if name != "recovery"})
