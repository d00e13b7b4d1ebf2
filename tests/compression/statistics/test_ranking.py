"""Scores of blocks and runs, by hand and on planted blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from foldstack.compression.statistics.gathering import Statistics, gather
from foldstack.compression.statistics.ranking import Ranking, plot, rank_blocks
from foldstack.compression.statistics.similarity import Similarity
from foldstack.compression.structure.architectures import architecture_of


def statistics_of(cosine: list[list[float]], angle: list[list[float]]) -> Statistics:
    """Statistics of two tokens of one window, by hand."""
    sums = Similarity(
        num_tokens=2,
        cosine_sum=2 * torch.tensor(cosine, dtype=torch.float64),
        num_windows=1,
        last_token_angle_sum=torch.tensor(angle, dtype=torch.float64),
        skip_first_token=False,
    )
    return Statistics(num_blocks=len(cosine) - 1, num_tokens=2, similarity_sums=sums)


@pytest.fixture
def ranking() -> Ranking:
    cosine = [[1.0, 0.9, 0.5, 0.2], [0.9, 1.0, 0.6, 0.3], [0.5, 0.6, 1.0, 0.9], [0.2, 0.3, 0.9, 1]]
    angle = [[0.0, 0.1, 0.3, 0.4], [0.1, 0.0, 0.3, 0.4], [0.3, 0.3, 0.0, 0.2], [0.4, 0.4, 0.2, 0]]
    return rank_blocks(statistics_of(cosine, angle))


def test_scores_by_hand(ranking: Ranking) -> None:
    assert ranking.scores["block_influence"] == pytest.approx((0.1, 0.4, 0.1))
    assert ranking.scores["angular_distance"] == pytest.approx((0.1, 0.3, 0.2))
    assert ranking.run_similarity(2) == pytest.approx((0.5, 0.3))
    assert ranking.run_similarity(3) == pytest.approx((0.2,))
    assert ranking.run_angle(1) == pytest.approx((0.1, 0.3, 0.2))


def test_blocks_are_ordered_by_score_then_by_place() -> None:
    equal = [[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]]
    ranking = rank_blocks(statistics_of(equal, equal))
    assert ranking.order() == (0, 1)


def test_the_table_says_who_goes_first(ranking: Ranking) -> None:
    rows = ranking.table()
    assert [row["block"] for row in rows] == [0, 1, 2]
    assert sorted(row["removed_as"] for row in rows) == [1, 2, 3]
    assert rows[1]["removed_as"] == 3


def test_a_ranking_survives_json(ranking: Ranking) -> None:
    assert Ranking.model_validate_json(ranking.model_dump_json()) == ranking


def test_the_plot_is_a_picture(ranking: Ranking, tmp_path: Path) -> None:
    plot(ranking, tmp_path / "ranking.png")
    assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")


def test_blocks_that_do_nothing_score_zero(architecture: str, tiny_model: Any) -> None:
    model = tiny_model(architecture)
    family = architecture_of(model)
    with torch.no_grad():
        for position in (1, 2):
            block = family.blocks(model)[position]
            for site in family.linears:
                for parameter in block.get_submodule(site.name).parameters():
                    parameter.zero_()
    windows = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(0))
    ranking = rank_blocks(gather(model, windows, {"similarity"}))
    assert ranking.scores["block_influence"][1:3] == pytest.approx((0, 0), abs=1e-9)
    assert set(ranking.order()[:2]) == {1, 2}
    assert ranking.run_similarity(2)[1] == pytest.approx(1)
    assert ranking.run_angle(2)[1] == pytest.approx(0, abs=1e-6)
    assert min(ranking.run_angle(2)) == ranking.run_angle(2)[1]
