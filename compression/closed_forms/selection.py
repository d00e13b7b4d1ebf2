"""One option for every slot, with the least loss at a budget: a binary program, solved exactly.

    minimise    sum over options o of loss_o x_o                          x_o in {0, 1}
    subject to  sum of x_o over the options that decide about a slot = 1  for every slot
                sum of saved_o,b x_o >= need_b                            for every budget b
                x_o <= y_class(o),  sum of y = 1                          for options of a class
                sum of x_o over an earlier choice <= its size - 1         for every choice not again

An option that decides about several slots (a block's all, a run of blocks) excludes those of each:
the program chooses a cover. HiGHS solves it (`scipy.optimize.milp`).
"""

import ctypes
import logging
import math
import os
import sys
import tempfile
import threading
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from foldstack.compression.errors import InputError

logger = logging.getLogger(__name__)

RELATIVE_GAP = 1e-4
"""Of the loss to the least one, where the solver stops."""
MOST_SECONDS = 120.0
_LOSS_SCALE = 1e3
# Solvers keep constraints to 1e-6 of their right side, which is 1 here: what is whole stays whole.
_SLACK = 1e-6
# What HiGHS prints whatever it was told, when it mends a solution that rounding has spoiled.
_CHATTER = b"HighsMip"
_ONE_AT_A_TIME = threading.Lock()


class OutOfReach(InputError):
    """No choice keeps the budgets."""

    def __init__(self, reach: Mapping[str, float], needs: Mapping[str, float]) -> None:
        self.reach, self.needs = dict(reach), dict(needs)
        short = [name for name, need in needs.items() if reach[name] < need * (1 - _SLACK)]
        said = ", ".join(f"{name}: {reach[name]:.4g} of {needs[name]:.4g}" for name in short)
        super().__init__(
            f"what there is to choose saves too little ({said})"
            if short
            else "each budget can be kept alone, but not all of them together"
        )


@dataclass(frozen=True)
class Option:
    """What may be chosen.

    Args:
        key: what the caller knows it by.
        slots: what it decides about.
        loss: its part of the sum to minimise; options of an infinite one are never chosen.
        saved: by the name of a budget; nothing where it is not named.
        of_class: of all chosen options that have one, it is the same.
    """

    key: Any
    slots: frozenset[Hashable]
    loss: float
    saved: Mapping[str, float] = field(default_factory=dict)
    of_class: Hashable | None = None


def select(
    options: Sequence[Option],
    needs: Mapping[str, float],
    not_again: Sequence[Collection[Any]] = (),
    limits: Mapping[str, float] | None = None,
) -> list[Option]:
    """The options of least loss that save what is needed; one for every slot that any is about.

    Args:
        needs: what is to be saved, by the name of a budget; not positive: nothing.
        not_again: keys of earlier choices, which are not to be made again.
        limits: the most that may be saved, by the name of a budget.

    Raises:
        OutOfReach: no choice saves as much; it knows how far each budget reaches by itself.
    """
    options = [option for option in options if math.isfinite(option.loss)]
    needs = {name: need for name, need in needs.items() if need > 0}
    losses = [option.loss * _LOSS_SCALE for option in options]
    found = _solved(options, losses, needs, not_again, limits or {})
    if found is None:
        reach = {name: _most(options, name, not_again, limits or {}) for name in needs}
        raise OutOfReach(reach, needs)
    return found


def _most(
    options: Sequence[Option],
    budget: str,
    not_again: Sequence[Collection[Any]],
    limits: Mapping[str, float],
) -> float:
    """The most that can be saved of one budget."""
    saved = [option.saved.get(budget, 0.0) for option in options]
    scale = max([1.0, *map(abs, saved)])
    found = _solved(options, [-amount / scale for amount in saved], {}, not_again, limits)
    return math.fsum(option.saved.get(budget, 0.0) for option in found or ())


def _solved(
    options: Sequence[Option],
    objective: Sequence[float],
    needs: Mapping[str, float],
    not_again: Sequence[Collection[Any]],
    limits: Mapping[str, float],
) -> list[Option] | None:
    classes = list(dict.fromkeys(o.of_class for o in options if o.of_class is not None))
    rows = _Rows(len(options) + len(classes))
    place = {name: len(options) + index for index, name in enumerate(classes)}
    of_slot: dict[Hashable, list[int]] = {}
    for index, option in enumerate(options):
        for slot in sorted(option.slots, key=repr):
            of_slot.setdefault(slot, []).append(index)
    for members in of_slot.values():
        rows.add(dict.fromkeys(members, 1.0), 1.0, 1.0)
    for name, need in needs.items():
        saved = {i: o.saved[name] / need for i, o in enumerate(options) if name in o.saved}
        rows.add(saved, 1.0, math.inf)
    for name, limit in limits.items():
        saved = {i: o.saved[name] for i, o in enumerate(options) if o.saved.get(name)}
        if saved:
            rows.add(saved, -math.inf, limit)
    for index, option in enumerate(options):
        if option.of_class is not None:
            rows.add({index: 1.0, place[option.of_class]: -1.0}, -math.inf, 0.0)
    if classes:
        rows.add(dict.fromkeys(place.values(), 1.0), 1.0, 1.0)
    for keys in not_again:
        members = [i for i, option in enumerate(options) if option.key in keys]
        rows.add(dict.fromkeys(members, 1.0), -math.inf, len(members) - 1.0)
    with _without_chatter():
        result = milp(
            np.array([*objective, *[0.0] * len(classes)]),
            integrality=np.ones(rows.width),
            bounds=Bounds(0, 1),
            constraints=rows.constraint(),
            options={"mip_rel_gap": RELATIVE_GAP, "time_limit": MOST_SECONDS},
        )
    if result.x is None:
        return None
    if result.status != 0:
        logger.warning("the search for the best choice stopped early: %s", result.message)
    return [o for o, taken in zip(options, result.x[: len(options)], strict=True) if taken > 0.5]


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Inside, what C code writes to standard output waits, and the solver's own line is dropped.

    The line comes from `printf`, past `sys.stdout`; whatever else is written meanwhile, by other
    threads, is passed on afterwards.
    """
    with _ONE_AT_A_TIME, tempfile.TemporaryFile() as waiting:
        _flush()
        stdout = os.dup(1)
        os.dup2(waiting.fileno(), 1)
        try:
            yield
        finally:
            _flush()
            os.dup2(stdout, 1)
            os.close(stdout)
            waiting.seek(0)
            kept = b"".join(line for line in waiting if not line.startswith(_CHATTER))
            while kept:
                kept = kept[os.write(1, kept) :]


def _flush() -> None:
    """What Python and C have buffered goes to where standard output is now."""
    sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)


class _Rows:
    """Linear constraints, row by row."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._entries: list[tuple[int, int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def add(self, entries: Mapping[int, float], low: float, high: float) -> None:
        self._entries += [(len(self._low), column, value) for column, value in entries.items()]
        self._low.append(low)
        self._high.append(high)

    def constraint(self) -> LinearConstraint:
        rows, columns, values = zip(*self._entries, strict=True)
        matrix = coo_array((values, (rows, columns)), shape=(len(self._low), self.width))
        return LinearConstraint(matrix.tocsr(), np.array(self._low), np.array(self._high))


def on_lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (saved, loss) those on the lower convex hull, in the order of what they save.

    Along it the loss rises ever more steeply: what a price per saving chooses is one of them.
    """
    hull: list[tuple[float, float]] = []
    for point in sorted(points):
        if hull and point[0] == hull[-1][0]:
            continue  # the same saving at a higher loss
        while len(hull) >= 2 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def spread(curves: Mapping[Any, Sequence[tuple[float, float]]], need: float) -> dict[Any, float]:
    """What each curve is to save so that all save `need` at the least loss, if each may save
    anything between its points.

    Curves are points (saved, loss), 0 among them; the steepest segments of their hulls stay.

    Raises:
        OutOfReach: all of them together save less.
    """
    segments = []
    for number, (key, points) in enumerate(curves.items()):
        hull = on_lower_hull(points)
        for start, end in pairwise(hull):
            segments.append((_slope(start, end), number, start[0], end[0], key))
    saved: dict[Any, float] = dict.fromkeys(curves, 0.0)
    left = need
    for _, _, begin, stop, key in sorted(segments, key=lambda segment: segment[:3]):
        if left <= 0:
            break
        taken = min(stop - begin, left)
        saved[key] += taken
        left -= taken
    if left > _SLACK * need:
        raise OutOfReach({"parameters": need - left}, {"parameters": need})
    return saved


def _slope(start: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])
