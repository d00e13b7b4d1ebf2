"""Tools of others on portable folders: TRL trains, others round them (make test-engines)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

pytestmark = [pytest.mark.engines, pytest.mark.foreign_warnings]
FAMILIES = ["llama", "opt"]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 97, (2, 12), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(ids, use_cache=False).logits


@pytest.fixture(params=FAMILIES)
def folder(
    request: pytest.FixtureRequest,
    structure: str,
    structured: Callable[..., Any],
    tokenizer_folder: Path,
    tmp_path: Path,
) -> Path:
    vocabulary = len(PreTrainedTokenizerFast.from_pretrained(tokenizer_folder))
    structured(structure, request.param, vocab_size=vocabulary).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("lora", [False, True])
def test_trl_trains_and_what_it_saves_is_loaded(
    lora: bool, folder: Path, tokenizer_folder: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl", reason="pip install trl")
    from datasets import Dataset
    from peft import LoraConfig, PeftModel

    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model, ids)
    out = tmp_path / "trained"
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(out), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
            bf16=False, max_length=32, report_to=[], save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": [f"return value * {n}" for n in range(4)]}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(tokenizer_folder, pad_token="a"),
        peft_config=LoraConfig(r=2, target_modules="all-linear") if lora else None,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out))
    after = logits(trainer.model, ids)
    assert (after - before).abs().max() > 1e-4
    again: Any = AutoModelForCausalLM.from_pretrained(folder if lora else out)
    again = PeftModel.from_pretrained(again, str(out)) if lora else again
    torch.testing.assert_close(logits(again, ids), after)


def test_caches_of_quanto_hold_a_text(folder: Path, ids: torch.Tensor) -> None:
    pytest.importorskip("optimum.quanto", reason="pip install optimum-quanto")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    settings |= {"eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    exact = model.generate(ids, **settings)
    rounded = {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 2}
    found = model.generate(ids, cache_implementation="quantized", cache_config=rounded, **settings)
    torch.testing.assert_close(found.logits[0], exact.logits[0], rtol=1e-4, atol=1e-4)
    assert 0 < (found.logits[1] - exact.logits[1]).abs().mean() < exact.logits[1].std()


def test_weights_that_torchao_rounds_are_saved_and_loaded(
    folder: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    from transformers import TorchAoConfig

    exact = logits(AutoModelForCausalLM.from_pretrained(folder), ids)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig())
    )
    rounded = logits(model, ids)
    assert 0 < (rounded - exact).abs().mean() < 0.5 * exact.std()
    model.save_pretrained(tmp_path / "rounded")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "rounded"), ids), rounded
    )


def test_weights_that_compressed_tensors_stored_are_read(folder: Path, ids: torch.Tensor) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install 'foldstack[quantized]'")
    from transformers import CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(folder)
    head, file = model.get_output_embeddings(), folder / "model.safetensors"
    tensors = load_file(file)
    for name, linear in model.named_modules():
        if type(linear) is nn.Linear and linear is not head:
            weight = tensors[f"{name}.weight"]
            scale = weight.abs().amax(1, keepdim=True) / 127
            small = (weight / scale).round().to(torch.int8)
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = small, scale
            linear.weight.data = small * scale
    save_file(tensors, file, metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["re:.*lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
