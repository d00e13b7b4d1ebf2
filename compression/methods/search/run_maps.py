"""What the MLP before a run of blocks becomes when it is to do the run's work as well."""

import copy
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.methods.in_order import TOKENS_AT_ONCE
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.refit import Fit, Sides, refitted_mlp
from foldstack.compression.statistics.hidden_states import MEMORY_BYTES
from foldstack.compression.statistics.stream import BlockStream, cpu_precision
from foldstack.compression.storage.spool import Spool
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.surgery import as_stored

FIT = Fit(target="residual", ridge=1e-3)
"""As `replaceme` fits."""


class RunMaps:
    """The maps of a dense model, each fitted once.

    The dense hidden states go through the blocks in order, so maps are cheapest asked for from the
    first block to the last and, of one block, from the shortest run to the longest.
    """

    def __init__(self, model: PreTrainedModel, evidence: Evidence) -> None:
        self.model, self.evidence = model, evidence
        self._spool = Spool(None if evidence.work is None else evidence.work / "maps")
        self._known: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._before: BlockStream | None = None
        self._behind: BlockStream | None = None

    def of(self, host: int, stop: int) -> dict[str, Tensor]:
        """What changes in block `host` when the blocks behind it up to `stop` - 1 are gone, as a
        cut of the same depth names it and the model stores it."""
        if (host, stop) not in self._known:
            name = f"map-{host}-{stop}"
            self._known[host, stop] = self._spool.part(name, partial(self._fitted, host, stop))
        return self._known[host, stop]

    def _fitted(self, host: int, stop: int) -> dict[str, Tensor]:
        before = self._standing_before(host)
        behind = self._behind
        if behind is None or behind.position <= host or behind.position > stop:
            behind = self._behind = self._stream()
            behind.put(before.batches(), host)

        def pass_run() -> None:
            while behind.position < stop:
                behind.advance()

        block = copy.deepcopy(architecture_of(self.model).blocks(self.model)[host])
        fitted = refitted_mlp(self.model, host, Sides(behind, before, block, pass_run), FIT)
        return as_stored(fitted, self.model)

    def _standing_before(self, host: int) -> BlockStream:
        if self._before is None or self._before.position > host:
            self._before = self._stream()
        if self._before.position < host:
            self._behind = None
        while self._before.position < host:
            self._before.advance()
        return self._before

    def _stream(self) -> BlockStream:
        windows = self.evidence.calibration
        return BlockStream(
            self.model,
            windows,
            batch_size=max(1, TOKENS_AT_ONCE // windows.shape[1]),
            dtype=cpu_precision(self.model),
            memory_bytes=MEMORY_BYTES // 2,
        )
