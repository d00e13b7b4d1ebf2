"""A model whose weights are quantised: dequantised once, and what it came from is known."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from foldstack.compression.checkpoints import checkpoint
from foldstack.compression.checkpoints.checkpoint import ReloadReport, load_model
from foldstack.compression.errors import InputError
from foldstack.flows.config.run_config import parse_config
from foldstack.flows.planning.forecast import dry_run
from foldstack.flows.running.branches import lay_out
from foldstack.tasks.dequantize_model import find_model
from foldstack.tasks.models import MODEL_FOLDER
from foldstack.tasks.stage import run_stage
from foldstack.tasks.store.artifacts import ArtifactStore


@pytest.fixture
def float8(model_folder: Callable[..., Path]) -> Path:
    """A model that stores one matrix as 8-bit floats with one scale."""
    folder = model_folder("llama")
    file, name = folder / "model.safetensors", "model.layers.0.self_attn.o_proj.weight"
    tensors = load_file(file)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.full((1, 1), 2.0)
    save_file(tensors, file, metadata={"format": "pt"})
    return quantized(folder, quant_method="fp8", weight_block_size=[32, 32])


def quantized(folder: Path, **scheme: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": scheme}))
    return folder


def test_a_quantised_model_is_made_plain_once_and_says_what_it_came_from(
    float8: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ArtifactStore(tmp_path / "store")
    found = find_model(store, str(float8))
    assert f"the weights of {float8} are dequantised now, once" in caplog.text
    assert found.folder.is_relative_to(store.root)
    name = "model.layers.0.self_attn.o_proj.weight"
    stored = load_file(float8 / "model.safetensors")[name].float()
    assert torch.equal(load_model(found.folder).state_dict()[name], 2 * stored)

    caplog.clear()
    copy = shutil.copytree(float8, tmp_path / "copy")
    again = find_model(store, str(copy))
    assert (again.fingerprint, again.folder) == (found.fingerprint, found.folder)
    assert "dequantised now" not in caplog.text
    assert "is dequantised, from fp8 to float32" in again.origin
    half = find_model(store, str(float8), dtype="bfloat16")
    assert half.folder != found.folder
    assert half.fingerprint != found.fingerprint


def test_a_quantised_model_is_compressed_like_any_other_and_its_card_says_so(
    float8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = ReloadReport(1.0, 0.0, 0.0, True, (1,), 1, "LlamaForCausalLM", 0.0)
    monkeypatch.setattr(checkpoint, "check_reload", lambda *_, **__: seen)
    windows = {"num_windows": 2, "window_tokens": 16}
    config = parse_config(
        {
            "model": {"name": str(float8), "device": "cpu"},
            "calibration": {"source": {"corpus": "self"}, **windows},
            "evaluation": {
                "perplexity": {"source": {"corpus": "self"}, "protocol": {"window_tokens": 16}}
            },
            "methods": ["shortgpt"],
            "sparsities": [0.15],
            "output": {"home": str(tmp_path / "home")},
        }
    )
    layout = lay_out(config)
    compress = layout.branches[1].compress
    assert compress is not None
    for stage in (layout.calibration, layout.statistics, layout.ranking, compress):
        made = run_stage(stage, layout.store)
    card = (made.open() / MODEL_FOLDER / "README.md").read_text()
    assert "is dequantised, from fp8 to float32" in card
    assert load_model(made.open() / MODEL_FOLDER).config.num_hidden_layers == 3


def test_plain_models_go_into_no_store(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("llama")
    assert find_model(ArtifactStore(tmp_path / "store"), str(folder)).folder == folder
    assert not (tmp_path / "store").exists()


def test_plan_refuses_what_run_would(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantized(model_folder("llama"), quant_method="bitsandbytes", load_in_4bit=True)
    home = tmp_path / "home"
    config = {"model": str(folder), "methods": ["shortgpt"], "output": {"home": str(home)}}
    with pytest.raises(InputError, match=r"quantised by bitsandbytes, .* cannot be dequantised"):
        dry_run(parse_config(config))
    assert not list(home.glob("store/dequantize_model/*/model"))
