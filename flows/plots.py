"""Pictures of a comparison."""

from pathlib import Path

from foldstack.flows.comparison import QUALITY, Comparison, variants_at

MARKERS = "osD^vP*X"


def plot_quality(comparison: Comparison, path: Path) -> bool:
    """Draw bits per byte against parameters, before (hollow) and after recovery (filled).

    Returns False, and draws nothing, when no row has both numbers.
    """
    points = [row for row in comparison.rows if row.number(QUALITY) is not None]
    if not points:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    methods = list(dict.fromkeys(row.method for row in points if not row.is_dense))
    for index, method in enumerate(methods):
        color, marker = f"C{index}", MARKERS[index % len(MARKERS)]
        rows = variants_at(points, method)
        sizes = [(row.number("parameters", "structure") or 0) / 1e6 for row in rows]
        final = [row.number(QUALITY) or float("nan") for row in rows]
        axes.plot(sizes, final, color=color, marker=marker, label=method)
        for row, size in zip(rows, sizes, strict=True):
            before = row.number(QUALITY, "before")
            if before is not None and row.after:
                axes.plot([size], [before], color=color, marker=marker, fillstyle="none")
    if comparison.dense is not None and (value := comparison.dense.number(QUALITY)) is not None:
        size = (comparison.dense.number("parameters", "structure") or 0) / 1e6
        axes.axhline(value, color="0.6", linewidth=0.8, zorder=0)
        axes.plot([size], [value], color="black", marker="*", markersize=14, linestyle="none",
                  label="dense")  # fmt: skip
    axes.set(xlabel="parameters (millions)", ylabel="bits per byte (lower is better)",
             title=comparison.title)  # fmt: skip
    axes.legend(title="filled: final, hollow: before recovery", fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True
