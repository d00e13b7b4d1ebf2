"""How big a structure is: parameters, bytes, FLOPs, KV cache; no memory for weights needed."""

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from foldstack.compression.structure.architectures import architecture_of, base_config_of
from foldstack.compression.structure.modeling_foldstack import (
    Borrowed,
    SlicedLinear,
    is_linear,
    linear_shape,
)
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import build_on_meta, config_for, plan_of


@dataclass(frozen=True)
class Size:
    """What a structure costs, counted on stored tensors: a shared or tied one counts once."""

    parameters: int
    block_linear_parameters: int
    """Parameters of the linears inside blocks: the denominator of most papers' ratios."""
    bytes: int
    flops_per_token: int
    """2 x multiply-adds of every executed linear and the head; attention scores are not in it."""
    kv_bytes_per_token: int
    num_blocks: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def count_parameters(model: nn.Module) -> int:
    """Stored parameters: tied and shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def sparsity_between(dense: Size, compressed: Size) -> float:
    """Fraction of the dense model's stored parameters that is gone."""
    return 1 - compressed.parameters / dense.parameters


def size_of_plan(config: PreTrainedConfig, plan: Plan, dtype: torch.dtype | None = None) -> Size:
    """The size of what `plan` makes of the model with this config."""
    stored_dtype: torch.dtype | None = getattr(config, "dtype", None)
    return _size(_Structure.of(config, plan), dtype or stored_dtype)


@dataclass(frozen=True)
class _Structure:
    key: str
    config: PreTrainedConfig = field(compare=False)
    plan: Plan = field(compare=False)

    @classmethod
    def of(cls, config: PreTrainedConfig, plan: Plan) -> "_Structure":
        key = f"{config.to_json_string(use_diff=False)}\n{plan.model_dump_json()}"
        return cls(key, config, plan)


@lru_cache(maxsize=4096)
def _size(structure: _Structure, dtype: torch.dtype | None) -> Size:
    """Kept, since a method that looks for the plan of a size asks for the same ones again."""
    return size_of(build_on_meta(config_for(structure.config, structure.plan)), dtype)


def size_of(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Size:
    """The size of a model, real or on the meta device; bytes in `dtype` or the model's own."""
    architecture = architecture_of(model)
    element_bytes = (dtype or model.dtype).itemsize
    blocks = architecture.blocks(model)
    stored = [m for m in blocks.modules() if is_linear(m)]
    head = model.get_output_embeddings()
    parameters = count_parameters(model)
    return Size(
        parameters=parameters,
        block_linear_parameters=sum(map(_num_weights, stored)),
        bytes=parameters * element_bytes,
        flops_per_token=2 * (_num_weights(head) + sum(map(_executed_weights, blocks))),
        kv_bytes_per_token=_kv_elements_per_token(model.config) * element_bytes,
        num_blocks=len(blocks),
    )


def block_parameters(config: PreTrainedConfig) -> list[int]:
    """Parameters that each executed block stores, by position: what a block borrows from another
    one counts there.
    """
    model = build_on_meta(config)
    return [count_parameters(block) for block in architecture_of(model).blocks(model)]


@dataclass(frozen=True)
class BlockSize:
    """What one block adds to the size of its model."""

    parameters: int
    flops_per_token: int
    kv_bytes_per_token: int


def block_sizes_of_plan(
    config: PreTrainedConfig, plan: Plan, dtype: torch.dtype
) -> tuple[BlockSize, ...]:
    """The sizes of the blocks of what `plan` makes of the model with this config, in order."""
    return _block_sizes(_Structure.of(config, plan), dtype)


@lru_cache(maxsize=4096)
def _block_sizes(structure: _Structure, dtype: torch.dtype) -> tuple[BlockSize, ...]:
    model = build_on_meta(config_for(structure.config, structure.plan))
    return tuple(_size_of_block(model, at, dtype) for at in range(len(structure.plan.blocks)))


def _size_of_block(model: PreTrainedModel, position: int, dtype: torch.dtype) -> BlockSize:
    """Without what it borrows but with the FLOPs of that."""
    block = architecture_of(model).blocks(model)[position]
    return BlockSize(
        parameters=count_parameters(block),
        flops_per_token=2 * _executed_weights(block),
        kv_bytes_per_token=_kv_elements_of(model.config, position) * dtype.itemsize,
    )


def _num_weights(linear: nn.Module) -> int:
    out_features, in_features = linear_shape(linear)
    return out_features * in_features


def _executed_weights(block: nn.Module) -> int:
    """Weights of the linears that one token passes in this block, borrowed ones included."""
    weights = 0
    for module in block.modules():
        if isinstance(module, Borrowed):
            weights += _executed_weights(module.target)
        elif isinstance(module, SlicedLinear):
            weights += module.borrowed_weights
        elif is_linear(module):
            weights += _num_weights(module)
    return weights


def _kv_elements_per_token(config: Any) -> int:
    return sum(_kv_elements_of(config, position) for position in range(len(plan_of(config).blocks)))


def _kv_elements_of(config: Any, position: int) -> int:
    base, plan = base_config_of(config), plan_of(config)
    if not plan.blocks[position].has_attention:
        return 0
    heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
    head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    narrow = plan.blocks[plan.owner(position)].narrow_heads
    if narrow is None:
        return int(2 * heads * head_dim)
    return int((narrow.kv_heads or heads) * (narrow.qk_dim + narrow.v_dim))


def linear_shapes(model: PreTrainedModel) -> dict[tuple[int, str], tuple[int, int]]:
    """(out, in) of every stored linear that a method may factor: (position, name) to shape.

    One of which other positions use slices is none of them, nor is one without any weight.
    """
    architecture, lenders = architecture_of(model), plan_of(model).lenders
    shapes = {}
    for position, block in enumerate(architecture.blocks(model)):
        for site in architecture.linears:
            try:
                module = block.get_submodule(site.name)
            except AttributeError:  # an attention-free replacement has none of the family's linears
                continue
            if not is_linear(module) or (position, site.name) in lenders:
                continue
            if all(shape := linear_shape(module)):
                shapes[position, site.name] = shape
    return shapes
