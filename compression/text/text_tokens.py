"""Documents as one stream of tokens that knows how many bytes of text each token stands for."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, Int64
from numpy import ndarray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foldstack.compression.errors import InputError

Bos = Literal["none", "stream", "document", "window"]

PREFIX = "▁"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class TokenStream:
    """Tokens of a text in order. A BOS token stands for no text."""

    tokens: Int64[Tensor, " tokens"]
    num_bytes: Int64[Tensor, " tokens"] | None
    """UTF-8 bytes of the text that each token stands for; None if the tokenizer cannot tell."""

    def __len__(self) -> int:
        return len(self.tokens)


def encode_stream(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    joiner: str = "",
    bos: Bos = "none",
    max_tokens: int = 0,
) -> TokenStream:
    """The documents as one stream: joined to one text, or encoded one by one if `joiner` is empty.

    Args:
        tokenizer: a fast tokenizer counts bytes exactly; a slow one not at all.
        documents: texts.
        joiner: what stands between two documents.
        bos: "stream" begins with a BOS token, "document" puts one before each document; "none"
            and "window" (which is the caller's to add) put none.
        max_tokens: the stream is cut after so many tokens; 0 = never.

    Raises:
        InputError: a BOS token is asked of a tokenizer that has none.
    """
    start = [bos_token(tokenizer)] if bos in ("stream", "document") else []
    per_document = start if bos == "document" else []
    tokens, num_bytes = list(start) if bos == "stream" else [], [0] * (bos == "stream")
    for text in [joiner.join(documents)] if joiner else documents:
        ids, sizes = _encode(tokenizer, text)
        if not ids:
            continue
        tokens += per_document + ids
        num_bytes += [0] * len(per_document) + sizes
        if 0 < max_tokens <= len(tokens):
            break
    stop = max_tokens or len(tokens)
    return TokenStream(
        torch.tensor(tokens[:stop], dtype=torch.int64),
        torch.tensor(num_bytes[:stop], dtype=torch.int64) if tokenizer.is_fast else None,
    )


def bos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that begins a text.

    Raises:
        InputError: the tokenizer has none.
    """
    if tokenizer.bos_token_id is None:
        raise InputError("this tokenizer has no BOS token: set bos to none")
    return int(tokenizer.bos_token_id)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,  # a text longer than the context is what windows are for
    )
    ids: list[int] = encoded["input_ids"]
    if not ids or not tokenizer.is_fast:
        return ids, [0] * len(ids)
    names = tokenizer.convert_ids_to_tokens(ids)
    return ids, bytes_per_token(text, encoded["offset_mapping"], names).tolist()


def bytes_per_token(
    text: str, offsets: Sequence[tuple[int, int]], names: Sequence[str]
) -> Int[ndarray, " tokens"]:
    """UTF-8 bytes of `text` that each token stands for; they add up to all of the text.

    A token stands for the characters up to its end that no token before it stood for, so that
    characters which the tokenizer drops count with the next token. Tokens that share a character
    (pieces of its bytes) share its bytes: one each for byte tokens such as <0xE2>, and one per
    letter for byte-level BPE, whose alphabet writes each byte as one letter.

    Args:
        text: what was encoded.
        offsets: first and last-plus-one character of each token.
        names: each token as the vocabulary writes it.
    """
    bytes_before = _bytes_before(text)
    if len(offsets) > 1 and names[0] == PREFIX and offsets[1][0] == 0:
        offsets = [(0, 0), *offsets[1:]]  # sentencepiece puts it before a text; it is not in it
    ends = np.maximum.accumulate([end for _, end in offsets])
    ends[-1] = len(text)
    counts = np.diff(bytes_before[ends], prepend=0)
    for group in _sharing_a_character(offsets, ends):
        own = [1 if BYTE_TOKEN.fullmatch(name) else len(name) for name in names[group]]
        if sum(own) == counts[group].sum():
            counts[group] = own
    return counts


def _bytes_before(text: str) -> Int[ndarray, " boundaries"]:
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])


def _sharing_a_character(
    offsets: Sequence[tuple[int, int]], ends: Int[ndarray, " tokens"]
) -> Iterator[slice]:
    """Runs of tokens each of which begins before the token before it ends."""
    starts = np.array([start for start, _ in offsets])
    joins_previous = np.concatenate([[False], starts[1:] < ends[:-1], [False]])
    first = None
    for position, joins in enumerate(joins_previous):
        if joins and first is None:
            first = position - 1
        if not joins and first is not None:
            yield slice(first, position)
            first = None
