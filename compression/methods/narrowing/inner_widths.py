"""How wide the inner dimensions of each block become when the whole model loses so much.

A block has up to three inner dimensions: the MLP's channels, the coordinates of query and key
heads, and those of value heads. Every parameter of its linears belongs to one of them, so a block
that loses the share phi of each loses that share of its linears.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from foldstack.compression.closed_forms.loss_curve import CURVE_STEPS, LossCurve
from foldstack.compression.closed_forms.selection import spread
from foldstack.compression.errors import InputError
from foldstack.compression.statistics.sensitivity import Sensitivity

Kind = Literal["mlp", "query_key", "value_output"]
KINDS: tuple[Kind, ...] = ("mlp", "query_key", "value_output")
Widths = dict[tuple[int, Kind], int]
BlockSparsities = Callable[[float], Mapping[int, float]]


@dataclass(frozen=True)
class InnerDimension:
    """One inner dimension of one block."""

    position: int
    kind: Kind
    size: int
    """Its width so far."""
    step: int
    """Widths are multiples of this, or the whole size."""
    price: int
    """Parameters per unit of width."""
    freed: int = 0
    """Parameters that go once it is narrower at all; negative when some come."""
    weight: float = 1.0
    """Its sparsity over that of its block."""

    @property
    def least(self) -> int:
        return min(self.step, self.size)

    def exact(self, sparsity: float, cap: float) -> float:
        """The width at a block sparsity, not yet a whole number."""
        return max(float(self.least), (1 - min(cap, self.weight * sparsity)) * self.size)

    def floor(self, width: float) -> int:
        if width >= self.size:
            return self.size
        # 1e-9 keeps a width that is whole in exact arithmetic from falling a step.
        return max(self.least, int(width / self.step + 1e-9) * self.step)

    def wider(self, width: int) -> int:
        return min(self.size, width + self.step)

    def removed(self, width: int | float) -> float:
        return float((self.size - width) * self.price + (self.freed if width < self.size else 0))


def sensitive_widths(
    dimensions: Sequence[InnerDimension], sensitivity: Sensitivity, to_remove: float, cap: float
) -> Widths:
    """Widths that remove `to_remove` parameters, or a little more, where that costs least by the
    scores of single narrower dimensions; none loses more than `cap` of its width.

    Raises:
        InputError: what was scored saves less, or a dimension was not scored.
    """
    keyed = _keyed(dimensions)
    curves = {
        key: _curve_of(dimension, sensitivity, cap).points(CURVE_STEPS)
        for key, dimension in keyed.items()
    }
    saved = spread(curves, to_remove)
    exact = {
        key: d.size - max(0.0, saved[key] - d.freed) / d.price if saved[key] > 0 else float(d.size)
        for key, d in keyed.items()
    }
    return rounded_widths(dimensions, exact, to_remove)


def _curve_of(dimension: InnerDimension, sensitivity: Sensitivity, cap: float) -> LossCurve:
    slot = dimension.position, dimension.kind
    scored = {
        score.variant.level: score.mean
        for score in sensitivity.scores
        if score.variant.kind.endswith("_width") and slot in score.variant.slots
    }
    narrowest = dimension.exact(cap, cap)
    points = [
        (dimension.removed(width), loss)
        for width, loss in scored.items()
        if width >= narrowest and dimension.removed(width) > 0
    ]
    if not points:
        raise InputError(
            f"no width of the {dimension.kind} dimension of block {dimension.position} was scored "
            "that may be chosen; score the widths of this very model"
        )
    return LossCurve(points)


def uniform_sparsities(positions: Sequence[int]) -> BlockSparsities:
    """The same sparsity in every block."""
    return lambda average: dict.fromkeys(positions, average)


def influence_sparsities(
    influence: Mapping[int, float], smoothing: float, cap: float
) -> BlockSparsities:
    """More sparsity where the block influence is low: phi = L phi_avg softmax(-s / eps).

    arXiv 2408.09632, equations 10 and 11. What a block would lose beyond `cap` is spread over the
    others in the same proportions, so that the mean stays phi_avg (at most `cap`).
    """
    scores = torch.tensor(list(influence.values()), dtype=torch.float64)
    shares = torch.softmax(-scores / smoothing, dim=0)

    def sparsities(average: float) -> dict[int, float]:
        phi = torch.full_like(shares, cap)
        is_free = torch.ones(len(shares), dtype=torch.bool)
        while is_free.any():
            left = len(shares) * average - cap * int((~is_free).sum())
            phi[is_free] = left * shares[is_free] / shares[is_free].sum()
            over = is_free & (phi > cap)
            if not over.any():
                break
            phi[over], is_free = cap, is_free & ~over
        return dict(zip(influence, phi.tolist(), strict=True))

    return sparsities


def removed_by(dimensions: Sequence[InnerDimension], widths: Mapping[tuple[int, Kind], int]) -> int:
    """Parameters that these widths remove."""
    return int(sum(d.removed(widths[d.position, d.kind]) for d in dimensions))


def farthest(dimensions: Sequence[InnerDimension], cap: float) -> int:
    """The most parameters that can go."""
    return int(sum(max(0.0, d.removed(d.exact(cap, cap))) for d in dimensions))


def chosen_widths(
    dimensions: Sequence[InnerDimension],
    sparsities: BlockSparsities,
    to_remove: float,
    cap: float,
    *,
    even: bool,
    slack: float,
) -> Widths:
    """Widths that remove `to_remove` parameters or a little more.

    The block sparsities are solved for, the widths rounded down, and what that removes too much is
    given back a step at a time, to the dimension that lost most by the rounding. With `even` a step
    goes to all blocks at once, and to single ones only when more than `slack` parameters are left.
    """
    exact = _exact_widths(dimensions, sparsities, to_remove, cap)
    return rounded_widths(dimensions, exact, to_remove, even=even, slack=slack)


def rounded_widths(
    dimensions: Sequence[InnerDimension],
    exact: Mapping[tuple[int, Kind], float],
    to_remove: float,
    *,
    even: bool = False,
    slack: float = 0.0,
) -> Widths:
    """Whole widths near exact ones that remove `to_remove` parameters or a little more: rounded
    down, then wider again where the rounding took most."""
    widths = {d_key: d.floor(exact[d_key]) for d_key, d in _keyed(dimensions).items()}
    singles = [(d,) for d in dimensions]
    if even:
        by_kind = [tuple(d for d in dimensions if d.kind == kind) for kind in KINDS]
        _give_back([group for group in by_kind if group], exact, widths, dimensions, to_remove)
    if not even or removed_by(dimensions, widths) - to_remove > slack:
        _give_back(singles, exact, widths, dimensions, to_remove)
    return widths


def _keyed(dimensions: Sequence[InnerDimension]) -> dict[tuple[int, Kind], InnerDimension]:
    return {(d.position, d.kind): d for d in dimensions}


def _exact_widths(
    dimensions: Sequence[InnerDimension],
    sparsities: BlockSparsities,
    to_remove: float,
    cap: float,
) -> dict[tuple[int, Kind], float]:
    """Widths, not whole numbers, at the mean sparsity that removes `to_remove` (by bisection)."""
    low, high = 0.0, cap
    for _ in range(60):
        middle = (low + high) / 2
        of_block = sparsities(middle)
        removed = sum(d.removed(d.exact(of_block[d.position], cap)) for d in dimensions)
        low, high = (low, middle) if removed >= to_remove else (middle, high)
    of_block = sparsities(high)
    return {(d.position, d.kind): d.exact(of_block[d.position], cap) for d in dimensions}


def _give_back(
    groups: Sequence[tuple[InnerDimension, ...]],
    exact: Mapping[tuple[int, Kind], float],
    widths: Widths,
    dimensions: Sequence[InnerDimension],
    to_remove: float,
) -> None:
    """Widen group after group by a step, the one that lost most first, while enough stays removed;
    changes `widths`."""
    left = removed_by(dimensions, widths) - to_remove

    def lost(group: tuple[InnerDimension, ...]) -> float:
        return max((exact[d.position, d.kind] - widths[d.position, d.kind]) / d.step for d in group)

    while True:
        for group in sorted(groups, key=lost, reverse=True):
            narrow = {(d.position, d.kind): widths[d.position, d.kind] for d in group}
            wide = {(d.position, d.kind): d.wider(narrow[d.position, d.kind]) for d in group}
            price = removed_by(group, narrow) - removed_by(group, wide)
            if wide != narrow and price <= left:
                widths.update(wide)
                left -= price
                break
        else:
            return
