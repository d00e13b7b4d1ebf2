"""Documents as one stream of tokens that knows how many bytes of text each token stands for."""

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Int64
from numpy import ndarray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foldstack.compression.errors import InputError
from foldstack.compression.text.bos import Bos

PREFIX = "▁"
PIECE, OVERLAP = 1 << 17, 1 << 13
"""Characters that are encoded at once of a long text, and more that the next ones are too."""
AGREEING = 16
"""Tokens on both sides of a seam that are the same."""
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
    tokens, num_bytes = array("q", start if bos == "stream" else []), array("q")
    num_bytes.extend([0] * len(tokens))
    for text in [joiner.join(documents)] if joiner else documents:
        lead = per_document
        for ids, sizes in token_pieces(tokenizer, text):
            tokens.extend(lead + ids)
            num_bytes.extend([0] * len(lead) + sizes)
            lead = []
            if 0 < max_tokens <= len(tokens):
                break
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


def token_pieces(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens of a text and the bytes that each stands for, part after part, none of them empty.

    They are those of the whole text: a part is encoded with what follows it, and ends where that
    and the next part, which begins before, agree on the tokens around. A tokenizer takes hundreds
    of bytes of memory for every byte that it encodes at once.
    """
    size = PIECE if tokenizer.is_fast else len(text)
    first, begun = 0, 0  # characters: where the piece in hand begins, and what it is to give first
    piece = _Piece.of(tokenizer, text, first, first + size + OVERLAP)
    while True:
        seam, following = len(text), None
        if piece.stop < len(text):
            following = _Piece.of(tokenizer, text, piece.stop - OVERLAP, piece.stop + size)
            found = _seam(piece, following)
            if found is None:  # one long thing without an inside: with more of it there may be one
                size *= 2
                piece = _Piece.of(tokenizer, text, piece.first, piece.stop + size)
                continue
            seam = found
        if part := piece.between(begun, seam):
            yield part
        if following is None:
            return
        piece, begun, size = following, seam, PIECE


@dataclass(frozen=True)
class _Piece:
    """A part of a text, encoded by itself; places are characters of the whole text."""

    text: str
    first: int
    stop: int
    tokens: list[int]
    names: list[str]
    starts: Int[ndarray, " tokens"]
    ends: Int[ndarray, " tokens"]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str, first: int, stop: int) -> "_Piece":
        stop = min(stop, len(text))
        encoded = tokenizer(
            text[first:stop],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,  # a text longer than the context is what windows are for
        )
        tokens: list[int] = encoded["input_ids"]
        if not tokenizer.is_fast:
            return cls(text, first, stop, tokens, [], np.empty(0, int), np.empty(0, int))
        places = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2) + first
        names = list(tokenizer.convert_ids_to_tokens(tokens))
        ends = np.maximum.accumulate(places[:, 1])
        return cls(text, first, stop, tokens, names, places[:, 0], ends)

    def between(self, begun: int, seam: int) -> tuple[list[int], list[int]] | None:
        """The tokens between two places, and their bytes; None where there is none."""
        if not self.names:
            return (self.tokens, [0] * len(self.tokens)) if self.tokens else None
        inside = slice(
            0 if begun == 0 else int(np.searchsorted(self.ends, begun, side="right")),
            len(self.ends) if seam == len(self.text)
            else int(np.searchsorted(self.ends, seam, side="right")),
        )  # fmt: skip
        tokens = self.tokens[inside]
        if not tokens:
            return None
        starts, ends = self.starts[inside] - begun, self.ends[inside] - begun
        places = list(zip(starts.tolist(), ends.tolist(), strict=True))
        sizes = bytes_per_token(self.text[begun:seam], places, self.names[inside])
        return tokens, sizes.tolist()

    def boundaries(self, after: int, before: int) -> dict[int, int]:
        """Places where a token ends and none goes on, with that token's number."""
        whole = np.flatnonzero((self.starts[1:] >= self.ends[:-1]) & (np.diff(self.ends) > 0))
        ends = self.ends[whole]
        chosen = (ends > after) & (ends < before)
        return dict(zip(ends[chosen].tolist(), whole[chosen].tolist(), strict=True))

    def around(self, token: int) -> tuple[list[int], list[int]] | None:
        """The tokens on both sides of one's end, and where they end; None near the piece's own."""
        if token + 1 < AGREEING or token + 1 + AGREEING > len(self.tokens):
            return None
        near = slice(token + 1 - AGREEING, token + 1 + AGREEING)
        return self.tokens[near], self.ends[near].tolist()


def _seam(piece: _Piece, following: _Piece) -> int | None:
    """A place in what both encoded at which they agree, as near to its middle as there is one."""
    mine = piece.boundaries(following.first, piece.stop)
    theirs = following.boundaries(following.first, piece.stop)
    middle = (following.first + piece.stop) / 2
    for place in sorted(mine.keys() & theirs.keys(), key=lambda place: abs(place - middle)):
        around = piece.around(mine[place])
        if around is not None and around == following.around(theirs[place]):
            return int(place)
    return None


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
