"""The report of a sweep, or of several: one HTML page that needs nothing else, and no network.

Its scripts are our own few lines and plotly, which lies compressed in the page; where scripts do
not run, still pictures stand in its place, and everything else is there.
"""

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldstack.compression.checkpoints.checkpoint import PLAN_FILE, load_config
from foldstack.compression.errors import InputError
from foldstack.compression.statistics.ranking import Ranking, scores_figure
from foldstack.compression.statistics.sensitivity import Sensitivity, curves_figure
from foldstack.compression.storage.digest import code_sources, digest_json
from foldstack.compression.storage.durable import write_whole
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import block_parameters
from foldstack.flows.comparison import interactive, plots
from foldstack.flows.comparison.block_rows import LOOKS, Cell, cells_of, is_aligned
from foldstack.flows.comparison.findings import finding_at, findings, with_error
from foldstack.flows.comparison.frame import plain_records, typed_frame
from foldstack.flows.comparison.interactive import Drawn
from foldstack.flows.comparison.plots import Against
from foldstack.flows.comparison.result import QUALITY, Comparison, Row
from foldstack.flows.comparison.tables import (
    Column,
    Record,
    arranged,
    columns,
    count,
    per_cent,
    texts,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
_OF_ONE_RUN = {"made_at", "num_stages", "num_cached", "seconds", "links", "warnings"}
TEMPLATE = Path(__file__).with_name("report.html.j2")
PICTURES: dict[Against, str] = {
    "size": "Bits per byte against parameters",
    "flops": "Bits per byte against FLOPs",
    "kv": "Bits per byte against the KV cache",
    "speed": "Bits per byte against decoding speed",
    "prefill": "Bits per byte against reading speed",
}
FRONTS: tuple[Against, ...] = ("size", "speed")
"""What the table's filter asks for."""
MANY_BLOCKS = 18
"""From so many on a box has no room for its widths."""
HIDDEN = {"more": 6, "extra": 9}
"""Columns of higher ranks than these are left out on phones, and on paper."""
SLOWER, FASTER = 0.97, 1.03
LOADS = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}"{flag})
tokenizer = AutoTokenizer.from_pretrained("{folder}")
"""
Labels = Collection[tuple[str, str]]
"""Sweep and label of rows."""


def page_key(comparison: Comparison, others: Sequence[str]) -> str:
    """Digest of what the pictures and the page of a sweep show, but for the time and the cost of
    one run of it, and of the code that draws them.

    Args:
        comparison: what the sweep found.
        others: all else that is on the page.
    """
    package = __name__.rpartition(".")[0]
    code = code_sources(f"{package}.{file.stem}" for file in Path(__file__).parent.glob("*.py"))
    texts = [_text(ending) for ending in (".html.j2", ".css", ".js")]
    told = comparison.model_dump_json(exclude=_OF_ONE_RUN)
    return digest_json([told, *others, code, texts])


def is_drawn(folder: Path, key: str) -> bool:
    """Whether the page in `folder` was written with this key."""
    try:
        with (folder / REPORT).open(encoding="utf-8") as page:
            return key in page.read(1000)
    except (OSError, UnicodeDecodeError):
        return False


def write_report(
    comparison: Comparison,
    folder: Path,
    *,
    ranking: Ranking | None,
    sensitivity: Sensitivity | None = None,
    config: str,
    origin: Mapping[str, str],
    key: str = "",
) -> Path:
    """Write the page of a sweep into `folder`, whole or not at all.

    Args:
        comparison: what the sweep found.
        folder: of its files.
        ranking: the dense model's blocks, drawn if it is there.
        sensitivity: what changes of its sites cost, drawn if it is there.
        config: the resolved config as YAML.
        origin: versions and hardware that the numbers come from.
        key: by which `is_drawn` knows the page again.
    """
    scores = None if ranking is None else _inline(scores_figure(ranking))
    curves = None if sensitivity is None else _inline(curves_figure(sensitivity))
    page = _render(
        [comparison], scores=scores, curves=curves, config=config, origin=origin, key=key
    )
    file = folder / REPORT
    write_whole(file, page)
    return file


def page_of_sweeps(comparisons: Sequence[Comparison], labels: Labels | None = None) -> str:
    """The page of several sweeps, with the rows of these sweeps and labels alone."""
    return _render(comparisons, labels=labels)


def _render(
    comparisons: Sequence[Comparison],
    *,
    labels: Labels | None = None,
    scores: str | None = None,
    curves: str | None = None,
    config: str = "",
    origin: Mapping[str, str] | None = None,
    key: str = "",
) -> str:
    from jinja2 import Environment

    parts = [part for c in comparisons if (part := _part(c, labels))]
    frame = typed_frame([record for part in parts for record in part.records])
    several = len(parts) > 1
    drawn = [Drawn(row, part.comparison.title * several, row.label in part.best)
             for part in parts for row in part.rows if row.state == "done"]  # fmt: skip
    shown = columns(frame)
    first = comparisons[0]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_text(".html.j2")).render(
        css=_text(".css"),
        js=_text(".js"),
        plotly=interactive.plotly_script(),
        title=" and ".join(dict.fromkeys(part.comparison.title for part in parts)),
        facts=_facts(first) if not several else [f"{len(parts)} sweeps", f"{len(frame)} models"],
        sweeps=[part.words() for part in parts],
        plots=_plots(drawn),
        columns=shown,
        rows=_table(frame, shown, _on_fronts(drawn)),
        sizes=[{"value": f"{size:g}", "told": f"{100 * size:.3g} %"}
               for size in sorted(set(frame["sparsity"].dropna()))],
        best_rule=first.best_rule,
        looks=LOOKS,
        look_of=_look,
        structures=[each for part in parts for each in _structures(part)],
        samples=[each for part in parts for each in _samples(part)],
        scores=scores,
        curves=curves,
        use=[_use(row) for part in parts for row in part.rows if row.label in part.best],
        config=config,
        origin=origin,
        key=key,
    )  # fmt: skip


def _text(ending: str) -> str:
    return TEMPLATE.with_name(TEMPLATE.name.removesuffix(".html.j2") + ending).read_text(
        encoding="utf-8"
    )


@dataclass(frozen=True)
class _Part:
    """One sweep of a page, with those of its rows that are shown."""

    comparison: Comparison
    rows: list[Row]
    records: list[dict[str, Any]]
    best: set[str] = field(default_factory=set)

    def words(self) -> dict[str, Any]:
        """What was found: a card for each sparsity, and sentences."""
        cards = [
            _card(self.comparison, sparsity, row)
            for sparsity, row in self.comparison.best().items()
            if row in self.rows
        ]
        of_sizes = {card["sentence"] for card in cards}
        told = [each for each in findings(self.comparison) if each not in of_sizes]
        of_all = told if len(self.rows) == len(self.comparison.rows) else []
        comparison = self.comparison
        return {
            "title": self.comparison.title,
            "cards": cards,
            "others": [*of_all, *(f"{each}." for each in (*comparison.missed, *comparison.unread))],
            "failed": [row for row in self.rows if row.state == "failed"],
        }


def _part(comparison: Comparison, labels: Labels | None) -> _Part | None:
    kept = [
        (row, record)
        for row, record in zip(comparison.rows, comparison.records(), strict=True)
        if labels is None or (comparison.sweep, row.label) in labels
    ]
    if not kept:
        return None
    best = {row.label for row in comparison.best().values()}
    return _Part(comparison, [row for row, _ in kept], [record for _, record in kept], best)


def _facts(comparison: Comparison) -> list[str]:
    """The line below the title: of what, when, how much work."""
    when = comparison.made_at
    told = [comparison.model]
    told += [] if when is None else [f"{when:%d %B %Y, %H:%M} UTC"]
    told += [f"{len(comparison.rows)} models", f"sweep {comparison.sweep}"]
    return told


def _card(comparison: Comparison, sparsity: float, row: Row) -> dict[str, Any]:
    """The best of a sparsity: its name, three figures, and the sentence."""
    figures: list[dict[str, str]] = []
    change = row.number(f"{QUALITY}_difference", "beside_dense")
    error = row.number(f"{QUALITY}_difference_stderr", "beside_dense")
    if change is not None and error is not None:
        value, _, after = with_error(change, error, sign="+").partition(" ")
        figures.append({"what": "bits/byte over dense", "value": value, "error": after})
    elif (quality := row.number(QUALITY)) is not None:
        figures.append({"what": "bits/byte", "value": f"{quality:.3f}"})
    if (speed := row.number("decode_speedup", "speed")) is not None:
        look = "slower" if speed < SLOWER else "faster" if speed > FASTER else ""
        figures.append(
            {"what": "decoding speed", "value": f"{speed:.2f}", "error": "x dense", "look": look}
        )
    if (parameters := row.number("parameters", "structure")) is not None:
        removed = row.number("realised_sparsity", "structure")
        less = f"-{per_cent(removed)}" if removed else ""
        figures.append({"what": "parameters", "value": count(parameters), "error": less})
    verdict = row.verdict
    return {
        "verdict": verdict and verdict.verdict,
        "because": verdict and verdict.because,
        "size": f"{100 * sparsity:.3g} % removed",
        "name": row.name,
        "figures": figures,
        "sentence": finding_at(comparison, sparsity),
    }


def _plots(drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """The pictures, each as plotly's data and as a still."""
    found = []
    for against, title in PICTURES.items():
        figure = interactive.quality_figure(drawn, against)
        still = plots.figure_of([each.row for each in drawn], against)
        if figure is not None and still is not None:
            data = interactive.figure_json(figure)
            found.append({"title": title, "figure": data, "still": _inline(still)})
    return found


def _on_fronts(drawn: Sequence[Drawn]) -> set[tuple[str, str]]:
    """Series and label of the rows that are undominated in size or decoding speed."""
    found = set()
    for against in FRONTS:
        places = {(each.series, each.row.label): spot
                  for each in drawn if (spot := plots.place(each.row, against))}  # fmt: skip
        front = set(plots.undominated(list(places.values()), against))
        found |= {name for name, spot in places.items() if spot in front}
    return found


def _table(
    frame: Any, shown: Sequence[Column], front: set[tuple[str, str]]
) -> list[dict[str, Any]]:
    """The rows of the table, with what scripts sort and filter them by."""
    on_front = {label for _, label in front}
    rows = plain_records(arranged(frame))
    largest = max(
        (abs(r.get(f"beside_dense/{QUALITY}_difference") or 0.0) for r in rows), default=0
    )
    return [
        {
            "look": "failed" if r["state"] == "failed" else "best" if r["is_best"] else "",
            "size": "" if r["sparsity"] is None else f"{r['sparsity']:g}",
            "kinds": " ".join(
                ["front"] * (r["label"] in on_front)
                + ["faster"] * ((r.get("speed/decode_speedup") or 0.0) > FASTER)
            ),
            "cells": [_cell(column, r, text, largest)
                      for column, text in zip(shown, texts(r, shown), strict=True)],
        }
        for r in rows
    ]  # fmt: skip


def _look(column: Column) -> str:
    looks = [name for name, rank in HIDDEN.items() if column.rank > rank]
    return " ".join(["text"] * column.is_text + looks)


def _cell(column: Column, record: Record, text: str, largest: float) -> dict[str, Any]:
    value = record.get(column.source) if text else None
    looks, share = [_look(column)], None
    if column.name == "verdict" and value is not None:
        looks.append(f"verdict {value.replace(' ', '-')}")
    if column.name == "speed" and value is not None:
        looks += ["slower"] * (value < SLOWER) + ["faster"] * (value > FASTER)
    if column.name == "difference" and value is not None and largest:
        looks.append("bar")
        share = round(100 * abs(value) / largest, 1)
    return {
        "text": text, "look": " ".join(filter(None, looks)), "share": share,
        "value": "" if value is None else value,
    }  # fmt: skip


def _structures(part: _Part) -> list[dict[str, Any]]:
    """The blocks of every finished model of a sweep, by its label."""
    dense = part.comparison.dense
    of_dense = _stored(Path(dense.folder)) if dense is not None and dense.folder else []
    found = []
    for row in part.rows:
        file = Path(row.folder) / PLAN_FILE
        if not row.folder or row.is_dense or not file.is_file():
            continue
        plan = Plan.model_validate_json(file.read_text(encoding="utf-8"))
        cells: list[Cell] = cells_of(plan, _stored(file.parent), of_dense)
        found.append(
            {
                "label": row.label,
                "told": f"{len(plan.blocks)} blocks",
                "cells": cells,
                "columns": plan.base_num_blocks if is_aligned(plan) else 0,
                "is_many": len(cells) > MANY_BLOCKS,
            }
        )
    return found


def _samples(part: _Part) -> list[dict[str, Any]]:
    """Each prompt with what every model of a sweep writes behind it, the dense one first."""
    models = [row for row in part.rows if row.samples and row.state == "done"]
    prompts = models[0].samples if models else ()
    return [
        {
            "prompt": sample.prompt,
            "models": [(row.label, row.samples[number].continuation) for row in models],
        }
        for number, sample in enumerate(prompts)
    ]


def _stored(folder: Path) -> list[int]:
    """Parameters that each block of the model in a folder stores; none where it cannot be read."""
    try:
        return block_parameters(load_config(folder))
    except InputError:
        return []


def _use(row: Row) -> dict[str, str]:
    """How a model is opened."""
    flag = "" if row.structure.get("grade") == "native" else ", trust_remote_code=True"
    return {"label": row.label, "code": LOADS.format(folder=row.folder, flag=flag)}


def _inline(figure: "Figure") -> str:
    """The picture as an address that holds it."""
    svg = io.BytesIO()
    with plots.without_glyph_warnings():
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"
