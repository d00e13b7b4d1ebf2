"""From scores to options of the program: what is known at some widths of a site is read off at all
of them, and what excludes what is told."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from foldstack.compression.closed_forms.loss_curve import LossCurve
from foldstack.compression.closed_forms.selection import Option
from foldstack.compression.methods.search.library import Library
from foldstack.compression.statistics.sensitivity import Score, Sensitivity, Slot, Variant

FINEST = 0.05
"""Share of a dimension between two of its widths that are told apart, where it has more than
`FEW_WIDTHS`."""
FEW_WIDTHS = 64
WHOLE = "whole"
NATIVE_KINDS = ("absent", "mlp_width", "run_absent", "run_map")
"""Variants that a stock class knows: widths of MLPs only if all have one."""
SILENCED = "attentions"
"""What is saved by this name: blocks that attend."""


def options_of(library: Library, sensitivity: Sensitivity) -> list[Option]:
    """Everything that may stand in the model, the original of every slot among it."""
    options = originals(library)
    for (_, _, kind), scores in sensitivity.sites.items():
        if kind.endswith("_width"):
            (slot,) = scores[0].variant.slots
            options += _of_widths(library, slot, scores)
        else:
            options += [option(library, score.variant, score.mean) for score in scores]
    return options


def of_one_mlp_width(options: Iterable[Option]) -> list[Option]:
    """The options of which a stock class can have all that are chosen together."""
    kept = []
    for o in options:
        if any(variant.kind not in NATIVE_KINDS for variant in o.key):
            continue
        widths = {variant.level for variant in o.key if variant.kind == "mlp_width"}
        gone = {position for variant in o.key for position in variant.gone}
        stays = any(
            isinstance(slot, tuple) and slot[1] == "mlp" and slot[0] not in gone for slot in o.slots
        )
        kept.append(replace(o, of_class=next(iter(widths), WHOLE if stays else None)))
    return kept


def neighbours_counted_wrong(options: Iterable[Option]) -> list[list[object]]:
    """Keys of options that are not to be chosen together: of blocks side by side that are gone,
    where all of them are an option as well, whose loss is known and no sum of parts of it."""
    runs: dict[tuple[int, int], list[object]] = {}
    for o in options:
        gone = {position for variant in o.key for position in variant.gone}
        if gone and len(gone) == max(gone) + 1 - min(gone):
            runs.setdefault((min(gone), max(gone) + 1), []).append(o.key)
    return [
        [first, second]
        for (start, middle), firsts in runs.items()
        for (other, stop), seconds in runs.items()
        if other == middle and (start, stop) in runs
        for first in firsts
        for second in seconds
    ]


def originals(library: Library) -> list[Option]:
    """What is in the model, slot by slot."""
    return [Option((), frozenset([slot]), 0.0) for slot in library.slots]


def option(library: Library, variant: Variant, loss: float) -> Option:
    """A variant as an option of the program."""
    return bundle(library, (variant,), variant.slots, loss)


def bundle(
    library: Library, key: tuple[Variant, ...], slots: frozenset[Slot], loss: float
) -> Option:
    """Some variants as one option of the program, of which they are the key."""
    saved: dict[str, float] = {SILENCED: float(sum(map(library.silenced, key)))}
    for variant in key:
        for name, value in library.savings(variant).items():
            saved[name] = saved.get(name, 0.0) + value
    return Option(key, slots, loss, saved)


def widths_between(library: Library, slot: Slot, farthest: int) -> list[int]:
    """Widths of a dimension from its widest narrower one down to `farthest`, no closer together
    than `FINEST` of it."""
    dimension = library.dimensions[slot]
    all_of_them = dimension.size // dimension.step
    steps = all_of_them if all_of_them <= FEW_WIDTHS else round(1 / FINEST)
    widths = {dimension.floor((1 - n / steps) * dimension.size) for n in range(1, steps)}
    return sorted((w for w in widths if farthest <= w < dimension.size), reverse=True)


def _of_widths(library: Library, slot: Slot, scores: Sequence[Score]) -> list[Option]:
    dimension = library.dimensions[slot]
    scored: Mapping[int, Score] = {score.variant.level: score for score in scores}
    points = [(dimension.removed(width), score.mean) for width, score in scored.items()]
    usable = [(saved, loss) for saved, loss in points if saved > 0 and math.isfinite(loss)]
    if not usable:
        return []
    curve = LossCurve(usable)
    widths = {*widths_between(library, slot, min(scored)), *scored}
    options = []
    for width in sorted(widths, reverse=True):
        saved = dimension.removed(width)
        # What was scored need not be a multiple that this search takes.
        if 0 < saved <= curve.farthest and dimension.floor(float(width)) == width:
            loss = scored[width].mean if width in scored else curve(saved)
            options.append(option(library, library.width(*slot, width), loss))
    return options
