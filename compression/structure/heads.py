"""The attention of a block head by head, whatever way its family stores the projections."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.structure.architectures import (
    Architecture,
    architecture_of,
    base_config_of,
    stock_of,
)


@dataclass(frozen=True)
class HeadSizes:
    """How a model's attention is divided."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    """Leading coordinates of a head that rotate, i with i + rotary_dim / 2; 0 for learned
    positions."""
    has_norms: bool
    """Whether queries and keys are normed head by head."""

    @property
    def group(self) -> int:
        """Query heads that read one key head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Heads:
    """Projections of one block; a bias is None where there is none."""

    query: Float[Tensor, "heads qk hidden"]
    key: Float[Tensor, "kv_heads qk hidden"]
    value: Float[Tensor, "kv_heads v hidden"]
    output: Float[Tensor, "heads hidden v"]
    query_bias: Float[Tensor, "heads qk"] | None
    key_bias: Float[Tensor, "kv_heads qk"] | None
    value_bias: Float[Tensor, "kv_heads v"] | None
    output_bias: Float[Tensor, " hidden"] | None


def head_sizes(model: PreTrainedModel) -> HeadSizes:
    """The division of a stock model's attention; of `model` itself or of what it was made from."""
    config = base_config_of(model.config)
    heads = config.num_attention_heads
    # All rotary tables of a model are of one width, and models without any have no such buffer.
    frequencies = [b for name, b in stock_of(model).named_buffers() if name.endswith("inv_freq")]
    attention = _attention_path(architecture_of(model))
    blocks = architecture_of(model).blocks(model)
    return HeadSizes(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        rotary_dim=2 * frequencies[0].numel() if frequencies else 0,
        has_norms=any(
            name in (f"{attention}.q_norm", f"{attention}.k_norm")
            for block in blocks
            for name, _ in block.named_modules()
        ),
    )


def _attention_path(architecture: Architecture) -> str:
    return architecture.linears[0].name.rpartition(".")[0]


def _sites(architecture: Architecture, reads: str) -> list[str]:
    return [site.name for site in architecture.linears if site.reads == reads]


def heads_of(model: PreTrainedModel, position: int, sizes: HeadSizes) -> Heads:
    """The projections of the block at `position`, in float64, where the model computes."""
    architecture = architecture_of(model)
    block = architecture.blocks(model)[position]
    modules: list[Any] = [
        block.get_submodule(name) for name in _sites(architecture, "attention_input")
    ]
    there: dict[str, Any] = {"device": model.device, "dtype": torch.float64}
    weight = torch.cat([architecture.weight(m).detach().to(**there) for m in modules])
    has_bias = modules[0].bias is not None
    bias = torch.cat([m.bias.detach().to(**there) for m in modules]) if has_bias else None
    counts = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    rows = [count * sizes.head_dim for count in counts]
    query, key, value = (
        part.unflatten(0, (count, -1))
        for part, count in zip(weight.split(rows), counts, strict=True)
    )
    biases: list[Tensor | None] = [None, None, None]
    if bias is not None:
        parts = zip(bias.split(rows), counts, strict=True)
        biases = [part.unflatten(0, (count, -1)) for part, count in parts]
    query_bias, key_bias, value_bias = biases
    output: Any = block.get_submodule(_sites(architecture, "attention_output")[0])
    read = architecture.weight(output).detach().to(**there)
    return Heads(
        query=query,
        key=key,
        value=value,
        output=read.unflatten(1, (sizes.heads, -1)).movedim(1, 0),
        query_bias=query_bias,
        key_bias=key_bias,
        value_bias=value_bias,
        output_bias=None if output.bias is None else output.bias.detach().to(**there),
    )


def stored_heads(model: PreTrainedModel, position: int, heads: Heads) -> dict[str, Tensor]:
    """`heads` as the tensors of a cut, in the form that the family stores them in.

    A fused projection keeps a bias for its values, of zeros where `heads` has none.
    """
    architecture = architecture_of(model)
    block = architecture.blocks(model)[position]
    names = _sites(architecture, "attention_input")
    weights = [w.flatten(0, 1) for w in (heads.query, heads.key, heads.value)]
    biases = [heads.query_bias, heads.key_bias, heads.value_bias]
    if len(names) == 1:
        if heads.query_bias is not None:
            parts = zip(biases, weights, strict=True)
            biases = [
                torch.cat([w.new_zeros(len(w)) if b is None else b.flatten() for b, w in parts])
            ]
        weights = [torch.cat(weights)]
    (output_name,) = _sites(architecture, "attention_output")
    names = [*names, output_name]
    weights = [*weights, heads.output.movedim(0, 1).flatten(1)]
    biases = [*biases[: len(names) - 1], heads.output_bias]
    tensors = {}
    for name, weight, bias in zip(names, weights, biases, strict=True):
        module = block.get_submodule(name)
        place = f"blocks.{position}.{name}"
        tensors[f"{place}.weight"] = architecture.stored_weight(module, weight)
        if bias is not None:
            tensors[f"{place}.bias"] = bias.flatten()
    return tensors


def rotary_pairs_place(model: PreTrainedModel, position: int) -> str:
    """Where a cut stores which rotary frequencies the key heads of a block have kept."""
    return f"blocks.{position}.{_attention_path(architecture_of(model))}.rotary_pairs"


def has_value_bias(model: PreTrainedModel) -> bool:
    """Whether some block of a model adds a bias to its values."""
    architecture = architecture_of(model)
    last = _sites(architecture, "attention_input")[-1]
    present = [dict(block.named_modules()).get(last) for block in architecture.blocks(model)]
    return any(module is not None and module.bias is not None for module in present)


def with_value_bias(heads: Heads, sizes: HeadSizes) -> Float[Tensor, " hidden"]:
    """The output bias with the values' in it: the weights of a row of scores add up to one."""
    assert heads.value_bias is not None
    biases = heads.value_bias.repeat_interleave(sizes.group, dim=0)
    moved = torch.einsum("hod,hd->o", heads.output, biases)
    return moved if heads.output_bias is None else heads.output_bias + moved
