"""What a frozen teacher makes of windows that are trained on more than once, computed once."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foldstack.compression.statistics.hidden_states import MEMORY_BYTES, HiddenStates

logger = logging.getLogger(__name__)

Taught = Sequence[Float[Tensor, "batch tokens hidden"]]
"""The teacher's last hidden states on some windows, and what else of it is compared."""

# From so many times the windows on a pass of the teacher beforehand costs less than those it saves.
WORTH_FROM = 1.25


@dataclass(frozen=True)
class TeacherStates:
    """Those of all windows, in memory or in files without a name.

    All are made beforehand, in the order of the windows: a run that was killed and goes on reads
    the same numbers, to the last bit, as one that was not.
    """

    _rows: dict[bytes, int]
    _kept: list[HiddenStates]

    @classmethod
    def of(
        cls,
        windows: Int[Tensor, "windows tokens"],
        make: Callable[[Tensor], Taught],
        batch_size: int,
        folder: Path,
    ) -> "TeacherStates | None":
        """Let the teacher pass the windows; None where there is no room for its states.

        Args:
            make: on some of the windows, as they are.
            folder: of the files that hold what is too large for memory.
        """
        kept: list[HiddenStates] = []
        try:
            for start in range(0, len(windows), batch_size):
                taught = make(windows[start : start + batch_size])
                for place, states in enumerate(taught):
                    if start == 0:
                        shape = (len(windows), states.shape[1], states.shape[2])
                        room = MEMORY_BYTES // len(taught)
                        kept.append(
                            HiddenStates(shape, states.dtype, memory_bytes=room, folder=folder)
                        )
                    kept[place].all[start : start + len(states)] = states
                    kept[place].let_go()
        except OSError as error:
            logger.warning("no room to keep the teacher's hidden states: %s", error)
            return None
        return cls({_key(window): row for row, window in enumerate(windows)}, kept)

    def __call__(self, windows: Int[Tensor, "batch tokens"]) -> Taught:
        """Of some of the windows, on their device."""
        rows = torch.tensor([self._rows[_key(window)] for window in windows.cpu()])
        taught = [states.all[rows].to(windows.device) for states in self._kept]
        for states in self._kept:
            states.let_go()
        return taught


def _key(window: Tensor) -> bytes:
    return window.to(torch.int64).numpy().tobytes()
