"""The pages of docs/: pictures of figures, answers first, links that lead somewhere."""

import csv
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# The page with the table that a picture's figures stand in too.
PAGES = {
    "which_method": ("methods.md", "after_recovery", ("perplexity_before", "perplexity_after")),
    "released_code": ("methods.md", "released_code", ("perplexity", "released_perplexity")),
    "departures": ("departures.md", "departures", ("perplexity",)),
    "claims": ("claims.md", "claims", ("figure", "bound")),
    "gemma": ("methods.md", "gemma", ("bits_over_dense", "stderr")),
}
QUESTIONS = ("which_method.md", "methods.md", "departures.md", "claims.md")


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plots", ROOT / "benchmarks" / "plots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PAGES)
def test_the_same_figures_give_the_same_picture(
    name: str, plots: ModuleType, tmp_path: Path
) -> None:
    assert set(plots.PLOTS) == set(PAGES)
    first = plots.draw(name, tmp_path).read_bytes()
    assert first.startswith(b"<?xml")
    assert plots.draw(name, tmp_path).read_bytes() == first


@pytest.mark.parametrize("name", PAGES)
def test_what_is_drawn_stands_in_the_page(name: str) -> None:
    page, file, columns = PAGES[name]
    numbers = set(re.findall(r"\d+\.\d+|\d+", (DOCS / page).read_text(encoding="utf-8")))
    with (DOCS / "figures" / f"{file}.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    drawn = {row[column] for row in rows for column in columns if row[column]}
    assert len(drawn) > 5
    assert drawn <= numbers


@pytest.mark.parametrize("page", QUESTIONS)
def test_a_page_asks_and_answers_in_one_sentence_and_has_one_picture(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    title, answer, *_ = text.split("\n\n")
    assert title.startswith("# ")
    assert title.endswith("?")
    assert re.fullmatch(r"\*\*[^*]+\.\*\*", answer)
    assert not re.search(r"\. [A-Z]", answer)
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert (DOCS / picture).is_file()


@pytest.mark.parametrize(
    "page", ["README.md", "deploy/README.md", *(f"docs/{q}" for q in QUESTIONS)]
)
def test_links_lead_somewhere(page: str) -> None:
    file = ROOT / page
    links = re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8"))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors, link
