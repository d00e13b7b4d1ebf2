"""A compressed decoder for mlx-lm, which loads it as the `model_file` of a folder.

This file is copied beside the weights, and imports nothing but mlx, mlx-lm and Python's own: so
`mlx_lm.generate --model FOLDER --trust-remote-code` runs the folder where foldstack is not
installed. What it computes is what `modeling_foldstack.py` computes with torch, out of the same
plan and the same names of weights; each stored tensor exists once. It differs in two entries:

- `rotary` in config.json says, by kind of attention, the frequencies of the stock model's rotary
  positions, so that every kind of scaling is the stock one: `frequencies`, `scale` of what rotates,
  and `beyond`: a number of tokens, from which on other `frequencies` stand;
- weights are (out, in) in every family, and those without elements are left out.

A position that uses another's weights holds a `Borrowed`, which is no module: mlx does not see it,
and whatever takes the place of the owner's linear (quantised, with an adapter) is used by all.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache

ATTENTION_FREE = ("ffn", "swiglu")
ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
}
FULL, SLIDING = "full_attention", "sliding_attention"


class Family(NamedTuple):
    """How a family's stock model is built, and what it calls its parts."""

    attention: str = "self_attn"
    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Queries, keys and values; one linear makes them all, or each has its own."""
    output: str = "o_proj"
    ups: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    is_gated: bool = True
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    """Before attention, and before the MLP."""
    post_norms: tuple[str, ...] = ()
    """After them, before what they computed is added to the residual."""
    norm: str = "rms"
    """rms; rms_from_one: times 1 + weight; layer: LayerNorm with a bias."""
    has_head_norms: bool = False
    embedding: str = "embed_tokens"
    positions: str = ""
    """Learned ones, the first of which is at `first_position`."""
    first_position: int = 0
    final_norm: str = "norm"


_GEMMA = Family(norm="rms_from_one")
_GEMMA2 = _GEMMA._replace(
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(has_head_norms=True),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2._replace(has_head_norms=True),
    "phi3": Family(inputs=("qkv_proj",), ups=("mlp.gate_up_proj",)),
    "opt": Family(
        output="out_proj",
        ups=("fc1",),
        down="fc2",
        is_gated=False,
        norms=("self_attn_layer_norm", "final_layer_norm"),
        norm="layer",
        positions="embed_positions",
        first_position=2,
        final_norm="final_layer_norm",
    ),
    "gpt2": Family(
        attention="attn",
        inputs=("c_attn",),
        output="c_proj",
        ups=("mlp.c_fc",),
        down="mlp.c_proj",
        is_gated=False,
        norms=("ln_1", "ln_2"),
        norm="layer",
        embedding="wte",
        positions="wpe",
        final_norm="ln_f",
    ),
}


@dataclass
class ModelArgs:
    """The folder's config.json: the stock config's entries, the plan and the frequencies."""

    config: dict[str, Any]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelArgs":
        return cls(dict(config))

    def __getattr__(self, name: str) -> Any:
        """An entry, as mlx-lm's own have them; None where there is none."""
        if name.startswith("__") or name == "config":
            raise AttributeError(name)
        return self.first(name)

    def first(self, *names: str, default: Any = None) -> Any:
        """The first of these entries that there is, by the names that the families have for it."""
        entries = (self.config.get(name) for name in names)
        return next((entry for entry in entries if entry is not None), default)

    @property
    def family(self) -> Family:
        return FAMILIES[self.config["base_model_type"]]

    @property
    def plans(self) -> list[dict[str, Any]]:
        return list(self.config["plan"]["blocks"])

    def owner(self, position: int) -> dict[str, Any]:
        """The plan of the block that stores this position's linears."""
        stored_at = self.plans[position].get("weights_of")
        return self.plans[position if stored_at is None else stored_at]

    @property
    def width(self) -> int:
        return int(self.first("hidden_size", "n_embd"))

    @property
    def heads(self) -> int:
        return int(self.first("num_attention_heads", "n_head"))

    @property
    def kv_heads(self) -> int:
        return int(self.first("num_key_value_heads", default=self.heads))

    @property
    def head_width(self) -> int:
        return int(self.first("head_dim", default=self.width // self.heads))

    @property
    def mlp_width(self) -> int:
        return int(self.first("intermediate_size", "ffn_dim", "n_inner", default=4 * self.width))

    @property
    def eps(self) -> float:
        return float(self.first("rms_norm_eps", "layer_norm_epsilon", default=1e-5))

    @property
    def scale(self) -> float:
        """What the scores of attention are multiplied by."""
        if self.config.get("scale_attn_weights") is False:
            return 1.0
        return float(self.first("query_pre_attn_scalar", default=self.head_width)) ** -0.5

    @property
    def softcap(self) -> float | None:
        """Of the scores; Gemma 3 has the entry and does not use it."""
        is_used = self.config["base_model_type"] == "gemma2"
        return self.config["attn_logit_softcapping"] if is_used else None

    @property
    def activation(self) -> Any:
        is_gemma2 = bool(self.family.post_norms)
        names = ("hidden_activation",) if is_gemma2 else ("hidden_act", "activation_function")
        return ACTIVATIONS[self.first(*names)]

    def kind(self, position: int) -> str:
        """Whether a block attends to everything or to a window."""
        kinds = self.config.get("layer_types")
        if kinds is not None:
            return str(kinds[position])
        has_window = self.config["base_model_type"] in ("mistral", "phi3")
        return SLIDING if has_window and self.config.get("sliding_window") else FULL

    def attends(self, position: int) -> bool:
        heads = self.owner(position).get("narrow_heads")
        is_light = self.plans[position]["kind"] in ATTENTION_FREE
        return not is_light and (heads is None or heads["v_dim"] > 0)


def part_of(module: Any, path: str) -> Any:
    """The part of a module that is under a path with dots."""
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def put(module: Any, path: str, part: Any) -> None:
    """Put a part under a path with dots, in modules that are there or are made."""
    *holders, name = path.split(".")
    for holder in holders:
        if not hasattr(module, holder):
            setattr(module, holder, nn.Module())
        module = getattr(module, holder)
    setattr(module, name, part)


class Borrowed:
    """Another position's linear, found anew at each call: it may have been quantised by now."""

    def __init__(self, blocks: list[Any], position: int, path: str) -> None:
        self.blocks, self.position, self.path = blocks, position, path

    @property
    def target(self) -> Any:
        return part_of(self.blocks[self.position], self.path)

    def __call__(self, x: mx.array) -> mx.array:
        return self.target(x)


class BiasAlone(nn.Module):
    """A linear that reads nothing: its bias, if it has one."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def __call__(self, x: mx.array) -> mx.array:
        shape = (*x.shape[:-1], self.outputs)
        return mx.broadcast_to(self.bias, shape) if "bias" in self else mx.zeros(shape, x.dtype)


class LowRank(nn.Module):
    """y = second(first(x)): a linear as two factors, of which the first may be another's."""

    def __init__(self, inputs: int, outputs: int, rank: int, first: Borrowed | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, rank, bias=False) if first is None else first
        self.second = nn.Linear(rank, outputs, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.second(self.first(x))


class Adapted(nn.Module):
    """y = borrowed(x) + second(first(x)): another position's linear and an own adapter."""

    def __init__(self, borrowed: Borrowed, adapter: LowRank) -> None:
        super().__init__()
        self.borrowed, self.adapter = borrowed, adapter

    def __call__(self, x: mx.array) -> mx.array:
        return self.borrowed(x) + self.adapter(x)


class Sliced(nn.Module):
    """y = W x + b, where some slices of W are stored here and the others at other positions.

    Where those that store them are plain linears they are multiplied run by run; else (quantised,
    with an adapter) each is called as a whole: of its outputs the slices are taken, or it reads the
    slices of the input that are its own and zeros for the others.
    """

    def __init__(
        self, blocks: list[Any], position: int, path: str, form: dict[str, Any], shape: Any
    ) -> None:
        super().__init__()
        outputs, inputs = shape
        self.is_along_out = form["axis"] == "out"
        indices = slice_indices(form, outputs if self.is_along_out else inputs)
        mine = zip(indices, form["slices"], strict=True)
        self.own = tuple(sorted(i for these, origin in mine if origin is None for i in these))
        """What of the whole is stored here, along the axis, in this order."""
        # In an object: mlx looks for modules in what a module holds of lists, tuples and dicts.
        self.of = SimpleNamespace(
            blocks=blocks, position=position, path=path, slices=form["slices"], indices=indices
        )
        if self.own:
            width = len(self.own)
            shape = (inputs, width) if self.is_along_out else (width, outputs)
            self.stored = nn.Linear(*shape, bias=False)
        elif not self.is_along_out:
            self.stored = BiasAlone(outputs)

    def connect(self) -> None:
        """Find the others that store slices, once all blocks are built."""
        blocks, here, path = self.of.blocks, self.of.position, self.of.path
        slices, indices = self.of.slices, self.of.indices
        at = {origin[0] for origin in slices if origin is not None} - {here}
        lenders = {position: part_of(blocks[position], path) for position in sorted(at)}
        everything = tuple(range(sum(map(len, indices))))
        stored = [self.own]
        stored += [m.own if isinstance(m, Sliced) else everything for m in lenders.values()]
        self.stored_widths = tuple(map(len, stored))
        self.lenders = tuple(
            Borrowed(blocks, position, f"{path}.stored" if isinstance(m, Sliced) else path)
            for position, m in lenders.items()
        )
        place_in = [{index: place for place, index in enumerate(these)} for these in stored]
        number = {here: 0} | {position: 1 + k for k, position in enumerate(lenders)}
        places = {}
        for index, (mine, origin) in enumerate(zip(indices, slices, strict=True)):
            position, theirs = (here, index) if origin is None else origin
            holder = number[position]
            for my, their in zip(mine, indices[theirs], strict=True):
                places[my] = holder, place_in[holder][their]
        self.runs = tuple(runs_of([places[i] for i in range(len(places))]))

    def __call__(self, x: mx.array) -> mx.array:
        own = self.stored if "stored" in self else None
        linears = [own, *(lender.target for lender in self.lenders)]
        is_plain = all(m is None or type(m) in (nn.Linear, BiasAlone) for m in linears)
        if self.is_along_out:
            return self._rows(linears, x) if is_plain else self._cut_of(linears, x)
        return self._columns(linears, x) if is_plain else self._sum_of(linears, x)

    def _rows(self, linears: list[Any], x: mx.array) -> mx.array:
        parts = []
        for k, start, length in self.runs:
            of = slice(start, start + length)
            part = x @ linears[k].weight[of].T
            parts.append(part + linears[k].bias[of] if "bias" in linears[k] else part)
        return mx.concatenate(parts, axis=-1)

    def _columns(self, linears: list[Any], x: mx.array) -> mx.array:
        at = 0
        total: Any = None
        for k, start, length in self.runs:
            part = x[..., at : at + length] @ linears[k].weight[:, start : start + length].T
            at, total = at + length, part if total is None else total + part
        own = linears[0]
        return total + own.bias if own is not None and "bias" in own else total

    def _cut_of(self, linears: list[Any], x: mx.array) -> mx.array:
        outputs: list[Any] = [None if linear is None else linear(x) for linear in linears]
        parts = [outputs[k][..., start : start + length] for k, start, length in self.runs]
        return mx.concatenate(parts, axis=-1)

    def _sum_of(self, linears: list[Any], x: mx.array) -> mx.array:
        inputs = [mx.zeros((*x.shape[:-1], width), x.dtype) for width in self.stored_widths]
        at = 0
        for k, start, length in self.runs:
            inputs[k][..., start : start + length] += x[..., at : at + length]
            at += length
        total = None if linears[0] is None else linears[0](inputs[0])
        for linear, slices in zip(linears[1:], inputs[1:], strict=True):
            part = linear(slices) - linear(mx.zeros_like(slices[:1, :1]))  # its bias stays its own
            total = part if total is None else total + part
        return total


def slice_indices(form: dict[str, Any], width: int) -> list[list[int]]:
    """Per slice of a linear, which of its outputs or inputs are in it."""
    parts = form["parts"] or [width]
    count = len(form["slices"])
    starts = [sum(parts[:number]) for number in range(len(parts))]
    return [
        [
            start + index * (part // count) + offset
            for start, part in zip(starts, parts, strict=True)
            for offset in range(part // count)
        ]
        for index in range(count)
    ]


def runs_of(places: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(holder, place) one after another as (holder, first place, how many)."""
    runs: list[tuple[int, int, int]] = []
    for holder, place in places:
        if runs and runs[-1][0] == holder and sum(runs[-1][1:]) == place:
            runs[-1] = (holder, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((holder, place, 1))
    return runs


class Rotary:
    """The rotary positions of one kind of attention."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.frequencies = mx.array(entry["frequencies"], dtype=mx.float32)
        self.scale = entry["scale"]
        beyond = entry.get("beyond")
        self.last = math.inf if beyond is None else beyond["tokens"]
        self.beyond = None if beyond is None else mx.array(beyond["frequencies"], dtype=mx.float32)

    def at(self, offset: Any, tokens: int) -> mx.array:
        """The frequencies for `tokens` after `offset`."""
        if self.beyond is None:
            return self.frequencies
        end = (offset.max() if isinstance(offset, mx.array) else offset) + tokens
        return mx.where(mx.array(end) > self.last, self.beyond, self.frequencies)

    def whole(self, x: mx.array, offset: Any) -> mx.array:
        """[batch, heads, tokens, width] with its first coordinates rotated."""
        rotating = 2 * len(self.frequencies)
        if self.scale != 1:
            x = mx.concatenate([x[..., :rotating] * self.scale, x[..., rotating:]], axis=-1)
        periods = 1 / self.at(offset, x.shape[2])
        return mx.fast.rope(
            x, rotating, traditional=False, base=None, scale=1.0, offset=offset, freqs=periods
        )

    def kept(self, x: mx.array, pairs: mx.array, offset: Any) -> mx.array:
        """The same where head h has kept the frequencies `pairs[h]`, i together with i + kept."""
        half = pairs.shape[-1]
        frequencies = self.at(offset, x.shape[2])[pairs][None, :, None]
        places = mx.array(offset)[..., None] + mx.arange(x.shape[2])  # [batch, tokens] or [tokens]
        places = places.reshape(-1, 1, x.shape[2], 1).astype(mx.float32)
        angles = places * frequencies
        cos, sin = mx.cos(angles) * self.scale, mx.sin(angles) * self.scale
        cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        rotated = [first * cos - second * sin, second * cos + first * sin]
        return mx.concatenate([*rotated, rest] if rest.shape[-1] else rotated, axis=-1)


class RootMeanSquareNorm(nn.Module):
    """The families' norm of a token's, or of a head's, coordinates."""

    def __init__(self, width: int, eps: float, is_gain_from_one: bool) -> None:
        super().__init__()
        self.weight = mx.ones(width)
        self.eps, self.is_gain_from_one = eps, is_gain_from_one

    def __call__(self, x: mx.array) -> mx.array:
        gain = 1.0 + self.weight if self.is_gain_from_one else self.weight
        return mx.fast.rms_norm(x, gain, self.eps)


class BareNorm(nn.Module):
    """x / sqrt(sum(x^2) / full_width + eps), where some coordinates may be gone."""

    def __init__(self, full_width: int, eps: float) -> None:
        super().__init__()
        self.full_width, self.eps = full_width, eps

    def __call__(self, x: mx.array) -> mx.array:
        gone = self.full_width / x.shape[-1]
        return mx.fast.rms_norm(x, None, self.eps * gone) * gone**0.5


class SublayerOutput(nn.Module):
    """What attention or the MLP adds to the residual, normed or scaled by a vector."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.weight = mx.ones(width)

    def __call__(self, y: mx.array) -> mx.array:
        if self.kind == "scaled":
            return y * self.weight
        return mx.fast.layer_norm(y, self.weight, None, 1e-5)


class Attention(nn.Module):
    """Causal self-attention whose heads may be narrower than the stock ones, queries and keys as
    well as values; all with the stock model's scale."""

    def __init__(self, args: ModelArgs, position: int, rotary: Rotary | None) -> None:
        super().__init__()
        family = args.family
        form = args.owner(position).get("narrow_heads")
        self.heads, self.is_narrow = args.heads, form is not None
        self.kv_heads = (form or {}).get("kv_heads") or args.kv_heads
        self.qk_width = form["qk_dim"] if form else args.head_width
        self.v_width = form["v_dim"] if form else args.head_width
        self.scale, self.softcap = args.scale, args.softcap
        self.input_names = family.inputs if self.v_width else ()
        self.output_name = family.output
        self.rotary = rotary
        if form is not None and form["rotary_dim"]:
            self.rotary_pairs = mx.zeros((self.kv_heads, form["rotary_dim"] // 2), dtype=mx.int64)
        if family.has_head_norms and self.v_width:
            for name in ("q_norm", "k_norm"):
                is_gain_from_one = family.norm == "rms_from_one"
                norm = RootMeanSquareNorm(self.qk_width, args.eps, is_gain_from_one)
                setattr(self, name, norm)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of all queries, all keys and all values."""
        keys, values = self.kv_heads * self.qk_width, self.kv_heads * self.v_width
        return self.heads * self.qk_width, keys, values

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        output = getattr(self, self.output_name)
        if not self.v_width:
            return output(x)
        batch, tokens, _ = x.shape
        queries, keys, values = self._projected(x)
        if (rotary := self.rotary) is not None:
            offset = 0 if cache is None else cache.offset
            queries, keys = (self._rotated(rotary, each, offset) for each in (queries, keys))
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        if self.softcap is None:
            attended = scaled_dot_product_attention(
                queries, keys, values, cache=cache, scale=self.scale, mask=mask
            )
        else:
            attended = self._capped(queries, keys, values, mask)
        return output(attended.transpose(0, 2, 1, 3).reshape(batch, tokens, -1))

    def _projected(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values as [batch, heads, tokens, width], normed, not rotated."""
        made = [getattr(self, name)(x) for name in self.input_names]
        if len(made) == 1:
            queries, keys, _ = self.widths
            made = mx.split(made[0], [queries, queries + keys], axis=-1)
        counts = self.heads, self.kv_heads, self.kv_heads
        queries, keys, values = (
            each.reshape(*x.shape[:2], count, -1) for each, count in zip(made, counts, strict=True)
        )
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return (
            queries.transpose(0, 2, 1, 3),
            keys.transpose(0, 2, 1, 3),
            values.transpose(0, 2, 1, 3),
        )

    def _rotated(self, rotary: Rotary, x: mx.array, offset: Any) -> mx.array:
        if not self.is_narrow:
            return rotary.whole(x, offset)
        if "rotary_pairs" not in self:
            return x
        pairs = mx.repeat(self.rotary_pairs, x.shape[1] // self.kv_heads, axis=0)
        return rotary.kept(x, pairs, offset)

    def _capped(self, queries: mx.array, keys: mx.array, values: mx.array, mask: Any) -> mx.array:
        batch, heads, tokens, _ = queries.shape
        queries = (queries * self.scale).reshape(batch, self.kv_heads, -1, *queries.shape[2:])
        scores = queries @ keys[:, :, None].swapaxes(-1, -2)
        scores = mx.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            mask = mask[:, :, None] if mask.ndim == 4 else mask  # its heads are in groups here
            scores = mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
        weights = mx.softmax(scores, precise=True, axis=-1)
        return (weights @ values[:, :, None]).reshape(batch, heads, tokens, -1)


class LightBlock(nn.Module):
    """A network in place of a run of blocks: no attention, no norm, no residual."""

    def __init__(self, kind: str, width: int, inner: int) -> None:
        super().__init__()
        self.ffn = nn.Module()
        for name in ("up",) if kind == "ffn" else ("gate", "up"):
            setattr(self.ffn, name, nn.Linear(width, inner, bias=False))
        self.ffn.down = nn.Linear(inner, width, bias=False)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        up = self.ffn.up(x)
        inner = nn.silu(self.ffn.gate(x)) * up if "gate" in self.ffn else nn.relu(up)
        return self.ffn.down(inner)


class Named(nn.Module):
    """A module that names its linears and not what they are put together to.

    mlx-lm's LoRA takes what has the name of a linear in one block for a linear in all of them.
    """

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        forms = (LowRank, Adapted, Sliced, BiasAlone)
        return [(name, m) for name, m in super().named_modules() if not isinstance(m, forms)]


class Block(Named):
    """A pre-norm block: x + attention(norm(x)), then h + mlp(norm(h)), or what a plan makes of it.

    On a narrower residual stream both links are matrices, and the norms have no parameters.
    """

    def __init__(self, args: ModelArgs, position: int, rotary: Rotary | None) -> None:
        super().__init__()
        family, plan = args.family, args.plans[position]
        self.family, self.activation = family, args.activation
        sliced = plan.get("sliced")
        setattr(self, family.attention, Attention(args, position, rotary))
        for name in family.norms:
            norm = norm_of(args) if sliced is None else BareNorm(args.width, args.eps)
            setattr(self, name, norm)
        for name in family.post_norms:
            setattr(self, name, norm_of(args))
        if sliced is not None:
            widths = [sliced[name] for name in ("entering", "middle", "leaving")]
            self.attention_shortcut = nn.Linear(widths[0], widths[1], bias=False)
            self.mlp_shortcut = nn.Linear(widths[1], widths[2], bias=False)
        if plan.get("outputs", "plain") != "plain":
            self.attention_output = SublayerOutput(plan["outputs"], args.width)
            self.mlp_output = SublayerOutput(plan["outputs"], args.width)
        self.mlp_width = args.owner(position).get("mlp_width")

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        attention = getattr(self, self.family.attention)
        x = self._added(x, attention(self._norm(0)(x), mask, cache), 0)
        return self._added(x, self._mlp_of(self._norm(1)(x)), 1)

    def _norm(self, which: int) -> Any:
        return getattr(self, self.family.norms[which])

    def _added(self, x: mx.array, y: mx.array, which: int) -> mx.array:
        """The residual and what attention (0) or the MLP (1) has computed."""
        sublayer = ("attention", "mlp")[which]
        if self.family.post_norms:
            y = getattr(self, self.family.post_norms[which])(y)
        if f"{sublayer}_output" in self:
            y = self[f"{sublayer}_output"](y)
        return (self[f"{sublayer}_shortcut"](x) if f"{sublayer}_shortcut" in self else x) + y

    def _mlp_of(self, x: mx.array) -> mx.array:
        down = part_of(self, self.family.down)
        if self.mlp_width == 0:
            return down(x)
        made = [part_of(self, name)(x) for name in self.family.ups]
        if self.family.is_gated:
            gate, up = made if len(made) == 2 else mx.split(made[0], 2, axis=-1)
            return down(self.activation(gate) * up)
        return down(self.activation(made[0]))


def norm_of(args: ModelArgs) -> nn.Module:
    """A norm of the residual, as the family has it."""
    if args.family.norm == "layer":
        return nn.LayerNorm(args.width, eps=args.eps)
    return RootMeanSquareNorm(args.width, args.eps, args.family.norm == "rms_from_one")


def put_linears(args: ModelArgs, blocks: list[Any], position: int) -> None:
    """Give a block its linears, each in the form that the plan says."""
    family, block = args.family, blocks[position]
    sliced = args.plans[position].get("sliced") or {}
    entering, middle = sliced.get("entering", args.width), sliced.get("middle", args.width)
    leaving = sliced.get("leaving", args.width)
    attention: Any = getattr(block, family.attention)
    heads, mlp_width = attention.widths, args.owner(position).get("mlp_width")
    mlp_width = args.mlp_width if mlp_width is None else mlp_width
    shapes: dict[str, tuple[int, int]] = {}
    if attention.v_width:
        outputs = heads if len(family.inputs) == 3 else (sum(heads),)
        names = (f"{family.attention}.{name}" for name in family.inputs)
        shapes |= {n: (entering, out) for n, out in zip(names, outputs, strict=True)}
    shapes[f"{family.attention}.{family.output}"] = attention.heads * attention.v_width, middle
    if mlp_width:
        parts = 2 if family.is_gated and len(family.ups) == 1 else 1
        shapes |= {name: (middle, parts * mlp_width) for name in family.ups}
    shapes[family.down] = mlp_width, leaving
    for name, (inputs, outputs) in shapes.items():
        put(block, name, linear_of(args, blocks, position, name, inputs, outputs))


def linear_of(
    args: ModelArgs, blocks: list[Any], position: int, name: str, inputs: int, outputs: int
) -> Any:
    """A linear in its form; all without a bias, which `Model.sanitize` gives to those that have
    one stored."""
    plan = args.plans[position]
    if (stored_at := plan.get("weights_of")) is not None:
        borrowed = Borrowed(blocks, stored_at, name)
        rank = plan.get("adapters", {}).get(name)
        return borrowed if rank is None else Adapted(borrowed, LowRank(inputs, outputs, rank))
    form = plan["linears"].get(name)
    if form is None:
        return nn.Linear(inputs, outputs, bias=False) if inputs else BiasAlone(outputs)
    if form.get("kind") == "head_slices":
        return Sliced(blocks, position, name, form, (outputs, inputs))
    basis_of = form.get("basis_of")
    first = None if basis_of is None else Borrowed(blocks, basis_of, f"{name}.first")
    return LowRank(inputs, outputs, form["rank"], first)


class Model(Named):
    """The causal model: `model` is the stock one with its blocks restructured, as in a folder."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args, self.model_type = args, "foldstack"
        self.base_path, _, self.blocks_name = args.blocks_path.rpartition(".")
        rotary = {kind: Rotary(entry) for kind, entry in (args.rotary or {}).items()}
        blocks: list[Any] = []
        for position, plan in enumerate(args.plans):
            if plan["kind"] in ATTENTION_FREE:
                blocks.append(LightBlock(plan["kind"], args.width, plan["intermediate_size"]))
                continue
            kind = args.kind(position)
            blocks.append(Block(args, position, rotary.get(kind, rotary.get(FULL))))
        for position, block in enumerate(blocks):
            if isinstance(block, Block):
                put_linears(args, blocks, position)
        self.model = nn.Module()
        put(self.model, args.blocks_path, blocks)
        self._put_ends(args)
        for module in self.modules():
            if isinstance(module, Sliced):
                module.connect()
        self.attending = tuple(p for p in range(len(blocks)) if args.attends(p))

    def _put_ends(self, args: ModelArgs) -> None:
        """What is before the blocks and after them."""
        base, family = self.base, args.family
        sliced = args.plans[0].get("sliced")
        entering = args.width if sliced is None else sliced["entering"]
        setattr(base, family.embedding, nn.Embedding(args.vocab_size, entering))
        if family.positions:
            count = args.first("max_position_embeddings", "n_positions") + family.first_position
            setattr(base, family.positions, nn.Embedding(count, entering))
        setattr(base, family.final_norm, norm_of(args))
        if not args.tie_word_embeddings:
            self.model.lm_head = nn.Linear(args.width, args.vocab_size, bias=False)

    @property
    def base(self) -> Any:
        """The stock base model, which holds the blocks."""
        return part_of(self.model, self.base_path)

    @property
    def layers(self) -> list[Any]:
        return getattr(self.base, self.blocks_name)

    def make_cache(self) -> list[Any]:
        """A KV cache for each block that attends."""
        window = self.args.sliding_window
        return [
            RotatingKVCache(max_size=window) if self.args.kind(p) == SLIDING else KVCache()
            for p in self.attending
        ]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Give the linears a bias that have one stored."""
        for path, module in nn.Module.named_modules(self):
            bias = weights.get(f"{path}.bias")
            if bias is not None and isinstance(module, (nn.Linear, BiasAlone)):
                module.bias = mx.zeros_like(bias)
        return weights

    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Logits [batch, tokens, vocabulary]; `cache` is what `make_cache` has made."""
        args, base, family = self.args, self.base, self.args.family
        caches = dict(zip(self.attending, cache or [None] * len(self.attending), strict=True))
        embed = getattr(base, family.embedding)
        x = embed(inputs) if input_embeddings is None else input_embeddings
        if family.norm == "rms_from_one":  # Gemma's, rounded as its weights are
            x = x * mx.array(args.width**0.5).astype(x.dtype)
        if family.positions:
            known = next(iter(caches.values()), None)
            places = mx.array(0 if known is None else known.offset)[..., None]
            places = places + mx.arange(x.shape[1]) + family.first_position
            x = x + getattr(base, family.positions)(places)
        masks: dict[str, Any] = {}
        for position, block in enumerate(self.layers):
            kind, known = args.kind(position), caches.get(position)
            if position in caches and kind not in masks:
                masks[kind] = self._mask(x, kind, known)
            x = block(x, masks.get(kind), known)
        x = getattr(base, family.final_norm)(x)
        logits = embed.as_linear(x) if args.tie_word_embeddings else self.model.lm_head(x)
        cap = args.final_logit_softcapping
        return mx.tanh(logits / cap) * cap if cap else logits

    def _mask(self, x: mx.array, kind: str, cache: Any) -> Any:
        window = self.args.sliding_window if kind == SLIDING else None
        is_array = self.args.softcap is not None
        return create_attention_mask(x, cache, window_size=window, return_array=is_array)
