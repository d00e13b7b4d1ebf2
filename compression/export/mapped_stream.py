"""What no stock block does to the residual stream, as layers of llama.cpp's `deci`.

A stock block adds to the stream and takes nothing away. SliceGPT's shortcuts map it,
LLM-Streamline's light networks replace it, FlexiGPT's virtual blocks norm what is added to it. A
layer of `deci` is attention, one linear (`W norm(x)`) or neither, then an MLP whose output may have
a bias. Here the stream has a spare coordinate that such a bias raises to 2^30: the mean square is
that coordinate's then, the norm divides every token by the same number, and what reads it is linear
in the stream: x + (P - 1) x is any map P. The opposite bias lowers it again, to exactly zero.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from foldstack.compression.export.deci_layers import RAISED, ROWS, Layer, Layers, Sublayer
from foldstack.compression.export.multiplied_out import Affine, affine, stock_affines, stock_like
from foldstack.compression.structure.architectures import architecture_of, stock_of
from foldstack.compression.structure.block_plan import BlockPlan
from foldstack.compression.structure.heads import head_sizes
from foldstack.compression.structure.modeling_foldstack import SublayerOutput
from foldstack.compression.structure.surgery import plan_of

_APART = 2.0**20
"""How much larger than the stream is what is normed beside it."""
_LARGEST = 2.0**15
"""What weights are scaled up to at most: float16 ends at 2^16."""
_SILU_IS_ONE = 1.2784645427610738
_WELL_CONDITIONED = 0.5
"""Singular values of a shortcut that are inverted."""
_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_WRITE = ("o_proj", "down_proj")


@dataclass(frozen=True)
class MappedStream:
    """A model as layers of deci, in its precision; linears, of which one takes away what another
    has put there, in float32 as vectors are."""

    hidden_size: int
    eps: float
    """Of every norm."""
    layers: list[Layer]
    others: dict[str, Tensor]
    """Embeddings, last norm and head by llama.cpp's names."""


class _Shortcut:
    """A stream's map x -> A x before y is added: [x; 0] + B y mapped by P is A x + y. Of y is kept
    beside x what inverting A would make large."""

    def __init__(self, shortcut: Any) -> None:
        matrix: Tensor = shortcut.weight.double()
        left, values, right = torch.linalg.svd(matrix)
        well = int((values >= _WELL_CONDITIONED).sum())
        inverse = right[:well].T / values[:well] @ left[:, :well].T
        self.before = torch.cat([inverse, left[:, well:].T])
        self.map = torch.cat([matrix, left[:, well:]], dim=1)

    @staticmethod
    def size(shortcut: Any) -> int:
        """Coordinates of the map, by the singular values alone."""
        leaving, entering = shortcut.weight.shape
        values = torch.linalg.svdvals(shortcut.weight.double())
        well = int((values >= _WELL_CONDITIONED).sum())
        return max(leaving, entering + leaving - well)


@torch.no_grad()
def mapped_stream(model: PreTrainedModel) -> MappedStream:
    """A Llama-shaped model of any structure as layers of deci."""
    mapping = _Mapping(model)
    layers = Layers(mapping.size, mapping.spare, mapping.sizes, model.dtype)
    for position in range(len(mapping.plan.blocks)):
        for sublayer in mapping.sublayers(position):
            layers.append(sublayer)
    layers.end()
    eps = mapping.stock.config.rms_norm_eps * mapping.hidden / mapping.size
    return MappedStream(mapping.size, eps, layers.layers, dict(mapping.others()))


class _Mapping:
    """A model's sublayers on a stream whose coordinates are the model's, scratch ones that a map
    empties again, the spare one, and one that stands for a norm's eps."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.plan, self.architecture = model, plan_of(model), architecture_of(model)
        self.stock = stock_like(model)
        self.sizes = head_sizes(self.stock)
        self.hidden = int(self.stock.config.hidden_size)
        self.blocks = self.architecture.blocks(model)
        planned = zip(self.blocks, self.plan.blocks, strict=True)
        self.spare = max(self._used(block, plan) for block, plan in planned)
        self.floor = self.spare + 1
        self.size = -(-(self.floor + 1) // ROWS) * ROWS

    def _used(self, block: Any, plan: BlockPlan) -> int:
        if plan.sliced is not None:
            ends = (block.attention_shortcut, block.mlp_shortcut)
            return max(map(_Shortcut.size, ends))
        return 2 * self.hidden if plan.outputs == "normed" else self.hidden

    def others(self) -> Iterator[tuple[str, Tensor]]:
        tokens: Any = self.model.get_input_embeddings()
        head: Any = self.model.get_output_embeddings()
        base: Any = stock_of(self.model)
        yield "token_embd.weight", self.reading(tokens.weight)
        yield "output_norm.weight", self._gain(base.model.norm).float()
        if head.weight is not tokens.weight:
            yield "output.weight", self.reading(head.weight)

    def reading(self, weight: Tensor) -> Tensor:
        """(out, in) of the first coordinates as (out, size)."""
        return pad(weight, (0, self.size - weight.shape[1]))

    def writing(self, values: Tensor) -> Tensor:
        """(out, ...) to the first coordinates as (size, ...)."""
        return pad(values, (*(0,) * 2 * (values.ndim - 1), 0, self.size - len(values)))

    def _gain(self, norm: Any) -> Tensor:
        """A norm here divides by the mean square over all coordinates, the model's over its own."""
        gain = getattr(norm, "weight", torch.ones(self.hidden)).double()
        return pad(gain, (0, self.size - len(gain))) * math.sqrt(self.hidden / self.size)

    def _raised_gain(self) -> Tensor:
        gain = torch.full((self.size,), RAISED / math.sqrt(self.size), dtype=torch.float64)
        gain[self.spare] = 0
        return gain

    def sublayers(self, position: int) -> Iterator[Sublayer]:
        block, plan = self.blocks[position], self.plan.blocks[position]
        if not plan.has_attention:
            yield self._light(block.ffn)
            return
        target = self.architecture.blocks(self.stock)[position]
        affines = stock_affines(block, target, self.architecture, self.sizes)
        linears = {site.name.rpartition(".")[2]: pair for site, pair in affines}
        attention = {name: linears.pop(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        yield from self._half(
            "attention", block, plan, self._gain(block.input_layernorm), attention
        )
        gain = self._gain(block.post_attention_layernorm)
        yield from self._half("mlp", block, plan, gain, linears)

    def _half(
        self,
        kind: Literal["attention", "mlp"],
        block: Any,
        plan: BlockPlan,
        gain: Tensor,
        linears: dict[str, Affine],
    ) -> Iterator[Sublayer]:
        """Attention or the MLP, and what is done to the stream after it."""
        last = next(name for name in _WRITE if name in linears)
        weight, bias = linears[last]
        if plan.sliced is not None:
            shortcut = _Shortcut(block.get_submodule(f"{kind}_shortcut"))
            linears[last] = _composed(shortcut.before, weight, bias)
            yield self._sublayer(kind, gain, linears)
            yield self._map(shortcut.map)
        elif plan.outputs == "normed":
            scale = _power_of_two(_APART, weight)
            linears[last] = self._apart(weight, bias, scale)
            yield self._sublayer(kind, gain, linears)
            yield self._normed(block.get_submodule(f"{kind}_output"))
            emptied = torch.eye(self.hidden, 2 * self.hidden, dtype=torch.float64)
            # Each leaves a 2^23rd of 2^20 y, or a 2^11th where products are TF32.
            for _ in range(3):
                yield self._map(emptied)
        else:
            yield self._sublayer(kind, gain, linears)

    def _sublayer(
        self, kind: Literal["attention", "mlp"], gain: Tensor, linears: dict[str, Affine]
    ) -> Sublayer:
        norm = "attn_norm.weight" if kind == "attention" else "ffn_norm.weight"
        tensors = {norm: gain}
        for name, (weight, bias) in linears.items():
            place = self.writing if name in _WRITE else self.reading
            tensors[f"{_NAMES[name]}.weight"] = place(weight)
            if bias is not None:
                tensors[f"{_NAMES[name]}.bias"] = self.writing(bias) if name in _WRITE else bias
        return Sublayer(kind, tensors)

    def _apart(self, weight: Tensor, bias: Tensor | None, scale: float) -> Affine:
        """y less its mean, `scale` times, in scratch coordinates; with the LayerNorm's eps."""
        centred = torch.cat([weight.new_zeros(weight.shape), weight - weight.mean(0)])
        values = weight.new_zeros(self.size)
        if bias is not None:
            values[self.hidden : 2 * self.hidden] = bias - bias.mean()
        of_layer_norm = self.hidden * SublayerOutput.EPS * scale**2
        values[self.floor] = (
            math.sqrt(of_layer_norm - self.hidden * self.stock.config.rms_norm_eps) / scale
        )
        return scale * centred, scale * values

    def _normed(self, output: Any) -> Sublayer:
        """Scratch coordinates, normed and times the gain, added to the stream."""
        gain = torch.zeros(self.size, dtype=torch.float64)
        scratch = slice(self.hidden, 2 * self.hidden)
        gain[scratch] = math.sqrt(self.hidden / self.size)
        weight = torch.zeros(self.size, self.size, dtype=torch.float64)
        weight[: self.hidden, scratch] = torch.diag(output.weight.double())
        return Sublayer("linear", {"attn_norm.weight": gain, "attn_output.weight": weight})

    def _map(self, matrix: Tensor) -> Sublayer:
        """The first coordinates x -> P x; all others become zero."""
        weight = -torch.eye(self.size, dtype=torch.float64)
        rows, columns = matrix.shape
        weight[:rows, :columns] += matrix
        weight[self.spare] = 0
        tensors = {"attn_norm.weight": self._raised_gain(), "attn_output.weight": weight}
        return Sublayer("linear", tensors, is_raised=True)

    def _light(self, network: Any) -> Sublayer:
        """A network without a norm that replaces the stream: f(x) - x is added."""
        parts = dict(network.named_children())
        up, up_bias = affine(parts["up"], self.architecture)
        down, down_bias = affine(parts["down"], self.architecture)
        if "gate" in parts:
            gate, gate_bias = affine(parts["gate"], self.architecture)
            up_bias = up.new_zeros(len(up))
            gate_bias = up_bias
        else:  # relu(z) is silu(K z) / K, for a large K
            assert up_bias is not None
            scale = _power_of_two(2.0**24, up)
            gate, gate_bias = scale * up, scale * up_bias
            up, up_bias = torch.zeros_like(up), torch.full_like(up_bias, 1 / scale)
        one = torch.eye(self.hidden, dtype=torch.float64)
        opened = torch.full((self.hidden,), _SILU_IS_ONE, dtype=torch.float64)
        linears: dict[str, Affine] = {
            "gate_proj": (torch.cat([gate, 0 * one]), torch.cat([gate_bias, opened])),
            "up_proj": (torch.cat([up, one]), torch.cat([up_bias, 0 * opened])),
            "down_proj": (torch.cat([down, -one], dim=1), down_bias),
        }
        tensors = self._sublayer("mlp", self._raised_gain(), linears).tensors
        return Sublayer("mlp", tensors, is_raised=True)


def _composed(before: Tensor, weight: Tensor, bias: Tensor | None) -> Affine:
    return before @ weight, None if bias is None else before @ bias


def _power_of_two(most: float, weight: Tensor) -> float:
    """The largest up to `most` that keeps scaled weights within float16."""
    largest = float(weight.abs().max()) or 1.0
    return min(most, 2.0 ** math.floor(math.log2(_LARGEST / largest)))
