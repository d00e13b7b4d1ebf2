"""Continuations of prompts: greedy, of the text's own beginnings, and within the context."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.samples import SampleSpec, beginnings, write_samples


def test_continuations_are_the_greedy_ones(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Breaks when a prompt comes back with its answer, or an answer is drawn."""
    model = tiny_model("llama", vocab_size=len(tokenizer)).eval()
    (sample,) = write_samples(model, tokenizer, ["def item("], 4)
    ids = tokenizer("def item(")["input_ids"]
    for _ in range(4):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    start = len(tokenizer("def item(")["input_ids"])
    assert sample.continuation == tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert write_samples(model, tokenizer, ["def item("], 4) == [sample]
    with pytest.raises(InputError, match="exceed the model's context of 128"):
        write_samples(model, tokenizer, ["def item("], 127)


def test_prompts_are_beginnings_of_documents_all_over_the_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Breaks when five prompts are of one document, or a prompt is a whole one."""
    texts = [f"{number:02d} is one of many lines of many words" for number in range(100)]
    texts[::3] = ["short"] * len(texts[::3])
    spec = SampleSpec(count=5, prompt_tokens=6)
    found = beginnings(texts, tokenizer, spec)
    assert len(set(found)) == 5
    for prompt in found:
        assert any(text.startswith(prompt) and text != prompt for text in texts)
    with pytest.raises(InputError, match="prompt_tokens may be at most"):
        beginnings(["short"], tokenizer, spec)
