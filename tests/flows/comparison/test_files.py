"""A sweep's files: whole or not there, and one that is damaged harms no other."""

import os
from pathlib import Path

import pytest

from foldstack.compression.errors import InputError
from foldstack.flows.comparison.files import comparisons_in, load, save_texts
from foldstack.flows.comparison.result import Comparison


def saved(home: Path, comparison: Comparison, name: str) -> Path:
    folder = home / "sweeps" / name
    save_texts(comparison.model_copy(update={"title": name}), folder)
    return folder


def test_a_comparison_comes_back_as_it_went(comparison: Comparison, tmp_path: Path) -> None:
    folder = saved(tmp_path, comparison, "small")
    assert load(folder) == comparison.model_copy(update={"title": "small"})
    assert sorted(file.name for file in folder.iterdir()) == [
        "comparison.csv", "comparison.json", "comparison.md",
    ]  # fmt: skip


def test_files_of_before_the_pairs_are_read(comparison: Comparison, tmp_path: Path) -> None:
    folder = saved(tmp_path, comparison, "old")
    file = folder / "comparison.json"
    text = file.read_text()
    assert '"lower"' in text
    file.write_text(text.replace('"lower"', '"best"'))
    assert load(folder).rivals == comparison.rivals


@pytest.mark.parametrize("damage", ["torn", "empty", "other", "zeros"])
def test_a_damaged_file_is_named_and_left_out(
    damage: str, comparison: Comparison, tmp_path: Path
) -> None:
    good, bad = saved(tmp_path, comparison, "good"), saved(tmp_path, comparison, "bad")
    file = bad / "comparison.json"
    whole = file.read_bytes()
    file.write_bytes(
        {"torn": whole[: len(whole) // 2], "empty": b"", "other": b'{"a": 1}', "zeros": bytes(99)}[
            damage
        ]
    )
    found = comparisons_in(tmp_path)
    assert [each.title for each in found.readable] == [good.name]
    (sentence,) = found.damaged
    assert sentence.startswith(f"{file} is damaged (")
    with pytest.raises(InputError, match="run that sweep again"):
        load(bad)
    os.remove(good / "comparison.json")
    with pytest.raises(InputError, match=r"run one with `foldstack run CONFIG`.*is damaged"):
        comparisons_in(tmp_path)


def test_readers_never_see_half_a_file(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine dies when the new text is written, but not yet in the old one's place."""
    folder = saved(tmp_path, comparison, "small")

    def die(*_: object) -> None:
        raise OSError("the machine died")

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(OSError, match="the machine died"):
        save_texts(comparison.model_copy(update={"title": "new"}), folder)
    assert load(folder).title == "small"
    assert not list(folder.glob(".*"))
