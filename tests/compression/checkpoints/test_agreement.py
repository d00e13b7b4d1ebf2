"""A config and the weights beside it are one model: the weights count, or both are named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from foldstack.compression.checkpoints.agreement import agreement
from foldstack.compression.checkpoints.checkpoint import (
    check_reload,
    load_config,
    load_model,
    save_model,
)
from foldstack.compression.errors import InputError
from foldstack.compression.structure.surgery import Cut, build_on_meta, cut, plan_of


def edit(folder, **entries):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


def with_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def another_head(tensors):
    shape = next(
        t.shape for n, t in tensors.items() if n.endswith(("embed_tokens.weight", "wte.weight"))
    )
    tensors["lm_head.weight"] = torch.randn(shape, generator=torch.Generator().manual_seed(3)) / 6


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "opt", "gemma3_text"])
def test_a_head_that_is_not_the_embedding_is_kept(name, model_folder, tmp_path):
    folder = with_tensors(model_folder(name), another_head)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    config = load_config(folder)
    assert not config.tie_word_embeddings
    assert build_on_meta(config).num_parameters() == load_model(folder).num_parameters()
    assert "the weights hold another head" in agreement(folder).notes[0]
    model = load_model(folder)
    smaller = cut(model, Cut(plan_of(model).keep([0, 2]), (0, 2)))
    save_model(smaller, tmp_path / "out", tokenizer_from=folder)
    torch.testing.assert_close(load_model(tmp_path / "out").lm_head.weight, head)


def test_a_head_that_is_the_embedding_stays_tied(model_folder):
    folder = model_folder("llama_tied")
    with_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    assert load_config(folder).tie_word_embeddings
    assert agreement(folder).notes == ()


def test_a_cut_that_would_lose_a_tensor_is_refused(tiny_model):
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True  # and its head is another
    with pytest.raises(ValueError, match=r"lm_head\.weight is lost"):
        cut(model, Cut(plan_of(model).keep([0]), (0,)))


def test_a_config_that_wants_a_head_which_is_not_there(model_folder):
    folder = edit(model_folder("llama_tied"), tie_word_embeddings=False)
    with pytest.raises(InputError, match="set tie_word_embeddings to true"):
        load_config(folder)


@pytest.mark.parametrize(
    ("said", "stored", "read"),
    [
        ("bfloat16", "float32", "float32"),
        ("float32", "float16", "float32"),
        ("bfloat16", "float16", "float32"),
        ("float16", "float16", "float16"),
        (None, "bfloat16", "bfloat16"),
    ],
)
def test_weights_are_read_in_what_holds_both_the_file_and_the_config(
    model_folder, said, stored, read
):
    """Less loses what the file holds, or overflows where the config's precision does not."""
    folder = edit(model_folder("llama"), dtype=said)
    of_file = getattr(torch, stored)
    with_tensors(folder, lambda held: held.update({n: t.to(of_file) for n, t in held.items()}))
    wanted = getattr(torch, read)
    assert load_config(folder).dtype == load_model(folder).dtype == wanted
    notes = agreement(folder).notes
    if said in (None, stored):
        assert not notes
    else:
        assert f"says {said}, and the weights are stored in {stored}" in notes[0]
        assert f"read in {read}" in notes[0]


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_a_decoder_saved_without_its_head_is_the_same_model(name, model_folder):
    folder = model_folder(name)
    before = load_model(folder).num_parameters()
    inside = load_model(folder).base_model_prefix + "."

    def rename(tensors):
        for key in list(tensors):
            tensors[key.removeprefix(inside)] = tensors.pop(key)

    assert load_model(with_tensors(folder, rename)).num_parameters() == before


class TestWeightsNobodyReads:
    def test_what_is_no_part_of_the_decoder_is_left_out(self, model_folder):
        extra = {"v_head.summary.weight": torch.ones(1, 32), "mtp.norm.weight": torch.ones(32)}
        folder = with_tensors(model_folder("llama"), lambda t: t.update(extra))
        assert (
            load_model(folder).num_parameters()
            == build_on_meta(load_config(folder)).num_parameters()
        )
        assert "mtp.norm.weight and 1 more, no part of the decoder" in agreement(folder).notes[0]

    def test_masks_of_old_files_are_no_news(self, model_folder):
        masks = {
            f"transformer.h.{block}.attn.{name}": torch.tensor(-1e4)
            for block in range(4)
            for name in ("masked_bias", "bias")
        }
        folder = with_tensors(model_folder("gpt2"), lambda t: t.update(masks))
        load_model(folder)
        assert agreement(folder).notes == ()

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("model.layers.4.mlp.up_proj.weight", "there are 4 blocks"),
            ("model.layers.0.self_attn.q_proj.bias", "a llama with the entries of its config"),
            ("model.layers.0.self_attn.q_norm.weight", "has no place for it"),
            ("model.norm.bias", "has no place for it"),
            ("lm_head.bias", "has no place for it"),
        ],
    )
    def test_a_weight_of_the_decoder_without_a_place_is_refused(self, name, sentence, model_folder):
        folder = with_tensors(model_folder("llama"), lambda t: t.update({name: torch.ones(32)}))
        for opened in (load_config, load_model):
            with pytest.raises(InputError, match=sentence):
                opened(folder)


CONFIGS = {
    "layer types of another depth": ("qwen2", {"num_hidden_layers": 3}, "layer_types"),
    "a whole number for a float": ("llama", {"initializer_range": 1}, "initializer_range"),
    "null for a boolean": ("llama", {"tie_word_embeddings": None}, "tie_word_embeddings"),
    "a padding id behind the vocabulary": ("llama", {"pad_token_id": 9999}, "pad_token_id is 9999"),
    "a rope type that nobody knows": (
        "llama",
        {"rope_parameters": {"rope_type": "newer", "factor": 2.0, "rope_theta": 1e4}},
        "newer",
    ),
    "no heads": ("llama", {"num_attention_heads": 0}, "config.json"),
    "text for a size": ("llama", {"hidden_size": "wide"}, "hidden_size"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_transformers_does_not_take(case, model_folder):
    architecture, entries, named = CONFIGS[case]
    folder = edit(model_folder(architecture), **entries)
    with pytest.raises(InputError, match=named) as refusal:
        load_config(folder)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    "entries",
    [
        {"attn_implementation": "flash_attention_2"},
        {"output_attentions": True, "output_hidden_states": True, "return_dict": False},
    ],
)
def test_what_a_call_returns_is_no_part_of_the_model(entries, model_folder, tmp_path):
    folder = edit(model_folder("llama"), **entries)
    model = load_model(folder)
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.shape[1] == 4
    save_model(model, tmp_path / "out", tokenizer_from=folder)
    again = json.loads((tmp_path / "out/config.json").read_text())
    assert not {name for name, value in entries.items() if again.get(name) == value}


def test_what_a_generation_config_says_does_not_matter_to_the_proof(model_folder, tmp_path):
    folder = model_folder("llama")
    entries = {
        "stop_strings": ["."], "num_return_sequences": 2, "do_sample": True, "num_beams": 2,
        "return_dict_in_generate": True, "max_length": 4,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(entries))
    model = load_model(folder)
    save_model(model, tmp_path / "out", tokenizer_from=folder)
    assert len(check_reload(model, tmp_path / "out").generated_tokens) == 8
    kept = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert kept["stop_strings"] == ["."]
