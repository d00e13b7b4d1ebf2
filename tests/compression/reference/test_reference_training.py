"""The script that trained the reference model, on a few lines of text."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from foldstack.compression.reference import train as script
from foldstack.compression.reference import training_text
from foldstack.compression.reference.stdlib_corpus import stdlib_split
from foldstack.compression.reference.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = list(stdlib_split("validation").values())[:4]
    return train_tokenizer(texts, vocab_size=320, max_length=512)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., argparse.Namespace]:
    """Train a model of one narrow block on four modules."""
    texts = dict(list(stdlib_split("validation").items())[:4])
    make_config = script.reference_config

    def narrow(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
        config = make_config(tokenizer)
        config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 16, 24
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 8
        return config

    for module in (script, training_text):
        monkeypatch.setattr(module, "stdlib_split", lambda split: texts)
    monkeypatch.setattr(script, "reference_config", narrow)

    def arguments(out: Path, minutes: float) -> argparse.Namespace:
        rates = {"matrix_lr": 1e-2, "other_lr": 1e-2, "look_seconds": 1e9, "save_seconds": 0.0}
        return argparse.Namespace(
            out=out, minutes=minutes, batch_size=4, workers=2, seed=0, **rates
        )

    return arguments


def test_stopped_run_goes_on_from_its_checkpoint(
    small: Callable[..., argparse.Namespace], tmp_path: Path
) -> None:
    def steps() -> int:
        with safe_open(tmp_path / script.CHECKPOINT, framework="pt") as file:
            return int(training_text.Progress.from_json(file.metadata()["progress"]).step)

    script.train(small(tmp_path, minutes=0.01))
    first = steps()
    assert first >= 1
    script.train(small(tmp_path, minutes=0.01))
    assert steps() == first  # the budget is of all runs together
    script.train(small(tmp_path, minutes=0.03))
    assert steps() > first
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("import os", return_tensors="pt").input_ids
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_checkpoint_brings_back_weights_and_optimizer_state(
    small: Callable[..., argparse.Namespace], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    cpu = torch.device("cpu")
    text = training_text.TrainingText(tokenizer, batch_size=2, seed=0)
    rows = text.one_pass(0)
    models, losses = [script.new_model(tokenizer, cpu) for _ in range(2)], []
    optimizers = [script.make_optimizers(model, 1e-2, 1e-2) for model in models]
    script.step(models[0], models[0], rows[0], optimizers[0], 1)
    progress = training_text.Progress(step=1, tokens=rows[0].numel())
    script.save_checkpoint(tmp_path, models[0], optimizers[0], progress)
    assert script.load_checkpoint(tmp_path, models[1], optimizers[1]) == progress
    for model, optimizer in zip(models, optimizers, strict=True):
        losses.append([script.step(model, model, batch, optimizer, 1) for batch in rows[1:4]])
    assert losses[0] == losses[1]


def test_workers_share_a_batch_without_changing_its_gradient(
    small: Callable[..., argparse.Namespace], tokenizer: PreTrainedTokenizerFast
) -> None:
    cpu = torch.device("cpu")
    model = script.new_model(tokenizer, cpu)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rows = training_text.TrainingText(tokenizer, batch_size=4, seed=0).one_pass(0)[0]
    gradients = []
    for workers in (1, 2):
        keep: list[torch.optim.Optimizer] = [torch.optim.SGD(model.parameters(), lr=0.0)]
        keep[0].zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
        script.step(model, model, rows, keep, workers)
        gradients.append(model.lm_head.weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.02, atol=2e-4)


def test_chunked_attention_is_causal_attention() -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 300, 8)
    key, value = (torch.randn(2, 2, 300, 8) for _ in range(2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    mixed, _ = script.causal_attention(torch.nn.Identity(), query, key, value)
    torch.testing.assert_close(mixed, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_every_pass_shows_the_same_text_in_another_order(
    small: Callable[..., argparse.Namespace], tokenizer: PreTrainedTokenizerFast
) -> None:
    text = training_text.TrainingText(tokenizer, batch_size=2, seed=0)
    first, again, second = text.one_pass(0), text.one_pass(0), text.one_pass(1)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], second[0])
    total = sum(map(len, text.modules))
    assert total - 4 * training_text.CONTEXT < first.numel() <= total
