"""Draws the pictures of docs/ from the figures of record in docs/figures/.

    python benchmarks/plots.py

The figures themselves are printed by the commands that stand on each page.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[1] / "docs"
DENSE = 15.80
"""Perplexity of the reference model after the same recovery (docs/methods.md)."""
COLORED = {
    "search": "black", "modegpt": "#cc79a7", "flexigpt": "#0072b2", "stack": "#e69f00",
    "sleb": "#009e73", "llm_streamline": "#d55e00", "svd_llm": "#56b4e9",
}  # fmt: skip
LABEL_SPACING = 1.055
GREY = "0.72"
GOOD, BAD = "#009e73", "#d55e00"


def which_method(axes: Any) -> None:
    """Perplexity after equal recovery over the dense model's, by what was removed."""
    table = pd.read_csv(DOCS / "figures" / "after_recovery.csv")
    ends: dict[str, tuple[float, float]] = {}
    for method, rows in table.groupby("method", sort=False):
        over = rows["perplexity_after"] / DENSE
        color = COLORED.get(str(method), GREY)
        line = 2.2 if method in COLORED else 1.0
        axes.plot(rows["removed_percent"], over, color=color, linewidth=line, marker="o",
                  markersize=4, zorder=3 if method in COLORED else 2)  # fmt: skip
        if method in COLORED:
            ends[str(method)] = (rows["removed_percent"].iloc[-1], over.iloc[-1])
    lowest = 0.0
    for method, (x, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        lowest = max(y, lowest * LABEL_SPACING)  # names stand above each other, not on each other
        axes.annotate(method, (x, y), (54, lowest), va="center", color=COLORED[method], fontsize=9)
    axes.axhline(1, color="black", linewidth=0.8)
    ticks = [1, 1.2, 1.5, 2, 2.5, 3, 4]
    axes.set(xlabel="parameters removed (%)", ylabel="perplexity over dense, after equal recovery",
             yscale="log", xlim=(8, 61), yticks=ticks)  # fmt: skip
    axes.set_yticklabels([f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def released_code(axes: Any) -> None:
    """Perplexity of the default beside that of the authors' code, method by method."""
    table = pd.read_csv(DOCS / "figures" / "released_code.csv").dropna()
    labels = [f"{row.variant}, {row.removed_percent:g} %" for row in table.itertuples()]
    for place, row in enumerate(table.itertuples()):
        axes.plot([row.perplexity, row.released_perplexity], [place, place], color=GREY,
                  linewidth=3, zorder=1)  # fmt: skip
        axes.annotate(f"{row.perplexity / row.released_perplexity - 1:+.0%}",
                      (row.perplexity, place), xytext=(0, 7), textcoords="offset points",
                      ha="center", fontsize=8, color=GOOD)  # fmt: skip
    places = range(len(table))
    axes.scatter(table["perplexity"], places, color=GOOD, zorder=2, label="foldstack's default")
    axes.scatter(table["released_perplexity"], places, color=BAD, marker="s", zorder=2,
                 label="released code")  # fmt: skip
    axes.set(xlabel="perplexity (dense 7.64); lower is better", yticks=list(places), xscale="log",
             ylim=(-0.7, len(table) - 0.5))  # fmt: skip
    axes.set_yticklabels(labels)
    ticks = [15, 20, 30, 50, 100, 150]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.legend(fontsize=8)


def departures(axes: Any) -> None:
    """By how much the perplexity changes when a departure from the paper is switched off."""
    table = pd.read_csv(DOCS / "figures" / "departures.csv")
    table["method"] = table["variant"].str.partition(" ")[0]
    default = table[table["variant"] == table["method"]].set_index(["method", "asked_percent"])
    keys = pd.MultiIndex.from_frame(table[["method", "asked_percent"]])
    table["change"] = table["perplexity"] / default["perplexity"].reindex(keys).to_numpy() - 1
    switched = table[table["variant"] != table["method"]]
    names = list(dict.fromkeys(switched["variant"]))
    for asked, offset, color in ((20, -0.19, "#56b4e9"), (40, 0.19, "#0072b2")):
        rows = switched[switched["asked_percent"] == asked]
        axes.barh([names.index(name) + offset for name in rows["variant"]], 100 * rows["change"],
                  height=0.36, color=color, label=f"{asked} % removed")  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="perplexity when switched off, over the default's (%)",
             yticks=range(len(names)))  # fmt: skip
    axes.set_yticklabels(names, fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="lower right")


def claims(axes: Any) -> None:
    """What was measured over what the claim allows: to the left of the line it holds."""
    table = pd.read_csv(DOCS / "figures" / "claims.csv")
    over = table["figure"] / table["bound"]
    colors = [GOOD if holds == "yes" else BAD for holds in table["holds"]]
    places = list(range(len(table)))
    axes.hlines(places, 1, over, color=colors, linewidth=2.5, alpha=0.5)
    axes.scatter(over, places, color=colors, zorder=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xlabel="measured over the claim's bound (left of 1: holds)", yticks=places)
    axes.set_yticklabels(table["claim"], fontsize=8)
    axes.invert_yaxis()


def gemma(axes: Any) -> None:
    """Loss above the dense Gemma 3 270M, by what was removed of the whole, before any training."""
    table = pd.read_csv(DOCS / "figures" / "gemma.csv")
    for method, rows in table.groupby("method", sort=False):
        color = COLORED.get(str(method), GREY)
        axes.errorbar(rows["removed_percent"], rows["bits_over_dense"], yerr=rows["stderr"],
                      color=color, marker="o", markersize=4, capsize=2)  # fmt: skip
        start = rows.iloc[0]
        lift = {"basis_sharing": -9, "svd_llm": 3}.get(str(method), -3)  # two beside one another
        axes.annotate(method, (start["removed_percent"], start["bits_over_dense"]),
                      xytext=(-8, lift), textcoords="offset points", ha="right",
                      fontsize=8, color="0.45" if color == GREY else color)  # fmt: skip
    ticks = [0.1, 0.2, 0.5, 1, 2, 5]
    axes.set(xlabel="parameters of the whole model removed (%)", yscale="log", xlim=(8.2, 21.3),
             ylabel="bits per byte above dense (1.375)")  # fmt: skip
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


PLOTS: dict[str, tuple[Callable[[Any], None], tuple[float, float]]] = {
    "which_method": (which_method, (8, 4.8)),
    "released_code": (released_code, (8, 3.4)),
    "departures": (departures, (8.5, 6)),
    "claims": (claims, (8.5, 5.2)),
    "gemma": (gemma, (8, 4)),
}


def draw(name: str, folder: Path) -> Path:
    """Draw one of the pictures; the same figures give the same bytes."""
    function, size = PLOTS[name]
    style = {"svg.hashsalt": name, "svg.fonttype": "none"}
    with matplotlib.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        function(axes)
        axes.grid(alpha=0.25)
        file = folder / f"{name}.svg"
        figure.savefig(file, metadata={"Date": None}, facecolor="white")
    return file


def main() -> None:
    """Draw all of them into docs/figures/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS / "figures", help="folder")
    folder = parser.parse_args().out
    for name in PLOTS:
        print(draw(name, folder))


if __name__ == "__main__":
    main()
