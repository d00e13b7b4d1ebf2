"""cut(model, change): the one place that makes a model smaller."""

import copy
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from foldstack.compression.errors import InputError
from foldstack.compression.storage.mapped_memory import release
from foldstack.compression.structure.architectures import (
    Architecture,
    architecture_of,
    base_config_of,
    stock_of,
)
from foldstack.compression.structure.block_plan import LowRank
from foldstack.compression.structure.modeling_foldstack import (
    FoldstackConfig,
    FoldstackForCausalLM,
    SlicedLinear,
)
from foldstack.compression.structure.plan import Plan

BUILDING = threading.RLock()
"""Held while a model is built or loaded: transformers replaces methods of its classes meanwhile,
and two threads at once may leave them replaced for good, so that no model ties its embeddings."""

# Config entries that hold one value per block; a survivor keeps its own.
_PER_BLOCK_ENTRIES = ("layer_types", "mlp_layer_types", "no_rope_layers")

_READ_AT_ONCE = 1 << 29
"""Bytes of weights in files that a look at them keeps in memory."""


@dataclass(frozen=True)
class Cut:
    """What a method decided: the new structure, and the tensors that it changed.

    Args:
        plan: the structure of the model to build.
        inherits: per position of `plan`, the position of the input model whose tensors it starts
            from; None when all of the block's tensors are new.
        tensors: the new and changed ones, as "blocks.<position>.<name inside the block>", for
            example "blocks.3.self_attn.q_proj.first.weight"; those outside the blocks by the name
            that the stock model has for them, for example "model.embed_tokens.weight".
        forecast: what the method expects of the result, by name, for what is measured of it later
            to be held against.
    """

    plan: Plan
    inherits: tuple[int | None, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    forecast: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.inherits) != len(self.plan.blocks):
            raise ValueError(
                f"inherits has {len(self.inherits)} entries for {len(self.plan.blocks)} blocks"
            )


def plan_of(model_or_config: Any) -> Plan:
    """The plan that a model was built from; the identity plan for a stock model."""
    config = getattr(model_or_config, "config", model_or_config)
    if config.model_type == "foldstack":
        return Plan.model_validate(config.plan)
    return Plan.identity(architecture_of(config).model_type, config.num_hidden_layers)


def config_for(config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """The config of a model with structure `plan`, made from one that has `plan_of(config)`.

    Per-block entries are selected, never truncated: a survivor keeps its own attention type.
    Returns a stock config when `plan` is native, else a FoldstackConfig.
    """
    base = _executed_base(base_config_of(config), plan_of(config), plan)
    if plan.is_sliced:
        base.tie_word_embeddings = False  # only the embeddings are narrower
    if plan.is_native:
        width = plan.blocks[0].mlp_width
        if width is not None:
            setattr(base, architecture_of(base).mlp_width_entry, width)
        base.architectures = [_stock_class(base).__name__]
        return base
    portable = FoldstackConfig(
        base_config=base,
        plan=plan.model_dump(mode="json"),
        blocks_path=architecture_of(base).blocks_path,
        dtype=config.dtype,
    )
    portable.architectures = [FoldstackForCausalLM.__name__]
    return portable


def _executed_base(base: PreTrainedConfig, old: Plan, new: Plan) -> PreTrainedConfig:
    if getattr(base, "num_kv_shared_layers", 0):
        raise InputError(
            f"{base.model_type} shares KV caches between blocks, which foldstack cannot cut yet"
        )
    executed = copy.deepcopy(base)
    position_of = {
        block.source: position for position, block in reversed(list(enumerate(old.blocks)))
    }
    positions = [position_of[block.source] for block in new.blocks]
    selected = {
        name: [entries[position] for position in positions]
        for name in _PER_BLOCK_ENTRIES
        if (entries := getattr(base, name, None)) is not None
    }
    executed.num_hidden_layers = len(new.blocks)
    for name, entries in selected.items():
        setattr(executed, name, entries)
    if getattr(base, "max_window_layers", None) is not None:
        executed.max_window_layers = min(base.max_window_layers, len(new.blocks))
    if getattr(base, "num_nextn_predict_layers", 0):
        executed.num_nextn_predict_layers = 0
    return executed


def _stock_class(base: PreTrainedConfig) -> type[PreTrainedModel]:
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(base)]
    found: type[PreTrainedModel] = stock
    return found


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a stock config or FoldstackConfig without memory for its weights."""
    is_foldstack = config.model_type == "foldstack"
    model_class = FoldstackForCausalLM if is_foldstack else _stock_class(config)
    # Drawing first values for weights without memory is half the time; tying is done with them.
    with BUILDING, torch.device("meta"), no_init_weights():
        model: PreTrainedModel = model_class(config)
    model.tie_weights(recompute_mapping=False)
    return model.eval()


def cut(model: PreTrainedModel, change: Cut, *, share_memory: bool = False) -> PreTrainedModel:
    """A new model with structure `change.plan`; `model` stays untouched and shares no memory.

    Returns a stock class when the plan is native, else a FoldstackForCausalLM; in eval mode, where
    `storage_of(model)` says. With `share_memory` it is only good for being read: what needs no
    change of its precision is not copied, so that of weights in files none is read here.

    Raises:
        ValueError: the change lacks a tensor, has one of the wrong shape or one without a place, or
            a tensor is not finite (with `share_memory`: one of the change's).
    """
    architecture = architecture_of(model)
    config = config_for(model.config, change.plan)
    smaller = build_on_meta(config)
    target = stock_of(smaller)
    source = _Inherited(model, architecture)
    state, unused, places, unread = {}, set(change.tensors), set[int](), set[str]()
    device = storage_of(model)
    for name, placeholder in target.state_dict().items():
        place = _place(name, architecture.blocks_path)
        given = name if place is None else place.name
        if given in change.tensors:
            unused.discard(given)
            tensor = change.tensors[given]
        elif place is None:
            tensor = source.outside_blocks(name)
        else:
            tensor = source.in_block(change.inherits[place.position], place)
            tensor = _own_slices(target, name, tensor)
        if tensor.shape != placeholder.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, its place {tuple(placeholder.shape)}"
            )
        dtype = source.dtype if tensor.is_floating_point() else tensor.dtype
        tensor = tensor.detach()
        # Two stored tensors stay two, though one may have been made from the other.
        is_shared = share_memory and tensor.data_ptr() not in places and tensor.is_contiguous()
        state[name] = tensor.to(device, dtype) if is_shared else _copied(tensor, device, dtype)
        if is_shared and given not in change.tensors:
            unread.add(name)
        places.add(tensor.data_ptr())
    if unused:
        raise ValueError(f"the plan has no place for {', '.join(sorted(unused))}")
    _check_finite({name: t for name, t in state.items() if name not in unread}, share_memory)
    target.load_state_dict(state, assign=True)
    _compute_buffers(target)
    smaller.tie_weights()
    _check_kept(target, state)
    target.to(device)  # the buffers
    if model.generation_config is not None:
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.requires_grad_(True).eval()


class BlockByBlock:
    """A compressed model of which one block at a time has memory, while the tensors of those behind
    it are still to be found."""

    def __init__(self, model: PreTrainedModel, plan: Plan, inherits: Sequence[int | None]) -> None:
        """Plan and positions as in a `Cut` of `model`."""
        self._architecture = architecture_of(model)
        self._source = _Inherited(model, self._architecture)
        self._target = stock_of(build_on_meta(config_for(model.config, plan)))
        self._inherits, self._device = inherits, model.device
        self.blocks = self._architecture.blocks(self._target)

    def fill(self, position: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The block at `position` with those of `tensors` that are its own and what it inherits,
        where the model computes; it shares memory with both where it can.

        The blocks whose linears it uses are to be filled, too, before it runs.
        """
        block, state = self.blocks[position], {}
        for inside, placeholder in block.state_dict().items():
            place = _Place(position, inside)
            if (tensor := tensors.get(place.name)) is None:
                name = f"{self._architecture.blocks_path}.{position}.{inside}"
                inherited = self._source.in_block(self._inherits[position], place)
                tensor = _own_slices(self._target, name, inherited)
            assert tensor.shape == placeholder.shape
            dtype = self._source.dtype if tensor.is_floating_point() else tensor.dtype
            state[inside] = tensor.detach().to(self._device, dtype)
        block.load_state_dict(state, assign=True)
        _compute_buffers(self._target, block)
        return block.to(self._device).eval()

    def empty(self, position: int) -> None:
        """Give back the memory of a block that no other one uses any more."""
        self.blocks[position].to("meta")


def storage_of(model: PreTrainedModel) -> torch.device:
    """Where the weights of a model's blocks are: not where it computes, if they go there in turn
    (`block_residency`)."""
    devices = {p.device for p in architecture_of(model).blocks(model).parameters()}
    return torch.device("cpu") if len(devices) > 1 else next(iter(devices), model.device)


def as_stored(tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors of a cut as they are to be stored: where `model` has its own, in its precision."""
    device = storage_of(model)
    return {
        name: tensor.to(device, model.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }


def _copied(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    copied = torch.empty(tensor.shape, device=device, dtype=dtype)
    return copied.copy_(tensor)


@dataclass(frozen=True)
class _Place:
    position: int
    inside: str

    @property
    def name(self) -> str:
        return f"blocks.{self.position}.{self.inside}"


def all_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor of a model as a cut names it."""
    path = architecture_of(model).blocks_path
    return {
        name if (place := _place(name, path)) is None else place.name: tensor
        for name, tensor in stock_of(model).state_dict().items()
    }


def _own_slices(target: nn.Module, name: str, whole: Tensor) -> Tensor:
    """Of a linear with slices what it stores itself; of any other all of it."""
    path, _, attribute = name.rpartition(".")
    holder = target.get_submodule(path.removesuffix(".stored"))
    return holder.own_part(attribute, whole) if isinstance(holder, SlicedLinear) else whole


def _place(name: str, blocks_path: str) -> _Place | None:
    found = re.match(re.escape(blocks_path) + r"\.(\d+)\.(.+)", name)
    return None if found is None else _Place(int(found[1]), found[2])


class _Inherited:
    """The tensors of the input model, by place; knows whose weights a position uses."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self.plan = plan_of(model)
        self.blocks_path = architecture.blocks_path
        self.tensors = stock_of(model).state_dict()
        self.sliced = {
            name: module
            for name, module in stock_of(model).named_modules()
            if isinstance(module, SlicedLinear)
        }
        self.dtype = model.dtype

    def outside_blocks(self, name: str) -> Tensor:
        tensor: Tensor = self.tensors[name]
        return tensor

    def in_block(self, position: int | None, place: _Place) -> Tensor:
        for holder in () if position is None else self._holders(position, place.inside):
            inside = place.inside.replace(".stored.", ".")
            tensor = self._whole(f"{self.blocks_path}.{holder}.{inside}")
            if tensor is not None:
                return tensor
        raise ValueError(
            f"the change brings no tensor for {place.name}, and there is none to inherit"
        )

    def _whole(self, name: str) -> Tensor | None:
        """A tensor by its name without slices, put together where it has some."""
        linear, _, attribute = name.rpartition(".")
        if linear in self.sliced:
            whole: Tensor | None = getattr(self.sliced[linear], attribute)
            return whole
        return self.tensors.get(name)

    def _holders(self, position: int, inside: str) -> Iterator[int]:
        yield position
        owner = self.plan.owner(position)
        yield owner
        form = self.plan.blocks[owner].linears.get(inside.removesuffix(".first.weight"))
        if isinstance(form, LowRank) and form.basis_of is not None:
            yield form.basis_of


def _compute_buffers(target: Any, within: nn.Module | None = None) -> None:
    """What is in no checkpoint (rotary frequencies, scales of embeddings), as a load computes it;
    of the whole model, or of a part of it.

    The input model's may have been cast with its weights, or scaled by a long input that it saw.
    """
    part: Any = target if within is None else within
    for module in part.modules():
        absent = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
        for name, buffer in absent.items():
            empty = torch.empty_like(buffer, device="cpu")
            module.register_buffer(name, empty, persistent=False)
        if absent:
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True  # it has its values
            target._init_weights(module)


def _check_kept(target: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError when tying the new model's weights has lost a tensor that it was given."""
    for name, tensor in target.state_dict().items():
        given = state[name]
        if tensor.data_ptr() != given.data_ptr() and not torch.equal(tensor, given):
            raise ValueError(f"{name} is lost: the config ties it to another tensor")


def _check_finite(tensors: Mapping[str, Tensor], in_files: bool) -> None:
    """Raises ValueError for NaN and infinity; with `in_files` gives back the memory of the read."""
    read: list[Tensor] = []
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.numel()):
            continue
        if not all(torch.isfinite(extreme) for extreme in tensor.aminmax()):  # NaN is an extreme
            raise ValueError(f"{name} has values that are not finite (NaN or infinity)")
        read.append(tensor)
        if in_files and sum(t.nbytes for t in read) > _READ_AT_ONCE:
            release(read)
            read = []
    if in_files:
        release(read)
