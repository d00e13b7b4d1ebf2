"""What a person sees in the terminal when a sweep has ended: the table, and what it says in words.

The table takes the columns that fit, those first by which a person decides. Where there is no
terminal it is Markdown.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foldstack.flows.comparison.findings import findings
from foldstack.flows.comparison.frame import plain_records
from foldstack.flows.comparison.result import Comparison
from foldstack.flows.comparison.tables import (
    Column,
    Record,
    arranged,
    chosen,
    columns,
    texts,
)
from foldstack.tasks.tracking.mlflow_pages import LOCAL_SERVER

if TYPE_CHECKING:
    import pandas

BEST_MARK = "*"
SHORT_HEADING = 10
PADDING = 3
"""Characters that a column takes beside its text, at most."""


def result_table(
    frame: "pandas.DataFrame", console: Console, *, title: str = "", names: Sequence[str] = ()
) -> Table:
    """The frame's rows in their order, the best of each sparsity marked.

    Args:
        frame: the rows.
        console: what it is to fit.
        title: stands above it.
        names: of the columns; when empty as many as fit.

    Raises:
        InputError: there is no column of a name.
    """
    rows = plain_records(frame)
    is_screen = console.is_terminal
    heads = _stacked if is_screen else _plain
    shown = chosen(frame, names) if names else fitting(columns(frame), rows, console.width, heads)
    table = Table(
        title=Text(title) if title else None, title_justify="left", header_style="bold",
        box=box.SIMPLE_HEAD if is_screen else box.MARKDOWN, pad_edge=not is_screen,
    )  # fmt: skip
    for column in shown:
        table.add_column(
            Text(heads(column)),
            justify="left" if column.is_text else "right",
            overflow="fold",
        )
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        style = "red" if row["state"] == "failed" else "bold green" if row["is_best"] else None
        ends = following is None or _group(following) != _group(row)
        cells = map(Text, _marked(row, shown))  # what looks like rich's markup is none
        table.add_row(*cells, style=style, end_section=ends and is_screen)
    return table


def _group(row: Record) -> tuple[object, object]:
    return row["sweep"], row["sparsity"]


def _marked(row: Record, shown: Sequence[Column]) -> list[str]:
    cells = texts(row, shown)
    for place, column in enumerate(shown):
        if row["is_best"] and column.name == "model":
            cells[place] += f" {BEST_MARK}"
    return cells


def fitting(
    columns: Sequence[Column],
    rows: Sequence[Record],
    width: int,
    heads: Callable[[Column], str],
) -> list[Column]:
    """The columns that fit into so many characters, those of the lowest ranks first."""
    left = width - 1
    kept: set[str] = set()
    for column in sorted(columns, key=lambda column: column.rank):
        heading = max(map(len, heads(column).split("\n")))
        cells = [len(cell) for row in rows for cell in _marked(row, [column])]
        needed = max([heading, *cells]) + PADDING
        if needed <= left or not kept:
            kept.add(column.name)
            left -= needed
    return [column for column in columns if column.name in kept]


def _plain(column: Column) -> str:
    return column.heading


def _stacked(column: Column) -> str:
    """A long heading in two lines, so that it is not much wider than the figures below it."""
    if len(column.heading) <= SHORT_HEADING:
        return column.heading
    first, space, rest = column.heading.partition(" ")
    return f"{first}\n{rest}" if space else first


def print_result(comparison: Comparison, console: Console) -> None:
    """The table, what failed and where more is to be seen; at last what was found, in words."""
    console.print(result_table(arranged(comparison.frame()), console, title=comparison.title))
    lines = [f"{BEST_MARK} {comparison.best_rule}"] if comparison.best() else []
    for row in comparison.failed:
        console.print(f"failed: {row.cause}", style="red", markup=False, highlight=False)
    counts = f"{comparison.num_cached} of {comparison.num_stages} stages from the store"
    lines.append(f"{counts}, {comparison.seconds:.1f} s")
    lines += [f"{name}: {place}" for name, place in comparison.links.items()]
    if any(place.startswith(LOCAL_SERVER) for place in comparison.links.values()):
        lines.append("`foldstack ui` serves MLflow's pages, and Prefect's")
    lines += [f"note: {sentence}" for sentence in comparison.missed]
    lines += [f"warning: {sentence}" for sentence in comparison.warnings]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    print_findings(comparison, console)


def print_findings(comparison: Comparison, console: Console) -> None:
    """What was found, a sentence for each sparsity, wrapped to the console."""
    for sentence in findings(comparison):
        console.print(sentence, markup=False, highlight=False)
