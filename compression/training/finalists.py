"""Which of several compressed models is kept, after each was trained back for a few equal steps.

What loses least right after compression need not do so after training: ranks flip (DarwinLM,
arXiv 2502.07780). So the losses that decide are the healed ones, on windows that nobody trained on;
what these cannot tell apart is decided by speed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from foldstack.compression.statistics.sensitivity import standard_error

LEVEL_WITHIN = 1.96
"""Standard errors of a difference: those of a 95 % interval."""


@dataclass(frozen=True)
class Finalist:
    """One of the models.

    Args:
        name: what it is called.
        before: loss on each window right after compression, nats per token.
        healed: the same after training.
        flops: per token.
    """

    name: str
    before: tuple[float, ...]
    healed: tuple[float, ...]
    flops: int


def winner(finalists: Sequence[Finalist]) -> int:
    """The place of the one with the fewest FLOPs among those whose healed loss is not above the
    lowest by more than the windows can tell."""
    lowest = min(finalists, key=lambda each: fmean(each.healed))
    level = [
        place
        for place, each in enumerate(finalists)
        if each is lowest or _is_level(each.healed, lowest.healed)
    ]
    return min(level, key=lambda place: (finalists[place].flops, fmean(finalists[place].healed)))


def _is_level(losses: Sequence[float], lowest: Sequence[float]) -> bool:
    rises = [one - other for one, other in zip(losses, lowest, strict=True)]
    return fmean(rises) <= LEVEL_WITHIN * standard_error(rises)


def told(finalists: Sequence[Finalist], kept: int, steps: int) -> str:
    """What was found, in a sentence without its end, and whether training changed who is ahead."""
    before, healed = (
        [fmean(getattr(each, when)) for each in finalists] for when in ("before", "healed")
    )
    others = [place for place in range(len(finalists)) if place != kept]
    losses = ", ".join(f"{finalists[place].name} {healed[place]:.4f}" for place in others)
    first = min(range(len(finalists)), key=before.__getitem__)
    flip = "" if first == kept else f"; before them {finalists[first].name} was ahead"
    return (
        f"of {len(finalists)} finalists the one with {finalists[kept].name} is kept after {steps} "
        f"steps each: {healed[kept]:.4f} nats per token ({losses}){flip}"
    )
