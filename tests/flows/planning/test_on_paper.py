"""A run on another machine, planned from a config without weights."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foldstack.compression.errors import InputError
from foldstack.flows.config.run_config import RunConfig, parse_config
from foldstack.flows.planning import machine_rates
from foldstack.flows.planning.on_paper import MACHINES, PaperStage, plan_on_paper


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """Of a 70B Llama that is a config.json and nothing else."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing of this machine is measured")

    monkeypatch.setattr(machine_rates, "_seconds_of", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    folder = tmp_path / "large"
    folder.mkdir()

    def of(**changes: Any) -> RunConfig:
        large = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
            "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
            "dtype": "bfloat16",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(large | changes))
        source = {"corpus": "python-stdlib", "split": "test"}
        return parse_config(
            {
                "model": {"name": str(folder), "dtype": "bfloat16"},
                "calibration": {"source": source, "num_windows": 128, "window_tokens": 2048},
                "evaluation": {"perplexity": {"source": source}},
                "recovery": {"steps": 10, "distillation": 0.5, "source": source},
                "methods": ["svd_llm"],
                "sparsities": [0.2],
                "statistics": {"shards": 8},
                "output": {"home": str(tmp_path / "home")},
            }
        )

    return of


def test_a_model_of_70b_is_planned_from_its_config(config: Callable[..., RunConfig]) -> None:
    one, eight = (plan_on_paper(config(), "h200", devices) for devices in (1, 8))
    assert one.parameters["dense"] == pytest.approx(70.6e9, rel=0.01)
    of = {stage.stage: stage for stage in one.stages}
    gathering = of["gather_statistics"]
    # Weights, and two files of hidden states, pass through; one block and its Grams stay.
    hidden = 2 * 128 * 2048 * 8192 * 2
    assert gathering.streamed_bytes == pytest.approx(2 * 70.6e9 + hidden, rel=0.01)
    assert 12 * 28672**2 < gathering.device_bytes < 40e9
    assert gathering.disk_bytes == 4 * 80 * (3 * 8192**2 + 28672**2)
    assert of["compress_model"].fits
    # Teacher and student side by side are more than one accelerator holds.
    assert not of["recover_model"].fits
    assert of["recover_model"].device_bytes > MACHINES["h200"].device_bytes
    assert one.seconds / 8 <= eight.seconds < one.seconds


def test_recovery_that_eight_share_out_fits(config: Callable[..., RunConfig]) -> None:
    """A batch's logits were counted whole, which the loss makes slice by slice."""

    def recovery(devices: int = 8, **settings: int) -> PaperStage:
        chosen = config()
        changed = chosen.recovery.model_copy(update={"cache_teacher": False, **settings})
        paper = plan_on_paper(chosen.model_copy(update={"recovery": changed}), "h200", devices)
        (stage,) = (each for each in paper.stages if each.stage == "recover_model")
        return stage

    one, two, eight = recovery(batch_size=8), recovery(batch_size=16), recovery(processes=8)
    tokens = 8 * config().recovery.windows.window_tokens
    assert two.device_bytes - one.device_bytes == tokens * 80 * (3 * 28672 + 8 * 8192) * 4
    assert not one.fits
    assert eight.fits
    assert eight.seconds < one.seconds / 3
    with pytest.raises(InputError, match=r"processes 8 wants as many accelerators.* is of 4"):
        recovery(devices=4, processes=8)


def test_what_cannot_be_planned_is_told(config: Callable[..., RunConfig]) -> None:
    with pytest.raises(InputError, match="h100, h200"):
        plan_on_paper(config(), "abacus", 1)
    mixture = config(model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], num_experts=128)
    with pytest.raises(InputError, match="mixture-of-experts models are not supported"):
        plan_on_paper(mixture, "h200", 1)
