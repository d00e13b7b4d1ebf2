"""Saved folders load anywhere and compute the same; broken ones are refused in one sentence."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import PreTrainedModel

from foldstack.compression.checkpoints.checkpoint import (
    check_reload,
    load_config,
    load_model,
    load_plan,
    load_tokenizer,
    model_fingerprint,
    save_model,
)
from foldstack.compression.checkpoints.model_folder import check_folder, resolve
from foldstack.compression.errors import InputError
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.size import count_parameters
from foldstack.compression.structure.surgery import Cut, cut, plan_of


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(2, 42)[None], use_cache=False).logits


def shared_and_factored(model):
    """Block 1 runs on block 0's linears; one linear of the last block has rank 3."""
    site = architecture_of(model).linears[0].name
    plan = plan_of(model).share(0, [1]).factor({(3, site): 3})
    module = architecture_of(model).blocks(model)[3].get_submodule(site)
    out_features, in_features = architecture_of(model).weight(module).shape
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"blocks.3.{site}.first.weight": torch.randn(3, in_features, generator=generator) / 6,
        f"blocks.3.{site}.second.weight": torch.randn(out_features, 3, generator=generator) / 6,
    }
    if module.bias is not None:
        tensors[f"blocks.3.{site}.second.bias"] = module.bias
    return cut(model, Cut(plan, (0, 1, 2, 3), tensors))


def test_portable_folders_reload_with_equal_logits_and_parameters(
    architecture, tiny_model, tokenizer_folder, tmp_path
):
    model = shared_and_factored(tiny_model(architecture))
    assert save_model(model, tmp_path, tokenizer_from=tokenizer_folder) == "portable"
    again = load_model(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert count_parameters(again) == count_parameters(model)
    assert load_plan(tmp_path) == plan_of(model) == plan_of(again)


def test_threads_that_load_at_once_leave_transformers_as_it_was(model_folder):
    folder = model_folder("llama_tied")
    tie_weights = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(load_model, [folder] * 12))
    assert PreTrainedModel.tie_weights is tie_weights
    assert all(model.lm_head.weight is model.model.embed_tokens.weight for model in models)


def test_native_folders_are_stock_folders(architecture, tiny_model, tokenizer_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(architecture)
    smaller = cut(model, Cut(plan_of(model).keep([1, 2]), (1, 2)))
    assert save_model(smaller, tmp_path, tokenizer_from=tokenizer_folder) == "native"
    assert not (tmp_path / "modeling_foldstack.py").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(smaller), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama_tied", "gemma3_text"])
def test_a_fresh_process_without_foldstack_sees_the_same_model(
    name, tiny_model, tokenizer_folder, tmp_path
):
    model = shared_and_factored(tiny_model(name))
    save_model(model, tmp_path, tokenizer_from=tokenizer_folder)
    report = check_reload(model, tmp_path)
    assert report.logits_difference == 0
    assert report.class_name == "FoldstackForCausalLM"
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.01)
    with pytest.raises(RuntimeError, match="computes other logits after reloading"):
        check_reload(model, tmp_path)


def test_shared_weights_are_stored_once(tiny_model, tokenizer_folder, tmp_path):
    from safetensors import safe_open

    model = shared_and_factored(tiny_model("llama_tied"))
    save_model(model, tmp_path, tokenizer_from=tokenizer_folder)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        elements = sum(torch.Size(stored.get_slice(k).get_shape()).numel() for k in stored.keys())  # noqa: SIM118
    assert elements == count_parameters(model)


def test_the_reload_script_needs_nothing_of_foldstack():
    from foldstack.compression.checkpoints import reload_check

    code = (
        f"import runpy, sys; runpy.run_path({reload_check.__file__!r}); "
        "sys.exit(any(m.startswith('foldstack') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_fingerprint_follows_the_bytes(model_folder):
    folder = model_folder("llama")
    before = model_fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert model_fingerprint(folder) != before


def test_tokenizer_loads_from_a_portable_folder(tiny_model, tokenizer_folder, tmp_path):
    save_model(shared_and_factored(tiny_model("llama")), tmp_path, tokenizer_from=tokenizer_folder)
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("def f")) == "def f"


class TestRefusals:
    """Each broken folder gets a sentence that says what is wrong."""

    def test_no_such_model(self):
        with pytest.raises(InputError, match=r"no model '\./nowhere'"):
            resolve("./nowhere")

    def test_hub_switched_off(self):
        with pytest.raises(InputError, match="the hub cannot be reached or is switched off"):
            resolve("some-org/some-model-that-is-not-cached")

    def test_no_config(self, tmp_path):
        with pytest.raises(InputError, match=r"holds no config\.json"):
            check_folder(tmp_path)

    def test_pickle_only(self, model_folder):
        folder = model_folder("llama")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(InputError, match="never loads"):
            check_folder(folder)

    def test_truncated_weights(self, model_folder):
        file = model_folder("llama") / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(InputError, match="is damaged"):
            load_model(file.parent)

    def test_missing_shard(self, model_folder):
        folder = model_folder("llama")
        index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match=r"lacks model-00002-of-00002\.safetensors"):
            load_model(folder)

    @pytest.mark.parametrize("name", ["../../x.safetensors", "/x.safetensors", "model.bin"])
    def test_index_that_names_what_is_no_shard(self, name, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        with pytest.raises(InputError, match="must name safetensors files beside it"):
            check_folder(tmp_path)

    @pytest.mark.parametrize(
        "file, content, sentence",
        [
            ("config.json", "[" * 100_000, "nested too deeply"),
            ("model.safetensors.index.json", "[" * 100_000, "nested too deeply"),
            ("model.safetensors.index.json", '{"weight_map": {"a": 1, "b": "x"}}', "does not list"),
            ("model.safetensors.index.json", '{"weight_map": []}', "does not list"),
        ],
    )
    def test_hostile_json(self, file, content, sentence, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / file).write_text(content)
        with pytest.raises(InputError, match=sentence):
            check_folder(tmp_path)

    @pytest.mark.parametrize(
        "header",
        [
            "{",
            "[]",
            "[" * 100_000,
            '{"a": {"data_offsets": [0]}}',
            '{"a": {"data_offsets": [0, "x"]}}',
            '{"a": {"data_offsets": [0, NaN]}}',
            '{"a": {"data_offsets": [0, Infinity]}}',
        ],
    )
    def test_hostile_safetensors_header(self, header, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        size = len(header).to_bytes(8, "little")
        (tmp_path / "model.safetensors").write_bytes(size + header.encode())
        with pytest.raises(InputError, match="not a whole safetensors file"):
            check_folder(tmp_path)

    def test_missing_weights(self, model_folder):
        from safetensors.torch import load_file, save_file

        file = model_folder("llama") / "model.safetensors"
        tensors = load_file(file)
        del tensors["model.layers.2.mlp.up_proj.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"1 missing weights, the first is model\.layers\.2"):
            load_model(file.parent)

    def test_weights_of_another_shape(self, model_folder):
        folder = model_folder("llama")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 58}))
        with pytest.raises(
            InputError, match=r"of shape \((56, 32|32, 56)\), where .* asks for \(.*58"
        ):
            load_model(folder)

    @pytest.mark.parametrize(
        ("config", "sentence"),
        [
            ({"model_type": "t5"}, "encoder-decoder"),
            ({"model_type": "mixtral", "num_local_experts": 8}, "mixture-of-experts"),
            ({"model_type": "bloom"}, "'bloom' is not supported"),
            ({"model_type": "no_such"}, "not a config that transformers knows"),
        ],
    )
    def test_other_kinds_of_model(self, config, sentence, model_folder):
        folder = model_folder("llama")
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=sentence):
            load_config(folder)


def test_a_path_may_begin_with_the_home_of_its_user(model_folder, monkeypatch):
    folder = model_folder("llama")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(f"~/{folder.name}") == folder
