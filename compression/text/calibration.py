"""Fixed-length token windows, drawn from documents."""

import json
import logging
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foldstack.compression.errors import InputError
from foldstack.compression.text.text_tokens import PIECE, bos_token, token_pieces

logger = logging.getLogger(__name__)

TOKENS_FILE = "windows.safetensors"
RECORD_FILE = "windows.json"
DOCUMENTS_AT_ONCE = 64
FEW_TOKENS = 64
"""Fewer than these and than a tenth of the model's are no vocabulary of its text."""


class WindowSpec(BaseModel):
    """How many windows are drawn from a text, and how they are cut."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_windows: int = Field(default=128, ge=1)
    """Windows to draw."""
    window_tokens: int = Field(default=512, ge=2)
    """Tokens per window, a BOS token included."""
    seed: int = Field(default=0, ge=0)
    """Decides which windows are drawn."""
    bos: Literal["none", "document", "window"] = "document"
    """Where a BOS token stands: nowhere, before each document, or at the start of each window."""

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> "WindowSpec":
        """The same where there is a BOS token, and without one for a tokenizer that has none: it
        was trained on texts that begin without."""
        if self.bos == "none" or tokenizer.bos_token_id is not None:
            return self
        logger.info("this tokenizer has no BOS token: bos is none and not %s", self.bos)
        return self.model_copy(update={"bos": "none"})


@dataclass(frozen=True)
class Windows:
    """Windows of equal length without padding, and what they were cut from."""

    tokens: Int[Tensor, "windows tokens"]
    document_starts: list[list[int]]
    """Per window, the places where a document begins (at its BOS token if there is one)."""
    num_available: int
    """Windows that fit into the text."""
    num_text_tokens: int
    """Tokens of the whole text, with the BOS tokens of its documents."""
    num_documents: int
    """Documents of the whole text."""

    @property
    def facts(self) -> dict[str, int]:
        """Realised counts, for a manifest."""
        num_windows, window_tokens = self.tokens.shape
        return {
            "num_windows": num_windows,
            "window_tokens": window_tokens,
            "num_tokens": num_windows * window_tokens,
            "num_available_windows": self.num_available,
            "num_text_tokens": self.num_text_tokens,
            "num_documents": self.num_documents,
            "num_document_starts": sum(map(len, self.document_starts)),
        }

    def save(self, folder: Path) -> None:
        """Write `windows.safetensors` and `windows.json` into a folder that exists."""
        save_file({"tokens": self.tokens.contiguous()}, folder / TOKENS_FILE)
        record = {**self.facts, "document_starts": self.document_starts}
        (folder / RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Windows":
        """Read what `save` wrote."""
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        return cls(
            tokens=load_file(folder / TOKENS_FILE)["tokens"],
            document_starts=record["document_starts"],
            num_available=record["num_available_windows"],
            num_text_tokens=record["num_text_tokens"],
            num_documents=record["num_documents"],
        )


def token_windows(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], spec: WindowSpec
) -> Windows:
    """Pack the documents into one stream and draw windows that do not overlap, by seed.

    The stream is cut into windows from its start on; what remains at its end is not used. Windows
    are drawn without replacement and kept in the order drawn, so that a smaller `num_windows`
    gives the first of them. There is no BOS token where the tokenizer has none.

    Raises:
        InputError: fewer windows fit into the text than are asked for.
    """
    spec = spec.for_tokenizer(tokenizer)
    stream, starts = _pack(tokenizer, documents, bos=spec.bos == "document")
    width = spec.window_tokens - (spec.bos == "window")
    available = len(stream) // width
    if available < spec.num_windows:
        raise InputError(
            f"the text must hold {spec.num_windows} windows of {spec.window_tokens} tokens, but "
            f"with {len(stream)} tokens only {available} fit: give more text, or lower "
            "num_windows or window_tokens"
        )
    dice = torch.Generator().manual_seed(spec.seed)
    drawn = torch.randperm(available, generator=dice)[: spec.num_windows]
    tokens = stream[: available * width].view(available, width)[drawn]
    shift = 0
    if spec.bos == "window":
        shift = 1
        tokens = torch.nn.functional.pad(tokens, (1, 0), value=bos_token(tokenizer))
    places: dict[int, list[int]] = {}
    for start in starts:
        places.setdefault(start // width, []).append(start % width + shift)
    return Windows(
        tokens=tokens.contiguous(),
        document_starts=[places.get(window, []) for window in drawn.tolist()],
        num_available=available,
        num_text_tokens=len(stream),
        num_documents=len(starts),
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer that is not the model's: it is empty, or its tokens have no embedding.

    Tokens that were added to it (`<image_soft_token>`, `[PAD]`) may lie behind the model's rows: no
    text holds them, and where one does, `check_tokens` finds it.

    Raises:
        InputError: it is.
    """
    vocabulary = tokenizer.get_vocab()
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    ordinary = [number for number in vocabulary.values() if number not in added]
    largest = max(ordinary, default=-1)
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer must belong to the model, but its token ids go up to {largest} and "
            f"the model's vocabulary ends at {vocab_size - 1}: give the folder with both"
        )
    if len(ordinary) < min(FEW_TOKENS, vocab_size // 10):
        raise InputError(
            f"the tokenizer must belong to the model, but it knows {len(ordinary)} tokens beside "
            f"its special ones, and the model has {vocab_size}: a file of its vocabulary is "
            "missing (tokenizer.json, vocab.json, vocab.txt, tokenizer.model), or "
            "tokenizer_config.json names another tokenizer_class"
        )


def check_tokens(tokens: Int[Tensor, "..."], vocab_size: int) -> None:
    """Refuse tokens of a text that the model has no embedding for.

    Raises:
        InputError: it has none for one of them.
    """
    largest = int(tokens.max()) if tokens.numel() else 0
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer does not match the model: it gives token {largest}, "
            f"the model's vocabulary has {vocab_size} entries"
        )


def _pack(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], *, bos: bool
) -> tuple[Int[Tensor, " stream"], list[int]]:
    lead = [bos_token(tokenizer)] if bos else []
    stream = array("i")
    starts: list[int] = []
    for ids in _encoded(tokenizer, documents):
        if ids:
            starts.append(len(stream))
            stream.extend(lead)
            stream.extend(ids)
    return torch.tensor(memoryview(stream), dtype=torch.int32), starts


def _encoded(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Iterator[Sequence[int]]:
    """The tokens of each document: of some at a time, and of a long one part after part, since
    Python's integers take nine times what the stream does, and a tokenizer far more.
    """
    for first in range(0, len(documents), DOCUMENTS_AT_ONCE):
        some = documents[first : first + DOCUMENTS_AT_ONCE]
        short = [text for text in some if len(text) <= PIECE]
        encoded = iter(
            tokenizer(short, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            if short
            else []
        )
        for text in some:
            if len(text) <= PIECE:
                yield next(encoded)
            else:
                yield array("i", chain.from_iterable(p for p, _ in token_pieces(tokenizer, text)))
