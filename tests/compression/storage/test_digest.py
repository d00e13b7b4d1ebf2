"""Digests of values, files and of the code behind a computation."""

import os
from pathlib import Path

import pytest

from foldstack.compression.storage import digest
from foldstack.compression.storage.digest import (
    code_digest,
    code_sources,
    digest_folder,
    digest_json,
)

SOURCES = {
    "compression/surgery.py": "from foldstack.compression.plan import Plan\nimport torch\n",
    "compression/plan.py": "import json\n",
    "compression/low_rank.py": "",
    "compression/methods/__init__.py": (
        "from foldstack.compression.methods.shortgpt import A\n"
        "from foldstack.compression.methods import svd_llm\n"
    ),
    "compression/methods/shortgpt.py": "import foldstack.compression.surgery as surgery\n",
    "compression/methods/svd_llm.py": (
        "def late():\n    from foldstack.compression import low_rank, surgery\n"
    ),
    "tasks/compress_model.py": (
        "from foldstack.compression.methods import METHODS\n"
        "from foldstack.compression.surgery import cut\n"
    ),
}
METHOD = "foldstack.compression.methods.svd_llm"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small foldstack to be edited, in the place of the real one."""
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(digest, "PACKAGE_FOLDER", tmp_path)
    return tmp_path


def edit(file: Path) -> None:
    file.write_text(file.read_text() + "# edited\n")
    digest._source.cache_clear()


def short(names: list[str]) -> list[str]:
    return [name.removeprefix("foldstack.").removeprefix("compression.") for name in names]


def test_digest_of_json_ignores_order_of_keys_only() -> None:
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": [1, 2], "a": 1})
    assert digest_json([1, 2]) != digest_json([2, 1])
    assert digest_json({"a": 1}) != digest_json({"a": "1"})
    assert digest_json("é") == (
        "f2886017e9c7abacf804b54d64787dce2b611c9544ba21f3affdd126a6e50086"
    )  # printf '"é"' | sha256sum
    with pytest.raises(ValueError, match="JSON compliant"):
        digest_json(float("nan"))


def test_digest_of_a_folder_counts_names_and_bytes_of_what_matches(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "b.bin").write_text("2")
    texts, everything = digest_folder(tmp_path, ["*.txt"]), digest_folder(tmp_path)
    os.utime(tmp_path / "a.txt", (0, 0))
    assert digest_folder(tmp_path, ["*.txt", "a.*"]) == texts
    (tmp_path / "b.bin").rename(tmp_path / "c.bin")
    assert digest_folder(tmp_path, ["*.txt"]) == texts
    assert digest_folder(tmp_path) != everything
    (tmp_path / "a.txt").write_text("3")
    assert digest_folder(tmp_path, ["*.txt"]) != texts


@pytest.mark.usefixtures("package")
def test_code_is_followed_through_imports_also_inside_functions() -> None:
    assert short(list(code_sources([METHOD]))) == [
        "low_rank",
        "methods.svd_llm",
        "plan",
        "surgery",
    ]
    assert short(list(code_sources(["foldstack.compression.methods.shortgpt"]))) == [
        "methods.shortgpt",
        "plan",
        "surgery",
    ]


@pytest.mark.usefixtures("package")
def test_package_counts_when_it_is_imported_itself() -> None:
    everything = short(list(code_sources(["foldstack.compression.methods"])))
    assert everything == [
        "low_rank",
        "methods",
        "methods.shortgpt",
        "methods.svd_llm",
        "plan",
        "surgery",
    ]


@pytest.mark.usefixtures("package")
def test_module_alone_counts_without_its_imports() -> None:
    sources = code_sources(["foldstack.compression.plan"], alone=["foldstack.tasks.compress_model"])
    assert short(list(sources)) == ["plan", "tasks.compress_model"]


def test_editing_one_method_leaves_the_other_methods_code_alone(package: Path) -> None:
    other = "foldstack.compression.methods.shortgpt"
    before, other_before = code_digest([METHOD]), code_digest([other])
    edit(package / "compression/methods/svd_llm.py")
    assert code_digest([METHOD]) != before
    assert code_digest([other]) == other_before
    edit(package / "compression/plan.py")
    assert code_digest([other]) != other_before


def test_line_ends_of_a_checkout_do_not_count(package: Path) -> None:
    before = code_digest([METHOD])
    file = package / "compression/surgery.py"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    digest._source.cache_clear()
    assert code_digest([METHOD]) == before


def test_process_keeps_the_digest_of_the_code_it_has_loaded(package: Path) -> None:
    before = code_digest([METHOD])
    file = package / "compression/plan.py"
    file.write_text("print()")
    assert code_digest([METHOD]) == before


@pytest.mark.parametrize("module", ["foldstack.compression.gone", "torch.nn", "foldstack"])
def test_only_modules_of_foldstack_have_code_here(module: str) -> None:
    with pytest.raises(ValueError, match=f"got '{module}'"):
        code_sources([module])
