"""Pictures of comparisons that answer to the pointer: plotly figures as data, and its script.

The figures have no colours of paper, ink and grid: the page gives them its own.
"""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldstack.compression.evaluation.paired import STANDARD_ERRORS
from foldstack.flows.comparison.plots import (
    AXES,
    NUMBERS,
    SPEEDS,
    Against,
    place,
    shown,
    undominated,
)
from foldstack.flows.comparison.result import QUALITY, Row
from foldstack.flows.comparison.tables import count, per_cent

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Okabe and Ito's, which people who see colours differently tell apart, and darker ones after them.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31",
          "#ad494a", "#637939")  # fmt: skip
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "hexagon", "star-square",
           "triangle-down", "cross", "bowtie", "star-diamond")  # fmt: skip
QUARTILES = ("", "_lower_quartile", "_upper_quartile")
NUM_SETTINGS = 12
"""More of a variant's settings are not told at the pointer."""


@dataclass(frozen=True)
class Drawn:
    """One row, and the sweep that it is of: "" where all are of one."""

    row: Row
    sweep: str = ""
    is_best: bool = False

    @property
    def series(self) -> str:
        """The legend's entry to which it belongs."""
        return f"{self.row.method}, {self.sweep}" if self.sweep else self.row.method


def quality_figure(drawn: Sequence[Drawn], against: Against) -> "Figure | None":
    """Bits per byte against what a model costs, with 95 % intervals and the undominated variants
    joined; None when there is nothing to see.
    """
    from plotly.graph_objects import Figure

    is_told = bool(shown([each.row for each in drawn], against))
    there = [each for each in drawn if is_told and place(each.row, against)]
    if all(each.row.is_dense for each in there):
        return None
    figure = Figure()
    figure.add_trace(_front(there, against))
    groups: dict[str, list[Drawn]] = {}
    for each in there:
        groups.setdefault(each.series, []).append(each)
    methods = [name for name, group in groups.items() if not group[0].row.is_dense]
    for name, group in groups.items():
        number = None if name not in methods else methods.index(name)
        for trace in _series(name, group, against, number):
            figure.add_trace(trace)
    figure.update_layout(
        template="none", hovermode="closest", margin={"l": 62, "r": 16, "t": 10, "b": 54},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        xaxis={"title": {"text": AXES[against]}, "zeroline": False, "automargin": True},
        yaxis={"title": {"text": "bits per byte (lower is better)"}, "zeroline": False,
               "automargin": True},
    )  # fmt: skip
    if against in SPEEDS:
        figure.add_vline(x=1, line={"dash": "dot", "width": 1, "color": "rgba(128,128,128,.8)"})
    return figure


def _front(drawn: Sequence[Drawn], against: Against) -> Any:
    """A broad line through the undominated rows."""
    from plotly.graph_objects import Scatter

    points = [spot for each in drawn if (spot := place(each.row, against))]
    front = undominated(points, against)
    return Scatter(
        x=[x for x, _ in front], y=[y for _, y in front], mode="lines", name="undominated",
        line={"width": 9, "color": "rgba(128,128,128,.28)"}, hoverinfo="skip",
    )  # fmt: skip


def _series(name: str, group: Sequence[Drawn], against: Against, number: int | None) -> "list[Any]":
    """The points of one method: final ones with intervals, hollow ones before recovery."""
    from plotly.graph_objects import Scatter

    rows = [each.row for each in group]
    spots = [spot for row in rows if (spot := place(row, against))]
    is_dense = number is None
    color = "#888888" if number is None else COLORS[number % len(COLORS)]
    # By speed, a line from one sparsity to the next would go to and fro; else the axis says it.
    mode = "markers+text" if is_dense or against in SPEEDS else "lines+markers"
    symbol = "star" if number is None else SYMBOLS[number % len(SYMBOLS)]
    traces = [
        Scatter(
            x=[x for x, _ in spots],
            y=[y for _, y in spots],
            name=name,
            legendgroup=name,
            mode=mode,
            line={"color": color, "width": 1.5},
            marker={
                "color": color, "symbol": symbol, "size": [13 if each.is_best else 9 for each in
                group] if not is_dense else 14,
                "line": {"width": [2 if each.is_best else 0 for each in group], "color": "#1b1f24"},
            },
            text=["dense" if row.is_dense else f"{100 * (row.sparsity or 0):.3g} %"
                  for row in rows],
            textposition="top center",
            textfont={"size": 10},
            error_y=_bars(_intervals(rows), color),
            error_x=_bars(_speed_spread(rows, against), color),
            hovertext=[hover_text(each) for each in group],
            hoverinfo="text",
            showlegend=not is_dense,
        )
    ]  # fmt: skip
    before = [(place(row, against), row) for row in rows if row.after]
    if before and against not in SPEEDS:
        traces.append(
            Scatter(
                x=[spot[0] for spot, _ in before if spot],
                y=[row.number(QUALITY, "before") for _, row in before],
                legendgroup=name, showlegend=False, mode="markers",
                marker={"color": color, "symbol": f"{symbol}-open", "size": 7, "opacity": 0.7},
                hovertext=[f"{escape(row.label)} before recovery<br>"
                           f"{row.number(QUALITY, 'before') or 0:.4f} bits per byte"
                           for _, row in before],
                hoverinfo="text",
            )
        )  # fmt: skip
    return traces


def _intervals(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Half widths of the 95 % intervals of the differences from dense, down and up."""
    errors = [row.number(f"{QUALITY}_difference_stderr", "beside_dense") or 0.0 for row in rows]
    return [(STANDARD_ERRORS * error, STANDARD_ERRORS * error) for error in errors]


def _speed_spread(rows: Sequence[Row], against: Against) -> list[tuple[float, float]]:
    """From the median down and up to the quartiles of the turns' ratios; nothing of sizes."""
    name, part, _ = NUMBERS[against]
    spreads = []
    for row in rows:
        middle, low, high = (row.number(f"{name}{which}", part) for which in QUARTILES)
        if middle is None or low is None or high is None:
            spreads.append((0.0, 0.0))
        else:
            spreads.append((middle - low, high - middle))
    return spreads


def _bars(spreads: Sequence[tuple[float, float]], color: str) -> dict[str, Any] | None:
    if not any(map(any, spreads)):
        return None
    return {
        "type": "data", "symmetric": False, "arrayminus": [low for low, _ in spreads],
        "array": [high for _, high in spreads], "color": color, "thickness": 1.2, "width": 3,
    }  # fmt: skip


def hover_text(drawn: Drawn) -> str:
    """What a point says at the pointer: its numbers with intervals, and its settings."""
    row = drawn.row
    lines = [f"<b>{escape(row.label)}</b>" + (f" ({escape(drawn.sweep)})" if drawn.sweep else "")]
    lines.append(f"{row.number(QUALITY) or 0:.4f} bits per byte")
    change = row.number(f"{QUALITY}_difference", "beside_dense")
    error = row.number(f"{QUALITY}_difference_stderr", "beside_dense")
    if change is not None and error is not None:
        low, high = change - STANDARD_ERRORS * error, change + STANDARD_ERRORS * error
        lines.append(f"{change:+.4f} over dense, 95 %: {low:+.4f} to {high:+.4f}")
    parameters = row.number("parameters", "structure")
    removed = row.number("realised_sparsity", "structure")
    if parameters is not None:
        less = f", {per_cent(removed)} less than dense" if removed else ""
        lines.append(f"{count(parameters)} parameters{less}")
    speed = row.number("decode_speedup", "speed")
    if speed is not None and not row.is_dense:
        lines.append(f"decodes {speed:.2f} times as fast as dense")
    lines += _settings(row.settings)
    return "<br>".join(lines)


def _settings(settings: Mapping[str, Any]) -> list[str]:
    told = [f"{name} {value}" for name, value in settings.items()
            if name not in ("name", "sparsity") and value is not None]  # fmt: skip
    more = [f"and {len(told) - NUM_SETTINGS} more settings"] if len(told) > NUM_SETTINGS else []
    told = [escape(text) for text in told[:NUM_SETTINGS]] + more
    return ["<i>" + ", ".join(told[i : i + 3]) + "</i>" for i in range(0, len(told), 3)]


def figure_json(figure: "Figure") -> str:
    """The figure as JSON that can stand inside a page's script element."""
    data: dict[str, Any] = json.loads(figure.to_json())
    # Plotly writes long arrays as base64 of their bytes; ours are short, and stay readable.
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def plotly_script() -> str:
    """Plotly's script, compressed (gzip) and as base64 text: a page unpacks it by itself."""
    import plotly

    script = Path(plotly.__file__).with_name("package_data") / "plotly.min.js"
    return base64.b64encode(gzip.compress(script.read_bytes(), mtime=0)).decode()
