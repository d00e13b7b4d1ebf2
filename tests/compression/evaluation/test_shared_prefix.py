"""A context computed once for all its endings gives the scores that lm-eval's own model gives."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.evaluation.shared_prefix import Request, share_prefixes

CONTEXT_LENGTHS = (40, 12, 12, 12, 1, 7)  # longer than a sliding window of 16, alike, and shortest
ENDINGS = (4, 2, 3, 2, 4, 1)


def _requests(seed: int = 0) -> list[Request]:
    """Items of several endings, of one token and of more; some alone; one that does not fit."""
    draw = random.Random(seed)
    numbers = itertools.count()
    requests: list[Request] = []
    for length, endings in zip(CONTEXT_LENGTHS, ENDINGS, strict=True):
        context = [draw.randrange(1, 90) for _ in range(length)]
        for ending in range(endings):
            tokens = [draw.randrange(1, 90) for _ in range(1 + 2 * ending)]
            requests.append((("", str(next(numbers))), context, tokens))
    requests.append((("", "too long"), list(range(1, 50)), [3, 4]))
    draw.shuffle(requests)
    return requests


def _agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    settings: dict[str, Any] = {
        "pretrained": model, "tokenizer": tokenizer, "batch_size": 8, "max_length": 48,
    }  # fmt: skip
    requests = _requests()
    stock = HFLM(**settings)._loglikelihood_tokens(requests, disable_tqdm=True)
    lm = HFLM(**settings)
    share_prefixes(lm)
    ours = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [score for score, _ in ours] == pytest.approx([s for s, _ in stock], abs=2e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in stock]


def test_scores_are_those_of_lm_eval_in_every_family(
    architecture: str, tiny_model: Callable[..., Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Breaks when a family's cache, window or logits do not survive a context that is shared."""
    _agree(tiny_model(architecture).eval(), tokenizer)


def test_scores_are_those_of_lm_eval_in_every_structure(
    structure: str, structured: Callable[..., Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Breaks when a structure's cache cannot be handed to the endings of its context."""
    _agree(structured(structure, "llama").eval(), tokenizer)


def test_what_a_context_costs_is_paid_once(
    tiny_model: Callable[..., Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Breaks when contexts are computed per ending, or logits where nothing is scored."""
    model = tiny_model("llama").eval()
    read, scored = [0], [0]
    model.get_input_embeddings().register_forward_hook(
        lambda _module, arguments, _out: read.__setitem__(0, read[0] + arguments[0].numel())
    )
    model.get_output_embeddings().register_forward_hook(
        lambda _module, arguments, _out: scored.__setitem__(0, scored[0] + arguments[0].shape[1])
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    share_prefixes(lm)
    requests: list[Request] = [(None, list(range(1, 31)), [n, n + 1, n + 2]) for n in range(4)]
    lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert read[0] == 30 + 4 * 2
    assert scored[0] == 1 + 4 * 2
