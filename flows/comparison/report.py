"""The report of a sweep: one HTML page that needs nothing else, and runs no script."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from foldstack.compression.checkpoints.checkpoint import PLAN_FILE
from foldstack.compression.statistics.ranking import Ranking, scores_figure
from foldstack.compression.structure.plan import Plan
from foldstack.flows.comparison.block_rows import LOOKS, Cell, cells_of
from foldstack.flows.comparison.plots import Against, quality_figure
from foldstack.flows.comparison.result import BEST_RULE, Comparison
from foldstack.flows.comparison.tables import cells, columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
PICTURES: dict[Against, str] = {
    "size": "Bits per byte against parameters",
    "speed": "Bits per byte against decoding speed",
}


def write_report(
    comparison: Comparison,
    folder: Path,
    *,
    ranking: Ranking | None,
    config: str,
    origin: Mapping[str, str],
) -> Path:
    """Write the page into `folder`.

    Args:
        ranking: the dense model's blocks, drawn if it is there.
        config: the resolved config as YAML.
        origin: versions and hardware that the numbers come from.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    figures = {told: quality_figure(comparison, which) for which, told in PICTURES.items()}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        comparison=comparison,
        heads=columns(comparison),
        rows=list(zip(comparison.rows, cells(comparison), strict=True)),
        best={row.label for row in comparison.best().values()},
        best_rule=BEST_RULE,
        notes=(*comparison.missed, *comparison.ties),
        pictures={told: _inline(figure) for told, figure in figures.items() if figure},
        scores=None if ranking is None else _inline(scores_figure(ranking)),
        looks=LOOKS,
        structures=_structures(comparison),
        config=config,
        origin=origin,
    )
    file = folder / REPORT
    file.write_text(page, encoding="utf-8")
    return file


def _structures(comparison: Comparison) -> dict[str, list[Cell]]:
    """The blocks of every finished variant, by its label."""
    files = {row.label: Path(row.folder) / PLAN_FILE for row in comparison.rows if row.folder}
    return {
        label: cells_of(Plan.model_validate_json(file.read_text(encoding="utf-8")))
        for label, file in files.items()
        if file.is_file()
    }


def _inline(figure: "Figure") -> str:
    """The picture as an address that holds it."""
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"
