"""Sublayers as layers of llama.cpp's `deci`: attention, one linear or neither, then an MLP."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from foldstack.compression.structure.heads import HeadSizes

ROWS = 32
"""Weights in a block of llama.cpp's schemes: widths are multiples of it."""
RAISED = 2.0**30
"""Beside its square that of any stream is less than float32's last digit."""


@dataclass
class Layer:
    """One layer of deci, its tensors by llama.cpp's names inside a block."""

    heads: int = 0
    """Query heads; 0 where there is neither attention nor a linear."""
    kv_heads: int = 0
    """Key and value heads; 0 beside query heads stands for a linear."""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def mlp_width(self) -> int:
        up = self.tensors.get("ffn_up.weight")
        return 0 if up is None else len(up)

    @property
    def is_linear(self) -> bool:
        return self.heads > 0 and self.kv_heads == 0


@dataclass(frozen=True)
class Sublayer:
    """Attention, a linear that reads through its norm, or an MLP, by llama.cpp's names."""

    kind: Literal["attention", "linear", "mlp"]
    tensors: dict[str, Tensor]
    is_raised: bool = False
    """Its norm is to divide every token by the same number."""


class Layers:
    """Sublayers in layers, with the spare coordinate raised before what is to be linear."""

    def __init__(self, size: int, spare: int, heads: HeadSizes, dtype: torch.dtype) -> None:
        """Args:
        size: coordinates of the stream.
        spare: the one that is raised, which nothing else writes to.
        heads: of attention.
        dtype: of weights; vectors, and linears, which undo one another, are in float32.
        """
        self.layers: list[Layer] = []
        self._size, self._spare, self._heads, self._dtype = size, spare, heads, dtype
        self._is_raised = False

    def append(self, sublayer: Sublayer) -> None:
        self._turn(sublayer.is_raised)
        if sublayer.kind != "mlp" or not self.layers or self.layers[-1].mlp_width:
            self._fill()
            self.layers.append(Layer())
        layer = self.layers[-1]
        if sublayer.kind != "mlp":
            layer.heads = self._heads.heads
        if sublayer.kind == "attention":
            layer.kv_heads = self._heads.kv_heads
        precision = torch.float32 if sublayer.kind == "linear" else self._dtype
        _store(layer, _in_rows(sublayer.tensors), precision)

    def end(self) -> None:
        self._turn(to_raised=False)
        self._fill()

    def _turn(self, to_raised: bool) -> None:
        if to_raised == self._is_raised:
            return
        if not self.layers:  # llama.cpp reads off the first what heads are
            self.layers.append(self._idle_attention())
        self._fill()
        tensors = self.layers[-1].tensors
        bias = tensors.get("ffn_down.bias", torch.zeros(self._size))
        bias[self._spare] += RAISED if to_raised else -RAISED
        tensors["ffn_down.bias"] = bias
        self._is_raised = to_raised

    def _fill(self) -> None:
        """An MLP of zeros where the last layer has none: llama.cpp would leave it out whole."""
        if self.layers and not self.layers[-1].mlp_width:
            size = self._size
            reads, writes = torch.zeros(ROWS, size), torch.zeros(size, ROWS)
            tensors = {"ffn_norm.weight": torch.zeros(size), "ffn_down.weight": writes}
            tensors |= {"ffn_gate.weight": reads, "ffn_up.weight": reads}
            _store(self.layers[-1], tensors, self._dtype)

    def _idle_attention(self) -> Layer:
        size, width = self._size, self._heads.head_dim
        tensors = {f"attn_{name}.weight": torch.zeros(width, size) for name in "qkv"}
        tensors |= {"attn_norm.weight": torch.zeros(size)}
        tensors |= {"attn_output.weight": torch.zeros(size, width)}
        layer = Layer(1, 1)
        _store(layer, tensors, self._dtype)
        return layer


def _store(layer: Layer, tensors: dict[str, Tensor], precision: torch.dtype) -> None:
    for name, tensor in tensors.items():
        layer.tensors[name] = tensor.to(torch.float32 if tensor.ndim == 1 else precision)


def _in_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An MLP with as many channels of zeros as a block of a scheme wants."""
    if (up := tensors.get("ffn_up.weight")) is None:
        return tensors
    missing = max(ROWS, -(-len(up) // ROWS) * ROWS) - len(up)
    padded = tensors | {"ffn_down.weight": pad(tensors["ffn_down.weight"], (0, missing))}
    for name in ("ffn_gate.weight", "ffn_up.weight", "ffn_gate.bias", "ffn_up.bias"):
        if name in tensors:
            rows = tensors[name]
            padded[name] = pad(rows, (*(0,) * 2 * (rows.ndim - 1), 0, missing))
    return padded
