"""MLflow's SQLite file: it appears whole or not at all, whoever opens it first.

MLflow makes its tables by dozens of migrations, each of them in steps. Two processes that do so in
one file at once, or one that is killed on the way, leave a file that no MLflow opens any more.
"""

import logging
import sqlite3
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from foldstack.tasks.store.leases import leased

log = logging.getLogger(__name__)

SCHEME = "sqlite:///"
ARTIFACTS = "mlartifacts"
"""Folder of a home with the files of its runs."""
PATIENCE_SECONDS = 30.0
HOLDING_PATHS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
    "tags": ("value",),
}
"""Columns in which MLflow keeps absolute paths for ever."""


def make_database(uri: str) -> None:
    """Make the file that `uri` names, unless it is there; does nothing for other databases.

    Raises:
        OSError: its folder cannot be written to.
    """
    if not uri.startswith(SCHEME):
        return
    file = Path(uri.removeprefix(SCHEME))
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with leased(file.with_name(f"{file.name}.leases"), lambda _: None) as lease:
        if not file.exists():
            _make_at_once(file)
        lease.discard()


def follow_home(uri: str, home: Path) -> None:
    """Let the database of a home that was moved or copied name its files where they are now.

    MLflow keeps the absolute place of an experiment's files, and would go on to write to the old
    one. Does nothing for a database that is not in the home.

    Raises:
        sqlite3.Error: the database cannot be written to.
    """
    home = home.resolve()
    file = Path(uri.removeprefix(SCHEME))
    if not uri.startswith(SCHEME) or file.parent.resolve() != home or not file.is_file():
        return
    with closing(sqlite3.connect(file, timeout=PATIENCE_SECONDS)) as database:
        for old in sorted(_former_homes(database, home)):
            with database:
                _rename_paths(database, old, home)
            log.info("MLflow's files of %s are those of %s now", old, home)


def _former_homes(database: sqlite3.Connection, home: Path) -> Iterator[Path]:
    """Where the files of this home were when it had another place: they are here, or not there."""
    try:
        rows = database.execute("SELECT experiment_id, artifact_location FROM experiments")
        experiments = rows.fetchall()
    except sqlite3.OperationalError:  # MLflow has not made its tables
        return
    for number, location in experiments:
        parts = urllib.parse.urlsplit(location or "")
        place = Path(urllib.request.url2pathname(parts.path))
        if parts.scheme not in ("", "file") or place.name != ARTIFACTS:
            continue
        if not place.is_absolute() or place.parent == home:
            continue
        runs = database.execute("SELECT run_uuid FROM runs WHERE experiment_id = ?", (number,))
        is_here = any((home / ARTIFACTS / run).is_dir() for (run,) in runs)
        if is_here or not place.exists():
            yield place.parent


def _rename_paths(database: sqlite3.Connection, old: Path, new: Path) -> None:
    for table, columns in HOLDING_PATHS.items():
        there = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
        for column in there & set(columns):
            for before, after in ((old.as_uri(), new.as_uri()), (str(old), str(new))):
                database.execute(
                    f"UPDATE {table} SET {column} = replace({column}, ?, ?) "
                    f"WHERE instr({column}, ?)",
                    (f"{before}/", f"{after}/", f"{before}/"),
                )


def _make_at_once(file: Path) -> None:
    from mlflow import MlflowClient

    unfinished = file.with_name(f"{file.name}.unfinished")
    for left in file.parent.glob(f"{unfinished.name}*"):  # by one who was killed; its journal too
        left.unlink()
    # That tables are made is nothing that a person waits to read among the stages of a run.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    MlflowClient(tracking_uri=f"{SCHEME}{unfinished}").search_experiments(max_results=1)
    unfinished.replace(file)
