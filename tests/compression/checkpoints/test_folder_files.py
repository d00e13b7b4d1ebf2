"""Small files of a model folder that are damaged: each a sentence."""

import json

import pytest

from foldstack.compression.checkpoints.folder_files import LARGEST_BYTES
from foldstack.compression.checkpoints.model_folder import check_folder
from foldstack.compression.errors import InputError

DAMAGES = {
    "cut short": (b'{"a": 1', "is not valid JSON"),
    "a list": (b"[1, 2]", "must hold a JSON object, got list"),
    "null": (b"null", "must hold a JSON object, got NoneType"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    "UTF-16": ("{}".encode("utf-16"), "must be UTF-8"),
    "nested": (b"[" * 100_000, "nested too deeply"),
    "empty": (b"", "is not valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", LARGEST_BYTES)
def test_damaged_json(name, damage, model_folder):
    folder, (content, sentence) = model_folder("llama"), DAMAGES[damage]
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence) as refusal:
        check_folder(folder)
    assert str(folder / name) in str(refusal.value)


def test_a_config_that_is_a_huge_file(model_folder):
    folder = model_folder("llama")
    with (folder / "config.json").open("r+b") as file:
        file.truncate(LARGEST_BYTES["config.json"] + 1)
    with pytest.raises(InputError, match=r"which is no config\.json"):
        check_folder(folder)


def test_an_adapter_beside_the_weights(model_folder):
    folder = model_folder("llama")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(InputError, match="lay it on top: merge it"):
        check_folder(folder)


@pytest.mark.parametrize("removed", [["model.safetensors"], ["model.safetensors", "config.json"]])
def test_an_adapter_alone(removed, model_folder):
    folder = model_folder("llama")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for name in removed:
        (folder / name).unlink()
    with pytest.raises(InputError, match="holds an adapter and no model: merge it"):
        check_folder(folder)


def test_weights_twice(model_folder):
    folder = model_folder("llama")
    (folder / "a.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = {"weight_map": {"lm_head.weight": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="a loader takes one of the two"):
        check_folder(folder)


def test_an_index_that_names_what_no_shard_holds(model_folder):
    folder = model_folder("llama")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"no.such.weight": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"names no\.such\.weight, which none of its files holds"):
        check_folder(folder)
