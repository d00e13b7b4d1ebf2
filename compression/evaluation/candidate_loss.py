"""Next-token loss of candidates for a smaller model, without computing their common part again."""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.evaluation.token_losses import plain_head, token_losses
from foldstack.compression.statistics.stream import (
    BlockStream,
    cpu_precision,
    skipping,
    starting_at,
    tensors_of,
)
from foldstack.compression.storage.mapped_memory import release, trim
from foldstack.compression.structure.surgery import BlockByBlock, Cut, plan_of
from foldstack.compression.training.block_training import BatchLoss, next_token_loss

WINDOWS_AT_ONCE = 8
LOGIT_BYTES = 1 << 28
"""Most that the logits of several windows take; with a large vocabulary those of one may be more.
"""


def windows_of(
    calibration: Int[Tensor, "windows tokens"], tokens: int
) -> Int[Tensor, "some tokens"]:
    """The first windows that hold `tokens` tokens together, or all of them."""
    return calibration[: -(-tokens // calibration.shape[1])]


def windows_at_once(model: PreTrainedModel, tokens: int) -> int:
    """How many windows of `tokens` tokens have logits that `LOGIT_BYTES` hold, `WINDOWS_AT_ONCE` at
    most."""
    of_window = 4 * tokens * model.config.get_text_config(decoder=True).vocab_size
    return max(1, min(WINDOWS_AT_ONCE, LOGIT_BYTES // of_window))


def mean_loss(
    loss_of: BatchLoss, model: PreTrainedModel, windows: Int[Tensor, "windows tokens"]
) -> float:
    """Mean over all windows of what `model` or its like computes, in nats per token; infinite for
    a candidate that computes no number.

    A candidate may break the model altogether: it only has to lose the comparison.
    """
    count, at_once = len(windows), windows_at_once(model, windows.shape[1])
    with torch.no_grad():
        batches = torch.split(torch.arange(count), at_once)
        loss = math.fsum(float(loss_of(batch)) * len(batch) for batch in batches) / count
    return loss if math.isfinite(loss) else math.inf


def deletion_losses(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows tokens"],
    candidates: Iterable[int],
    *,
    gone: Iterable[int] = (),
    tell: Callable[[], None] = lambda: None,
) -> dict[int, float]:
    """Loss of `model` without the blocks `gone` and without one of the candidates, for each.

    What enters a candidate is computed once: c candidates among L blocks cost one pass over the
    data and the c passes from behind the candidate to the head, half of c whole passes. Nothing is
    copied and nothing in `model` stays changed. `tell` is called after every candidate.
    """
    losses = {}
    with skipping(model, gone):
        stream = BlockStream(model, windows, batch_size=WINDOWS_AT_ONCE)
        for candidate in sorted(candidates):
            while stream.position < candidate:
                stream.advance()
            entering = torch.cat(stream.hidden)
            with (
                skipping(model, [candidate]),
                next_token_loss(model, candidate, windows, entering) as loss_of,
            ):
                losses[candidate] = mean_loss(loss_of, model, windows)
            tell()
    return losses


def loss_of_cut(
    model: PreTrainedModel, change: Cut, windows: Int[Tensor, "windows tokens"]
) -> float:
    """Next-token loss, in nats per token, of what a cut makes of `model`, of whose blocks each has
    one of its own in their order; infinite where it computes no number.

    One block of it at a time is in memory, and on a CPU half precision computes in float32.
    """
    with skipping(model, range(1, len(plan_of(model).blocks))):  # what it reads does not matter
        head = plain_head(model, windows[0].long())
    made = BlockByBlock(model, change.plan, change.inherits)
    stream = BlockStream(model, windows, batch_size=WINDOWS_AT_ONCE, dtype=cpu_precision(model))
    for position in range(len(stream.blocks)):
        block = made.fill(position, change.tensors)
        stream.advance(block)
        release(tensors_of(block))
        made.empty(position)
        trim()
    leaving, last, rows = stream.states.all, len(stream.blocks) - 1, slice(0)
    losses = []
    with (
        torch.no_grad(),
        skipping(model, [last]),
        starting_at(model, last, lambda: leaving[rows, :-1]),
    ):
        for start in range(0, len(windows), WINDOWS_AT_ONCE):
            rows = slice(start, start + WINDOWS_AT_ONCE)
            losses.append(token_losses(model, windows[rows].long(), head))
    loss = float(torch.cat(losses).mean())
    return loss if math.isfinite(loss) else math.inf
