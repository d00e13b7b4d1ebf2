"""A model that computes on an accelerator while the weights of its blocks stay in host memory.

One block at a time is on the device: it comes when it is run and goes when another one is. Whoever
runs every block on all the data before the next one (`stream.BlockStream`) copies each block once,
and the memory of the device holds one block, whatever the depth.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.statistics.stream import tensors_of
from foldstack.compression.storage.mapped_memory import release
from foldstack.compression.structure.architectures import architecture_of


def run_blocks_in_turn(model: PreTrainedModel, device: torch.device | str) -> None:
    """From now on `model` computes on `device`, with the weights of one block there at a time.

    What is outside the blocks moves to the device for good, and so `model.device` says where it
    computes; the blocks move to host memory. What is written in place to a block on the device is
    written back when it goes. For inference: gradients would need weights that have left.
    """
    blocks = architecture_of(model).blocks(model)
    inside = {id(tensor) for tensor in _tensors_of(blocks)}
    for tensor in _tensors_of(model):
        _put(tensor, tensor.to("cpu" if id(tensor) in inside else device))
    resident = _Resident(torch.device(device))
    for block in blocks:
        block.forward = _ForwardOnDevice(block, resident)


class _ForwardOnDevice:
    """A block's forward, once its weights are on the device.

    Not a hook, which would fetch the weights of a block also where its forward is replaced.
    """

    def __init__(self, block: nn.Module, resident: "_Resident") -> None:
        self.block, self.resident = block, resident

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.resident.become(self.block)
        return type(self.block).forward(self.block, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_ForwardOnDevice":
        # A copy of the block is on the same device in its turn.
        return _ForwardOnDevice(copy.deepcopy(self.block, memo), self.resident)


class _Resident:
    """The one block on the device, and where its tensors are at home."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._block: nn.Module | None = None
        self._guests: list[_Guest] = []

    def become(self, block: nn.Module) -> None:
        if block is self._block and all(guest.is_on_device for guest in self._guests):
            return
        self._leave()
        self._guests = [_Guest(tensor, self.device) for tensor in _tensors_of(block)]
        release(guest.home for guest in self._guests)
        self._block = block

    def _leave(self) -> None:
        for guest in self._guests:
            guest.leave()
        self._block, self._guests = None, []


class _Guest:
    """A tensor of that block."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self.tensor = tensor
        self.home = tensor.data
        self._here = self.home.to(device, copy=True)
        _put(tensor, self._here)
        self._version = tensor._version

    @property
    def is_on_device(self) -> bool:
        return self.tensor.device == self._here.device

    def leave(self) -> None:
        """Go home; whoever gave the tensor other data meanwhile, as for a pass in another precision
        (`stream.BlockStream`), has put back what it found and keeps that."""
        if self.tensor.data_ptr() != self._here.data_ptr():
            return
        if self.tensor._version != self._version:
            self.home.copy_(self.tensor.data)
        _put(self.tensor, self.home)


def _put(tensor: Tensor, data: Tensor) -> None:
    # The object stays: ties, borrowers and optimizers hold it.
    with torch.inference_mode(False):
        tensor.data = data


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers that a module computes with, borrowed ones included, each once."""
    return list({id(tensor): tensor for tensor in tensors_of(module)}.values())
