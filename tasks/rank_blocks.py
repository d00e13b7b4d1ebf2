"""The stage that turns statistics into scores of blocks, with a table and a picture of them."""

import csv
from pathlib import Path
from typing import ClassVar

from foldstack.compression.statistics.gathering import Statistics
from foldstack.compression.statistics.ranking import Ranking, plot, rank_blocks
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import Progress
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.store.manifest import Facts

RANKING_FILE = "ranking.json"
TABLE_FILE = "ranking.csv"
PLOT_FILE = "ranking.png"


class RankBlocks(ComputedStage):
    """One score per block and criterion."""

    stage: ClassVar[str] = "rank_blocks"
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    statistics: Artifact

    def modules(self) -> tuple[str, ...]:
        return ("foldstack.compression.statistics.ranking",)

    @property
    def label(self) -> str:
        return "rank blocks"

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        ranking = rank_blocks(Statistics.load(self.statistics.open()))
        (folder / RANKING_FILE).write_text(ranking.model_dump_json(indent=1), encoding="utf-8")
        rows = ranking.table()
        with (folder / TABLE_FILE).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        plot(ranking, folder / PLOT_FILE)
        return {"blocks": ranking.num_blocks, "most_removable": ranking.order()[0]}


def load_ranking(ranked: Artifact) -> Ranking:
    """The ranking in an artifact of this stage."""
    return Ranking.model_validate_json((ranked.open() / RANKING_FILE).read_text(encoding="utf-8"))
