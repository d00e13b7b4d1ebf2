"""`foldstack compare`: which sweeps and rows it takes, and what it writes."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from foldstack.compression.errors import InputError
from foldstack.flows.cli.app import app
from foldstack.flows.cli.command_compare import Choice, compare_command, write_compared
from foldstack.flows.comparison.files import save_texts
from foldstack.flows.comparison.result import Comparison, Row

FACTS = {"structure": {"parameters": 7}, "before": {"bits_per_byte": 1.5}}


def comparison_of(title: str, model: str, sweep: str) -> Comparison:
    rows = [Row(label="dense", method="dense", structure={"parameters": 9},
                before={"bits_per_byte": 1.0})]  # fmt: skip
    rows += [
        Row(label=f"{method} {sparsity:.2f}", method=method, sparsity=sparsity,
            structure={"parameters": 7}, before={"bits_per_byte": quality},
            speed={"decode_speedup": 2 - quality})
        for method, sparsity, quality in [("a", 0.1, 1.1), ("b", 0.1, 1.2), ("a", 0.3, 1.4)]
    ]  # fmt: skip
    return Comparison(title=title, sweep=sweep, model=model, rows=tuple(rows))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for title, model in (("first", "some/tiny"), ("second", "some/tiny"), ("third", "other")):
        save_texts(comparison_of(title, model, f"{title}-digest"), tmp_path / "sweeps" / title)
    return tmp_path


@pytest.mark.parametrize(
    ("what", "titles"),
    [
        ([], ["first", "second", "third"]),
        (["tiny"], ["first", "second"]),
        (["some/tiny", "third"], ["first", "second", "third"]),
        (["second-digest"], ["second"]),
        (["{home}/sweeps/third"], ["third"]),
        (["{home}/sweeps/third/comparison.json", "first"], ["third", "first"]),
    ],
)
def test_sweeps_are_named_by_model_title_digest_or_folder(
    what: list[str], titles: list[str], home: Path
) -> None:
    named = [text.replace("{home}", str(home)) for text in what]
    assert [c.title for c in compare_command(named, home, Choice()).comparisons] == titles


@pytest.mark.parametrize(
    ("choice", "labels"),
    [
        (Choice(methods=["a"]), ["a 0.10", "a 0.30"]),
        (Choice(sparsities=[0.1]), ["a 0.10", "b 0.10"]),
        (Choice(where=["speed>0.7"]), ["a 0.10", "b 0.10"]),
        (Choice(where=["speed>0.7", "method=b"]), ["b 0.10"]),
        (Choice(sort=["-quality"]), ["a 0.30", "b 0.10", "a 0.10", "dense"]),
    ],
)
def test_rows_are_chosen_and_sorted(choice: Choice, labels: list[str], home: Path) -> None:
    assert list(compare_command(["third"], home, choice).frame["label"]) == labels


@pytest.mark.parametrize(
    ("what", "choice", "sentence"),
    [
        (["thrid"], Choice(), "did you mean third?"),
        ([], Choice(methods=["c"]), "no method c among a, b, dense"),
        ([], Choice(where=["speed>9"]), "no row is left"),
        ([], Choice(sort=["sped"]), "did you mean speed?"),
    ],
)
def test_mistakes_are_sentences(what: list[str], choice: Choice, sentence: str, home: Path) -> None:
    with pytest.raises(InputError) as caught:
        compare_command(what, home, choice)
    assert sentence in str(caught.value)


def written(home: Path, ending: str, choice: Choice = Choice()) -> Path:  # noqa: B008 (frozen)
    file = home / f"out{ending}"
    write_compared(compare_command([], home, choice), choice, file)
    return file


def test_files_hold_the_rows(home: Path) -> None:
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".csv": pd.read_csv, ".parquet": pd.read_parquet, ".json": pd.read_json,
    }  # fmt: skip
    for ending, read in readers.items():
        frame = read(written(home, ending))
        assert len(frame) == 12, ending
        assert frame["quality/bits_per_byte"].max() == 1.4
        few = read(written(home, ending, Choice(columns=["label", "quality"])))
        assert list(few.columns) == ["label", "quality/bits_per_byte"]
    assert written(home, ".md").read_text().count("| a 0.30 |") == 3
    page = written(home, ".html", Choice(methods=["a"])).read_text()
    assert page.count('data-value="a 0.30"') == 3
    assert 'data-value="b 0.10"' not in page


def test_an_ending_that_is_no_format(home: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean \.parquet"):
        written(home, ".parqet")
    with pytest.raises(InputError, match="needs a folder that exists"):
        written(home, "/nowhere/out.csv")


def test_the_command_prints_what_was_found_and_names_what_is_damaged(home: Path) -> None:
    (home / "sweeps" / "second" / "comparison.json").write_text('{"title": "sec')
    done = CliRunner().invoke(app, ["compare", "--home", str(home)], env={"COLUMNS": "90"})
    assert done.exit_code == 0, done.output
    # The table goes to the file descriptor itself; see test_json below for its content.
    assert "second/comparison.json is damaged" in done.stderr


def test_json(
    home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["foldstack", "compare", "third", "--home", str(home), "--json"]
    )
    with pytest.raises(SystemExit) as stopped:
        app()
    assert stopped.value.code == 0
    found = json.loads(capfd.readouterr().out)
    (sweep,) = found["sweeps"]
    assert sweep["findings"][0].startswith("At 10 % a is best: 1.100 bits per byte")
    assert [row["label"] for row in found["rows"]] == ["dense", "a 0.10", "b 0.10", "a 0.30"]
    assert found["rows"][1]["sparsity"] == 0.1
