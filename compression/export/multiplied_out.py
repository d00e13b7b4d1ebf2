"""Any structure as its stock class: factors multiplied, borrowed weights copied, widths padded.

The same function in the family's own class, for tools that load nothing else; it is larger, since
what was saved by sharing and factoring is stored out again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.export.forms import why_no_stock
from foldstack.compression.structure.architectures import (
    Architecture,
    LinearSite,
    architecture_of,
    base_config_of,
    stock_of,
)
from foldstack.compression.structure.heads import HeadSizes, head_sizes
from foldstack.compression.structure.modeling_foldstack import (
    FUSED_QKV_NAMES,
    MLP_DOWN_NAMES,
    MLP_FUSED_NAMES,
    AdaptedLinear,
    Borrowed,
    LowRankLinear,
    NarrowAttention,
    linear_shape,
    sublayer_ends,
)
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import BUILDING, config_for, plan_of

Affine = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias (out) in float64."""


@torch.no_grad()
def multiplied_out(model: PreTrainedModel) -> PreTrainedModel:
    """A stock model that computes what `model` computes, up to rounding; it shares no memory.

    Narrow MLPs get channels of zeros, narrow heads zeros at the places of the rotary pairs that
    are gone, and gains on what a sublayer adds are multiplied into its last weights.

    Raises:
        InputError: the structure holds what no stock class computes.
    """
    plan, architecture = plan_of(model), architecture_of(model)
    if (reason := why_no_stock(plan)) is not None:
        raise InputError(
            f"this model cannot be multiplied out to a {architecture.model_type}: {reason}; its "
            "own folder runs in transformers and vLLM"
        )
    stock = stock_like(model)
    sizes = head_sizes(stock)
    _copy_others(model, stock, architecture)
    for position in range(len(plan.blocks)):
        _fill_block(model, stock, position, sizes)
    stock.tie_weights()
    stock.generation_config = model.generation_config
    return stock.eval()


def stock_like(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the stock class with as many blocks and any weights."""
    plan = plan_of(model)
    identity = Plan.identity(plan.base_model_type, len(plan.blocks))
    config = config_for(base_config_of(model.config), identity)
    stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with BUILDING:
        stock: PreTrainedModel = stock_class(config).to(model.dtype)
    return stock


def _copy_others(
    model: PreTrainedModel, stock: PreTrainedModel, architecture: Architecture
) -> None:
    """Embeddings, the head and all norms, which have the same names in both."""
    stored = stock_of(model).state_dict()
    linears = tuple(site.name for site in architecture.linears)
    for name, tensor in stock.state_dict().items():
        is_linear = any(f".{linear}." in name for linear in linears)
        if not is_linear or architecture.blocks_path not in name:
            tensor.copy_(stored[name])


def _fill_block(
    model: PreTrainedModel, stock: PreTrainedModel, position: int, sizes: HeadSizes
) -> None:
    architecture = architecture_of(model)
    block = architecture.blocks(model)[position]
    target = architecture.blocks(stock)[position]
    for site, (weight, bias) in stock_affines(block, target, architecture, sizes):
        place: Any = target.get_submodule(site.name)
        if site.reads in ("mlp_input", "mlp_output"):
            weight, bias = _widened_mlp(site.name, weight, bias, linear_shape(place))
        _store(place, weight, bias, architecture)
    _fill_norms(target, _gains(block))


def stock_affines(
    block: nn.Module, target: nn.Module, architecture: Architecture, sizes: HeadSizes
) -> Iterator[tuple[LinearSite, Affine]]:
    """The linears of a block with attention as its stock block `target` has them, but for the MLP's
    width and the stream's."""
    gains = _gains(block)
    path = architecture.linears[0].name.rpartition(".")[0]
    attention: Any = block.get_submodule(path)
    value_bias: Tensor | None = None
    for site in reversed(architecture.linears):  # attention's output before its inputs
        weight, bias = affine(block.get_submodule(site.name), architecture)
        if isinstance(attention, NarrowAttention) and not site.reads.startswith("mlp"):
            place: Any = target.get_submodule(site.name)
            if site.reads == "attention_output":
                weight, bias, value_bias = _widened_output(attention, weight, bias, place, sizes)
            else:
                weight, bias = _widened_input(attention, site.name, weight, bias, sizes)
                bias = _with_value_bias(site.name, weight, bias, value_bias, place, sizes)
        if site.reads in gains:
            gain = gains[site.reads]
            weight, bias = gain[:, None] * weight, None if bias is None else gain * bias
        yield site, (weight, bias)


def _store(place: Any, weight: Tensor, bias: Tensor | None, architecture: Architecture) -> None:
    place.weight.copy_(architecture.stored_weight(place, weight))
    if place.bias is None:
        assert bias is None or not bias.any(), "a bias without a place"
    elif bias is None:
        place.bias.zero_()
    else:
        place.bias.copy_(bias)


def affine(module: nn.Module, architecture: Architecture) -> Affine:
    """The weight (out, in) and the bias of a linear of any form, in float64."""
    if isinstance(module, Borrowed):
        return affine(module.target, architecture)
    if isinstance(module, LowRankLinear):
        (first, _), (second, bias) = (
            affine(m, architecture) for m in (module.first, module.second)
        )
        return second @ first, bias
    if isinstance(module, AdaptedLinear):
        whole, adapter = (affine(m, architecture) for m in (module.borrowed, module.adapter))
        return whole[0] + adapter[0], _sum(whole[1], adapter[1])
    bias = getattr(module, "bias", None)
    return architecture.weight(module).double(), None if bias is None else bias.double()


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def _widened_mlp(name: str, weight: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Affine:
    """With channels of zeros, which every activation of the families leaves at zero."""
    whole = weight.new_zeros(shape)
    if name in MLP_DOWN_NAMES:
        whole[:, : weight.shape[1]] = weight
        return whole, bias
    parts = 2 if name in MLP_FUSED_NAMES else 1
    whole_bias = None if bias is None else bias.new_zeros(shape[0])
    for part in range(parts):
        width, full = weight.shape[0] // parts, shape[0] // parts
        to, of = slice(part * full, part * full + width), slice(part * width, (part + 1) * width)
        whole[to] = weight[of]
        if whole_bias is not None and bias is not None:
            whole_bias[to] = bias[of]
    return whole, whole_bias


def _places(attention: NarrowAttention, head: int, sizes: HeadSizes) -> Tensor:
    """Where the coordinates of narrow queries and keys of a key head are in the stock head."""
    pairs = attention.rotary_pairs
    kept = torch.empty(0, dtype=torch.long) if pairs is None else pairs[head].cpu()
    still = attention.qk_dim - 2 * len(kept)
    if still > sizes.head_dim - sizes.rotary_dim:
        raise InputError("its heads have coordinates that do not rotate, where stock ones all do")
    rest = sizes.rotary_dim + torch.arange(still)
    return torch.cat([kept, kept + sizes.rotary_dim // 2, rest])


def _widened_input(
    attention: NarrowAttention, name: str, weight: Tensor, bias: Tensor | None, sizes: HeadSizes
) -> Affine:
    """Queries, keys or values, or all of them in one, with zeros where nothing was kept."""
    kind, keys = name.rpartition(".")[2], attention.num_kv_heads
    counts = {"q_proj": (sizes.heads,), "k_proj": (keys,), "v_proj": (0,)}
    parts = (sizes.heads, keys, 0) if kind in FUSED_QKV_NAMES else counts[kind]
    narrow = [n * attention.qk_dim if n else keys * attention.v_dim for n in parts]
    weights, biases = (
        weight.split(narrow),
        [None] * len(parts) if bias is None else bias.split(narrow),
    )
    widened = [
        _widened_rows(attention, count, w, b, sizes)
        for count, w, b in zip(parts, weights, biases, strict=True)
    ]
    whole_bias = None if bias is None else torch.cat([b for _, b in widened if b is not None])
    return torch.cat([w for w, _ in widened]), whole_bias


def _widened_rows(
    attention: NarrowAttention, heads: int, weight: Tensor, bias: Tensor | None, sizes: HeadSizes
) -> Affine:
    """Rows of `heads` query or key heads; of the values where `heads` is 0. Keys and values stand
    there as often as stock heads read them."""
    keys = attention.num_kv_heads
    count = heads or keys
    rows = weight.unflatten(0, (count, -1))
    whole = rows.new_zeros(count, sizes.head_dim, rows.shape[-1])
    whole_bias = None if bias is None else bias.new_zeros(count, sizes.head_dim)
    for head in range(count):
        places = torch.arange(attention.v_dim)
        if heads:
            places = _places(attention, head * keys // count, sizes)
        whole[head, places] = rows[head]
        if bias is not None and whole_bias is not None:
            whole_bias[head, places] = bias.unflatten(0, (count, -1))[head]
    copies = 1 if heads == sizes.heads else sizes.kv_heads // keys
    whole = whole.repeat_interleave(copies, dim=0).flatten(0, 1)
    if whole_bias is not None:
        whole_bias = whole_bias.repeat_interleave(copies, dim=0).flatten()
    return whole, whole_bias


def _widened_output(
    attention: NarrowAttention, weight: Tensor, bias: Tensor | None, place: Any, sizes: HeadSizes
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What attention's output reads, with zeros where values were lost.

    A bias that the stock linear has no place for becomes the output for a value that is one for
    every token: attention's weights sum to one. That value is given back as a bias of the values.
    """
    columns = weight.unflatten(1, (sizes.heads, -1))
    whole = columns.new_zeros(columns.shape[0], sizes.heads, sizes.head_dim)
    whole[:, :, : attention.v_dim] = columns
    value_bias = None
    if bias is not None and place.bias is None:
        if attention.v_dim == sizes.head_dim:
            raise InputError("a bias of attention's output has no place in the stock class")
        value_bias = bias.new_zeros(sizes.kv_heads, sizes.head_dim)
        value_bias[0, attention.v_dim] = 1
        whole[:, 0, attention.v_dim] = bias
        bias, value_bias = None, value_bias.flatten()
    return whole.flatten(1), bias, value_bias


def _with_value_bias(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    value_bias: Tensor | None,
    place: Any,
    sizes: HeadSizes,
) -> Tensor | None:
    """The bias of a linear that makes values, with the one that stands for the output's."""
    kind = name.rpartition(".")[2]
    if value_bias is None or not (kind == "v_proj" or kind in FUSED_QKV_NAMES):
        return bias
    if place.bias is None:
        raise InputError("a bias of attention's output has no place in the stock class")
    whole = weight.new_zeros(weight.shape[0]) if bias is None else bias.clone()
    whole[-sizes.kv_heads * sizes.head_dim :] += value_bias
    return whole


def _gains(block: Any) -> dict[str, Tensor]:
    """Gains on what attention and the MLP add to the residual, by the linears they come from; those
    behind a norm by that norm's name."""
    if not hasattr(block, "attention_output"):
        return {}
    ends = sublayer_ends(block)
    names = ("attention_output", "mlp_output")
    if hasattr(block, "post_feedforward_layernorm"):
        inside = {module: name for name, module in block.named_modules()}
        names = (inside[ends[0]], inside[ends[1]])
    outputs = (block.attention_output, block.mlp_output)
    return {
        name: output.weight.double()
        for name, output in zip(names, outputs, strict=True)
        if output.kind == "scaled"
    }


def _fill_norms(target: nn.Module, gains: dict[str, Tensor]) -> None:
    for name, norm in _gained_norms(target, gains):
        norm.weight.copy_((1 + norm.weight.double()) * gains[name] - 1)  # Gemma's: times 1 + weight


def _gained_norms(target: nn.Module, gains: dict[str, Tensor]) -> Iterator[tuple[str, Any]]:
    for name in gains:
        if name not in ("attention_output", "mlp_output"):
            yield name, target.get_submodule(name)
