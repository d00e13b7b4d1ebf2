"""Gains of virtual blocks by least squares, so that each comes near to the block it stands for."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.evaluation.candidate_loss import mean_loss
from foldstack.compression.statistics.stream import BlockStream
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.modeling_foldstack import sublayer_ends

logger = logging.getLogger(__name__)


def better_gains(
    model: PreTrainedModel,
    smaller: PreTrainedModel,
    small: Mapping[str, Tensor],
    windows: Int[Tensor, "windows tokens"],
) -> dict[str, Tensor]:
    """The fitted gains, or the small ones that `smaller` has where those give the lower loss.

    Each gain fits its own block; where adapters express little of several blocks in a row, what
    they make of each other's errors can be worse than a model without them.
    """
    with_small = _loss(smaller, windows)
    positions = sorted({int(name.split(".")[1]) for name in small})
    fitted = fit_gains(model, smaller, positions, windows)
    with_fitted = _loss(smaller, windows)
    logger.info("loss with fitted gains %.4f, with small ones %.4f", with_fitted, with_small)
    return fitted if with_fitted < with_small else dict(small)


def _loss(model: PreTrainedModel, windows: Int[Tensor, "windows tokens"]) -> float:
    def loss_of(batch: Int[Tensor, " batch"]) -> Tensor:
        tokens = windows[batch].to(model.device, torch.long)
        loss: Tensor = model(tokens, labels=tokens, use_cache=False).loss
        return loss

    return mean_loss(loss_of, model, windows)


def fit_gains(
    model: PreTrainedModel,
    smaller: PreTrainedModel,
    positions: Iterable[int],
    windows: Int[Tensor, "windows tokens"],
) -> dict[str, Tensor]:
    """The gains of `smaller`'s normed outputs at these positions, as a cut names them.

    Front to back, on what the blocks before produce. With u = LN(y) of the virtual block and t what
    the residual lacks for having passed the block of `model` at the same position, per channel

        g = sum over tokens of u t / sum over tokens of u^2

    first for attention, then, with those gains in place, for the MLP. What the adapters cannot
    express gets gains near 0 by itself. Sets the gains of `smaller` on the way.
    """
    stream = BlockStream(smaller, windows)
    originals = architecture_of(model).blocks(model)
    fitted = {}
    for position in sorted(positions):
        while stream.position < position:
            stream.advance()
        block, original = stream.blocks[position], originals[position]
        for name in ("attention_output", "mlp_output"):
            gain = _least_squares_gain(stream, block, original, name)
            output: Any = block.get_submodule(name)
            with torch.no_grad():
                output.weight.copy_(gain)
            fitted[f"blocks.{position}.{name}.weight"] = gain
    return fitted


def _least_squares_gain(
    stream: BlockStream, block: nn.Module, original: nn.Module, name: str
) -> Float[Tensor, " hidden"]:
    mine = {n: block.get_submodule(n) for n in ("attention_output", "mlp_output")}
    theirs = dict(zip(mine, sublayer_ends(original), strict=True))
    with _recorded({**{f"my {n}": m for n, m in mine.items()}, **theirs}) as seen:
        crossed, energy = torch.zeros(()), torch.zeros(())
        for _ in zip(stream.outputs(original), stream.outputs(block), strict=True):
            ends, lacking = seen["attention_output"], seen["attention_output"]
            if name == "mlp_output":
                lacking = ends + seen["mlp_output"] - seen["my attention_output"]
            unit = seen[f"my {name} unit"]
            crossed = crossed + (unit * lacking).sum(0)
            energy = energy + unit.square().sum(0)
    return crossed / energy.clamp_min(torch.finfo(energy.dtype).tiny)


@contextmanager
def _recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside, the last output of every module as float64 rows; of a normed output its unit too."""
    seen: dict[str, Tensor] = {}

    def record(name: str, module: Any, args: tuple[Any, ...], output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        seen[name] = y.detach().double().flatten(0, -2)
        if name.startswith("my "):
            seen[f"{name} unit"] = module.unit(args[0]).detach().double().flatten(0, -2)

    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: record(name, module, args, output)
        )
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
