"""Perplexity and bits per byte of a causal model on a text, in a protocol that is stated.

Perplexities compare only under one protocol: window length, BOS tokens, how documents are joined,
which positions count. So the protocol is data and travels with the result.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.records import PerplexityProtocol, PerplexityResult
from foldstack.compression.evaluation.token_losses import plain_head, token_losses
from foldstack.compression.out_of_memory import with_smaller_batches
from foldstack.compression.text.calibration import check_tokens
from foldstack.compression.text.text_tokens import TokenStream, bos_token, encode_stream

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

PROBED_TOKENS = 4
LARGEST_EXPONENT = 709.0  # of a float64


def measure_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    protocol: PerplexityProtocol,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of `model` on `documents`, weighted by token.

    Raises:
        InputError: the text is too short for one window, the tokenizer does not fit the model, a
            window is longer than the model's context or memory allows, or a loss is not finite.
    """
    _check_context(model, protocol)
    stream = _stream(tokenizer, documents, protocol)
    check_tokens(stream.tokens, _rows_of(model))
    windows = _windows(stream, tokenizer, protocol)
    sums: list[float] = []
    with _evaluating(model), torch.inference_mode():
        for losses in _batch_losses(model, windows, protocol.batch_size):
            for window in losses:
                if not window.isfinite().all():
                    raise InputError(_not_finite(model, len(sums), len(windows)))
                sums.append(window.sum().item())
            if progress is not None:
                progress("perplexity", len(sums), len(windows))
    return _summarize(model, tokenizer, stream, windows, sums, protocol)


def _stream(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], protocol: PerplexityProtocol
) -> TokenStream:
    follows_last = protocol.score_last and protocol.bos != "window"
    return encode_stream(
        tokenizer,
        documents,
        joiner=protocol.joiner,
        bos=protocol.bos,
        max_tokens=protocol.max_tokens + follows_last if protocol.max_tokens else 0,
    )


@dataclass(frozen=True)
class _Window:
    """One window's tokens, and which part of the stream its targets are."""

    tokens: Int64[Tensor, " span"]
    targets: slice

    @property
    def num_targets(self) -> int:
        return self.targets.stop - self.targets.start


def _windows(
    stream: TokenStream, tokenizer: PreTrainedTokenizerBase, protocol: PerplexityProtocol
) -> list[_Window]:
    prefix = [bos_token(tokenizer)] if protocol.bos == "window" else []
    # Without a BOS of its own, a window's first token is predicted by the window before.
    shared = 1 if protocol.score_last and not prefix else 0
    full = protocol.span - len(prefix)
    windows = []
    for start in range(0, len(stream) - shared, full - shared):
        stop = min(start + full, len(stream))
        first_target = start if prefix else start + 1
        if stop == first_target or (stop - start < full and protocol.remainder == "drop"):
            continue
        tokens = torch.cat([torch.tensor(prefix, dtype=torch.int64), stream.tokens[start:stop]])
        windows.append(_Window(tokens, slice(first_target, stop)))
    if not windows:
        raise InputError(
            f"the text is too short for windows of {protocol.window_tokens} tokens, it has "
            f"{len(stream)}: give more text or set remainder to 'score'"
        )
    return windows


def _batch_losses(
    model: nn.Module, windows: Sequence[_Window], batch_size: int
) -> Iterator[Float64[Tensor, "batch targets"]]:
    """Losses of the windows in order, in batches without padding that shrink if memory is short."""
    head = plain_head(model, windows[0].tokens[:PROBED_TOKENS])
    done = 0
    while done < len(windows):
        first = windows[done].tokens

        def losses_of(at_once: int, done: int = done, length: int = len(first)) -> Tensor:
            batch = [window.tokens for window in windows[done : done + at_once]]
            alike = [tokens for tokens in batch if len(tokens) == length]
            return token_losses(model, torch.stack(alike), head)

        losses = with_smaller_batches(losses_of, batch_size, len(first))
        yield losses
        done += len(losses)
        batch_size = len(losses)


def _summarize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stream: TokenStream,
    windows: Sequence[_Window],
    sums: Sequence[float],
    protocol: PerplexityProtocol,
) -> PerplexityResult:
    total, num_tokens = math.fsum(sums), sum(window.num_targets for window in windows)
    predicted = torch.cat([stream.tokens[window.targets] for window in windows])
    unknown = tokenizer.unk_token_id
    num_bytes = bits_per_byte = None
    if stream.num_bytes is not None:
        num_bytes = int(sum(stream.num_bytes[window.targets].sum() for window in windows))
        bits_per_byte = total / math.log(2) / num_bytes if num_bytes else None
    nll = total / num_tokens
    return PerplexityResult(
        perplexity=math.exp(nll) if nll < LARGEST_EXPONENT else math.inf,
        nll=nll,
        bits_per_byte=bits_per_byte,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_unknown=0 if unknown is None else int((predicted == unknown).sum()),
        num_windows=len(windows),
        window_nll=tuple(sums),
        window_tokens=tuple(window.num_targets for window in windows),
        dtype=str(model.dtype).removeprefix("torch."),
        protocol=protocol,
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_context(model: PreTrainedModel, protocol: PerplexityProtocol) -> None:
    config: Any = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and protocol.window_tokens > context:
        raise InputError(
            f"window_tokens may be at most the model's context of {context} tokens, "
            f"got {protocol.window_tokens}"
        )


def _rows_of(model: PreTrainedModel) -> int:
    """Tokens that the model has an embedding for."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _not_finite(model: PreTrainedModel, window: int, num_windows: int) -> str:
    return (
        f"the model's loss is not finite in window {window} of {num_windows} (counted from 0): its "
        f"weights are damaged, or {str(model.dtype).removeprefix('torch.')} is too narrow for it"
    )
