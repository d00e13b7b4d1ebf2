"""The report: a page that needs nothing else, with every row, picture and structure."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from foldstack.compression.statistics.ranking import Ranking
from foldstack.compression.structure.plan import Plan
from foldstack.flows.comparison.block_rows import cells_of
from foldstack.flows.comparison.report import write_report
from foldstack.flows.comparison.result import Comparison, Row

DENSE = Plan.identity("llama", 6)
NAMES = ("self_attn.q_proj", "mlp.down_proj")


def looks(plan: Plan) -> list[tuple[str, str]]:
    return [(cell.label, cell.look) for cell in cells_of(plan)]


def test_a_dense_model_is_as_it_was() -> None:
    assert looks(DENSE) == [(str(block), "own") for block in range(6)]
    assert cells_of(DENSE)[3].told == "block 3: as it was"


def test_removed_blocks_stay_where_they_were() -> None:
    plan = DENSE.keep([1, 2, 4])
    assert [cell.label for cell in cells_of(plan)] == ["0", "1", "2", "3", "4", "5"]
    assert [cell.look for cell in cells_of(plan)] == [
        "removed", "own", "own", "removed", "own", "removed",
    ]  # fmt: skip


def test_sharing_names_the_owner_by_its_base_block() -> None:
    plan = DENSE.keep([0, 2, 3, 5]).share(1, [2])
    shared = cells_of(plan)[3]
    assert (shared.label, shared.look) == ("3", "shared")
    assert shared.told == "block 3: uses the weights of block 2"
    adapted = DENSE.borrow({4: 1}, {NAMES[0]: 3})
    assert "uses the weights of block 1; adapters of rank 3" in cells_of(adapted)[4].told


def test_factors_widths_and_runs_are_told() -> None:
    factored = DENSE.factor({(2, NAMES[0]): 5, (2, NAMES[1]): 9})
    assert cells_of(factored)[2].told == "block 2: 2 linears of two factors, rank 5 to 9"
    narrow = DENSE.narrow(mlp_widths={1: 40})
    assert looks(narrow)[1] == ("1", "narrow")
    replaced = DENSE.replace(2, 5, "swiglu", 24)
    assert looks(replaced)[2] == ("2-4", "trained")
    assert "a trained swiglu 24 wide in place of the run" in cells_of(replaced)[2].told
    assert len(cells_of(replaced)) == 4


def test_repeated_blocks_are_all_drawn() -> None:
    plan = DENSE.repeat([0, 1, 2, 2, 3, 4, 5], {NAMES[0]: 2})
    labels = [cell.label for cell in cells_of(plan)]
    assert labels == ["0", "1", "2", "2", "3", "4", "5"]
    assert {cell.look for cell in cells_of(plan) if cell.label == "2"} == {"own", "shared"}


class Page(HTMLParser):
    """What a page loads, and the texts of its table's cells."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.scripts = 0
        self.cells: list[str] = []
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        self.scripts += tag == "script"
        self._in_cell = tag == "td"
        if self._in_cell:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "plan.json").write_text(DENSE.keep([0, 1, 4, 5]).model_dump_json())
    difference = {"bits_per_byte_difference": 0.25, "bits_per_byte_difference_stderr": 0.01}
    return Comparison(
        title="<script>alert(1)</script> & more",
        sweep="0123456789ab",
        model="tiny",
        rows=(
            Row(
                label="dense", method="dense", structure={"parameters": 3e6},
                before={"bits_per_byte": 1.0}, speed={"decode_speedup": 1.0},
            ),
            Row(
                label="shortgpt 0.30", method="shortgpt", sparsity=0.3, seed=0, folder=str(folder),
                structure={"parameters": 2e6}, before={"bits_per_byte": 1.5},
                after={"bits_per_byte": 1.25}, beside_dense=difference,
                speed={"decode_speedup": 1.4},
            ),
            Row(
                label="mka 0.30", method="mka", sparsity=0.3, seed=0, state="failed",
                cause="out of <memory>",
            ),
        ),
    )  # fmt: skip


def test_the_page_stands_alone_and_shows_everything(comparison: Comparison, tmp_path: Path) -> None:
    ranking = Ranking(
        num_blocks=2,
        scores={"block_influence": (0.1, 0.2)},
        similarity=((1.0, 0.9, 0.8), (0.9, 1.0, 0.9), (0.8, 0.9, 1.0)),
        last_token_angle=((0.0, 0.1, 0.2), (0.1, 0.0, 0.1), (0.2, 0.1, 0.0)),
    )
    file = write_report(
        comparison, tmp_path, ranking=ranking, config="name: <demo>\n", origin={"torch": "2.13"}
    )
    text = file.read_text()
    page = Page()
    page.feed(text)
    assert page.scripts == 0
    assert "&lt;script&gt;alert(1)" in text
    assert "name: &lt;demo&gt;" in text
    assert len(page.loaded) == 3  # by size, by speed, the scores
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.loaded)
    assert "+0.250 ±0.010" in page.cells
    assert "out of &lt;memory&gt;" in text
    assert re.findall(r'class="block (\w+)" title="block (\d)', text) == [
        ("own", "0"), ("own", "1"), ("removed", "2"), ("removed", "3"), ("own", "4"), ("own", "5"),
    ]  # fmt: skip


def test_a_sweep_of_which_nothing_came_has_a_page_too(
    comparison: Comparison, tmp_path: Path
) -> None:
    failed = comparison.model_copy(update={"rows": comparison.rows[2:]})
    page = Page()
    page.feed(write_report(failed, tmp_path, ranking=None, config="", origin={}).read_text())
    assert page.loaded == []
    assert "failed" in page.cells
