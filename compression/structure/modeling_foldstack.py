"""A compressed decoder: a stock Hugging Face model whose blocks were restructured after a plan.

This file is copied beside the weights of every portable checkpoint, so it needs nothing but torch
and transformers: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads the
folder where foldstack is not installed. It is the only interpreter of a plan there is; `surgery.py`
uses it too.

Each stored tensor exists once. A position that uses another's weights holds a `Borrowed` module,
which has no parameters and looks the owner's module up when it is called; so nothing has to be
tied, and an adapter put on the owner (peft) is at once the adapter of every borrower. Weights are
never read behind the forward of the module that stores them where that forward may be more than
their product (adapters, offloading, quantised weights, the linears of a serving engine).

Stock code goes by class and by name: it records outputs, checkpoints gradients, splits models and
fuses linears by the class of a module, and hands arguments over by position or under names that
change between versions. So what stands in a stock module's place is of its class too (`both`), each
differently built attention or MLP is of a class of its own, and arguments are taken by the stock
module's own signature.
"""

import copy
import copyreg
import importlib
import inspect
import logging
import operator
import re
import sys
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import init_hf_modules
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = (5, 10), (5, 24)
"""The minor versions between which this file was tested, both included."""

logger = logging.getLogger(__name__)


def version_warning(version: str) -> str | None:
    """What is to be said of a version of transformers under which nothing was tested."""
    found = re.match(r"(\d+)\.(\d+)", version)
    numbers = tuple(map(int, found.groups())) if found else ()
    if OLDEST_TRANSFORMERS <= numbers <= NEWEST_TRANSFORMERS:
        return None
    oldest, newest = (".".join(map(str, of)) for of in (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS))
    return (
        f"this model's code was tested under transformers {oldest} to {newest}, and this is "
        f"{version}: compare what it decodes from its KV cache with the logits of the whole text "
        "before you rely on it"
    )


if (said := version_warning(transformers.__version__)) is not None:
    logger.warning(said)

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


# Entries that a config of ours holds itself; all others are those of the stock config.
_COMMON = frozenset(vars(PreTrainedConfig()))
_OF_THE_FOLDER = ("architectures", "auto_map", "model_type", "quantization_config")
_OF_THE_CALL = (
    "attn_implementation",
    "experts_implementation",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "torch_dtype",
    "transformers_version",
)


class FoldstackConfig(PreTrainedConfig):
    """The stock config of the executed depth, entry by entry, and the plan that restructures it.

    In JSON all entries stand side by side, as engines read them. In memory those of the stock
    config live in `base_config`, which the stock modules hold, and this config answers for it in
    both directions: what is read or written here is read and written there.

    Args:
        base_config: the stock config or its entries; None where `entries` are those (flat JSON).
            Folders of foldstack 0.1 and before have it as one nested entry.
        plan: the structure, as `Plan.model_dump(mode="json")` writes it.
        blocks_path: where the blocks are in the stock causal model.
        base_model_type: `model_type` of the stock config.
    """

    model_type = "foldstack"

    def __init__(
        self,
        base_config: dict[str, Any] | PreTrainedConfig | None = None,
        plan: dict[str, Any] | None = None,
        blocks_path: str = "model.layers",
        base_model_type: str = "llama",
        **entries: Any,
    ) -> None:
        own = entries
        if base_config is None:
            names = {*_COMMON, *_OF_THE_FOLDER, *_OF_THE_CALL}
            own = {name: value for name, value in entries.items() if name in names}
            not_stock = {*_OF_THE_FOLDER, "name_or_path", "transformers_version"}
            base_config = {n: value for n, value in entries.items() if n not in not_stock}
            base_config["model_type"] = base_model_type
        if not isinstance(base_config, PreTrainedConfig):
            stock = dict(base_config)
            base_config = CONFIG_MAPPING[stock.pop("model_type", base_model_type)](**stock)
        self.plan = plan
        self.blocks_path = blocks_path
        super().__init__(**own)
        self.base_config: Any = base_config

    def __getattr__(self, name: str) -> Any:
        base = vars(self).get("base_config")
        if base is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = vars(self).get("base_config")
        is_stock = base is not None and name not in vars(self) and hasattr(base, name)
        is_common = hasattr(PreTrainedConfig, name) or name in _COMMON
        if is_stock or (is_common and base is not None and name != "architectures"):
            setattr(base, name, value)
        if is_common or not is_stock:
            super().__setattr__(name, value)  # type: ignore[no-untyped-call]

    def to_dict(self) -> dict[str, Any]:
        """All entries side by side; `base_model_type` says whose they are."""
        own = super().to_dict()
        own.pop("base_config")
        base = self.base_config.to_dict()
        own["base_model_type"] = base.pop("model_type")
        return base | own

    @property
    def block_plans(self) -> list[dict[str, Any]]:
        return (self.plan or {}).get("blocks", [])

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """This config itself: one with another in it is taken for that of a multimodal model."""
        return self

    @property
    def _attends(self) -> list[bool]:
        plans = self.block_plans
        return [attends(plans, position) for position in range(len(plans))]

    @property
    def num_hidden_layers(self) -> int:
        """How many blocks attend, which caches and engines count by; all without a plan. In JSON
        and in `base_config` it is all executed blocks."""
        attends = self._attends
        return sum(attends) if attends else self.base_config.num_hidden_layers

    @property
    def layer_types(self) -> list[str] | None:
        """The kinds of attention of the blocks that attend; stock configs without it have none."""
        types = self.base_config.layer_types
        if types is None or not self._attends:
            return types
        return [kind for kind, attends in zip(types, self._attends, strict=True) if attends]


def attends(block_plans: list[dict[str, Any]], position: int) -> bool:
    """Whether a block has attention, and attention has heads of some width."""
    block_plan = block_plans[position]
    stored_at = block_plan.get("weights_of")
    owner = block_plan if stored_at is None else block_plans[stored_at]
    heads = owner.get("narrow_heads")
    return block_plan["kind"] not in ATTENTION_FREE and (heads is None or heads["v_dim"] > 0)


# How a KV cache has been called in the arguments of stock blocks. Since 5.24 it is `cache`; before,
# `cache` was what continuous batching hands to its attention function.
_CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")
_NEW_CACHE_NAME = "cache"


def argument_names(module_class: Any) -> tuple[str, ...]:
    """The arguments that a stock module's forward takes by position, without self."""
    parameters = inspect.signature(module_class.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]


def cache_name(module_class: Any) -> str:
    """What the forward of a stock module calls its KV cache."""
    is_new = _NEW_CACHE_NAME in argument_names(module_class)
    return _NEW_CACHE_NAME if is_new else _CACHE_NAMES[0]


def take_cache(arguments: dict[str, Any], name: str) -> Any:
    """Take the KV cache out of named arguments, whichever of its names it goes by."""
    found = arguments.pop(name, None)
    others = [arguments.pop(other, None) for other in _CACHE_NAMES]
    return next((cache for cache in others if cache is not None), None) if found is None else found


class _Call:
    """Pickled, what a call gives in the process that unpickles it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


def _imported(module: str) -> _Call:
    """A module, where code that came with a folder may be imported at all: transformers lets that
    be found in each process by itself."""
    first = _Call(init_hf_modules)
    return _Call(operator.itemgetter(1), (first, _Call(importlib.import_module, module)))


class _Pickled(type):
    """Class of the classes that another process could not find by their names."""


def _reduced(found: Any) -> tuple[Any, ...]:
    if found in _CLASSES.values():
        (bases, form), _ = next(item for item in _CLASSES.items() if item[1] is found)
        return _class_of, (found.__name__, bases, form)
    return getattr, (_imported(found.__module__), found.__name__)


copyreg.pickle(_Pickled, _reduced)
_CLASSES: dict[tuple[Any, ...], Any] = {}


def _class_of(name: str, bases: tuple[Any, ...], form: tuple[str, ...] = ()) -> Any:
    """The one class with these bases for modules of this form."""
    if (bases, form) not in _CLASSES:
        _CLASSES[bases, form] = _Pickled(name, bases, {"__module__": __name__, "form": form})
    return _CLASSES[bases, form]


def both(ours: Any, stock: Any) -> Any:
    """A class of ours that is a stock one too, for all that goes by the class of a module."""
    return _class_of(f"{ours.__name__}Of{stock.__name__}", (ours, stock))


def product(x: Any, *linears: Any) -> Any:
    """What the last of the linears makes of what the others have made of x, in turn.

    Without the calls around each product where there is nothing in them: they take as long as a
    small product, and a structure has more of those than the dense model.
    """
    if torch.compiler.is_compiling():
        for linear in linears:
            x = linear(x)
        return x
    for linear in linears:
        while type(linear) is Borrowed and not _is_watched(linear):
            linear = linear._holder[0]._modules[linear.name]
        state = linear.__dict__
        held = state["_parameters"]
        if (
            type(linear) is not nn.Linear
            or state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
            or "weight" not in held
        ):
            x = linear(x)
        else:
            x = nn.functional.linear(x, held["weight"], held["bias"])
    return x


def _is_watched(module: nn.Module) -> bool:
    """Whether a call of the module is more than its class says: hooks, or a forward of its own."""
    state = module.__dict__
    return (
        "forward" in state
        or bool(state["_forward_hooks"] or state["_forward_pre_hooks"])
        or bool(state["_backward_hooks"] or state["_backward_pre_hooks"])
    )


class Borrowed(nn.Module):
    """Stands where a position uses a module stored elsewhere; has no parameters of its own."""

    def __init__(self, holder: nn.Module, name: str) -> None:
        super().__init__()
        # In a tuple, nn.Module does not see the holder and register its parameters again.
        self._holder = (holder,)
        self.name = name

    @property
    def holder(self) -> nn.Module:
        return self._holder[0]

    @property
    def target(self) -> nn.Module:
        """The module itself, found anew at each call: it may have been wrapped by an adapter."""
        found: Any = self._holder[0]._modules[self.name]
        return found

    @property
    def weight(self) -> Any:
        return self.target.weight

    def forward(self, x: torch.Tensor) -> Any:
        return product(x, self.target)

    def extra_repr(self) -> str:
        return f"{type(self.holder).__name__}.{self.name}"


class LentLinear(nn.Module):
    """A linear whose weights others use, as a serving engine is to see it: as none that it knows.

    Engines put several linears of a module into one of their own, where no borrower finds them.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class LowRankLinear(nn.Module):
    """y = second(first(x)): a linear of rank `rank`; the bias, if any, sits on `second`."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.first: nn.Module = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self._modules
        return product(x, parts["first"], parts["second"])


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
        result: torch.Tensor = product(x, self.borrowed) + self.adapter(x)
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

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return ((y * self.weight) if self.kind == "scaled" else self.unit(y, self.weight)).to(
            y.dtype
        )

    def unit(self, y: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        """(y - mean(y)) / std(y) * gain per token, in float32 at least."""
        precise = y.to(torch.promote_types(y.dtype, torch.float32))
        gain = None if gain is None else gain.to(precise.dtype)
        return nn.functional.layer_norm(precise, y.shape[-1:], gain, eps=self.EPS)

    def after(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Forward hook; being a method it goes with its module when a model is deep-copied."""
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)


class ChangedBlock(nn.Module):
    """An OPT block, whose MLP ends in a linear of the block itself, with the MLP's output changed.

    What stands there may be an adapter (peft) by now, and others may borrow it: the hook is on it
    only while its own block runs, within its forward, which alone is computed again in gradient
    checkpointing.
    """

    fc2: nn.Module
    mlp_output: SublayerOutput

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        handle = self.fc2.register_forward_hook(self.mlp_output.after)
        try:
            return super().forward(*args, **kwargs)
        finally:
            handle.remove()


class StoredBias(nn.Module):
    """The bias of a linear of which nothing else is stored here."""

    weight = None

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias.expand(*x.shape[:-1], -1)


class BiasAlone(nn.Module):
    """A Conv1D that reads nothing, which the stock one cannot do."""

    bias: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias.expand(*x.shape[:-1], -1)


class SlicedLinear(nn.Module):
    """y = W x + b, where some slices of W are stored here and the others at other positions.

    What is stored is a linear of the stock class, so that it trains and takes adapters like any
    other; where nothing is, there is no module. While those that store the slices are such linears
    and nothing more, W is put together at each call, or where that would take longer than the
    product, for a few tokens, multiplied run by run: memory is saved, arithmetic is not. As soon as
    one of them is more than its weight (an adapter, an offloaded, quantised or engine's linear),
    each is called as a whole: of its outputs the slices are taken, or it reads the slices of the
    input that are its own and zeros for the others.
    Source of the idea: head-wise shareable attention, arXiv 2402.11819.
    """

    FEW = 16
    """Fewer tokens than these are multiplied run by run."""

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
        self._lent_widths: tuple[int, ...] = ()
        self.has_bias = dense.bias is not None
        self.stored = self._stored_part(dense)

    def _stored_part(self, dense: Any) -> nn.Module | None:
        if not self.own:
            bias_stays = self.has_bias and not self.along_out
            return StoredBias(dense.bias.detach()) if bias_stays else None
        dense.weight = nn.Parameter(self.own_part("weight", dense.weight.detach()))
        if self.has_bias:
            dense.bias = nn.Parameter(self.own_part("bias", dense.bias.detach()))
        names = ("nf", "nx") if self.is_conv1d else ("out_features", "in_features")
        setattr(dense, names[0 if self.along_out else 1], len(self.own))
        stored: nn.Module = dense
        return stored

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
        self._lent_widths = tuple(map(len, stored))
        place_in = [{index: place for place, index in enumerate(indices)} for indices in stored]
        number = {here: 0} | {position: 1 + k for k, position in enumerate(lenders)}
        places = {}
        for index, (mine, origin) in enumerate(zip(self.indices, self.form["slices"], strict=True)):
            position, theirs = (here, index) if origin is None else origin
            holder = number[position]
            for my, their in zip(mine, self.indices[theirs], strict=True):
                places[my] = holder, place_in[holder][their]
        self._runs = _runs([places[i] for i in range(len(places))])

    def _linears(self) -> list[Any]:
        """What stores the slices: this position's own part, then the lenders."""
        return [self._modules.get("stored"), *(lender.target for lender in self.lenders)]

    def _whole(self, name: str, dim: int) -> torch.Tensor:
        tensors: list[Any] = [getattr(linear, name, None) for linear in self._linears()]
        parts = [tensors[k].narrow(dim, start, length) for k, start, length in self._runs]
        return torch.cat(parts, dim)

    @property
    def weight(self) -> torch.Tensor:
        """The whole weight, as the stock class stores it."""
        return self._whole("weight", self._dim)

    @property
    def bias(self) -> Any:
        if not self.has_bias:
            return None
        stored: Any = self.stored
        return self._whole("bias", 0) if self.along_out else stored.bias

    @property
    def borrowed_weights(self) -> int:
        """How many of the weights are stored elsewhere."""
        other_side = self.shape[1 if self.along_out else 0]
        return self.shape[0] * self.shape[1] - len(self.own) * other_side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linears = self._linears()
        if all(map(_is_plain, linears)):
            if not torch.compiler.is_compiling() and x.numel() < self.FEW * x.shape[-1]:
                return self._by_runs(linears, x)
            weight = self.weight
            return nn.functional.linear(x, weight.T if self.is_conv1d else weight, self.bias)
        return self._cut_of(linears, x) if self.along_out else self._sum_of(linears, x)

    def _by_runs(self, linears: list[Any], x: torch.Tensor) -> torch.Tensor:
        """The product with W and its bias without putting W together."""
        weights: list[Any] = [linear and linear._parameters.get("weight") for linear in linears]
        if self.is_conv1d:
            weights = [None if weight is None else weight.T for weight in weights]
        multiply, bias = nn.functional.linear, self.bias
        if self.along_out:
            parts = [multiply(x, weights[k].narrow(0, start, n)) for k, start, n in self._runs]
            whole = torch.cat(parts, -1)
            return whole if bias is None else whole + bias
        at, total = 0, bias
        for k, start, n in self._runs:
            part = multiply(x.narrow(-1, at, n), weights[k].narrow(1, start, n))
            at, total = at + n, part if total is None else total + part
        return total

    def _cut_of(self, linears: list[Any], x: torch.Tensor) -> torch.Tensor:
        """Slices of the linears' outputs, side by side."""
        outputs: list[Any] = [None if linear is None else linear(x) for linear in linears]
        parts = [outputs[k].narrow(-1, start, length) for k, start, length in self._runs]
        return torch.cat(parts, -1)

    def _sum_of(self, linears: list[Any], x: torch.Tensor) -> torch.Tensor:
        """The linears' outputs for the slices of x that each one has; their biases stay theirs."""
        inputs = [x.new_zeros(*x.shape[:-1], width) for width in self._lent_widths]
        at = 0
        for k, start, length in self._runs:
            inputs[k][..., start : start + length] += x[..., at : at + length]
            at += length
        own, *lenders = linears
        parts = [] if own is None else [own(inputs[0])]
        for lender, slices in zip(lenders, inputs[1:], strict=True):
            parts.append(lender(slices))
            if self.has_bias:
                parts.append(-lender(slices.new_zeros(1, slices.shape[-1])))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def _is_plain(linear: Any) -> bool:
    """True for a linear whose forward is the product with its weight and nothing more."""
    if linear is None or type(linear) is StoredBias:
        return True
    if type(linear) is not nn.Linear and type(linear).__name__ != "Conv1D":
        return False
    weight = linear._parameters.get("weight")
    return type(weight) is nn.Parameter and not weight.is_meta and not _is_watched(linear)


def _stored_in(module: Any) -> list[nn.Module]:
    """The linears that a module of one of our forms is made of; any other is one itself."""
    if isinstance(module, Borrowed):
        return _stored_in(module.target)
    if isinstance(module, (LowRankLinear, AdaptedLinear)):
        return [linear for part in module.children() for linear in _stored_in(part)]
    if isinstance(module, SlicedLinear):
        has_weight = [m for m in module._linears() if m is not None and type(m) is not StoredBias]
        return [linear for part in has_weight for linear in _stored_in(part)]
    return [module]


_LINEAR_FORMS = (Borrowed, LowRankLinear, AdaptedLinear, SlicedLinear, LentLinear)


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


class AttentionFreeBlock(GradientCheckpointingLayer):
    """A light network in place of a run of blocks: no attention, no norm, no residual.

    Source: LLM-Streamline, arXiv 2403.19135, section 3 (FFN and SwiGLU replacements).
    """

    def __init__(self, kind: str, hidden_size: int, intermediate_size: int) -> None:
        nn.Module.__init__(self)  # not as the stock block that it also is (`both`)
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
        gone = self.full_width / x.shape[-1]  # the stock function divides by what is there
        return nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps * gone) * gone**0.5

    def extra_repr(self) -> str:
        return f"full_width={self.full_width}, eps={self.eps}"


def _is_one_row(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a token is decoded on a CPU, where each small step takes longer than its sums; not
    where a graph is made, which would keep one token's number or ask for it."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
        and x.numel() == x.shape[-1]
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    )


class OneStepNorm(nn.Module):
    """A root-mean-square norm of a stock class by torch's own function for it, which is one kernel
    on a GPU and half the time of the stock class's steps on a CPU; a single token's there takes
    half of that again."""

    _eps: float
    _is_gain_from_one: bool
    """Multiplies by 1 + weight."""

    @classmethod
    def take_over(cls, norm: Any) -> None:
        """Change a stock norm into one of this kind, in place."""
        norm._is_gain_from_one = type(norm).__name__.startswith("Gemma")
        norm._eps = norm.eps if norm._is_gain_from_one else norm.variance_epsilon
        norm.__class__ = both(cls, type(norm))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self._parameters["weight"]
        if x.dtype == torch.float64:  # the stock class rounds to float32
            result: torch.Tensor = super().forward(x)
            return result
        gain = 1.0 + weight.float() if self._is_gain_from_one else weight
        if _is_one_row(x, gain):  # whose mean square is a number
            row = x.flatten()
            scale = (torch.dot(row, row).item() / len(row) + self._eps) ** -0.5
            return (x * gain).mul_(scale)
        if self._is_gain_from_one:
            return nn.functional.rms_norm(x.float(), gain.shape, gain, self._eps).type_as(x)
        return torch.rms_norm(x, gain.shape, gain, self._eps)


_STOCK_NORMS = tuple(
    f"{family}RMSNorm"
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma", "Gemma2", "Gemma3")
)
"""Classes that are known to compute what `OneStepNorm` does."""


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
        nn.Module.__init__(self)
        entering, middle, leaving = (widths[n] for n in ("entering", "middle", "leaving"))
        self.entering = entering
        self._argument_names = argument_names(type(stock))[1:]
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
        kwargs |= dict(zip(self._argument_names, args, strict=False))
        for name in ("encoder_hidden_states", "encoder_attention_mask"):  # of cross-attention
            kwargs.pop(name, None)
        hidden_states = hidden_states[..., : self.entering]  # the rest is padding (GPT-2)
        parts: dict[str, Any] = self._modules
        before_attention, before_mlp = (parts[name] for name in self._norm_names)
        attention = parts[self._attention_name]
        attended = attention(hidden_states=before_attention(hidden_states), **kwargs)[0]
        middle = product(hidden_states, parts["attention_shortcut"]) + attended
        return product(middle, parts["mlp_shortcut"]) + self._mlp_of(before_mlp(middle))

    @property
    def mlp_norm(self) -> nn.Module:
        return getattr(self, self._norm_names[1])

    def _mlp_of(self, x: torch.Tensor) -> torch.Tensor:
        parts: dict[str, Any] = self._modules
        if "mlp" in parts:
            return parts["mlp"](x)
        # OPT's is not a module of its own.
        return parts["fc2"](parts["activation_fn"](parts["fc1"](x)))


class NarrowAttention(nn.Module):
    """Causal self-attention with fewer coordinates per head than the stock module it stands for.

    The same projections under the same names, with queries and keys of `qk_dim` and values of
    `v_dim` coordinates per head. The scale of the scores is the stock one: what is left of a dot
    product estimates the whole (MoDeGPT, arXiv 2408.09632). Every key head has its own selection
    of the stock rotary frequencies, shared by the query heads that read it. Where there are fewer
    key and value heads than in the stock module, the cache has so many, and each stands for several
    of the stock ones. Heads without coordinates add nothing to the output's bias.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    rotary_pairs: torch.Tensor | None
    """[kv_heads, rotary_dim / 2]: which of the stock frequencies each key head has kept."""

    def __init__(self, stock: Any, form: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        config = stock.config
        self._argument_names = argument_names(type(stock))[1:]
        self._cache_name = cache_name(type(stock))
        self.config, self.layer_idx, self.is_causal = config, stock.layer_idx, stock.is_causal
        self.num_heads = config.num_attention_heads
        self.stock_kv_heads = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.num_kv_heads = form.get("kv_heads") or self.stock_kv_heads
        self.num_key_value_groups = self.num_heads // self.stock_kv_heads
        self.qk_dim, self.v_dim = form["qk_dim"], form["v_dim"]
        self.head_dim = stock.head_dim
        """Of the stock heads: as wide as engines and caches of a fixed width expect them."""
        self.scaling = stock.scaling
        self.sliding_window = getattr(
            stock, "sliding_window", getattr(config, "sliding_window", None)
        )
        is_capped = config.model_type == "gemma2"  # gemma3 has the entry and does not use it
        self.softcap = config.attn_logit_softcapping if is_capped else None
        self.attention_dropout = _dropout_of(stock)
        self.resid_dropout = getattr(stock, "resid_dropout", None)
        self._eager = sys.modules[type(stock).__module__].eager_attention_forward
        self._resize_linears(stock, form["value_bias_in_output"])
        for name in ("q_norm", "k_norm"):
            norm = copy.deepcopy(getattr(stock, name, None)) if self.qk_dim else None
            if norm is not None:
                norm.weight = nn.Parameter(norm.weight.new_ones(self.qk_dim))
            setattr(self, name, norm)
        self._known_turns: Any = None
        self.num_pairs = form["rotary_dim"] // 2
        self.register_buffer("rotary_pairs", self.first_pairs() if self.num_pairs else None)

    def first_pairs(self) -> torch.Tensor:
        """The first frequencies for every key head, which stand until others are loaded."""
        return torch.arange(self.num_pairs).repeat(self.num_kv_heads, 1)

    def _apply(self, fn: Any, recurse: bool = True) -> "NarrowAttention":
        """Frequencies that get memory get values with it: transformers initialises none of ours."""
        was_empty = self.rotary_pairs is not None and self.rotary_pairs.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_empty and self.rotary_pairs is not None and not self.rotary_pairs.is_meta:
            self.rotary_pairs.copy_(self.first_pairs())
        return self

    def _resize_linears(self, stock: Any, value_bias_in_output: bool) -> None:
        q, k, v = self._split_sizes()
        sizes = {"q_proj": q, "k_proj": k, "v_proj": v} | dict.fromkeys(FUSED_QKV_NAMES, q + k + v)
        for name, size in sizes.items():
            linear = getattr(stock, name, None)
            if linear is not None:
                bias = linear.bias is not None and not (name == "v_proj" and value_bias_in_output)
                setattr(self, name, _resized(linear, linear_shape(linear)[1], size, bias))
        self._input_names = [name for name in sizes if name in self._modules]
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
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.v_dim == 0:
            nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
            return self._given_out(nothing), None
        kwargs |= dict(zip(self._argument_names, args, strict=False))
        cache = take_cache(kwargs, self._cache_name)
        attention_mask = kwargs.pop("attention_mask", None)
        position_embeddings = kwargs.pop("position_embeddings", None)
        query, key, value = self._projected(hidden_states)
        if position_embeddings is not None and self.rotary_pairs is not None:
            query, key = self._rotated(query, key, *position_embeddings)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = self._cached(cache, key, value, kwargs)
        kind = self.config._attn_implementation or "eager"
        if kind == "sdpa" and attention_mask is None and self._is_once(query, key, value):
            return self._given_out(self._attended_once(query, key, value)), None
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        tokens = query.shape[0], query.shape[2]
        key, value = self._of_stock_heads(key), self._of_stock_heads(value)
        query, key, value = self._of_one_width(kind, query, key, value)
        # Here and not in a function of its own: vLLM looks for the call in what `forward` says.
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(kind, self._eager)
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
        # Engines return the heads side by side.
        output = output.reshape(*tokens, self.num_heads, -1)[..., : self.v_dim]
        return self._given_out(output.reshape(*tokens, -1).contiguous()), weights

    def _given_out(self, heads: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = product(heads, self._modules[self._output_name])
        return output if self.resid_dropout is None else self.resid_dropout(output)

    def _is_once(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether sdpa would compute what it is asked step by step: fused kernels take keys and
        values of one width, and to pad all that a cache holds for one query is not worth it."""
        has_dropout = self.training and self.attention_dropout > 0
        is_uneven = key.shape[-1] != value.shape[-1]
        return query.shape[2] == 1 and is_uneven and self.softcap is None and not has_dropout

    def _attended_once(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Outputs of one query of each sequence over all keys, the heads side by side."""
        batch, heads, _, width = key.shape
        queries = (query * self.scaling).reshape(batch * heads, -1, width)
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        scores = torch.bmm(queries, keys.mT)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return torch.bmm(weights.to(values.dtype), values).view(batch, 1, -1)

    def _cached(
        self, cache: Any, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values so far, as wide and as many as the cache holds them."""
        heads, *widths = _shape_in(cache, self.layer_idx, (self.stock_kv_heads, self.head_dim))
        if heads == self.stock_kv_heads:
            key, value = self._of_stock_heads(key), self._of_stock_heads(value)
        key, value = _padded(key, widths[0]), _padded(value, widths[1])
        # Stock attention hands its arguments over since they belong to caches of pages.
        given = {"kwargs": kwargs} if self._cache_name == _NEW_CACHE_NAME else {}
        key, value = cache.update(key, value, self.layer_idx, **given)
        return key, value

    def _projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values as [batch, tokens, heads, coordinates], normed, not rotated."""
        projections = [self._modules[name] for name in self._input_names]
        if len(projections) == 1:
            query, key, value = product(x, projections[0]).split(self._split_sizes(), dim=-1)
        else:
            query, key, value = (product(x, projection) for projection in projections)
        heads = (*x.shape[:-1], -1)
        query, key = query.view(*heads, self.qk_dim), key.view(*heads, self.qk_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value.view(*heads, self.v_dim)

    def _of_stock_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Each of the fewer heads as often as it stands for a stock one."""
        copies = self.stock_kv_heads // x.shape[1]
        return x.repeat_interleave(copies, dim=1) if copies > 1 else x

    def _of_one_width(
        self, kind: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """With zeros up to the width that the attention function takes."""
        width = max(key.shape[-1], value.shape[-1])
        if kind == "sdpa" and key.shape[-1] != value.shape[-1]:
            width = -(-width // 16) * 16  # as wide as its kernels are quick
        if not kind.startswith(_KINDS_OF_ANY_WIDTH) and "/" not in kind:
            width = max(width, self.head_dim)  # an engine's or a paged one has the config's width
        elif query.shape[2] == 1 and kind in ("eager", "sdpa"):
            # Without the zeros the fused kernels refuse and the whole matrix of scores is written
            # to memory; one query alone has a row of them, which is not worth the copies.
            return _padded(query, key.shape[-1]), key, value
        return _padded(query, width), _padded(key, width), _padded(value, width)

    def _rotated(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys with their first coordinates rotated, i together with i + kept."""
        of_cos, of_sin = self._turns(cos.shape[-1])
        cos, sin = _entries(cos, of_cos), _entries(torch.cat((-sin, sin), dim=-1), of_sin)
        heads = torch.cat((query, key), dim=2)
        width = cos.shape[-1]
        rotating = heads if width == self.qk_dim else heads[..., :width]
        rotated = torch.addcmul(rotating * cos, rotating.roll(width // 2, -1), sin)
        if width < self.qk_dim:
            rotated = torch.cat((rotated, heads[..., width:]), dim=-1)
        return rotated.narrow(2, 0, self.num_heads), rotated.narrow(2, self.num_heads, key.shape[2])

    def _turns(self, num_entries: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the cosine and the signed sine of each rotating coordinate are in tables of
        `num_entries` and twice as many: [heads, 2 * kept], the queries' heads before the keys'."""
        pairs: Any = self.rotary_pairs
        if torch.compiler.is_compiling():
            return self._found_turns(pairs, num_entries)
        # The same for every token; what has been loaded since is another tensor, or version of it.
        state = id(pairs), None if pairs.is_inference() else pairs._version, num_entries
        if self._known_turns is None or self._known_turns[0] != state:
            self._known_turns = state, self._found_turns(pairs, num_entries), pairs
        return self._known_turns[1]

    def _found_turns(
        self, pairs: torch.Tensor, num_entries: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_queries = pairs.repeat_interleave(self.num_heads // len(pairs), dim=0)
        kept = torch.cat((of_queries, pairs))
        return torch.cat((kept, kept), -1), torch.cat((kept, kept + num_entries), -1)


def _entries(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A table [batch, tokens, n] as [batch, tokens, *index.shape]; that of one place as the
    latter."""
    if not torch.compiler.is_compiling() and table.numel() == table.shape[-1]:
        return table.take(index)
    entries = table.gather(-1, index.flatten().expand(*table.shape[:-1], -1))
    return entries.view(*table.shape[:-1], *index.shape)


# Attention functions whose heads may have any one width; names with a slash are kernels of the Hub.
_KINDS_OF_ANY_WIDTH = ("eager", "sdpa", "flex_attention", "flash_attention")


def _padded(x: torch.Tensor, width: int) -> torch.Tensor:
    """With zeros up to `width` in its last dimension."""
    missing = width - x.shape[-1]
    return nn.functional.pad(x, (0, missing)) if missing > 0 else x


def _shape_in(cache: Any, layer_idx: int, dense: tuple[int, int]) -> tuple[int, int, int]:
    """The heads, and the widths of keys and values, that a cache has settled for a layer; 0 while
    any will do.

    A cache that was filled before it saw a key has the shape of the config, `dense`, and so have
    pages; one that quantises in groups along the width takes what its group divides.
    """
    layers = getattr(cache, "layers", None)
    layer: Any = layers[layer_idx] if layers is not None and layer_idx < len(layers) else None
    heads, width = dense
    if layers is None or hasattr(layer, "q_group_size"):
        return heads, width, width
    if getattr(layer, "is_initialized", False) and layer.keys is not None and layer.keys.ndim == 4:
        return layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]
    return 0, 0, 0


def _dropout_of(attention: Any) -> float:
    """The dropout of the scores, by the three names that the families have for it."""
    if hasattr(attention, "attn_dropout"):
        return attention.attn_dropout.p
    return getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0))


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
            light = both(AttentionFreeBlock, type(blocks[position]))
            width = block_plan["intermediate_size"]
            blocks[position] = light(block_plan["kind"], model.config.hidden_size, width)
            continue
        stored_at = block_plan["weights_of"]
        _narrow(blocks[position], block_plan if stored_at is None else block_plans[stored_at])
        sliced = block_plan.get("sliced")
        if sliced is not None:
            blocks[position] = sliced_block(blocks[position], sliced, model.config.hidden_size)
            if position == 0:
                _narrow_embeddings(model, blocks, sliced["entering"])
        for module in blocks[position].modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = attention_position  # type: ignore[assignment]  # in the KV cache
        attention_position += attends(block_plans, position)
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
    if is_in_engine(model.config):
        _protect_lenders(blocks)
    else:
        for norm in [m for m in model.modules() if type(m).__name__ in _STOCK_NORMS]:
            OneStepNorm.take_over(norm)
    for block in blocks:
        _give_classes_of_forms(block)


def is_in_engine(config: Any) -> bool:
    """True where a serving engine builds the model: it brings an attention function of its own."""
    kind = (config._attn_implementation or "eager").removeprefix("paged|")
    return not kind.startswith(_KINDS_OF_ANY_WIDTH) and "/" not in kind


def _protect_lenders(blocks: nn.Module) -> None:
    borrowed = [module for module in blocks.modules() if isinstance(module, Borrowed)]
    sliced = [module for module in blocks.modules() if isinstance(module, SlicedLinear)]
    borrowed += [lender for module in sliced for lender in module.lenders]
    for use in borrowed:
        if type(use.target) is nn.Linear:
            setattr(use.holder, use.name, LentLinear(use.target))


def _give_classes_of_forms(block: nn.Module) -> None:
    for module in block.modules():
        form = tuple(
            f"{name}={type(child).__name__}"
            for name, child in module.named_children()
            if isinstance(child, _LINEAR_FORMS)
        )
        if form:
            # Engines look at one instance of a class and rewrite all of them.
            module.__class__ = _class_of(type(module).__name__, (type(module),), form)


def sliced_block(stock: nn.Module, widths: dict[str, int], full_width: int) -> SlicedBlock:
    """A `SlicedBlock` that is also of the stock block's class."""
    return both(SlicedBlock, type(stock))(stock, widths, full_width)


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
        stock = getattr(block, name)
        setattr(block, name, both(NarrowAttention, type(stock))(stock, heads))


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
    inputs = inputs if in_features is None else in_features
    outputs = outputs if out_features is None else out_features
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
            module._is_hf_initialized = False  # type: ignore[assignment]  # with values of its own
            module.embedding_dim = width


def _resized(linear: Any, in_features: int, out_features: int, bias: bool) -> nn.Module:
    """A linear of the same class; a Conv1D always has a bias."""
    if type(linear).__name__ == "Conv1D":
        stock = type(linear)
        made = stock if in_features else _class_of(stock.__name__, (BiasAlone, stock))
        return made(out_features, in_features)
    if in_features and out_features:
        return nn.Linear(in_features, out_features, bias=bias)
    # PyTorch warns of each that it would draw no weights for.
    empty = nn.Linear(1, 1, bias=bias)
    empty.in_features, empty.out_features = in_features, out_features
    empty.weight = nn.Parameter(empty.weight.new_zeros(out_features, in_features))
    if bias:
        empty.bias = nn.Parameter(empty.bias.new_zeros(out_features))
    return empty


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
        block.__class__ = both(ChangedBlock, type(block))
    else:
        mlp.register_forward_hook(block.mlp_output.after)


def _inside_form(block: nn.Module, name: str) -> bool:
    return isinstance(block.get_submodule(_split(name)[0]), (LowRankLinear, SlicedLinear))


class _Restructured(PreTrainedModel):
    """What the base model and the causal model share: a stock model, restructured, under the name
    that weights have in a folder."""

    config_class = FoldstackConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # as far as the stock class
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(self, config: FoldstackConfig, stock_class: Any) -> None:
        for flag in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn"):
            setattr(self, flag, getattr(stock_class, flag))
        super().__init__(config)

    @property
    def stock(self) -> Any:
        """The stock model inside."""
        raise NotImplementedError

    def _restructure(self, holder: PreTrainedModel) -> None:
        """Change the stock blocks; `holder` is what `blocks_path` starts from."""
        restructure(holder, self.config.block_plans, self.config.blocks_path)
        blocks: Any = holder.get_submodule(self.config.blocks_path)
        self._no_split_modules = sorted({type(block).__name__ for block in blocks})
        self._can_compile_fullgraph = self.stock._can_compile_fullgraph
        self._cache_name = cache_name(type(self.stock))
        # What folders of foldstack 0.1 hold of linears that store nothing; by whole names, since an
        # engine passes over whatever fits.
        self._keys_to_ignore_on_load_unexpected = {
            rf"(^|\.){re.escape(name)}\.stored\.weight$"
            for name, linear in self.named_modules()
            if isinstance(linear, SlicedLinear) and not linear.own
        }
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def base_model(self) -> Any:
        """The stock base model, whose output has the hidden states."""
        return self.stock.base_model

    def stored_linears(self, *names: str) -> list[str]:
        """The modules that hold what linears of these names multiply by, as peft's `target_modules`
        takes them: "v_proj" alone is refused where it stands for two factors or another's weights.

        Args:
            names: ends of the stock linears' names, as "v_proj" or "mlp.down_proj".

        Raises:
            ValueError: no module has such a name.
        """
        modules = dict(self.named_modules())
        name_of = {module: name for name, module in modules.items()}
        found = []
        for wanted in names:
            those = [m for n, m in modules.items() if f".{n}".endswith(f".{wanted}")]
            if not those:
                raise ValueError(f"{wanted!r} is no module of this model")
            found += [name_of[linear] for module in those for linear in _stored_in(module)]
        return list(dict.fromkeys(found))

    def get_input_embeddings(self) -> nn.Module:
        return self.stock.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.stock.set_input_embeddings(value)

    def _forward(self, cache: Any, use_cache: bool | None, arguments: dict[str, Any]) -> Any:
        """The stock forward, on a cache that has entries for the attending blocks alone."""
        name = self._cache_name
        found = take_cache(arguments, name)
        cache = found if cache is None else cache
        wants_cache = self.stock.config.use_cache if use_cache is None else use_cache
        if wants_cache and cache is None:
            cache = DynamicCache(config=self.config)
        return self.stock(use_cache=use_cache, **{name: cache}, **arguments)


class FoldstackModel(_Restructured, metaclass=_Pickled):
    """A stock base model, without its head, whose blocks were restructured after `config.plan`.

    What serving engines build, and what `AutoModel` loads from a folder.
    """

    def __init__(self, config: FoldstackConfig) -> None:
        stock_class: Any = MODEL_MAPPING[type(config.base_config)]
        super().__init__(config, stock_class)
        stock = stock_class(config.base_config)
        self._stock_name = stock.base_model_prefix
        setattr(self, self._stock_name, stock)
        self._restructure(self)

    @property
    def stock(self) -> Any:
        return getattr(self, self._stock_name)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock base model's forward; `last_hidden_state` [batch, tokens, width] is first."""
        kwargs |= {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        return self._forward(past_key_values, use_cache, kwargs)


class FoldstackForCausalLM(_Restructured, GenerationMixin, metaclass=_Pickled):
    """A stock causal model whose blocks were restructured after `config.plan`."""

    def __init__(self, config: FoldstackConfig) -> None:
        stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.base_config)]
        super().__init__(config, stock_class)
        self.model = stock_class(config.base_config)
        self._restructure(self.model)

    @property
    def stock(self) -> Any:
        return self.model

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
        """The stock causal model's forward: `logits` [batch, tokens, vocab], `loss` of `labels`."""
        kwargs |= {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "logits_to_keep": logits_to_keep,
        }
        return self._forward(past_key_values, use_cache, kwargs)


AutoConfig.register(FoldstackConfig.model_type, FoldstackConfig, exist_ok=True)
AutoModel.register(FoldstackConfig, FoldstackModel, exist_ok=True)
AutoModelForCausalLM.register(FoldstackConfig, FoldstackForCausalLM, exist_ok=True)
