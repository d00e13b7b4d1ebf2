"""The Python standard library of the running interpreter as a text corpus.

Uses nothing but the standard library and imports nothing of foldstack, because lm-eval loads this
file by path in processes where foldstack is not installed.

A module is a `.py` file under the interpreter's `stdlib` folder, named by its path there with
forward slashes ("json/decoder.py"). Left out are: what stands under a folder of `IGNORED_FOLDERS`
(installed packages, caches, test suites, demonstrations, bundled wheels, and the two folders of
generated tables, `encodings` and `pydoc_data`, which would be a tenth of the library and say
little about Python); the build-time configuration modules of `IGNORED_PREFIXES`, which differ
between machines; files that are not UTF-8 or hold nothing but white space. Nothing else is dropped
and nothing is deduplicated: text that occurs twice in the library occurs twice here.

A module belongs to one split as a whole, by the first 8 bytes of the SHA-256 of its path: below
5 % of the range it is `test`, below 10 % `validation`, else `train`. So a module stays in its
split on every machine and in every Python version that has it.
"""

import hashlib
import os
import sysconfig
from functools import cache
from pathlib import Path

SPLITS = ("train", "validation", "test")
IGNORED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "turtledemo",
    "_bundled",
    "__phello__",
    "encodings",
    "pydoc_data",
}
IGNORED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")


@cache
def stdlib_modules() -> dict[str, str]:
    """Give the text of every module of the standard library by its path, sorted by path.

    Raises:
        FileNotFoundError: this Python has no standard library as source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules: dict[str, str] = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - IGNORED_FOLDERS  # installed packages are many
        for name in files:
            file = Path(folder, name)
            if file.suffix != ".py" or name.startswith(IGNORED_PREFIXES):
                continue
            try:
                text = file.read_bytes().decode("utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip():
                modules[file.relative_to(root).as_posix()] = text
    if not modules:
        raise FileNotFoundError(f"no source files under {root}")
    return dict(sorted(modules.items()))


def split_of(path: str) -> str:
    """Give the split that the module at `path` belongs to."""
    place = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
    return "test" if place < 0.05 else "validation" if place < 0.10 else "train"


def stdlib_split(split: str) -> dict[str, str]:
    """Give the modules of one split, text by path, sorted by path.

    Raises:
        ValueError: `split` is none of train, validation, test.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return {path: text for path, text in stdlib_modules().items() if split_of(path) == split}


def stdlib_digest(split: str) -> str:
    """Give the SHA-256 over the paths and texts of one split: the identity of its content."""
    content = hashlib.sha256()
    for path, text in stdlib_split(split).items():
        for part in (path.encode(), text.encode()):
            content.update(len(part).to_bytes(8, "big") + part)
    return content.hexdigest()
