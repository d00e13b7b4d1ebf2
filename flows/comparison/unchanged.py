"""A run of which nothing has changed since it ended: what it found is told again.

To find that out by the stages' fingerprints takes torch, transformers and Prefect, whose imports
are most of what a cached run costs. Fingerprints are made of the config, the environment and files.
Which files those were is noted when a run ends, with what was made from them; while each has the
size and the time of change that it had, the comparison that was written then is the run's.
"""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldstack.compression.errors import InputError
from foldstack.compression.storage import digest
from foldstack.compression.storage.durable import write_whole
from foldstack.flows.comparison.result import Comparison
from foldstack.flows.config.config_file import find_config, read_config
from foldstack.tasks.environment.home import foldstack_home

if TYPE_CHECKING:
    from foldstack.flows.config.run_config import RunConfig
    from foldstack.flows.running.branches import Layout

ENVIRONMENT = ("FOLDSTACK_", "PREFECT_", "MLFLOW_", "HF_", "TRANSFORMERS_", "CUDA_")
"""How the variables begin that a run may go by."""
SETTINGS_OF_PREFECT = ("prefect.toml", "pyproject.toml", ".env")
CODE = ("compression", "flows", "tasks")
USED = "manifest.json"
"""The store dates it at each use: its content counts, and not its time."""


@dataclass(frozen=True)
class Question:
    """What a command asks for, before anything heavy is imported."""

    key: str
    home: Path
    asked_at: float = field(default_factory=time.time, compare=False)

    @classmethod
    def of(cls, config: str, overrides: Sequence[str]) -> "Question | None":
        """None where the config cannot be read: whoever reads it in earnest says why."""
        try:
            data = read_config(find_config(config), overrides)
        except InputError:
            return None
        output = data.get("output")
        home = output.get("home") if isinstance(output, dict) else None
        variables = {k: v for k, v in os.environ.items() if k.startswith(ENVIRONMENT)}
        place = [os.getcwd(), platform.node(), sys.version, os.cpu_count(), sys.path]
        told = json.dumps([data, variables, place], sort_keys=True, default=str)
        where = Path(str(home)).expanduser() if home else foldstack_home()
        return cls(hashlib.sha256(told.encode()).hexdigest()[:32], where)

    @property
    def file(self) -> Path:
        return self.home / "unchanged" / f"{self.key}.json"


def found_before(question: Question) -> Comparison | None:
    """What the same command found, where nothing that it went by or made has changed since."""
    try:
        noted: dict[str, Any] = json.loads(question.file.read_text(encoding="utf-8"))
        if any(_stamp(Path(path)) != stamp for path, stamp in noted["files"].items()):
            return None
        comparison = Comparison.model_validate_json(Path(noted["comparison"]).read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for path in noted["files"]:
        if Path(path).name == USED:
            with suppress(OSError):
                os.utime(path)  # the store's garbage collection keeps what was used of late
    return comparison.model_copy(update={"num_cached": comparison.num_stages})


def note(question: Question, layout: "Layout", comparison: Comparison) -> None:
    """Note what a run went by, if it can be told from files alone that nothing has changed."""
    if comparison.failed or comparison.warnings or not _is_local(layout.config):
        return
    from prefect.settings import get_current_settings

    home = layout.config.output.home.expanduser().resolve()
    given = {path for path in digest.SEEN if not path.is_relative_to(home)}
    read = {*given, *_below(digest.PACKAGE_FOLDER / name for name in CODE)}
    if any(_changed_at(path) > question.asked_at - 1 for path in read):
        return  # before it was read, or after
    made = [stage.artifact(layout.store).folder for stage in layout.stages]
    files = {
        *read,
        *_below([*made, layout.report_folder]),
        *(Path(place) for place in sys.path if os.path.isdir(place)),  # packages come and go there
        *(Path(name).absolute() for name in SETTINGS_OF_PREFECT),
        get_current_settings().profiles_path,
        home / "models",
        home / "mlflow.db",
    }
    noted = {
        "comparison": str(layout.report_folder / "comparison.json"),
        "files": {str(path): _stamp(path) for path in sorted(files)},
    }
    with suppress(OSError):
        question.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(question.file, json.dumps(noted))


def _is_local(config: "RunConfig") -> bool:
    """Whether all that a run goes by and makes is files: others know what has become of theirs."""
    from foldstack.compression.checkpoints.model_folder import REFERENCE
    from foldstack.compression.text.corpus import PYTHON_STDLIB, SELF

    texts = {*_corpora(config.model_dump())} - {PYTHON_STDLIB, SELF}
    models = {config.model.name} - {REFERENCE}
    is_logged_here = not (config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"))
    is_kept_here = not config.output.store and (is_logged_here or not config.tracking.enabled)
    return is_kept_here and all(Path(name).expanduser().exists() for name in texts | models)


def _corpora(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        if isinstance(corpus := config.get("corpus"), str):
            yield corpus
        config = config.values()
    elif not isinstance(config, list | tuple):
        return
    for part in config:
        yield from _corpora(part)


def _below(folders: Iterable[Path]) -> set[Path]:
    """Every file under folders but what Python compiles."""
    return {
        file
        for folder in folders
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def _stamp(path: Path) -> list[int] | str | None:
    """What changes when a file does; of a folder, when something comes or goes in it."""
    if path.name == USED:
        return digest.digest_file(path) if path.is_file() else None
    with suppress(OSError):
        found = path.stat()
        return [found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino]
    return None


def _changed_at(path: Path) -> float:
    """When a file got its content or its name, in seconds since 1970; 0 where there is none."""
    with suppress(OSError):
        return max(path.stat().st_mtime, path.stat().st_ctime)
    return 0.0
