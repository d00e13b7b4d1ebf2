"""The embedded default: the model that comes along, and the benchmarks under lm-eval."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from foldstack.compression.reference import BENCHMARKS_FOLDER, MODEL_FOLDER
from foldstack.compression.reference.against_xz import model_bits
from foldstack.compression.reference.benchmarks import stdlib_items
from foldstack.compression.reference.stdlib_corpus import stdlib_split
from foldstack.compression.reference.tokenizer import train_tokenizer


def random_model(context: int = 128) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Both benchmarks with a random model, loaded the way the stock command line loads them."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("model")
    random_model().save_pretrained(folder)
    texts = list(stdlib_split("validation").values())[:5]
    train_tokenizer(texts, vocab_size=300, max_length=128).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "device": "cpu", "dtype": "float32"},
            tasks=["stdlib_continuation", "stdlib_bits_per_byte"],
            task_manager=TaskManager(include_path=str(BENCHMARKS_FOLDER), include_defaults=False),
            limit=12,
            batch_size=8,
            bootstrap_iters=0,
        )


@pytest.mark.filterwarnings("ignore")
def test_benchmarks_run_under_lm_eval(results: dict[str, Any]) -> None:
    scores = results["results"]
    assert 0 <= scores["stdlib_continuation"]["acc,none"] <= 1
    assert scores["stdlib_bits_per_byte"]["bits_per_byte,none"] > 0
    assert scores["stdlib_bits_per_byte"]["byte_perplexity,none"] == pytest.approx(
        2 ** scores["stdlib_bits_per_byte"]["bits_per_byte,none"]
    )
    assert results["n-samples"]["stdlib_continuation"]["original"] >= 500


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = stdlib_items.continuation()["test"].to_list()
    return made


def test_continuation_items_are_fair_and_repeat(items: list[dict[str, Any]]) -> None:
    assert items == stdlib_items.continuation()["test"].to_list()
    modules = stdlib_split("test")
    assert len(items) >= 500
    for item in items:
        choices, text = item["choices"], modules[item["path"]]
        assert len(set(choices)) == 4
        assert text[: item["offset"]].endswith(item["context"])
        assert text[item["offset"] :].startswith(choices[item["label"]])
        assert max(map(len, choices)) - min(map(len, choices)) <= 4
        others = choices[: item["label"]] + choices[item["label"] + 1 :]
        assert not any(other.strip() in item["context"] for other in others)
    counts = [sum(item["label"] == label for item in items) for label in range(4)]
    assert min(counts) > 0.2 * len(items)


def test_length_alone_does_not_give_the_continuation_away(items: list[dict[str, Any]]) -> None:
    """Choices of one item are about as long as one another."""
    shortest = [min(range(4), key=lambda i: len(item["choices"][i])) for item in items]
    longest = [max(range(4), key=lambda i: len(item["choices"][i])) for item in items]
    for guess in (shortest, longest):
        hits = sum(g == item["label"] for g, item in zip(guess, items, strict=True))
        assert hits / len(items) < 0.35


def test_bits_per_byte_items_are_heads_of_modules_in_whole_lines() -> None:
    items = stdlib_items.bits_per_byte()["test"].to_list()
    modules = stdlib_split("test")
    for item in items:
        assert modules[item["path"]].startswith(item["text"])
        assert item["text"] == modules[item["path"]] or item["text"].endswith("\n")
    assert 100_000 < sum(len(item["text"].encode()) for item in items) < 250_000


def test_bits_of_overlapping_windows_count_every_token_once() -> None:
    """A model that knows nothing needs log2(vocabulary) bits for each token, wherever it stands."""
    model = random_model(context=16)
    torch.nn.init.zeros_(model.lm_head.weight)
    for length in (2, 16, 17, 18, 24, 25, 26, 57):
        bits = model_bits(model, torch.arange(length), context=16)
        assert bits == pytest.approx((length - 1) * math.log2(300))


def test_bits_are_exact_where_one_window_holds_the_text() -> None:
    model = random_model(context=16)
    tokens = torch.randint(0, 300, (17,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logs = model(input_ids=tokens[None, :-1]).logits[0].log_softmax(-1)
    expected = -float(logs.gather(1, tokens[1:, None]).sum()) / math.log(2)
    assert model_bits(model, tokens, context=16) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER).eval()


def test_reference_model_is_what_its_card_says(reference: LlamaForCausalLM) -> None:
    config = reference.config
    assert type(reference) is LlamaForCausalLM
    assert config.num_hidden_layers == 12
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    assert reference.num_parameters() == 3_955_392
    assert reference.dtype == torch.float32
    assert (MODEL_FOLDER / "model.safetensors").stat().st_size <= 16_000_000
    assert (MODEL_FOLDER / "README.md").read_text(encoding="utf-8").startswith("---\n")


def test_reference_tokenizer_gives_back_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    text = "def naïve(x):\n\n\n    return '日本', x  # 🙂\t\r\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    assert len(tokenizer) == 2048


def test_reference_model_reads_python_better_than_xz_would(reference: LlamaForCausalLM) -> None:
    """Held-out text on which `xz -9e`, all of it at once, needs 1.85 bits per byte."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    text = stdlib_split("test")["traceback.py"][:6000]
    tokens = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
    assert model_bits(reference, tokens, 512) / len(text.encode()) < 1.4
