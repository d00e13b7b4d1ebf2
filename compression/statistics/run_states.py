"""What enters a run of blocks and what leaves it: kept in memory, or computed again when asked."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.statistics.stream import BlockStream
from foldstack.compression.structure.architectures import base_config_of

GIB = 1 << 30

States = Float[Tensor, "batch tokens hidden"]


class RunStates:
    """The hidden states before block `start` and before block `stop` of a frozen model.

    Where both fit in `memory_gib` for all windows they are recorded in one pass. Where they do not
    (30,000 windows of 2,048 tokens at width 4,096 are a terabyte in bfloat16), every batch passes
    blocks 0 ... stop - 1 again, which the rest of the model never has to: nothing is stored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Int[Tensor, "windows tokens"],
        start: int,
        stop: int,
        *,
        batch_size: int,
        memory_gib: float,
    ) -> None:
        self.model, self.windows, self.start, self.stop = model, windows, start, stop
        width = int(base_config_of(model.config).hidden_size)
        self.is_recorded = 2 * windows.numel() * width * model.dtype.itemsize <= memory_gib * GIB
        self._stream = BlockStream(
            model, windows if self.is_recorded else windows[:1], batch_size=batch_size
        )
        if self.is_recorded:
            self._inputs, self._targets = self._passed(self._stream)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, batch: Int[Tensor, " batch"]) -> States:
        """What enters the run in these windows."""
        if self.is_recorded:
            return self._inputs[batch]
        stream = BlockStream(self.model, self.windows[batch], batch_size=len(batch))
        return _at(stream, self.start)

    def pair(self, batch: Int[Tensor, " batch"]) -> tuple[States, States]:
        """What enters and what leaves the run in these windows."""
        if self.is_recorded:
            return self._inputs[batch], self._targets[batch]
        return self._passed(BlockStream(self.model, self.windows[batch], batch_size=len(batch)))

    def through(self, block: nn.Module, inputs: States) -> States:
        """`block` in place of the run, with the mask, positions and attention of inference."""
        return self._stream.call(block, inputs, position=self.start)

    def _passed(self, stream: BlockStream) -> tuple[States, States]:
        return _at(stream, self.start), _at(stream, self.stop)


def _at(stream: BlockStream, position: int) -> States:
    while stream.position < position:
        stream.advance()
    return torch.cat(stream.hidden)
