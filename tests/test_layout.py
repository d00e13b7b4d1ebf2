"""The rules of packaging and layering that no tool checks by itself."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE_FOLDERS = ("compression", "flows", "tasks")
# Loading one of these when the library is imported costs seconds. (transformers loads accelerate.)
HEAVY = ("datasets", "lm_eval", "matplotlib", "peft")
# Not for the top of a module: extends a class of peft; is loaded by lm-eval; is run as a script.
LATE = ("adapters", "foldstack_mlx", "stdlib_items", "train")


def files_below(folder: str, pattern: str) -> Iterator[Path]:
    """Files of ours: what tools keep in hidden folders is not."""
    for file in (ROOT / folder).rglob(pattern):
        if file.is_file() and not any(
            part.startswith(".") for part in file.parts[len(ROOT.parts) :]
        ):
            yield file


def setuptools_settings() -> dict[str, dict[str, list[str]]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    settings: dict[str, dict[str, list[str]]] = project["tool"]["setuptools"]
    return settings


def library_modules() -> list[str]:
    """Modules of foldstack.compression that others may import at their top."""
    files = sorted((ROOT / "compression").rglob("*.py"))
    modules = (file.relative_to(ROOT).with_suffix("") for file in files if file.stem not in LATE)
    parts = (module.parts[:-1] if module.name == "__init__" else module.parts for module in modules)
    return [".".join(("foldstack", *names)) for names in parts]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_folder_with_code_is_packaged() -> None:
    found = {
        file.parent.relative_to(ROOT)
        for folder in CODE_FOLDERS
        for file in files_below(folder, "*.py")
    }
    listed = setuptools_settings()["packages"]
    assert sorted(listed) == sorted(".".join(("foldstack", *path.parts)) for path in found)


def test_every_file_that_is_not_code_is_packaged() -> None:
    data = setuptools_settings()["package-data"]
    packaged = {
        file
        for package, patterns in data.items()
        for pattern in patterns
        for file in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    found = {
        file
        for folder in CODE_FOLDERS
        for file in files_below(folder, "*")
        if file.suffix not in (".py", ".pyc", ".toml")
    }
    assert found == packaged


@pytest.mark.parametrize("folder", CODE_FOLDERS)
def test_code_folder_is_not_a_package_by_itself(folder: str) -> None:
    """An __init__.py here would let compression/ hide Python 3.14's standard `compression`."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_sub_folders_are_packages() -> None:
    """Without __init__.py, importlib.resources fails on them in an editable install."""
    folders = [
        path.parent
        for folder in CODE_FOLDERS
        for path in files_below(folder, "*.py")
        if path.parent != ROOT / folder
    ]
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_standard_library_works_from_the_repository_root() -> None:
    run_python("import bz2, gzip, lzma, tarfile, zipfile")


def test_type_checkers_see_the_folders() -> None:
    for folder in CODE_FOLDERS:
        assert (ROOT / "typings" / "foldstack" / folder).resolve() == ROOT / folder


def test_library_imports_no_workflow_engine_nothing_slow_and_says_nothing() -> None:
    modules = library_modules()
    assert "foldstack.compression.structure.plan" in modules
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    for banned in ("prefect", "mlflow", *{HEAVY}):
        assert banned not in sys.modules, f"{{module}} imports {{banned}}"
"""
    assert run_python(code) == ""


def test_results_are_read_without_torch() -> None:
    """`foldstack compare` and `ls` answer in a second; torch alone takes two."""
    modules = (
        "compression.structure.plan",
        "compression.storage.digest",
        "flows.cli.command_compare",
    )
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(f"foldstack.{{module}}")
    assert "torch" not in sys.modules, f"{{module}} imports torch"
from foldstack.flows.cli.listing import KINDS, listing, schema_text
assert schema_text() and all(listing(kind) for kind in KINDS)
assert "torch" not in sys.modules, "a listing imports torch"
"""
    assert run_python(code) == ""


@pytest.mark.parametrize(("file", "banned"), [("plan.py", "mlflow"), ("methods/x.py", "prefect")])
def test_ruff_refuses_prefect_and_mlflow_in_the_library(file: str, banned: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--stdin-filename", f"compression/{file}", "-"],
        input=f"import {banned}\n\nprint({banned})\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "TID251" in done.stdout


def test_no_file_is_named_after_a_library() -> None:
    """Prefect's script loader puts a flow's folder first on sys.path: flows/evaluate.py would
    stand for Hugging Face's `evaluate` in every import after it.
    """
    names = {file.stem for folder in ("flows", "tasks") for file in files_below(folder, "*.py")}
    taken = {"datasets", "evaluate", "mlflow", "prefect", "tokenizers", "torch", "transformers"}
    assert not names & (taken | sys.stdlib_module_names)


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = project["dependencies"] + [each for extra in extras for each in extra]
    pinned = {
        line.partition("==")[0]
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    }
    names = {re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in wanted}
    assert names - {"foldstack"} <= pinned  # an extra of ours may name another one
