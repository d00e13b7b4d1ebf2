"""What changes cost beside one another: scored again where a choice stands, and chosen again.

Scores of single changes add up only as long as each is small beside what the others do. So what is
near a choice is scored with all the rest of it in place, and the program is solved again among
that; a round stays only if its loss falls by more than its error on windows that no score has seen.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from foldstack.compression.closed_forms.selection import Option, OutOfReach
from foldstack.compression.methods.search.curves import bundle
from foldstack.compression.methods.search.library import DENSE, Choice, Library, in_order
from foldstack.compression.methods.search.scoring import Scorer, displaced, with_variant
from foldstack.compression.statistics.sensitivity import Slot, Variant, standard_error
from foldstack.compression.storage.spool import Spool

logger = logging.getLogger(__name__)

STEP = 0.1
"""How far from its width a dimension is scored again, as a share of it, on either side."""
MOST_OTHERS = 2
"""Changes of another kind that are scored again in a round, for each block of the model."""

Solve = Callable[[Sequence[Option]], list[Option]]


@dataclass(frozen=True)
class Improvement:
    """What one round came to.

    Args:
        before, after: KL on the windows that no score has seen, nats per token.
        stderr: of their difference, paired by window.
    """

    before: float
    after: float
    stderr: float

    @property
    def is_real(self) -> bool:
        return self.before - self.after > self.stderr


def improved(
    library: Library,
    scorer: Scorer,
    fresh: Scorer,
    choice: Choice,
    solve: Solve,
    rounds: int,
    spool: Spool,
    known: Mapping[Variant, float],
    *,
    one_width: bool = False,
) -> tuple[Choice, list[Improvement]]:
    """A choice after rounds of scoring around it, and what each came to.

    Args:
        scorer: on the windows that scores are of.
        fresh: on others, which decide.
        solve: the options to choose, at the budget.
        known: losses of variants in the dense model; those that cost less there than `choice` does
            as a whole are tried, the cheapest for what they save first.
        one_width: all MLPs have one width: what comes back has that of the others.
    """
    found: list[Improvement] = []
    here = fresh.loss(choice)
    for number in range(rounds):
        name = f"round-{number}"
        options = options_around(library, scorer, choice, spool, name, known, one_width=one_width)
        try:
            other = choice_of(solve(options))
        except OutOfReach:  # what is near saves too little: cannot be, as the choice itself is near
            break
        if other == choice:
            break
        there = fresh.loss(other)
        difference = (here - there).tolist()
        change = Improvement(float(here.mean()), float(there.mean()), standard_error(difference))
        found.append(change)
        logger.info("round %d: KL %.4f to %.4f", number + 1, change.before, change.after)
        if not change.is_real:
            break
        choice, here = other, there
    return choice, found


def choice_of(options: Iterable[Option]) -> Choice:
    """The variants that some chosen options stand for."""
    return frozenset(variant for option in options for variant in option.key)


def options_around(
    library: Library,
    scorer: Scorer,
    choice: Choice,
    spool: Spool,
    name: str,
    known: Mapping[Variant, float],
    *,
    one_width: bool = False,
) -> list[Option]:
    """What may stand instead of single parts of a choice, with what each changes of its loss."""
    base = scorer.loss(choice)
    has_widths = any(variant.kind.endswith("_width") for variant in known)
    moves = _width_moves(library, choice) if has_widths else []
    moves += _returns(library, choice, one_width=one_width)
    moves += _others(library, choice, known, float(base.mean()))
    losses = scorer.losses([move.choice for move in moves], choice, spool, name)
    rises = [float((loss - base).mean()) for loss in losses]
    options = standing(library, choice)
    by_slot: dict[Slot, list[tuple[float, float]]] = {}
    for move, rise in zip(moves, rises, strict=True):
        if not math.isfinite(rise):
            continue
        if move.slot is None:
            options.append(bundle(library, move.key, move.slots, rise))
        else:
            by_slot.setdefault(move.slot, []).append((float(move.key[0].level), rise))
    for slot, points in by_slot.items():
        options += _between(library, choice, slot, points)
    return options


@dataclass(frozen=True)
class _Move:
    choice: Choice
    key: tuple[Variant, ...]
    slots: frozenset[Slot]
    slot: Slot | None = None
    """The dimension that becomes narrower or wider; None where it is something else."""


def standing(library: Library, choice: Choice) -> list[Option]:
    """What a choice has at each slot, at no further loss."""
    options = [bundle(library, (variant,), variant.slots, 0.0) for variant in in_order(choice)]
    taken = {slot for variant in choice for slot in variant.slots}
    return options + [Option((), frozenset([s]), 0.0) for s in library.slots if s not in taken]


def _current(library: Library, choice: Choice, slot: Slot) -> int | None:
    """The width of a dimension in a choice; None where something else stands there."""
    for variant in choice:
        if slot in variant.slots:
            return variant.level if variant.kind.endswith("_width") else None
    return library.dimensions[slot].size


def _width_moves(library: Library, choice: Choice) -> list[_Move]:
    moves = []
    for slot, dimension in library.dimensions.items():
        width = _current(library, choice, slot)
        if width is None:
            continue
        reach = STEP * dimension.size
        for target in (width - reach, width + reach):
            other = max(dimension.least, dimension.floor(target))
            if other == width:
                other = dimension.wider(width) if target > width else width
            if other != width:
                variant = library.width(*slot, other)
                moves.append(_Move(with_variant(choice, variant), (variant,), variant.slots, slot))
    return moves


def _returns(library: Library, choice: Choice, *, one_width: bool) -> list[_Move]:
    """What may come back where more than a width was changed: whole, or as wide as the others."""
    widths = {v.level for v in choice if v.kind == "mlp_width"} if one_width else set()
    moves = []
    for variant in in_order(choice):
        if variant.kind.endswith("_width"):
            continue
        back = tuple(
            library.width(*slot, width)
            for slot in sorted(variant.slots)
            for width in widths
            if slot[1] == "mlp"
        )
        moves.append(_Move(frozenset([*choice - {variant}, *back]), back, variant.slots))
    return moves


def _others(
    library: Library, choice: Choice, known: Mapping[Variant, float], loss: float
) -> list[_Move]:
    """Changes of another kind than a width that may be made, each with all that it displaces: what
    is not its own comes back whole."""
    cheap = [
        variant
        for variant in in_order(known)
        if not variant.kind.endswith("_width")
        and variant not in choice
        and known[variant] <= max(loss, 1e-6)
    ]
    cheap.sort(key=lambda v: known[v] / max(1, library.saved(v).parameters))
    moves = []
    for variant in cheap[: MOST_OTHERS * len(library.positions)]:
        slots = variant.slots.union(*(other.slots for other in displaced(choice, variant)))
        moves.append(_Move(with_variant(choice, variant), (variant,), slots))
    return moves


def _between(
    library: Library, choice: Choice, slot: Slot, points: Sequence[tuple[float, float]]
) -> list[Option]:
    """Widths from the narrowest scored one to the widest; what lies between them on a parabola
    through what is known, or a line."""
    dimension = library.dimensions[slot]
    width = _current(library, choice, slot)
    assert width is not None
    known = {float(width): 0.0, **dict(points)}
    rise = _polynomial(known)
    options = []
    low, high = int(min(known)), int(max(known))
    step = max(dimension.step, round(STEP * dimension.size / 4 / dimension.step) * dimension.step)
    for other in sorted({*range(low, high + 1, step), *(int(w) for w, _ in points)}):
        if other == width or dimension.floor(float(other)) != other:
            continue
        variant = library.width(*slot, other)
        key = () if other == dimension.size else (variant,)
        options.append(bundle(library, key, variant.slots, rise(float(other))))
    return options


def _polynomial(known: Mapping[float, float]) -> Callable[[float], float]:
    """Through all points, by Lagrange."""
    places = list(known)

    def value(x: float) -> float:
        total = 0.0
        for at in places:
            weight = math.prod((x - other) / (at - other) for other in places if other != at)
            total += known[at] * weight
        return total

    return value


def removed_in_turn(
    library: Library,
    scorer: Scorer,
    candidates: Sequence[Variant],
    is_enough: Callable[[Choice], bool],
) -> Choice | None:
    """Blocks absent one after the other, each time the one that then costs the least loss, until it
    is enough (SLEB, arXiv 2402.09025, by the divergence); None where it never is."""
    choice, left = DENSE, list(candidates)
    while not is_enough(choice):
        if not left:
            return None
        alternatives = [with_variant(choice, variant) for variant in left]
        losses = [float(loss.mean()) for loss in scorer.losses(alternatives, choice)]
        least = min(range(len(left)), key=losses.__getitem__)
        choice = alternatives[least]
        left.pop(least)
    return choice
