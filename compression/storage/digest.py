"""SHA-256 of values, files, folders and of the code behind a computation."""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGE = "foldstack"
LIBRARY = f"{PACKAGE}.compression"
# The folders of foldstack.compression, .tasks and .flows are neighbours in the repository and in
# an installed wheel alike.
PACKAGE_FOLDER = Path(__file__).parents[2]
CHUNK_BYTES = 1 << 20
SEEN: set[Path] = set()
"""What this process took digests of: while that is as it was, so are they."""


def saw(*paths: Path) -> None:
    """Note files, or folders, by whose content something is known."""
    SEEN.update(path.absolute() for path in paths)


def digest_json(value: Any) -> str:
    """Digest of a JSON value: equal for equal values, whatever the order of their keys.

    Raises:
        TypeError: the value is not made of JSON types.
        ValueError: it holds a NaN or an infinity, which JSON cannot say.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(file: Path) -> str:
    """Digest of a file's bytes, read in pieces."""
    saw(file)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def digest_folder(folder: Path, patterns: Iterable[str] = ("**/*",)) -> str:
    """Digest of the names and bytes of the files under `folder` that match a pattern."""
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    saw(folder, *(file.parent for file in files))
    return digest_json({file.relative_to(folder).as_posix(): digest_file(file) for file in files})


def code_digest(modules: Iterable[str]) -> str:
    """Digest of the sources of foldstack modules and of the library modules they import."""
    return digest_json(code_sources(modules))


def code_sources(modules: Iterable[str], *, alone: Iterable[str] = ()) -> dict[str, str]:
    """Digest of each source file behind `modules`, by module name.

    Imports are followed inside foldstack.compression, also those inside functions. A package's
    __init__ counts only when the package itself is imported: foldstack.compression.methods names
    every method, and a change of one of them must not look like a change of the others.

    Args:
        modules: full names, e.g. "foldstack.compression.structure.surgery".
        alone: modules whose own source counts, but not what they import.

    Raises:
        ValueError: a name is not a module of foldstack.
    """
    waiting, found = sorted(modules), {}
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module], imported = _source(_file_of(module))
            waiting.extend(imported)
    for module in alone:
        found[module] = _source(_file_of(module))[0]
    return dict(sorted(found.items()))


@lru_cache(maxsize=512)
def _source(file: Path) -> tuple[str, tuple[str, ...]]:
    """Digest of a source file and the library modules it imports.

    Kept for the life of the process: the process goes on running the code that it has loaded,
    whatever becomes of the file.
    """
    text = file.read_text(encoding="utf-8")  # with every newline as \n, whatever git made of it
    imported = sorted(set(_library_imports(ast.parse(text, filename=str(file)))))
    return hashlib.sha256(text.encode()).hexdigest(), tuple(imported)


def _library_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (name for name in names if name.startswith(f"{LIBRARY}."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from _imported_from(node.module, [alias.name for alias in node.names])


def _imported_from(source: str, names: list[str]) -> Iterator[str]:
    """Modules that `from source import names` reads: submodules among the names, else `source`."""
    if source != PACKAGE and source != LIBRARY and not source.startswith(f"{LIBRARY}."):
        return
    for name in names:
        inner = f"{source}.{name}"
        if _find_file(inner) is not None and inner.startswith(f"{LIBRARY}."):
            yield inner
        elif _find_file(source) is not None:
            yield source


def _file_of(module: str) -> Path:
    file = _find_file(module)
    if file is None:
        raise ValueError(f"code is counted for modules of {PACKAGE}, got {module!r}")
    return file


def _find_file(module: str) -> Path | None:
    package, *parts = module.split(".")
    return _file_below(PACKAGE_FOLDER, tuple(parts)) if package == PACKAGE and parts else None


@lru_cache(maxsize=2048)
def _file_below(folder: Path, parts: tuple[str, ...]) -> Path | None:
    path = folder.joinpath(*parts)
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)
