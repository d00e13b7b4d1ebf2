"""Attention with fewer key and value heads: its structure and its tensors."""

import torch
from torch import Tensor

from foldstack.compression.closed_forms.head_merging import merged_keys, merged_values
from foldstack.compression.methods.search.materials import Materials
from foldstack.compression.methods.search.sites import Sites
from foldstack.compression.structure.block_plan import NarrowHeads
from foldstack.compression.structure.heads import (
    Heads,
    has_value_bias,
    heads_of,
    rotary_pairs_place,
    stored_heads,
    with_value_bias,
)
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import as_stored


def merged_plan(sites: Sites, plan: Plan, position: int, count: int) -> Plan:
    """The plan in which a block has `count` key and value heads, as wide as they were."""
    sizes = sites.heads
    form = NarrowHeads(
        qk_dim=sizes.head_dim,
        v_dim=sizes.head_dim,
        rotary_dim=sizes.rotary_dim,
        kv_heads=count,
        value_bias_in_output=has_value_bias(sites.model),
    )
    return plan.narrow(heads={position: form})


def merged_heads(materials: Materials, position: int, count: int) -> dict[str, Tensor]:
    """The projections of a block with `count` key and value heads, each in the place of
    neighbours, as a cut names them and the model stores them."""
    sites, statistics = materials.sites, materials.evidence.statistics
    model, sizes = sites.model, sites.heads
    heads = heads_of(model, position, sizes)
    device = heads.query.device
    gram = statistics.gram(position, "attention_input").to(device)
    input_sum = statistics.input_sum(position, "attention_input").to(device)
    moments = _moments(gram, input_sum, statistics.num_tokens)
    query, key = _with_bias(heads.query, heads.query_bias), _with_bias(heads.key, heads.key_bias)
    output, value = heads.output.split(sizes.group), heads.value
    keys, queries, values, outputs = [], [], [], []
    for run in torch.arange(sizes.kv_heads).split(sizes.kv_heads // count):
        grouped = query.unflatten(0, (sizes.kv_heads, sizes.group))[run]
        one, read = merged_keys(key[run], grouped, moments, sizes.rotary_dim)
        keys.append(one)
        queries.append(read)
        read_of_values = torch.stack([output[int(head)] for head in run])
        one, read = merged_values(value[run], read_of_values, gram / statistics.num_tokens)
        values.append(one)
        outputs.append(read)
    query, key = torch.cat(queries), torch.stack(keys)
    has_bias = heads.value_bias is not None
    merged = Heads(
        query=query[..., :-1],
        key=key[..., :-1],
        value=torch.stack(values),
        output=torch.cat(outputs),
        query_bias=None if heads.query_bias is None else query[..., -1],
        key_bias=None if heads.key_bias is None else key[..., -1],
        value_bias=None,
        output_bias=with_value_bias(heads, sizes) if has_bias else heads.output_bias,
    )
    tensors = as_stored(stored_heads(model, position, merged), model)
    if sizes.rotary_dim:
        pairs = torch.arange(sizes.rotary_dim // 2).repeat(count, 1)
        tensors[rotary_pairs_place(model, position)] = pairs
    return tensors


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[heads, dim, hidden + 1]: what is done to x with a one behind it."""
    last = weight.new_zeros(weight.shape[:-1]) if bias is None else bias
    return torch.cat([weight, last[..., None]], dim=-1)


def _moments(gram: Tensor, input_sum: Tensor, num_tokens: int) -> Tensor:
    """Sum over tokens of x x^T with a one behind x."""
    last = torch.cat([input_sum, input_sum.new_tensor([num_tokens])])
    return torch.cat([torch.cat([gram, input_sum[:, None]], dim=1), last[None]])
