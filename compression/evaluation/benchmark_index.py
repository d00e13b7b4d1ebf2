"""Which benchmarks lm-eval knows, and the cheapest way to make it know the ones that are asked for.

lm-eval's index of its own 14,000 tasks takes 20 seconds to build; names are found in its YAML files
in half a second. So the index is built of as few folders as the names need.
"""

import difflib
import functools
import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.quiet_lm_eval import quiet_loggers
from foldstack.compression.reference import BENCHMARKS_FOLDER

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

logger = logging.getLogger(__name__)

DECLARATION = re.compile(r"""^["']?(task|group)["']?[ \t]*:[ \t]*["']?([^\s"'#\[{]+)""", re.M)


def check_tasks(
    names: Sequence[str], include_paths: Sequence[Path] = (), *, fetch: bool = False
) -> None:
    """Refuse names that are no benchmarks; with `fetch`, also those whose data cannot be had.

    Args:
        names: of lm-eval's tasks, groups and tags, of tasks in `include_paths`, or of the packaged
            benchmarks; or paths of task YAML files.
        include_paths: folders with further task YAML files.
        fetch: build the tasks, which downloads what they need (imports lm-eval: seconds).

    Raises:
        InputError: says what is wrong, with the nearest names.
    """
    if not names:
        raise InputError("give at least one benchmark, such as stdlib_continuation")
    declared = _declared_in(_folders(include_paths))
    for name in names:
        if _is_file(name) and not Path(name).is_file():
            raise InputError(f"no benchmark file {name}")
    named = [name for name in names if not _is_file(name) and name not in declared]
    unknown = [name for name in named if name not in _declared_by_lm_eval()]
    if unknown:  # tags, and what lm-eval declares in unusual ways, are in its full index only
        index = _full_manager(tuple(_folders(include_paths))).task_index
        for name in unknown:
            if name not in index:
                raise InputError(_no_such_task(name, [*declared, *index]))
    if fetch:
        with data_errors(), quiet_loggers():
            task_manager(names, include_paths).load(list(names))


def without_data(names: Sequence[str], include_paths: Sequence[Path] = ()) -> list[str]:
    """Have the data of benchmarks fetched; a sentence on all those whose data, or a package that
    they need, is not there."""
    missing: dict[str, list[str]] = {}
    for name in names:
        try:
            check_tasks([name], include_paths, fetch=True)
        except InputError as error:
            missing.setdefault(str(error), []).append(name)
        except ImportError as error:
            package = error.name or str(error)
            missing.setdefault(f"the package {package} is not installed", []).append(name)
    if not missing:
        return []
    reasons = [f"{', '.join(some)} ({reason})" for reason, some in missing.items()]
    return [
        f"tracks cannot be measured for want of what these benchmarks need: {', '.join(reasons)}"
    ]


def file_of_task(name: str) -> Path | None:
    """Where lm-eval declares a task, which is no group; None if it has none of that name."""
    kind, file = _declared_by_lm_eval().get(name, ("", None))
    return file if kind == "task" else None


def task_manager(names: Sequence[str], include_paths: Sequence[Path] = ()) -> "TaskManager":
    """An lm-eval task manager that knows `names`, which `check_tasks` has passed.

    Raises:
        InputError: a YAML file declares a name, but lm-eval cannot read the file; or a benchmark
            runs what the model writes.
    """
    from lm_eval.tasks import TaskManager

    folders = _folders(include_paths)
    manager = TaskManager(include_path=list(folders), include_defaults=False)
    missing = set(_missing(manager, names))
    for name, (_, file) in _declared_in(folders).items():
        if name in missing:
            raise InputError(f"benchmark {name} is declared in {file}, which lm-eval cannot read")
    stock = _declared_by_lm_eval() if missing else {}
    if missing and all(stock.get(name, ("", None))[0] == "task" for name in missing):
        beside = {stock[name][1].parent for name in missing}
        manager = TaskManager(include_path=[*sorted(beside), *folders], include_defaults=False)
        missing = set(_missing(manager, names))
    if missing:
        manager = _full_manager(tuple(folders))
    for name, settings in _settings_of(manager, names):
        # Before lm-eval loads it: that fetches the program that runs the code, and tries it.
        if (settings or {}).get("unsafe_code"):
            raise InputError(
                f"benchmark {name} runs code that the model writes, which foldstack refuses: "
                "nothing here keeps such code from your files"
            )
    return manager


@contextmanager
def data_errors() -> Iterator[None]:
    """Turns a failure to get a benchmark's data into one sentence."""
    try:
        yield
    except Exception as error:
        if sentence := _explain(error):
            raise InputError(sentence) from error
        raise


def _explain(error: BaseException) -> str | None:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, ConnectionError | LocalEntryNotFoundError | HfHubHTTPError):
        return f"a benchmark's data cannot be fetched from the hub: {said}"
    if isinstance(error, DatasetNotFoundError):
        return f"a benchmark's data is not on the hub: {said}"
    if isinstance(error, FileNotFoundError):
        return (
            f"a benchmark's data is not there: {said} (relative data_files count from the current "
            "directory, not from the YAML file)"
        )
    if "Dataset scripts are no longer supported" in said:
        return f"a benchmark needs a dataset script, which datasets no longer runs: {said}"
    return None


def _folders(include_paths: Sequence[Path]) -> list[Path]:
    for path in include_paths:
        if not path.is_dir():
            raise InputError(f"include_paths are folders with task YAML files, {path} is none")
    return [folder for folder in (BENCHMARKS_FOLDER, *include_paths) if folder.is_dir()]


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _declared_in(folders: Sequence[Path]) -> dict[str, tuple[str, Path]]:
    """Kind ("task" or "group") and file of every name that the YAML files plainly declare."""
    found: dict[str, tuple[str, Path]] = {}
    for folder in folders:
        for file in sorted(folder.glob("**/*.yaml")):
            text = file.read_text(encoding="utf-8", errors="replace")
            for kind, name in DECLARATION.findall(text):
                found.setdefault(name, (kind, file))
    return found


@functools.cache
def _declared_by_lm_eval() -> dict[str, tuple[str, Path]]:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    return _declared_in([Path(spec.submodule_search_locations[0]) / "tasks"])


@functools.lru_cache(maxsize=1)
def _full_manager(folders: tuple[Path, ...]) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    logger.info("reading lm-eval's whole task index, which takes about 20 seconds")
    with quiet_loggers():
        return TaskManager(include_path=list(folders), include_defaults=True)


def _missing(manager: "TaskManager", names: Sequence[str]) -> Iterator[str]:
    """The names, and the members of the groups among them, that the manager does not know."""
    return (name for name, settings in _settings_of(manager, names) if settings is None)


def _settings_of(
    manager: "TaskManager", names: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The names, and the members of the groups and tags among them, each with what its YAML file
    says; None where the manager does not know it."""
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None and _is_file(name):
            from lm_eval.tasks._yaml_loader import load_yaml

            settings = load_yaml(Path(name), resolve_func=False)
        elif entry is None:
            yield name, None
            continue
        elif entry.yaml_path is None:  # a tag
            yield from _settings_of(manager, sorted(entry.tags - {name}))
            continue
        else:
            settings = entry.cfg or {}
        yield name, settings
        if isinstance(members := settings.get("task"), list):
            yield from ((name, item) for item in members if isinstance(item, dict))
            yield from _settings_of(manager, [m for m in map(_member, members) if m is not None])


def _member(item: str | dict[str, Any]) -> str | None:
    """The name that a group's item refers to; None if it is defined in place."""
    if isinstance(item, str):
        return item
    is_inline = "dataset_path" in item or isinstance(item.get("task"), list)
    return None if is_inline else item.get("group", item.get("task"))


def _no_such_task(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, {*known}, n=3)
    advice = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` prints them all"
    return f"no benchmark {name!r}: {advice}"
