"""Local files as people have them: every form is read, and what cannot be is told."""

import bz2
import gzip
import json
import logging
import lzma
from pathlib import Path

import pandas
import pytest

from foldstack.compression.errors import InputError
from foldstack.compression.text.corpus import TextSource, documents, source_digest

TEXTS = ["one", "two, three\nfour", "Größe 🙂"]
LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()


def source(path: Path, content: bytes, **settings: str) -> TextSource:
    path.write_bytes(content)
    return TextSource(corpus=str(path), **settings)


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.ndjson", "a.json"])
def test_records(name: str, tmp_path: Path) -> None:
    assert documents(source(tmp_path / name, LINES)) == TEXTS
    with_mark = b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")
    assert documents(source(tmp_path / name, with_mark)) == TEXTS


def test_a_list_of_records(tmp_path: Path) -> None:
    records = json.dumps([{"text": text} for text in TEXTS], indent=1).encode()
    assert documents(source(tmp_path / "a.json", records)) == TEXTS


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".XZ", lzma.compress)]
)
def test_packed_files(suffix: str, pack: object, tmp_path: Path) -> None:
    assert callable(pack)
    plain = source(tmp_path / "a.jsonl", LINES)
    packed = source(tmp_path / f"a.jsonl{suffix}", pack(LINES))
    assert documents(packed) == TEXTS
    assert source_digest(packed) == source_digest(plain)
    with pytest.raises(InputError, match="cannot be read") as refusal:
        documents(source(tmp_path / f"b.txt{suffix}", b"not packed"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet", "feather"])
def test_tables(form: str, tmp_path: Path) -> None:
    table = pandas.DataFrame({"n": [1, 2, 3], "text": TEXTS})
    file = tmp_path / f"a.{form}"
    if form in ("csv", "tsv"):
        table.to_csv(file, sep="," if form == "csv" else "\t", index=False)
    else:
        getattr(table, f"to_{form}")(file)
    assert documents(TextSource(corpus=str(file))) == TEXTS
    with pytest.raises(InputError, match="set text_field to one of n, text"):
        documents(TextSource(corpus=str(file), text_field="body"))
    with pytest.raises(InputError, match=f"no whole .{form} file|no column"):
        documents(source(file, b"PAR1 and no more"))


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    pandas.DataFrame({"text": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"must be text, but in row 1 .* it is int"):
        documents(TextSource(corpus=str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.md", "a.rst", "a.text"])
def test_plain_text_with_the_line_ends_of_any_system(name: str, tmp_path: Path) -> None:
    for end in (b"\n", b"\r\n"):
        text = end.join([b"one", b"two", b"", b"three"])
        made = source(tmp_path / name, b"\xef\xbb\xbf" + text, separator="\n\n")
        assert documents(made) == [end.join([b"one", b"two"]).decode(), "three"]


def test_what_was_left_out_or_mended_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = '{"text": null}\n{"text": "a thumb \\ud83d"}\n{"text": "\\ud83d\\ude00"}\n'
    made = source(tmp_path / "a.jsonl", records.encode())
    assert documents(made) == ["a thumb �", "😀"]
    with caplog.at_level(logging.WARNING):
        source_digest(made)
        source_digest(source(tmp_path / "b.txt", b"one text", separator="===\n"))
    assert [record.getMessage() for record in caplog.records] == [
        f"1 of 3 texts in {tmp_path / 'a.jsonl'} are null: left out",
        f"1 texts of {tmp_path / 'a.jsonl'} hold half a character (a lone surrogate): it is read "
        "as U+FFFD",
        f"{tmp_path / 'b.txt'} has no '===\\n' (separator): it is one document",
    ]


def test_a_file_of_another_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.pdf is no corpus: give plain text \(\.txt,"):
        documents(source(tmp_path / "a.pdf", b"%PDF"))
    with pytest.raises(InputError, match="there is no file"):
        documents(TextSource(corpus=str(tmp_path / "gone.parquet")))


def test_a_path_may_begin_with_the_home_of_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    assert documents(TextSource(corpus="~/a.txt")) == ["text"]


def test_a_folder_with_the_name_of_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "wikitext" / "train.jsonl").write_bytes(LINES)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, "foldstack"):
        source_digest(TextSource(corpus="./wikitext"))
        assert not caplog.records
        for split in ("train", "train[:1]"):  # told once, however often it is read
            source_digest(TextSource(corpus="wikitext", split=split))
    (record,) = caplog.records
    assert "and not the dataset of that name on the hub" in record.getMessage()
