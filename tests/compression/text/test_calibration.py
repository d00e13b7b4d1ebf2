"""Windows of tokens: packing, drawing, saving."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foldstack.compression.errors import InputError
from foldstack.compression.text import calibration, text_tokens
from foldstack.compression.text.calibration import (
    Windows,
    WindowSpec,
    check_tokenizer,
    check_tokens,
    token_windows,
)

BOS = 0


def digit_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Digits are tokens 1 to 10; token 0 begins a text."""
    vocab = {"<s>": BOS, **{str(digit): digit + 1 for digit in range(10)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>" if bos else None)


def cut(texts: Sequence[str], **spec: object) -> Windows:
    return token_windows(digit_tokenizer(), list(texts), WindowSpec.model_validate(spec))


def rows(windows: Windows) -> set[tuple[int, ...]]:
    return {tuple(row) for row in windows.tokens.tolist()}


def test_each_document_begins_with_bos() -> None:
    windows = cut(["123", "45", "6"], num_windows=3, window_tokens=3, bos="document")
    assert rows(windows) == {(0, 2, 3), (4, 0, 5), (6, 0, 7)}
    starts = dict(zip(map(tuple, windows.tokens.tolist()), windows.document_starts, strict=True))
    assert starts == {(0, 2, 3): [0], (4, 0, 5): [1], (6, 0, 7): [1]}
    assert windows.tokens.dtype == torch.int32


def test_each_window_begins_with_bos() -> None:
    windows = cut(["1234", "56"], num_windows=3, window_tokens=3, bos="window")
    assert rows(windows) == {(0, 2, 3), (0, 4, 5), (0, 6, 7)}
    starts = dict(zip(map(tuple, windows.tokens.tolist()), windows.document_starts, strict=True))
    assert starts == {(0, 2, 3): [1], (0, 4, 5): [], (0, 6, 7): [1]}


def test_without_bos_the_windows_are_the_text() -> None:
    windows = cut(["123", "", "4567"], num_windows=2, window_tokens=3, bos="none")
    assert rows(windows) == {(2, 3, 4), (5, 6, 7)}
    assert windows.facts == {
        "num_windows": 2,
        "window_tokens": 3,
        "num_tokens": 6,
        "num_available_windows": 2,
        "num_text_tokens": 7,
        "num_documents": 2,
        "num_document_starts": 2,
    }


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text("0123456789", max_size=12), min_size=1, max_size=6),
    width=st.integers(2, 5),
    seed=st.integers(0, 5),
)
def test_windows_do_not_overlap_and_seed_decides_which(
    texts: list[str], width: int, seed: int
) -> None:
    stream = [token for text in texts if text for token in [BOS, *(int(c) + 1 for c in text)]]
    available = len(stream) // width
    assume(available)
    all_rows = [stream[i * width : (i + 1) * width] for i in range(available)]
    everything = cut(texts, num_windows=available, window_tokens=width, seed=seed)
    assert sorted(everything.tokens.tolist()) == sorted(all_rows)
    fewer = cut(texts, num_windows=max(1, available - 1), window_tokens=width, seed=seed)
    assert fewer.tokens.tolist() == everything.tokens.tolist()[: max(1, available - 1)]


def test_other_seed_draws_other_windows_and_the_same_seed_the_same() -> None:
    texts = [str(number) for number in range(300)]
    draws = [cut(texts, num_windows=20, window_tokens=4, seed=seed).tokens for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_too_short_a_text_says_how_many_windows_fit() -> None:
    with pytest.raises(InputError, match=r"3 windows of 4 tokens.* with 8 tokens only 2 fit"):
        cut(["1234567"], num_windows=3, window_tokens=4)


def test_a_tokenizer_without_bos_is_none_of_the_users_faults() -> None:
    for bos in ("document", "window"):
        spec = WindowSpec(num_windows=2, window_tokens=2, bos=bos)
        windows = token_windows(digit_tokenizer(bos=False), ["1234"], spec)
        assert rows(windows) == {(2, 3), (4, 5)}


def test_a_document_longer_than_what_is_encoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["0123456789" * 9, "42", "9876543210" * 20, "7"]
    whole = cut(texts, num_windows=20, window_tokens=4)
    for module in (calibration, text_tokens):
        monkeypatch.setattr(module, "PIECE", 40)
    monkeypatch.setattr(text_tokens, "OVERLAP", 40)
    assert torch.equal(cut(texts, num_windows=20, window_tokens=4).tokens, whole.tokens)


def test_windows_survive_saving(tmp_path: Path) -> None:
    windows = cut(["123", "45", "6"], num_windows=3, window_tokens=3)
    windows.save(tmp_path)
    again = Windows.load(tmp_path)
    assert torch.equal(again.tokens, windows.tokens)
    assert again.tokens.dtype == torch.int32
    assert again.document_starts == windows.document_starts
    assert again.facts == windows.facts


def test_tokenizer_must_fit_the_vocabulary() -> None:
    check_tokenizer(digit_tokenizer(), vocab_size=11)
    with pytest.raises(InputError, match="ids go up to 10 and the model's vocabulary ends at 9"):
        check_tokenizer(digit_tokenizer(), vocab_size=10)


def test_text_is_never_cut_to_the_tokenizer_s_own_limit() -> None:
    tokenizer = digit_tokenizer()
    tokenizer.model_max_length = 4
    spec = WindowSpec(num_windows=2, window_tokens=8, bos="none")
    assert token_windows(tokenizer, ["1" * 16], spec).num_text_tokens == 16


def test_a_special_token_behind_the_models_rows_is_no_fault() -> None:
    tokenizer = digit_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_tokenizer(tokenizer, vocab_size=11)
    check_tokens(torch.arange(11), vocab_size=11)
    with pytest.raises(InputError, match=r"gives token 11, .* has 11 entries"):
        check_tokens(torch.tensor(tokenizer("1<image>2")["input_ids"]), vocab_size=11)


def test_a_tokenizer_without_a_vocabulary_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    empty = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    with pytest.raises(InputError, match="knows 0 tokens beside its special ones"):
        check_tokenizer(empty, vocab_size=320)
