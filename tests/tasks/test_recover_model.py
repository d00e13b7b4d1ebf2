"""Finalists in a sweep: made, healed a little, and one of them kept, which goes on as any other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from foldstack.compression.checkpoints import checkpoint
from foldstack.compression.checkpoints.checkpoint import ReloadReport, load_model
from foldstack.compression.errors import InputError
from foldstack.flows.config.run_config import parse_config
from foldstack.flows.planning.forecast import dry_run
from foldstack.flows.running.branches import DECIDING_WINDOWS, lay_out
from foldstack.tasks.models import MODEL_FOLDER
from foldstack.tasks.models import model_folder as folder_in
from foldstack.tasks.recover_model import HISTORY_FILE, TABLE_FILE, RecoverModel
from foldstack.tasks.running.messages import ProcessDied
from foldstack.tasks.stage import Progress, no_progress, run_stage


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


@pytest.mark.slow  # starts four processes that import torch
def test_two_processes_that_share_the_model_recover_what_one_recovers(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same loss curve to 1e-5 of the loss; also where one was killed, and where one process
    goes on from what two had written."""
    monkeypatch.setattr(
        checkpoint,
        "check_reload",
        lambda *_, **__: ReloadReport(1.0, 0.0, 0.0, True, (1,), 1, "X", 0.0),
    )
    config["methods"] = [{"name": "sleb"}]
    config["recovery"] |= {"steps": 6, "checkpoint_every": 2, "gradient_accumulation": 2,
                           "learning_rate": 5e-3, "distillation": 0.5, "validation_fraction": 0.2,
                           "processes": 2}  # fmt: skip
    layout = lay_out(parse_config(config))
    branch = layout.branches[1]
    assert branch.recover is not None
    for stage in layout.before_speeds:
        if stage.stage in ("collect_calibration", "gather_statistics", "rank_blocks",
                           "score_variants", "compress_model"):  # fmt: skip
            run_stage(stage, layout.store)

    def compute(stage: RecoverModel, name: str, progress: Progress = no_progress) -> Any:
        folder, work = tmp_path / name, tmp_path / f"{name}-work"
        folder.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
        stage.compute(folder, work, progress)
        lines = (folder / HISTORY_FILE).read_text().splitlines()
        return torch.tensor([list(json.loads(line).values()) for line in lines])

    def kill_one(_what: str, done: int, _total: int) -> None:
        if done == 3:
            psutil.Process().children()[1].kill()

    seen: list[int] = []
    expected = compute(branch.recover.model_copy(update={"processes": 1}), "one")
    with pytest.raises(ProcessDied, match="process 1 ended with signal 9"):
        compute(branch.recover, "two", kill_one)
    left = tmp_path / "two-work"
    (kept,) = left.glob("step-*")
    assert len(list(kept.glob("shard-*.safetensors"))) == 2
    shutil.copytree(left, tmp_path / "alone-work")
    found = compute(branch.recover, "two", lambda _what, done, _total: seen.append(done))
    assert seen[0] > 2
    alone = compute(branch.recover.model_copy(update={"processes": 1}), "alone")
    for history, name in ((found, "two"), (alone, "alone")):
        torch.testing.assert_close(history, expected, rtol=1e-5, atol=1e-5)
        whole, shared = (load_model(tmp_path / of / MODEL_FOLDER) for of in ("one", name))
        for key, tensor in whole.state_dict().items():
            torch.testing.assert_close(shared.state_dict()[key], tensor, rtol=1e-3, atol=1e-4)
    assert expected[-1, 1] < expected[0, 1]  # it did train
