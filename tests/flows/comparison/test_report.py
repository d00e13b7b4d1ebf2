"""The report: a page that needs nothing else, with every row, picture and structure."""

import base64
import gzip
import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from foldstack.compression.statistics.ranking import Ranking
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import block_parameters
from foldstack.compression.structure.surgery import build_on_meta, config_for, plan_of
from foldstack.flows.comparison import plots
from foldstack.flows.comparison.block_rows import cells_of, is_aligned
from foldstack.flows.comparison.findings import findings
from foldstack.flows.comparison.report import is_drawn, page_key, page_of_sweeps, write_report
from foldstack.flows.comparison.result import Comparison

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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_are_filled_as_far_as_they_store_weights(
    family: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    config = tiny_model(family).config
    dense = block_parameters(config)
    plan = plan_of(config).keep([0, 1, 3]).share(0, [1])
    cells = cells_of(plan, block_parameters(config_for(config, plan)), dense)
    assert [cell.look for cell in cells] == ["own", "shared", "removed", "own"]
    first, second, gone, last = (cell.kept for cell in cells)
    assert (first, last, gone) == (1.0, 1.0, 0.0)
    assert second is not None
    assert 0 < second < 0.1  # its norms
    assert sum(dense) < sum(p.numel() for p in build_on_meta(config).parameters())


def test_notes_hold_widths_and_ranks_and_runs_their_length() -> None:
    factored = cells_of(DENSE.factor({(2, NAMES[0]): 5, (2, NAMES[1]): 9}))[2]
    replaced = cells_of(DENSE.replace(2, 5, "swiglu", 24))[2]
    borrowed = cells_of(DENSE.borrow({4: 1}, {NAMES[0]: 3}))[4]
    assert (factored.note, replaced.note, borrowed.note) == ("r 5-9", "swiglu 24", "= 1 + r 3")
    assert (factored.span, replaced.span) == (1, 3)
    assert is_aligned(DENSE.replace(2, 5, "swiglu", 24))
    assert not is_aligned(DENSE.repeat([0, 1, 2, 2, 3, 4, 5], {NAMES[0]: 2}))


ADDRESSES = ("src", "href", "srcset", "action", "data", "poster")


class Page(HTMLParser):
    """What a page loads or leads to, its scripts and figures, and its table's cells."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.figures: list[dict[str, Any]] = []
        self.cells: list[str] = []
        self.policy = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.loaded += [value or "" for name, value in attrs if name in ADDRESSES]
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"] or ""
        if tag == "script":
            self.scripts.append(named)
        self._inside = "json" if named.get("type") == "application/json" else tag
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "td":
            self.cells[-1] += data
        elif self._inside == "json":
            self.figures.append(json.loads(data))


def page_of(text: str) -> Page:
    page = Page()
    page.feed(text)
    return page


RANKING = Ranking(
    num_blocks=2,
    scores={"block_influence": (0.1, 0.2)},
    similarity=((1.0, 0.9, 0.8), (0.9, 1.0, 0.9), (0.8, 0.9, 1.0)),
    last_token_angle=((0.0, 0.1, 0.2), (0.1, 0.0, 0.1), (0.2, 0.1, 0.0)),
)


@pytest.fixture
def report(
    comparison: Comparison, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> str:
    """The page of a comparison, the first variant of which is there with its plan."""
    folder = tmp_path / "model"
    config = tiny_model("llama").config
    plan = plan_of(config).keep([0, 3])
    build_on_meta(config_for(config, plan)).config.save_pretrained(folder)
    (folder / "plan.json").write_text(plan.model_dump_json())
    rows = [row.model_copy(update={"folder": str(folder)}) if row.label == "modegpt 0.30" else row
            for row in comparison.rows]  # fmt: skip
    titled = comparison.model_copy(
        update={"title": "<script>alert(1)</script> & more", "rows": tuple(rows)}
    )
    file = write_report(
        titled, tmp_path, ranking=RANKING, config="name: <demo>\n", origin={"torch": "2.13"}
    )
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["report.html"]
    return file.read_text(encoding="utf-8")


def test_a_page_is_known_again_until_what_it_shows_changes(
    comparison: Comparison, tmp_path: Path
) -> None:
    key = page_key(comparison, ["name: demo"])
    assert not is_drawn(tmp_path, key)
    write_report(comparison, tmp_path, ranking=None, config="", origin={}, key=key)
    later = comparison.model_copy(update={"seconds": 3.0, "num_cached": 7})
    assert is_drawn(tmp_path, page_key(later, ["name: demo"]))
    other = comparison.model_copy(update={"rows": comparison.rows[:-1]})
    assert not is_drawn(tmp_path, page_key(other, ["name: demo"]))
    assert not is_drawn(tmp_path, page_key(comparison, ["name: other"]))


def test_the_page_is_one_small_file_that_refers_to_nothing_outside(report: str) -> None:
    assert len(report.encode()) < 5_000_000
    page = page_of(report)
    assert page.loaded
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.loaded)
    assert not any("src" in script for script in page.scripts)
    assert not re.search(r"https?://|@import|url\(", report)
    assert page.policy.startswith("default-src 'none'")
    assert "connect-src" not in page.policy
    assert not re.search(r"(?:img|style|script)-src [^;]*(?:\*|https?:)", page.policy)


def test_the_page_says_what_was_found_first(report: str, comparison: Comparison) -> None:
    text = html.unescape(report)
    places = [text.index(sentence) for sentence in findings(comparison)]
    assert len(places) == 3
    assert max(places) < text.index("All models")
    assert "out of <memory>" in text
    assert "&lt;script&gt;alert(1)" in report
    assert "<script>alert(1)" not in report
    assert "name: &lt;demo&gt;" in report


def test_the_page_holds_every_model_and_both_pictures(report: str) -> None:
    page = page_of(report)
    for text in ("dense", "+0.100 ±0.010", "failed", "700 k"):
        assert text in page.cells
    by_size, by_speed = page.figures
    front = next(each for each in by_size["data"] if each.get("name") == "undominated")
    assert list(zip(front["x"], front["y"], strict=True)) == [(0.7, 1.1), (0.9, 1.01), (1.0, 1.0)]
    front = next(each for each in by_speed["data"] if each.get("name") == "undominated")
    assert list(zip(front["x"], front["y"], strict=True)) == [(1.0, 1.0), (1.2, 1.05), (1.45, 1.2)]
    shown = next(each for each in by_size["data"] if each.get("name") == "modegpt")
    assert "+0.1000 over dense, 95 %: +0.0804 to +0.1196" in shown["hovertext"][1]
    assert "rank 7" in shown["hovertext"][1]
    assert shown["error_y"]["array"] == pytest.approx([0.00196, 0.0196])
    assert re.findall(r'class="block (\w+)" title="block (\d)', report) == [
        ("own", "0"), ("removed", "1"), ("removed", "2"), ("own", "3"),
    ]  # fmt: skip


def test_plotly_is_unpacked_as_it_was(report: str) -> None:
    packed = re.search(r'id="plotly">([^<]+)<', report)
    assert packed is not None
    script = gzip.decompress(base64.b64decode(packed.group(1)))
    import plotly

    assert script == (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_bytes()


def test_a_sweep_of_which_nothing_came_has_a_page_too(
    comparison: Comparison, tmp_path: Path
) -> None:
    failed = comparison.model_copy(update={"rows": comparison.rows[-1:], "rivals": ()})
    text = write_report(failed, tmp_path, ranking=None, config="", origin={}).read_text()
    page = page_of(text)
    assert page.loaded == []
    assert "failed" in page.cells
    assert "1 of 1 models failed: mka 0.30." in text
    assert len(text) < 100_000  # no picture, no plotly


def test_several_sweeps_share_a_page(comparison: Comparison) -> None:
    other = comparison.model_copy(update={"title": "other", "sweep": "ba9876543210"})
    page = page_of(page_of_sweeps([comparison, other]))
    assert page.cells.count("dense") == 2
    assert {"modegpt, small", "modegpt, other"} <= {
        trace.get("name") for trace in page.figures[0]["data"]
    }
    chosen = {(comparison.sweep, "dense"), (comparison.sweep, "modegpt 0.30")}
    alone = page_of_sweeps([comparison, other], chosen)
    assert page_of(alone).cells.count("dense") == 1
    assert "svd_llm 0.30" not in page_of(alone).cells


@given(
    points=st.lists(st.tuples(st.sampled_from((1.0, 2.0, 3.0)), st.sampled_from((1.0, 1.5, 2.0)))),
    against=st.sampled_from(("size", "speed")),
)
def test_the_front_is_what_no_point_beats(
    points: list[tuple[float, float]], against: plots.Against
) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        is_as_good = (a[0] <= b[0] if against == "size" else a[0] >= b[0]) and a[1] <= b[1]
        return is_as_good and a != b

    expected = {p for p in points if not any(beats(other, p) for other in points)}
    assert plots.undominated(points, against) == sorted(expected)


def test_half_a_per_cent_of_size_wins_nothing() -> None:
    assert plots.undominated([(2.768, 1.34), (2.769, 1.27), (4.0, 1.2)], "size") == [
        (2.769, 1.27), (4.0, 1.2),
    ]  # fmt: skip
