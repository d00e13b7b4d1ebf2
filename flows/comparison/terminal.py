"""What a person sees in the terminal when a sweep has ended: the table, and where to look next."""

from rich.console import Console
from rich.table import Table

from foldstack.flows.comparison.result import Comparison
from foldstack.flows.comparison.tables import cells, columns


def result_table(comparison: Comparison) -> Table:
    """The comparison as one table."""
    table = Table(title=comparison.title, title_justify="left", header_style="bold")
    for index, head in enumerate(columns(comparison)):
        table.add_column(head, justify="left" if index == 0 else "right")
    best = {row.label for row in comparison.best().values()}
    for row, texts in zip(comparison.rows, cells(comparison), strict=True):
        style = "red" if row.state == "failed" else "green" if row.label in best else None
        table.add_row(*texts, style=style)
    return table


def print_result(comparison: Comparison, console: Console) -> None:
    """The table, what failed, and where more is to be seen."""
    console.print(result_table(comparison))
    for row in comparison.failed:
        console.print(f"failed: {row.cause}", style="red", markup=False, highlight=False)
    counts = f"{comparison.num_cached} of {comparison.num_stages} stages from the store"
    lines = [f"{counts}, {comparison.seconds:.1f} s"]
    lines += [f"{name}: {place}" for name, place in comparison.links.items()]
    lines += [f"note: {sentence}" for sentence in (*comparison.missed, *comparison.ties)]
    lines += [f"warning: {sentence}" for sentence in comparison.warnings]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
