"""A compressed decoder: a stock Hugging Face model whose blocks were restructured after a plan.

This file is copied beside the weights of every portable checkpoint, so it needs nothing but torch
and transformers: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads the
folder where foldstack is not installed. It is the only interpreter of a plan there is; `surgery.py`
uses it too.

Each stored tensor exists once. A position that uses another's weights holds a `Borrowed` module,
which has no parameters and looks the owner's module up when it is called; so nothing has to be
tied, and an adapter put on the owner (peft) is at once the adapter of every borrower.
"""

import copy
import sys
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION_FREE = ("ffn", "swiglu")

# The linears that a narrower block resizes, by the names that the supported families give them.
ATTENTION_NAMES = ("self_attn", "attn")
FUSED_QKV_NAMES = ("qkv_proj", "c_attn")
ATTENTION_OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj")
MLP_UP_NAMES = ("mlp.gate_proj", "mlp.up_proj", "fc1", "mlp.c_fc")
MLP_FUSED_NAMES = ("mlp.gate_up_proj",)
MLP_DOWN_NAMES = ("mlp.down_proj", "fc2", "mlp.c_proj")
QKV_NAMES = ("q_proj", "k_proj", "v_proj", *FUSED_QKV_NAMES)

# The norms before attention and before the MLP, by family.
PRE_NORM_NAMES = (
    ("input_layernorm", "post_attention_layernorm"),
    ("self_attn_layer_norm", "final_layer_norm"),
    ("ln_1", "ln_2"),
)


class FoldstackConfig(PreTrainedConfig):
    """The stock config of the executed depth, and the plan that restructures its blocks."""

    model_type = "foldstack"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "base_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    def __init__(
        self,
        base_config: dict[str, Any] | PreTrainedConfig | None = None,
        plan: dict[str, Any] | None = None,
        blocks_path: str = "model.layers",
        **kwargs: Any,
    ) -> None:
        self.base_config: Any = base_config
        self.plan = plan
        self.blocks_path = blocks_path
        super().__init__(**kwargs)

    @property
    def block_plans(self) -> list[dict[str, Any]]:
        return (self.plan or {}).get("blocks", [])

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The stock config as a KV cache must see it: attention-free blocks have no entry."""
        attends = [block["kind"] not in ATTENTION_FREE for block in self.block_plans]
        if all(attends):
            return self.base_config
        seen_by_cache = copy.deepcopy(self.base_config)
        layer_types = getattr(self.base_config, "layer_types", None)
        seen_by_cache.num_hidden_layers = sum(attends)
        if layer_types is not None:
            seen_by_cache.layer_types = [
                t for t, has in zip(layer_types, attends, strict=True) if has
            ]
        return seen_by_cache

    # What generic tools (lm-eval, generation, serving) read from a causal model's config.
    @property
    def vocab_size(self) -> int:
        return self.base_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of what the head reads; in a sliced model the embeddings are narrower."""
        return self.base_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.base_config.num_hidden_layers

    @property
    def max_position_embeddings(self) -> int:
        return self.base_config.max_position_embeddings


class Borrowed(nn.Module):
    """Stands where a position uses a module stored elsewhere; has no parameters of its own."""

    def __init__(self, holder: nn.Module, name: str) -> None:
        super().__init__()
        # In a tuple, nn.Module does not see the holder and register its parameters again.
        self._holder = (holder,)
        self._name = name

    @property
    def target(self) -> nn.Module:
        """The module itself, found anew at each call: it may have been wrapped by an adapter."""
        return getattr(self._holder[0], self._name)

    @property
    def weight(self) -> Any:
        return self.target.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.target(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{type(self._holder[0]).__name__}.{self._name}"


class LowRankLinear(nn.Module):
    """y = second(first(x)): a linear of rank `rank`; the bias, if any, sits on `second`."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.first: nn.Module = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class AdaptedLinear(nn.Module):
    """y = borrowed(x) + second(first(x)) + b: another position's linear and an own adapter.

    The adapter stays apart from the borrowed weights, or nothing would be shared any more.
    Source: FlexiGPT, arXiv 2501.14713, section 3.4.
    """

    def __init__(self, borrowed: Borrowed, adapter: LowRankLinear) -> None:
        super().__init__()
        self.borrowed = borrowed
        self.adapter = adapter

    @property
    def weight(self) -> Any:
        return self.borrowed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.borrowed(x) + self.adapter(x)
        return result


class SublayerOutput(nn.Module):
    """What is done to attention's or the MLP's output before it is added to the residual.

    normed: (y - mean(y)) / std(y) * weight, FlexiGPT, arXiv 2501.14713, equation 6;
    scaled: y * weight, FoldGPT, arXiv 2407.00928.
    """

    EPS = 1e-5

    def __init__(self, kind: str, hidden_size: int) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self._handle: RemovableHandle | None = None

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        changed = y if self.kind == "scaled" else self.unit(y)
        return (changed * self.weight).to(y.dtype)

    def unit(self, y: torch.Tensor) -> torch.Tensor:
        """(y - mean(y)) / std(y) per token, in float32 at least."""
        precise = y.to(torch.promote_types(y.dtype, torch.float32))
        return nn.functional.layer_norm(precise, y.shape[-1:], eps=self.EPS)

    def after(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Forward hook; being a method it goes with its module when a model is deep-copied."""
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)

    def begin(self, block: Any, _args: Any) -> None:
        """Forward pre-hook of an OPT block, whose MLP ends in a linear of the block itself.

        What stands there may be an adapter (peft) by now, and others may borrow it: the hook is on
        it only while its own block runs.
        """
        self.end()
        self._handle = block.fc2.register_forward_hook(self.after)

    def end(self, *_: Any) -> None:
        """Forward hook of the same block."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class SlicedLinear(nn.Module):
    """y = W x + b, where some slices of W are stored here and the others at other positions.

    W is put together at each call: memory is saved, arithmetic is not. What is stored is a linear
    of the stock class, so that it trains and takes adapters like any other.
    Source of the idea: head-wise shareable attention, arXiv 2402.11819.
    """

    def __init__(self, dense: Any, form: dict[str, Any]) -> None:
        super().__init__()
        self.form = form
        self.along_out = form["axis"] == "out"
        self.is_conv1d = type(dense).__name__ == "Conv1D"
        self.shape = linear_shape(dense)
        width = self.shape[0 if self.along_out else 1]
        self.indices = slice_indices(form, width)
        mine = zip(self.indices, form["slices"], strict=True)
        self.own = sorted(i for indices, origin in mine if origin is None for i in indices)
        """What of the whole is stored here, along the axis, in this order."""
        self.lenders: tuple[Borrowed, ...] = ()
        self._runs: list[tuple[int, int, int]] = []
        dense.weight = nn.Parameter(self.own_part("weight", dense.weight.detach()))
        if dense.bias is not None:
            dense.bias = nn.Parameter(self.own_part("bias", dense.bias.detach()))
        names = ("nf", "nx") if self.is_conv1d else ("out_features", "in_features")
        setattr(dense, names[0 if self.along_out else 1], len(self.own))
        self.stored: nn.Module = dense

    def own_part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What is stored here of the whole weight or bias."""
        if name == "bias" and not self.along_out:
            return whole
        dim = 0 if name == "bias" else self._dim
        return whole.index_select(
            dim, torch.tensor(self.own, dtype=torch.long, device=whole.device)
        )

    @property
    def _dim(self) -> int:
        """Dimension of the stored weight that is cut; a Conv1D's is transposed."""
        return int(self.along_out == self.is_conv1d)

    def connect(self, here: int, lenders: dict[int, tuple[Borrowed, list[int]]]) -> None:
        """Use the slices of these linears: by position, the linear and what it stores; this one is
        at position `here`."""
        self.lenders = tuple(lender for lender, _ in lenders.values())
        stored = [self.own, *(indices for _, indices in lenders.values())]
        place_in = [{index: place for place, index in enumerate(indices)} for indices in stored]
        number = {here: 0} | {position: 1 + k for k, position in enumerate(lenders)}
        places = {}
        for index, (mine, origin) in enumerate(zip(self.indices, self.form["slices"], strict=True)):
            position, theirs = (here, index) if origin is None else origin
            holder = number[position]
            for my, their in zip(mine, self.indices[theirs], strict=True):
                places[my] = holder, place_in[holder][their]
        self._runs = _runs([places[i] for i in range(len(places))])

    def _whole(self, name: str, dim: int) -> torch.Tensor:
        tensors = [getattr(linear, name) for linear in (self.stored, *self._lending())]
        parts = [tensors[k].narrow(dim, start, length) for k, start, length in self._runs]
        return torch.cat(parts, dim)

    def _lending(self) -> list[nn.Module]:
        return [lender.target for lender in self.lenders]

    @property
    def weight(self) -> torch.Tensor:
        """The whole weight, as the stock class stores it."""
        return self._whole("weight", self._dim)

    @property
    def bias(self) -> Any:
        bias = self.stored.bias
        return bias if bias is None or not self.along_out else self._whole("bias", 0)

    @property
    def borrowed_weights(self) -> int:
        """How many of the weights are stored elsewhere."""
        stored: Any = self.stored.weight
        return self.shape[0] * self.shape[1] - stored.numel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        return nn.functional.linear(x, weight.T if self.is_conv1d else weight, self.bias)


def slice_indices(form: dict[str, Any], width: int) -> list[list[int]]:
    """Per slice of a linear, which of its outputs or inputs are in it."""
    parts = form["parts"] or [width]
    count = len(form["slices"])
    if sum(parts) != width or any(part % count for part in parts):
        raise ValueError(f"{count} equal slices of parts {list(parts)} are not {width} wide")
    starts = [sum(parts[:number]) for number in range(len(parts))]
    return [
        [
            start + index * (part // count) + offset
            for start, part in zip(starts, parts, strict=True)
            for offset in range(part // count)
        ]
        for index in range(count)
    ]


def _runs(places: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(holder, place) one after another as (holder, first place, how many)."""
    runs: list[tuple[int, int, int]] = []
    for holder, place in places:
        if runs and runs[-1][0] == holder and sum(runs[-1][1:]) == place:
            runs[-1] = (holder, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((holder, place, 1))
    return runs


class _Ffn(nn.Module):
    """W2 relu(W1 x + b1) + b2."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.relu(self.up(x)))


class _SwiGlu(nn.Module):
    """W_down(silu(W_gate x) * W_up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class AttentionFreeBlock(nn.Module):
    """A light network in place of a run of blocks: no attention, no norm, no residual.

    Source: LLM-Streamline, arXiv 2403.19135, section 3 (FFN and SwiGLU replacements).
    """

    def __init__(self, kind: str, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        network = {"ffn": _Ffn, "swiglu": _SwiGlu}[kind]
        self.ffn = network(hidden_size, intermediate_size)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.ffn(hidden_states)


class RootMeanSquareNorm(nn.Module):
    """x / sqrt(sum(x^2) / full_width + eps): the norm of a vector of which some coordinates may be
    gone. It has no parameters: a gain would not commute with a change of basis."""

    def __init__(self, full_width: int, eps: float) -> None:
        super().__init__()
        self.full_width, self.eps = full_width, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = precise.square().sum(-1, keepdim=True) / self.full_width
        return (precise * torch.rsqrt(mean_square + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"full_width={self.full_width}, eps={self.eps}"


class _Widened(nn.Module):
    """Zeros up to `full_width`: GPT-2 reshapes what leaves its blocks to what enters them."""

    def __init__(self, full_width: int) -> None:
        super().__init__()
        self.full_width = full_width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x, (0, self.full_width - x.shape[-1]))


class SlicedBlock(GradientCheckpointingLayer):
    """A pre-norm block on a narrower residual stream: h = A x + attention(norm(x)), then
    B h + mlp(norm(h)).

    Attention and the MLP are the stock modules under their stock names, with narrower linears where
    they read from the residual stream and write to it. A and B lead from one link's basis to the
    next one's. Source: SliceGPT, arXiv 2401.15024, section 3.
    """

    def __init__(self, stock: Any, widths: dict[str, int], full_width: int) -> None:
        super().__init__()
        entering, middle, leaving = (widths[n] for n in ("entering", "middle", "leaving"))
        self.entering = entering
        for name, child in stock.named_children():
            self.add_module(name, child)
        self._attention_name = next(name for name in ATTENTION_NAMES if hasattr(stock, name))
        self._norm_names = next(names for names in PRE_NORM_NAMES if hasattr(stock, names[0]))
        for name in self._norm_names:
            norm = getattr(stock, name)
            # LayerNorm and the families' RMS norms have different names for it.
            eps = getattr(norm, "eps", None) or norm.variance_epsilon
            setattr(self, name, RootMeanSquareNorm(full_width, eps))
        for names, inputs, outputs in (
            ([f"{self._attention_name}.{name}" for name in QKV_NAMES], entering, None),
            ([f"{self._attention_name}.{name}" for name in ATTENTION_OUTPUT_NAMES], None, middle),
            ((*MLP_UP_NAMES, *MLP_FUSED_NAMES), middle, None),
            (MLP_DOWN_NAMES, None, leaving),
        ):
            for name in names:
                _resize(self, name, inputs, outputs)
        self.attention_shortcut = nn.Linear(entering, middle, bias=False)
        self.mlp_shortcut = nn.Linear(middle, leaving, bias=False)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # GPT-2 passes these by position, and what only cross-attention reads.
        kwargs |= dict(zip(("past_key_values", "attention_mask"), args, strict=False))
        kwargs.pop("encoder_attention_mask", None)
        hidden_states = hidden_states[..., : self.entering]  # the rest is padding (GPT-2)
        before_attention, before_mlp = (getattr(self, name) for name in self._norm_names)
        attention = getattr(self, self._attention_name)
        attended = attention(hidden_states=before_attention(hidden_states), **kwargs)[0]
        middle = self.attention_shortcut(hidden_states) + attended
        return self.mlp_shortcut(middle) + self._mlp_of(before_mlp(middle))

    @property
    def mlp_norm(self) -> nn.Module:
        return getattr(self, self._norm_names[1])

    def _mlp_of(self, x: torch.Tensor) -> torch.Tensor:
        parts: dict[str, Any] = dict(self.named_children())
        if "mlp" in parts:
            return parts["mlp"](x)
        # OPT's is not a module of its own.
        return parts["fc2"](parts["activation_fn"](parts["fc1"](x)))


class NarrowAttention(nn.Module):
    """Causal self-attention with fewer coordinates per head than the stock module it stands for.

    The same projections under the same names, with queries and keys of `qk_dim` and values of
    `v_dim` coordinates per head. The scale of the scores is the stock one: what is left of a dot
    product estimates the whole (MoDeGPT, arXiv 2408.09632). Every key head has its own selection
    of the stock rotary frequencies, shared by the query heads that read it.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    rotary_pairs: torch.Tensor | None
    """[kv_heads, rotary_dim / 2]: which of the stock frequencies each key head has kept."""

    def __init__(self, stock: Any, form: dict[str, Any]) -> None:
        super().__init__()
        config = stock.config
        self.config, self.layer_idx, self.is_causal = config, stock.layer_idx, stock.is_causal
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.qk_dim, self.v_dim = form["qk_dim"], form["v_dim"]
        self.scaling = stock.scaling
        self.sliding_window = getattr(
            stock, "sliding_window", getattr(config, "sliding_window", None)
        )
        is_capped = config.model_type == "gemma2"  # gemma3 has the entry and does not use it
        self.softcap = config.attn_logit_softcapping if is_capped else None
        self.attention_dropout = _dropout_of(stock)
        self.resid_dropout = getattr(stock, "resid_dropout", nn.Identity())
        self._eager = sys.modules[type(stock).__module__].eager_attention_forward
        self._resize_linears(stock, form["value_bias_in_output"])
        for name in ("q_norm", "k_norm"):
            norm = copy.deepcopy(getattr(stock, name, None))
            if norm is not None:
                norm.weight = nn.Parameter(norm.weight.new_ones(self.qk_dim))
            setattr(self, name, norm)
        pairs = torch.arange(form["rotary_dim"] // 2).repeat(self.num_kv_heads, 1)
        self.register_buffer("rotary_pairs", pairs if pairs.numel() else None)

    def _resize_linears(self, stock: Any, value_bias_in_output: bool) -> None:
        q, k, v = self._split_sizes()
        sizes = {"q_proj": q, "k_proj": k, "v_proj": v} | dict.fromkeys(FUSED_QKV_NAMES, q + k + v)
        for name, size in sizes.items():
            linear = getattr(stock, name, None)
            if linear is not None:
                bias = linear.bias is not None and not (name == "v_proj" and value_bias_in_output)
                setattr(self, name, _resized(linear, linear_shape(linear)[1], size, bias))
        name = next(name for name in ATTENTION_OUTPUT_NAMES if hasattr(stock, name))
        linear = getattr(stock, name)
        bias = linear.bias is not None or value_bias_in_output
        inner = self.num_heads * self.v_dim
        setattr(self, name, _resized(linear, inner, linear_shape(linear)[0], bias))
        self._output_name = name

    def _split_sizes(self) -> tuple[int, int, int]:
        """Widths of all queries, all keys and all values."""
        keys = self.num_kv_heads * self.qk_dim
        return self.num_heads * self.qk_dim, keys, self.num_kv_heads * self.v_dim

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self._projected(hidden_states)
        if position_embeddings is not None and self.rotary_pairs is not None:
            cos, sin = (self._of_kept_pairs(table) for table in position_embeddings)
            key = _rotated(key, cos, sin)
            groups = self.num_key_value_groups
            query = _rotated(query, *(t.repeat_interleave(groups, dim=1) for t in (cos, sin)))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        kind = self.config._attn_implementation
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(kind, self._eager)
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        if query.shape[2] > 1:
            query, key, value = self._of_one_width(query, key, value)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output = output[..., : self.v_dim].reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.resid_dropout(getattr(self, self._output_name)(output)), weights

    def _projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values as [batch, heads, tokens, coordinates], normed, not rotated."""
        fused = [getattr(self, name) for name in FUSED_QKV_NAMES if hasattr(self, name)]
        if fused:
            query, key, value = fused[0](x).split(self._split_sizes(), dim=-1)
        else:
            query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        query, key = (t.unflatten(-1, (-1, self.qk_dim)) for t in (query, key))
        value = value.unflatten(-1, (-1, self.v_dim))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _of_one_width(self, *heads: torch.Tensor) -> list[torch.Tensor]:
        """With zeros up to one width, without which the fused kernels refuse and the whole matrix
        of scores is written to memory. One query alone has a row of them: not worth the copies."""
        width = max(self.qk_dim, self.v_dim)
        return [nn.functional.pad(x, (0, width - x.shape[-1])) for x in heads]

    def _of_kept_pairs(self, table: torch.Tensor) -> torch.Tensor:
        """A table [batch, tokens, rotary] of all frequencies as [batch, kv_heads, tokens, kept]."""
        kept = table[..., self.rotary_pairs].transpose(1, 2)
        return torch.cat((kept, kept), dim=-1)


def _dropout_of(attention: Any) -> float:
    """The dropout of the scores, by the three names that the families have for it."""
    if hasattr(attention, "attn_dropout"):
        return attention.attn_dropout.p
    return getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first coordinates of each head rotated, i together with i + half; the others as are."""
    rotating, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotating.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.cat((rotating * cos + turned * sin, still), dim=-1)


def restructure(
    model: PreTrainedModel, block_plans: list[dict[str, Any]], blocks_path: str
) -> None:
    """Change the blocks of a stock model of the executed depth, in place, as the plan says."""
    blocks = model.get_submodule(blocks_path)
    assert isinstance(blocks, nn.ModuleList)
    assert len(blocks) == len(block_plans)
    attention_position = 0
    for position, block_plan in enumerate(block_plans):
        if block_plan["kind"] in ATTENTION_FREE:
            blocks[position] = AttentionFreeBlock(
                block_plan["kind"], model.config.hidden_size, block_plan["intermediate_size"]
            )
            continue
        stored_at = block_plan["weights_of"]
        _narrow(blocks[position], block_plan if stored_at is None else block_plans[stored_at])
        sliced = block_plan.get("sliced")
        if sliced is not None:
            blocks[position] = SlicedBlock(blocks[position], sliced, model.config.hidden_size)
            if position == 0:
                _narrow_embeddings(model, blocks, sliced["entering"])
        for module in blocks[position].modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = attention_position  # type: ignore[assignment]  # in the KV cache
        attention_position += 1
        for name, form in block_plan["linears"].items():
            if form.get("kind") == "head_slices":
                parent, attribute = _split(name)
                holder = blocks[position].get_submodule(parent)
                setattr(holder, attribute, SlicedLinear(getattr(holder, attribute), form))
            else:
                _factor_linear(blocks, position, name, form)
    # An owner may come after its borrowers, so every linear has its form before any is borrowed.
    for position, block_plan in enumerate(block_plans):
        for name, form in block_plan["linears"].items():
            if form.get("kind") == "head_slices":
                _connect_slices(blocks, position, name)
        if block_plan["weights_of"] is not None:
            adapters = block_plan.get("adapters", {})
            _borrow_linears(blocks[block_plan["weights_of"]], blocks[position], adapters)
        if block_plan.get("outputs", "plain") != "plain":
            _change_outputs(blocks[position], block_plan["outputs"], model.config.hidden_size)


def _split(path: str) -> tuple[str, str]:
    parent, _, name = path.rpartition(".")
    return parent, name


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear and for transformers' Conv1D (GPT-2), whose weight is transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear or a Conv1D."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)


def _narrow(block: nn.Module, block_plan: dict[str, Any]) -> None:
    """Give a stock block the widths of its plan; plans from before there were any have none."""
    width, heads = block_plan.get("mlp_width"), block_plan.get("narrow_heads")
    if width is not None:
        for name in (*MLP_UP_NAMES, *MLP_FUSED_NAMES, *MLP_DOWN_NAMES):
            _narrow_mlp_linear(block, name, width)
    if heads is not None:
        name = next(name for name in ATTENTION_NAMES if hasattr(block, name))
        setattr(block, name, NarrowAttention(getattr(block, name), heads))


def _narrow_mlp_linear(block: nn.Module, name: str, width: int) -> None:
    if name in MLP_DOWN_NAMES:
        _resize(block, name, width, None)
    else:
        _resize(block, name, None, 2 * width if name in MLP_FUSED_NAMES else width)


def _resize(block: nn.Module, name: str, in_features: int | None, out_features: int | None) -> None:
    """Give a linear of a block another width; None leaves it, and so does another family's name."""
    parent_path, attribute = _split(name)
    parent = getattr(block, parent_path, None) if parent_path else block
    linear: Any = getattr(parent, attribute, None)
    if linear is None:
        return
    outputs, inputs = linear_shape(linear)
    inputs, outputs = in_features or inputs, out_features or outputs
    setattr(parent, attribute, _resized(linear, inputs, outputs, linear.bias is not None))


def _narrow_embeddings(model: PreTrainedModel, blocks: nn.Module, width: int) -> None:
    """All tables outside the blocks: tokens, and learned positions where there are any."""
    inside = set(blocks.modules())
    base: Any = model.base_model
    if hasattr(base, "drop"):  # GPT-2's last step before its blocks
        base.drop = nn.Sequential(base.drop, _Widened(model.config.hidden_size))
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module not in inside:
            module.weight = nn.Parameter(module.weight.new_zeros(module.num_embeddings, width))
            module.embedding_dim = width


def _resized(linear: Any, in_features: int, out_features: int, bias: bool) -> nn.Module:
    """A linear of the same class; a Conv1D always has a bias."""
    if type(linear).__name__ == "Conv1D":
        return type(linear)(out_features, in_features)
    return nn.Linear(in_features, out_features, bias=bias)


def _factor_linear(blocks: nn.ModuleList, position: int, name: str, form: dict[str, Any]) -> None:
    parent_path, attribute = _split(name)
    parent = blocks[position].get_submodule(parent_path)
    dense = getattr(parent, attribute)
    out_features, in_features = linear_shape(dense)
    factored = LowRankLinear(in_features, out_features, form["rank"], dense.bias is not None)
    if form.get("basis_of") is not None:
        holder: Any = blocks[form["basis_of"]].get_submodule(name)
        if holder.first.weight.shape[1] != in_features:
            raise ValueError(
                f"position {position} has {in_features} inputs to {name} and shares the basis of "
                f"position {form['basis_of']}, which has {holder.first.weight.shape[1]}"
            )
        factored.first = Borrowed(holder, "first")
    setattr(parent, attribute, factored)


def _connect_slices(blocks: nn.ModuleList, position: int, name: str) -> None:
    linear = blocks[position].get_submodule(name)
    assert isinstance(linear, SlicedLinear)
    parent_path, attribute = _split(name)
    lenders = {}
    for origin in linear.form["slices"]:
        if origin is None or origin[0] == position or origin[0] in lenders:
            continue
        holder = blocks[origin[0]].get_submodule(parent_path)
        lender: Any = getattr(holder, attribute)
        is_sliced = isinstance(lender, SlicedLinear)
        if lender.shape != linear.shape if is_sliced else linear_shape(lender) != linear.shape:
            raise ValueError(f"positions {position} and {origin[0]} have other shapes of {name}")
        if is_sliced:
            lenders[origin[0]] = Borrowed(lender, "stored"), lender.own
        else:
            everything = range(sum(map(len, linear.indices)))
            lenders[origin[0]] = Borrowed(holder, attribute), list(everything)
    linear.connect(position, lenders)


def _borrow_linears(owner: nn.Module, borrower: nn.Module, adapters: dict[str, int]) -> None:
    linears = [
        name
        for name, module in owner.named_modules()
        if isinstance(module, (LowRankLinear, SlicedLinear))
        or (is_linear(module) and not _inside_form(owner, name))
    ]
    assert set(adapters) <= set(linears), f"no linear {sorted(set(adapters) - set(linears))}"
    for name in linears:
        parent_path, attribute = _split(name)
        parent = borrower.get_submodule(parent_path)
        borrowed = Borrowed(owner.get_submodule(parent_path), attribute)
        linear: nn.Module = borrowed
        if name in adapters:
            own: Any = getattr(parent, attribute)  # the stock one, which has the shape and the bias
            out_features, in_features = linear_shape(own)
            adapter = LowRankLinear(in_features, out_features, adapters[name], own.bias is not None)
            linear = AdaptedLinear(borrowed, adapter)
        setattr(parent, attribute, linear)


def sublayer_ends(block: Any) -> tuple[nn.Module, nn.Module]:
    """The modules whose outputs are added to the residual: attention's, and the MLP's.

    In gemma 2 and 3 they are the post-norms: a small gain before one would be normed away.
    """
    if hasattr(block, "post_feedforward_layernorm"):
        return block.post_attention_layernorm, block.post_feedforward_layernorm
    attention = block.attn if hasattr(block, "attn") else block.self_attn
    return attention, block.mlp if hasattr(block, "mlp") else block.fc2


def _change_outputs(block: Any, kind: str, hidden_size: int) -> None:
    block.attention_output = SublayerOutput(kind, hidden_size)
    block.mlp_output = SublayerOutput(kind, hidden_size)
    attention, mlp = sublayer_ends(block)
    attention.register_forward_hook(block.attention_output.after)
    if hasattr(block, "fc2"):
        block.register_forward_pre_hook(block.mlp_output.begin)
        block.register_forward_hook(block.mlp_output.end, always_call=True)
    else:
        mlp.register_forward_hook(block.mlp_output.after)


def _inside_form(block: nn.Module, name: str) -> bool:
    return isinstance(block.get_submodule(_split(name)[0]), (LowRankLinear, SlicedLinear))


class FoldstackForCausalLM(PreTrainedModel, GenerationMixin):
    """A stock causal model whose blocks were restructured after `config.plan`."""

    config_class = FoldstackConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: FoldstackConfig) -> None:
        super().__init__(config)
        stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.base_config)]
        self.model = stock_class(config.base_config)
        restructure(self.model, config.block_plans, config.blocks_path)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.set_output_embeddings(value)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.model.prepare_inputs_for_generation(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """The stock model's forward, on a cache that has entries for the attending blocks alone."""
        wants_cache = self.model.config.use_cache if use_cache is None else use_cache
        if wants_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


AutoConfig.register(FoldstackConfig.model_type, FoldstackConfig, exist_ok=True)
AutoModelForCausalLM.register(FoldstackConfig, FoldstackForCausalLM, exist_ok=True)
