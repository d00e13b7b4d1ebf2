"""A native config says the same to readers of today and of transformers 4."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from foldstack.compression.checkpoints.checkpoint import save_model
from foldstack.compression.checkpoints.older_readers import with_older_names
from foldstack.compression.reference import MODEL_FOLDER

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "overrides", "older"),
    [
        ("llama", {"rope_theta": 500000.0}, {"rope_theta": 500000.0, "rope_scaling": None}),
        (
            "llama",
            {"rope_parameters": LLAMA3},
            {
                "rope_theta": 500000.0,
                "rope_scaling": {n: v for n, v in LLAMA3.items() if n != "rope_theta"},
            },
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
                }
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 20000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            "phi3",
            {"partial_rotary_factor": 0.5, "rope_theta": 5000.0},
            {"rope_theta": 5000.0, "partial_rotary_factor": 0.5, "rope_scaling": None},
        ),
        ("gpt2", {}, {}),
        ("opt", {}, {}),
    ],
)
def test_both_spellings_are_written_and_read_as_one(
    family: str, overrides: Any, older: Any, tiny_model: Any, tmp_path: Any
) -> None:
    model = tiny_model(family, **overrides)
    assert save_model(model, tmp_path, tokenizer_from=tmp_path) == "native"
    entries = json.loads((tmp_path / "config.json").read_text())
    assert {name: entries.get(name, "absent") for name in older} == older
    assert entries["torch_dtype"] == entries["dtype"] == "float32"
    assert with_older_names(entries) == entries
    read, meant = AutoConfig.from_pretrained(tmp_path), model.config
    assert getattr(read, "rope_parameters", None) == getattr(meant, "rope_parameters", None)
    assert str(read.dtype).endswith("float32")


def test_a_tokenizer_of_today_is_read_by_both(tiny_model: Any, tmp_path: Path) -> None:
    """transformers 4.57 knows no TokenizersBackend and takes no list for extra_special_tokens."""
    source, out = tmp_path / "source", tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(source)
    save_model(tiny_model("llama"), out, tokenizer_from=source)
    entries = json.loads((out / "tokenizer_config.json").read_text())
    assert entries["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert entries["additional_special_tokens"] == ["<image>"]
    assert "extra_special_tokens" not in entries
    again, text = AutoTokenizer.from_pretrained(out), "def f(): <image>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.extra_special_tokens == tokenizer.extra_special_tokens
