"""Per-token losses of a causal model, in float64, without the logits of a whole batch."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

LOGITS_AT_ONCE = 2**23  # in float64: 64 MB


def token_losses(
    model: nn.Module, tokens: Int[Tensor, "batch span"], head: nn.Module | None = None
) -> Float64[Tensor, "batch targets"]:
    """Negative log likelihood, in nats, of each token but a row's first, given those before.

    Args:
        model: in eval mode.
        tokens: rows of one length, without padding.
        head: what `plain_head` gave for the model, if anything. It is then applied to some
            positions at a time: the logits of a large vocabulary never exist for a whole batch.
    """
    tokens = tokens.to(next(model.parameters()).device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    if head is None:
        states = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
    else:
        states, _ = _read_by(head, model, inputs)
    project: Callable[[Tensor], Tensor] = head or nn.Identity()
    at_once = max(1, LOGITS_AT_ONCE // project(states[:1]).shape[-1])
    losses = []
    for some, answers in zip(states.split(at_once), targets.split(at_once), strict=True):
        logits = project(some).double()
        chosen = logits.gather(-1, answers.unsqueeze(-1)).squeeze(-1)
        losses.append(logits.logsumexp(-1) - chosen)
    return torch.cat(losses).view(inputs.shape).cpu()


def plain_head(model: nn.Module, tokens: Int[Tensor, " tokens"]) -> nn.Module | None:
    """The module whose output is the logits; None if the model does more to them.

    Gemma 2 caps them, Granite and Cohere scale them: tried out on some tokens, not known by name.
    """
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return None
    states, first = _read_by(head, model, tokens.unsqueeze(0).to(next(model.parameters()).device))
    return head if torch.equal(head(states[:1]).to(first.dtype), first) else None


def _read_by(
    head: nn.Module, model: nn.Module, inputs: Int[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "positions width"], Float[Tensor, "1 vocab"]]:
    """What `head` reads at all positions, and the logits of the first, the only ones computed."""
    seen: list[Tensor] = []

    def keep_all_pass_one(_head: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(arguments[0].flatten(0, 1))
        return (arguments[0][:1, :1],)

    hook = head.register_forward_pre_hook(keep_all_pass_one)
    try:
        logits = model(input_ids=inputs, use_cache=False).logits
    finally:
        hook.remove()
    return seen[0], logits[0]
