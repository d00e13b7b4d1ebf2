"""Scores of blocks and of runs of blocks, from the similarity of hidden states.

Block influence (ShortGPT, arXiv 2403.03853, equation 1), for block l with input x^(l):

    BI_l = 1 - mean over tokens of cos(x^(l), x^(l+1))

The paper's code counts the cosine of a zero vector as 0.5; so do we. Unlike it (and every published
re-implementation) the output of the last block is taken before the final norm.

Angular distance of a run of n blocks (UIDL, arXiv 2403.17887, equation 7), at the last token alone:

    d(l, n) = mean over windows of arccos(cos(x^(l), x^(l+n))) / pi

Similarity of a run (LLM-Streamline, arXiv 2403.19135, section 2): s(l, n) = the mean cosine of
x^(l) and x^(l+n). All of them come from one matrix over pairs of boundaries.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from foldstack.compression.statistics.gathering import Statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Matrix = tuple[tuple[float, ...], ...]


class Ranking(BaseModel):
    """What the similarity statistics say about each block and each run of blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_blocks: int = Field(ge=1)
    scores: dict[str, tuple[float, ...]]
    """One score per block for every criterion; a higher score says keep."""
    similarity: Matrix
    """Mean cosine of the hidden states at two boundaries, for all pairs."""
    last_token_angle: Matrix
    """Mean angle at the last token over pi, for all pairs."""

    def order(self, criterion: str = "block_influence") -> tuple[int, ...]:
        """The blocks from the most to the least removable; ties go to the earlier block."""
        scores = self.scores[criterion]
        return tuple(sorted(range(self.num_blocks), key=lambda block: (scores[block], block)))

    def run_similarity(self, length: int) -> tuple[float, ...]:
        """s(l) for every run of `length` blocks: mean cosine of what enters and what leaves it."""
        return tuple(
            self.similarity[start][start + length] for start in range(self.num_blocks - length + 1)
        )

    def run_angle(self, length: int) -> tuple[float, ...]:
        """d(l) for every run of `length` blocks."""
        return tuple(
            self.last_token_angle[start][start + length]
            for start in range(self.num_blocks - length + 1)
        )

    def table(self) -> list[dict[str, Any]]:
        """One row per block: its scores, and its place in the order of removal (1 goes first)."""
        places = {block: place for place, block in enumerate(self.order(), start=1)}
        return [
            {
                "block": block,
                **{criterion: values[block] for criterion, values in self.scores.items()},
                "removed_as": places[block],
            }
            for block in range(self.num_blocks)
        ]


def rank_blocks(statistics: Statistics) -> Ranking:
    """The ranking of a model's blocks.

    Raises:
        InputError: the statistics hold no similarity.
    """
    similarity = statistics.similarity
    angle = statistics.last_token_angle
    return Ranking(
        num_blocks=statistics.num_blocks,
        scores={
            "block_influence": tuple((1 - similarity.diagonal(1)).tolist()),
            "angular_distance": tuple(angle.diagonal(1).tolist()),
        },
        similarity=tuple(tuple(row) for row in similarity.tolist()),
        last_token_angle=tuple(tuple(row) for row in angle.tolist()),
    )


def plot(ranking: Ranking, path: Path) -> None:
    """Write the picture of the scores to a file of the kind that its name says."""
    scores_figure(ranking).savefig(path, dpi=120)


def scores_figure(ranking: Ranking) -> "Figure":
    """A picture of the scores per block and of the similarity of all boundaries."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display and leaves pyplot's global state alone
    bars, heat = figure.subplots(1, 2)
    num_criteria = len(ranking.scores)
    width = 0.8 / num_criteria
    for index, (criterion, scores) in enumerate(ranking.scores.items()):
        offset = (index - (num_criteria - 1) / 2) * width
        places = [block + offset for block in range(ranking.num_blocks)]
        bars.bar(places, scores, width, label=criterion.replace("_", " "))
    bars.set(xlabel="block", ylabel="score (low = removable)", title="What each block changes")
    bars.legend()
    image = heat.imshow(ranking.similarity, origin="lower", cmap="viridis")
    heat.set(
        xlabel="boundary (input of block, last: output)",
        ylabel="boundary",
        title="Mean cosine of hidden states",
    )
    figure.colorbar(image, ax=heat)
    return figure
