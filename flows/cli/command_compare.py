"""`foldstack compare`: any number of sweeps as one table, filtered, sorted, shown and written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from foldstack.compression.errors import InputError
from foldstack.compression.storage.durable import write_whole
from foldstack.flows.comparison.files import COMPARISON, comparisons_in, is_of, load
from foldstack.flows.comparison.findings import findings
from foldstack.flows.comparison.frame import (
    csv_text,
    json_text,
    parquet_bytes,
    plain_records,
    sort,
    typed_frame,
    where,
)
from foldstack.flows.comparison.result import Comparison
from foldstack.flows.comparison.tables import arranged, chosen, markdown, short_names
from foldstack.flows.comparison.terminal import print_findings, result_table
from foldstack.flows.config.config_errors import did_you_mean

if TYPE_CHECKING:
    import pandas

FORMATS = (".csv", ".parquet", ".md", ".json", ".html")


@dataclass(frozen=True)
class Choice:
    """Which rows and columns are asked for."""

    where: Sequence[str] = ()
    methods: Sequence[str] = ()
    sparsities: Sequence[float] = ()
    sort: Sequence[str] = ()
    columns: Sequence[str] = ()

    @property
    def is_of_rows(self) -> bool:
        """True when some rows may be missing, so that what all of them say is not to be told."""
        return bool(self.where or self.methods or self.sparsities)


@dataclass(frozen=True)
class Compared:
    """Rows of sweeps."""

    comparisons: list[Comparison]
    damaged: list[str]
    frame: "pandas.DataFrame"


def compare_command(what: Sequence[str], home: Path | None, choice: Choice) -> Compared:
    """The rows of the sweeps that `what` names: models, sweeps of the home, or folders of sweeps;
    of all in the home when it is empty.

    Raises:
        InputError: it names nothing, a column does not exist, or no row is left.
    """
    comparisons, damaged = _named(what, home)
    frame = typed_frame([record for each in comparisons for record in each.records()])
    short = short_names(frame)
    for condition in choice.where:
        frame = where(frame, condition, short)
    if choice.methods:
        _check_known("method", choice.methods, frame["method"])
        frame = frame[frame["method"].isin(list(choice.methods))]
    if choice.sparsities:
        frame = frame[frame["sparsity"].round(6).isin([round(s, 6) for s in choice.sparsities])]
    if frame.empty:
        raise InputError("no row is left: the sweeps have none that fulfils all conditions")
    frame = arranged(frame)
    if choice.sort:
        frame = sort(frame, choice.sort, short)
    return Compared(comparisons, damaged, frame)


def _check_known(kind: str, names: Sequence[str], column: "pandas.Series[Any]") -> None:
    known = sorted(set(column.dropna()))
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise InputError(f"no {kind} {name} among {', '.join(known)}{hint}")


def _named(what: Sequence[str], home: Path | None) -> tuple[list[Comparison], list[str]]:
    folders = {name: _folder(name) for name in what}
    found = [load(folder) for folder in folders.values() if folder is not None]
    names = [name for name, folder in folders.items() if folder is None]
    if what and not names:
        return found, []
    there = comparisons_in(home)
    chosen_by = {name: [c for c in there.readable if _is_called(c, name)] for name in names}
    for name, comparisons in chosen_by.items():
        if not comparisons:
            known = sorted({known for c in there.readable for known in _names(c)})
            hint = did_you_mean(name, known)
            raise InputError(
                f"no sweep {name}: name a model, a sweep or its folder; there are "
                f"{', '.join(known)}{hint}"
            )
    chosen_labels = {id(c) for comparisons in chosen_by.values() for c in comparisons}
    of_home = [c for c in there.readable if not names or id(c) in chosen_labels]
    return [*found, *of_home], there.damaged


def _folder(name: str) -> Path | None:
    """The folder of a sweep that a path leads to."""
    path = Path(name).expanduser()
    if path.name == COMPARISON and path.is_file():
        return path.parent
    return path if (path / COMPARISON).is_file() else None


def _names(comparison: Comparison) -> tuple[str, ...]:
    return Path(comparison.model).name, comparison.title, comparison.sweep


def _is_called(comparison: Comparison, name: str) -> bool:
    folder = Path(comparison.links.get("report", "")).name
    return is_of(comparison, name) or name in (*_names(comparison), folder)


def print_compared(compared: Compared, choice: Choice, console: Console) -> None:
    """The table, and unless rows are missing what each sweep found, in words."""
    console.print(result_table(compared.frame, console, names=choice.columns))
    if choice.is_of_rows:
        return
    for comparison in compared.comparisons:
        if len(compared.comparisons) > 1:
            console.print(f"\n{comparison.title}", style="bold", markup=False, highlight=False)
        print_findings(comparison, console)


def as_json(compared: Compared) -> dict[str, Any]:
    """For machines: the sweeps with what they found in words, and their rows."""
    sweeps = [
        {
            "title": each.title, "sweep": each.sweep, "base_model": each.model,
            "best_rule": each.best_rule, "findings": findings(each), "links": each.links,
        }
        for each in compared.comparisons
    ]  # fmt: skip
    rows = json.loads(json_text(compared.frame))
    return {"sweeps": sweeps, "rows": rows, "damaged": compared.damaged}


def write_compared(compared: Compared, choice: Choice, file: Path) -> None:
    """Write the rows in the format of the file's ending, whole or not at all.

    CSV, JSON and Parquet hold every number, Markdown the table, HTML a page like a sweep's report.

    Raises:
        InputError: no format has that ending, or a column does not exist.
    """
    content: str | bytes
    frame = compared.frame
    if choice.columns:
        shown = chosen(frame, choice.columns)
        data = frame[list(dict.fromkeys(column.source for column in shown))]
    else:
        shown, data = None, frame
    match file.suffix:
        case ".csv":
            content = csv_text(data)
        case ".parquet":
            content = parquet_bytes(data)
        case ".json":
            content = json_text(data) + "\n"
        case ".md":
            content = markdown(frame, shown) + "\n"
        case ".html":
            from foldstack.flows.comparison.report import page_of_sweeps

            labels = {(r["sweep"], r["label"]) for r in plain_records(frame)}
            content = page_of_sweeps(compared.comparisons, labels)
        case ending:
            hint = did_you_mean(ending, FORMATS)
            raise InputError(f"--out writes {', '.join(FORMATS)}, got {file.name}{hint}")
    if not file.parent.is_dir():
        raise InputError(f"--out needs a folder that exists, and {file.parent} does not")
    write_whole(file, content)
