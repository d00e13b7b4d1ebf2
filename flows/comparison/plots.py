"""Pictures of a comparison."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from foldstack.compression.evaluation.paired import STANDARD_ERRORS
from foldstack.flows.comparison.result import QUALITY, Comparison, Row, variants_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Against = Literal["size", "flops", "kv", "speed", "prefill"]
SPEEDS: tuple[Against, ...] = ("speed", "prefill")
"""What is to be high; the others are to be low."""
SAME = 0.005
MARKERS = "osD^vP*X"
AXES: dict[Against, str] = {
    "size": "parameters (millions)",
    "flops": "FLOPs per token of linears (millions)",
    "kv": "KV cache per token (bytes)",
    "speed": "decode tokens per second over the dense model's",
    "prefill": "tokens read per second over the dense model's",
}
NUMBERS: dict[Against, tuple[str, str, float]] = {
    "size": ("parameters", "structure", 1e6),
    "flops": ("flops_per_token", "structure", 1e6),
    "kv": ("kv_bytes_per_token", "structure", 1.0),
    "speed": ("decode_speedup", "speed", 1.0),
    "prefill": ("prefill_speedup", "speed", 1.0),
}
"""Name and part of a row's number, and what is one unit of the axis."""


def plot_quality(comparison: Comparison, path: Path) -> bool:
    """Draw bits per byte against parameters, before (hollow) and after recovery (filled).

    Returns False, and draws nothing, when no row has both numbers.
    """
    figure = figure_of(comparison.rows, "size")
    if figure is not None:
        figure.axes[0].set_title(comparison.title)
        with without_glyph_warnings():
            figure.savefig(path, dpi=120)
    return figure is not None


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Of a name in letters that matplotlib's font lacks: boxes stand there, and that is all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph ")
        yield


def figure_of(rows: Sequence[Row], against: Against) -> "Figure | None":
    """Bits per byte against what a model costs; None when there is nothing to see (`shown`).

    Bars are 95 % intervals of the difference from the dense model, by the windows of the text.
    """
    points = shown(rows, against)
    if not points:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display and leaves pyplot's global state alone
    axes = figure.subplots()
    methods = list(dict.fromkeys(row.method for row in points if not row.is_dense))
    for index, method in enumerate(methods):
        color, marker = f"C{index}", MARKERS[index % len(MARKERS)]
        if finished := variants_at(points, method):
            _draw_method(axes, finished, against, method, color, marker)
    front = undominated([spot for row in points if (spot := place(row, against))], against)
    axes.plot(*zip(*front, strict=True), color="0.5", alpha=0.28, linewidth=8, zorder=0,
              solid_joinstyle="round", label="undominated")  # fmt: skip
    for x, y in [spot for row in points if row.is_dense and (spot := place(row, against))]:
        axes.axhline(y, color="0.6", linewidth=0.8, zorder=0)
        axes.plot([x], [y], color="black", marker="*", markersize=14, linestyle="none",
                  label="dense")  # fmt: skip
    axes.set(xlabel=AXES[against], ylabel="bits per byte (lower is better)")  # fmt: skip
    told = None if against in SPEEDS else "filled: final, hollow: before recovery"
    axes.legend(title=told, fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def _draw_method(
    axes: "Axes", rows: list[Row], against: Against, method: str, color: str, marker: str
) -> None:
    xs, ys = zip(*filter(None, (place(row, against) for row in rows)), strict=True)
    errors = [
        STANDARD_ERRORS * (row.number(f"{QUALITY}_difference_stderr", "beside_dense") or 0)
        for row in rows
    ]
    # By speed, a line from one sparsity to the next would go to and fro.
    line = "none" if against in SPEEDS else "-"
    axes.errorbar(
        xs, ys, errors, color=color, marker=marker, capsize=3, linestyle=line, label=method
    )
    for row, x in zip(rows, xs, strict=True):
        before = row.number(QUALITY, "before")
        if before is not None and row.after and against not in SPEEDS:
            axes.plot([x], [before], color=color, marker=marker, fillstyle="none")


def undominated(
    points: Sequence[tuple[float, float]], against: Against
) -> list[tuple[float, float]]:
    """The Pareto front: the points that no other one beats in one number without losing in the
    other, from left to right. Bits per byte and sizes are to be low, speeds high; what differs by
    less than half a per cent in one of these does not win by it.
    """
    side = -1 if against in SPEEDS else 1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (side * point[0], point[1])):
        if not front or y < front[-1][1]:
            if front and abs(x / front[-1][0] - 1) < SAME:
                front.pop()
            front.append((x, y))
    return sorted(front)


def shown(rows: Sequence[Row], against: Against) -> list[Row]:
    """The rows that have both numbers; none where all cost the same, as KV caches often do."""
    spots = {spot[0] for row in rows if (spot := place(row, against))}
    is_told = len(spots) > 1 or against == "size"
    return [row for row in rows if place(row, against)] if is_told else []


def place(row: Row, against: Against) -> tuple[float, float] | None:
    """Where a row is drawn; None when it lacks one of the two numbers."""
    name, part, unit = NUMBERS[against]
    x, y = row.number(name, part), row.number(QUALITY)
    return None if x is None or y is None else (x / unit, y)
