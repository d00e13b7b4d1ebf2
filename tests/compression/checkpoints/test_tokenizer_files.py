"""A tokenizer travels whole, whatever files it is made of, and the proof reads a text with it."""

import json

import pytest
import torch

from foldstack.compression.checkpoints import tokenizer_files as tokenizer_files_module
from foldstack.compression.checkpoints.checkpoint import (
    check_reload,
    check_tokenizer_travels,
    load_model,
    load_tokenizer,
    model_fingerprint,
    save_model,
)
from foldstack.compression.checkpoints.tokenizer_files import (
    check_same_tokens,
    copy_tokenizer,
    sample_text,
    tokenizer_files,
    tokens_of,
)
from foldstack.compression.errors import InputError
from foldstack.compression.structure.surgery import Cut, cut, plan_of

LETTERS = [chr(0x4E00 + number) for number in range(200)]


@pytest.fixture
def chinese_gpt2(model_folder):
    """A GPT-2 with the tokenizer of a BERT: vocab.txt, and a class that the model's is not."""
    folder = model_folder("gpt2")
    (folder / "tokenizer.json").unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    entries = {"tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))
    return folder


def vocab_and_merges(folder):
    """The old form of the same byte-level tokenizer: two files."""
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(whole["vocab"]), encoding="utf-8")
    merges = [" ".join(m) if isinstance(m, list) else m for m in whole["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    return folder


def test_a_vocabulary_in_a_text_file_travels(chinese_gpt2, tmp_path):
    model, saved = load_model(chinese_gpt2), {}
    smaller = cut(model, Cut(plan_of(model).keep([0, 2]), (0, 2)))
    shared = cut(model, Cut(plan_of(model).share(0, [1]), (0, 1, 2, 3)))
    for name, made in {"native": smaller, "portable": shared}.items():
        assert save_model(made, tmp_path / name, tokenizer_from=chinese_gpt2) == name
        saved[tmp_path / name] = made
        again = load_tokenizer(tmp_path / name)("".join(LETTERS[:9]))["input_ids"]
        assert again == load_tokenizer(chinese_gpt2)("".join(LETTERS[:9]))["input_ids"]
        assert again.count(again[1]) == 1  # and not the unknown token nine times
    for folder, model in saved.items():
        assert check_reload(model, folder, chinese_gpt2).generated_tokens


@pytest.mark.parametrize("class_name", [None, "GPT2Tokenizer"])
def test_two_files_travel_also_where_the_class_is_not_named(class_name, model_folder, tmp_path):
    folder = vocab_and_merges(model_folder("gpt2"))
    (folder / "tokenizer_config.json").unlink()
    if class_name:
        entries = json.dumps({"tokenizer_class": class_name})
        (folder / "tokenizer_config.json").write_text(entries)
    check_tokenizer_travels(folder)
    model = load_model(folder)
    shared = cut(model, Cut(plan_of(model).share(0, [1]), (0, 1, 2, 3)))
    save_model(shared, tmp_path / "out", tokenizer_from=folder)
    ours, theirs = load_tokenizer(tmp_path / "out"), load_tokenizer(folder)
    texts = sample_text(theirs)
    check_same_tokens(tmp_path, tokens_of(theirs, texts), tokens_of(ours, texts), texts)
    entries = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert entries["tokenizer_class"].startswith("GPT2Tokenizer")


def test_every_form_that_is_known(tmp_path):
    names = [
        "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt",
        "qwen.tiktoken", "tekken.json", "chat_template.jinja", "special_tokens_map.json",
        "additional_chat_templates/tool_use.jinja",
    ]  # fmt: skip
    source, target = tmp_path / "a", tmp_path / "b"
    for name in [*names, "model.safetensors", "pytorch_model.bin", "notes.pdf", "train.jsonl"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    copy_tokenizer(source, target)
    copied = {file.relative_to(target).as_posix() for file in target.rglob("*") if file.is_file()}
    assert copied == set(names)


def test_a_file_that_only_the_class_names(tmp_path):
    entries = {"tokenizer_class": "HerbertTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(entries))
    from transformers import HerbertTokenizer

    for name in HerbertTokenizer.vocab_files_names.values():
        (tmp_path / name).write_text("x")
    found = {file.name for file in tokenizer_files(tmp_path)}
    assert found >= set(HerbertTokenizer.vocab_files_names.values())


@pytest.mark.parametrize("name", ["qwen.tiktoken", "additional_chat_templates/tool_use.jinja"])
def test_a_change_of_a_tokenizers_file_is_another_model(name, model_folder):
    folder = model_folder("llama")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("a")
    before = model_fingerprint(folder)
    (folder / name).write_text("b")
    assert model_fingerprint(folder) != before


def test_the_proof_finds_another_tokenizer(chinese_gpt2, tmp_path):
    model = load_model(chinese_gpt2)
    save_model(model, tmp_path / "out", tokenizer_from=chinese_gpt2)
    words = (tmp_path / "out" / "vocab.txt").read_text(encoding="utf-8").split("\n")
    words[5], words[6] = words[6], words[5]
    (tmp_path / "out" / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    with pytest.raises(InputError, match="the tokenizer does not travel"):
        check_reload(model, tmp_path / "out", tokenizer_from=chinese_gpt2)


def test_perplexity_counts_what_the_tokenizer_does_not_know(chinese_gpt2):
    from foldstack.compression.evaluation.perplexity import measure_perplexity
    from foldstack.compression.evaluation.records import PerplexityProtocol

    model, tokenizer = load_model(chinese_gpt2), load_tokenizer(chinese_gpt2)
    text = "".join(LETTERS[number % 200] for number in range(64)) + " z z"
    protocol = PerplexityProtocol(window_tokens=32)
    with torch.inference_mode():
        assert measure_perplexity(model, tokenizer, [text], protocol).num_unknown == 2


@pytest.mark.parametrize(
    ("name", "package"), [("tekken.json", "mistral_common"), ("a.model", "sentencepiece")]
)
def test_a_tokenizer_that_needs_a_package_says_which(name, package, model_folder, monkeypatch):
    folder = model_folder("llama")
    for old in ("tokenizer.json", "tokenizer_config.json"):
        (folder / old).unlink()
    (folder / name).write_bytes(b"{}")
    monkeypatch.setattr(tokenizer_files_module, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=f"{name} needs the package {package}") as refusal:
        load_tokenizer(folder)
    assert "\n" not in str(refusal.value)
