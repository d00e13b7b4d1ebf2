"""Where text comes from: the standard library, local files, datasets."""

import json
import sys
from pathlib import Path

import pytest

from foldstack.compression.errors import InputError
from foldstack.compression.reference import stdlib_corpus
from foldstack.compression.text.corpus import TextSource, documents, source_digest, stdlib_dataset


def write_jsonl(path: Path, records: list[object]) -> TextSource:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return TextSource(corpus=str(path))


def test_splits_share_no_module_and_lose_none() -> None:
    splits = [stdlib_corpus.stdlib_split(split) for split in stdlib_corpus.SPLITS]
    paths = [path for split in splits for path in split]
    assert sorted(paths) == list(stdlib_corpus.stdlib_modules())
    sizes = [sum(map(len, split.values())) for split in splits]
    assert sizes[0] > 0.8 * sum(sizes)
    assert min(sizes) > 150_000


def test_split_of_a_module_follows_from_its_path_alone() -> None:
    # By hand: the first 8 bytes of `printf json/decoder.py | sha256sum` etc., as a share of 2^64.
    places = {"json/decoder.py": "train", "enum.py": "validation", "traceback.py": "test"}
    assert {path: stdlib_corpus.split_of(path) for path in places} == places


def test_corpus_holds_library_code_and_no_tests_tables_or_packages() -> None:
    modules = stdlib_corpus.stdlib_modules()
    assert {"json/decoder.py", "asyncio/tasks.py", "typing.py"} <= set(modules)
    folders = {part for path in modules for part in path.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
    assert modules["json/decoder.py"] == Path(json.decoder.__file__).read_bytes().decode()


def test_digest_tells_splits_apart_and_repeats() -> None:
    digests = {split: stdlib_corpus.stdlib_digest(split) for split in stdlib_corpus.SPLITS}
    assert len(set(digests.values())) == 3
    stdlib_corpus.stdlib_modules.cache_clear()
    assert stdlib_corpus.stdlib_digest("test") == digests["test"]


def test_dataset_of_a_split_has_path_and_text() -> None:
    dataset = stdlib_dataset("validation")
    assert dataset.column_names == ["path", "text"]
    assert dict(zip(dataset["path"], dataset["text"], strict=True)) == (
        stdlib_corpus.stdlib_split("validation")
    )
    assert documents(TextSource(split="validation")) == dataset["text"][:]


def test_unknown_split_of_the_standard_library_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"train, validation, test, got 'tests'"):
        documents(TextSource(split="tests"))


def test_text_file_is_one_document_or_is_split_where_told(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("one\r\n===\ntwo\n===\n \n===\nthrée".encode())
    whole = TextSource(corpus=str(file))
    assert documents(whole) == ["one\r\n===\ntwo\n===\n \n===\nthrée"]
    parts = whole.model_copy(update={"separator": "===\n"})
    assert documents(parts) == ["one\r\n", "two\n", "thrée"]
    assert source_digest(parts) != source_digest(whole)


def test_path_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.txt").write_text("text", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert documents(TextSource(corpus="here.txt")) == ["text"]


def test_jsonl_gives_the_field_asked_for(tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "a.jsonl", [{"text": "one", "code": "1"}, {"text": "", "code": "2"}]
    )
    assert documents(source) == ["one"]
    assert documents(source.model_copy(update={"text_field": "code"})) == ["1", "2"]


def test_digest_depends_on_the_text_and_not_on_where_it_lies(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    same = write_jsonl(tmp_path / "b.jsonl", [{"text": "one", "more": 1}, {"text": "two"}])
    joined = write_jsonl(tmp_path / "c.jsonl", [{"text": "onetwo"}])
    assert source_digest(first) == source_digest(same) != source_digest(joined)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\n \n", "is blank"),
        (b'{"text": "a"}\n{"body": "b"}\n', "line 2 .* has no field 'text'.*body"),
        (b'{"text": "a"\n', "line 1 .* must be a JSON object"),
        (b"[1]\n", "must be a JSON object, got list"),
        (b'{"text": 3}\n', "must be text, but in line 1 .* it is int"),
        (b"\xff\xfe\n", "readable as UTF-8"),
    ],
)
def test_bad_jsonl_is_refused_in_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        documents(TextSource(corpus=str(file)))
    assert "\n" not in str(error.value)


def test_missing_file_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"no file {tmp_path / 'gone.txt'}"):
        documents(TextSource(corpus="gone.txt"))


def test_local_dataset_folder_goes_by_split_and_field(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a", "number": 1}, {"text": None, "number": 2}])
    source = TextSource(corpus=str(tmp_path))
    assert documents(source) == ["a"]
    with pytest.raises(InputError, match=r"Unknown split.*train"):
        documents(source.model_copy(update={"split": "dev"}))
    with pytest.raises(InputError, match=r"no field 'body'.*text, number"):
        documents(source.model_copy(update={"text_field": "body"}))
    with pytest.raises(InputError, match="'number' must be text"):
        documents(source.model_copy(update={"text_field": "number"}))


def test_dataset_out_of_reach_is_one_sentence() -> None:
    """Hub access is switched off in tests, so every name is out of reach."""
    with pytest.raises(InputError, match="the hub cannot be reached or is switched off"):
        documents(TextSource(corpus="nobody/nothing-of-this-name"))


def test_source_names_unknown_settings() -> None:
    with pytest.raises(ValueError, match="splits"):
        TextSource(splits="train")  # type: ignore[call-arg]


def test_corpus_module_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    """lm-eval loads it where foldstack, and maybe more, is not installed."""
    import subprocess

    file = Path(stdlib_corpus.__file__)
    code = "import stdlib_corpus as c; print(c.stdlib_digest('test'))"
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path[0:0] = [{str(file.parent)!r}]; {code}",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == stdlib_corpus.stdlib_digest("test")
