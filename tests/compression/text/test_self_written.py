"""Windows that a model writes: against sampling without a cache, and the rules of documents."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from foldstack.compression.errors import InputError
from foldstack.compression.text.calibration import Windows, WindowSpec
from foldstack.compression.text.corpus import SELF, TextSource, documents
from foldstack.compression.text.self_written import (
    chances_of,
    draw_tokens,
    write_windows,
    written_texts,
)

VOCABULARY = 97
BOS, EOS = 0, 5

Make = Callable[..., PreTrainedModel]


def word_tokenizer(size: int = VOCABULARY, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """Tokens w0, w1, ...; w0 begins a document and w5 ends it."""
    vocabulary = {f"w{index}": index for index in range(size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w1")),
        bos_token=f"w{BOS}" if bos else None,
        eos_token=f"w{EOS}",
    )


def write(model: PreTrainedModel, tokenizer: Any = None, **settings: Any) -> Windows:
    spec = {name: settings.pop(name) for name in WindowSpec.model_fields if name in settings}
    return write_windows(
        model, tokenizer or word_tokenizer(), WindowSpec.model_validate(spec), **settings
    )


def test_a_token_is_drawn_where_its_part_of_the_chances_lies() -> None:
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3]).log()
    chances = torch.tensor([0.0, 0.0999, 0.1001, 0.6999, 0.7001, 1 - 1e-12], dtype=torch.float64)
    drawn = draw_tokens(logits.expand(6, 4), chances, temperature=1.0)
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3]
    # At temperature 1/2 the odds are squared: 1 : 36 : 9 of 46.
    edges = torch.tensor([0.99, 1.01, 36.99, 37.01], dtype=torch.float64) / 46
    assert draw_tokens(logits.expand(4, 4), edges, temperature=0.5).tolist() == [0, 2, 2, 3]


def test_windows_are_those_of_sampling_without_a_cache(family: str, tiny_model: Make) -> None:
    """Sliding windows are shorter than what is written, so that their caches are full."""
    model = tiny_model(family)
    spec = WindowSpec(num_windows=3, window_tokens=24, bos="window")
    written = write_windows(model, word_tokenizer(), spec, temperature=0.7)
    chances = chances_of(spec, "train")
    tokens = torch.full((3, 1), BOS)
    for place in range(1, 24):
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[:, -1]
        drawn = draw_tokens(logits, chances[:, place], temperature=0.7)
        tokens = torch.cat([tokens, drawn[:, None]], dim=1)
    assert torch.equal(written.tokens, tokens.int())
    assert len(set(tokens.flatten().tolist())) > 20  # a model that writes is not stuck


def test_batches_change_nothing_and_fewer_windows_are_the_first(tiny_model: Make) -> None:
    model, spec = tiny_model("llama"), {"num_windows": 5, "window_tokens": 9}
    told: list[tuple[int, int]] = []
    whole = write(model, **spec, progress=lambda _, done, total: told.append((done, total)))
    assert torch.equal(write(model, **spec, batch_size=2).tokens, whole.tokens)
    fewer = write(model, num_windows=3, window_tokens=9)
    assert torch.equal(fewer.tokens, whole.tokens[:3])
    assert told[-1] == (45, 45)
    for other in ({"split": "test"}, {"seed": 1}, {"temperature": 0.2}):
        assert not torch.equal(write(model, **spec, **other).tokens, whole.tokens)


def ending_model(make: Make) -> PreTrainedModel:
    """After any token, it writes the end of a document one time in three or so."""
    model = make("llama")
    logits = model.lm_head.forward

    def favoured(hidden: torch.Tensor) -> torch.Tensor:
        raised = logits(hidden).clone()
        raised[..., EOS] = raised.logsumexp(-1) - 0.7
        return raised

    model.lm_head.forward = favoured  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("bos", ["document", "window", "none"])
def test_documents_end_and_begin_as_the_windows_want_it(tiny_model: Make, bos: str) -> None:
    windows = write(ending_model(tiny_model), num_windows=8, window_tokens=30, bos=bos)
    assert (windows.tokens == EOS).sum() > 20
    for row, starts in zip(windows.tokens.tolist(), windows.document_starts, strict=True):
        after = [row[place + 1] for place, token in enumerate(row[:-1]) if token == EOS]
        if bos == "document":
            assert set(after) <= {BOS}
            assert starts == [place for place, token in enumerate(row) if token == BOS]
        else:
            assert set(after) != {BOS}
        assert (row[0] == BOS) is (bos != "none")
    assert windows.num_documents == sum(map(len, windows.document_starts))


def test_without_bos_windows_begin_with_plain_tokens_and_stay_in_the_vocabulary(
    tiny_model: Make,
) -> None:
    tokenizer = word_tokenizer(60, bos=False)  # the embedding has 97 rows
    windows = write(tiny_model("gpt2"), tokenizer, num_windows=40, window_tokens=12, bos="none")
    first = windows.tokens[:, 0].tolist()
    assert len(set(first)) > 15
    assert EOS not in first
    assert int(windows.tokens.max()) < 60
    same = write(tiny_model("gpt2"), tokenizer, num_windows=40, window_tokens=12, bos="document")
    assert torch.equal(same.tokens, windows.tokens)


def test_written_windows_become_texts_document_by_document() -> None:
    tokens = torch.tensor([[0, 7, 8, 5, 0, 9], [9, 9, 0, 5, 0, 5]], dtype=torch.int32)
    windows = Windows(tokens, [[0, 4], [2, 4]], 2, 12, 4)
    assert written_texts(windows, word_tokenizer()) == ["w7 w8", "w9", "w9 w9"]


def test_self_is_no_text_where_no_model_is() -> None:
    with pytest.raises(InputError, match="'self' is what the dense model of a run writes"):
        documents(TextSource(corpus=SELF))
