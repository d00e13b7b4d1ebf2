"""The database of a Prefect server of ours: never one that another version of Prefect made."""

import importlib.util
import os
import re
import sqlite3
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

FILE = "prefect.db"
CHOSEN_BY = ("PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL")
MIGRATIONS = "server/database/_migrations/versions/sqlite"
REVISION = re.compile(r"^(down_)?revision(?:: [^=]+)? = [\"'](\w+)[\"']", re.MULTILINE)


def prefect_home() -> Path:
    """Where Prefect keeps its files."""
    return Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()


def is_chosen() -> bool:
    """True when the user has said which database servers are to use."""
    return any(os.environ.get(name) for name in CHOSEN_BY)


def database_file() -> Path:
    """The SQLite file of a server that we start, in Prefect's home.

    The user's own where this version of Prefect made it, or none has yet. A server would change one
    of an older version so that that one does not open it any more, and fails on a newer one's.
    """
    file = prefect_home() / FILE
    return file if _is_ours(file) else prefect_home() / f"foldstack-prefect-{version('prefect')}.db"


def database_settings() -> dict[str, str]:
    """Settings of a server that we start, for its environment; none where the default will do."""
    if is_chosen() or (file := database_file()).name == FILE:
        return {}
    return {CHOSEN_BY[0]: f"sqlite+aiosqlite:///{file}"}


def _is_ours(file: Path) -> bool:
    """True when a file is not there, holds nothing yet, or what this version of Prefect made."""
    if not file.exists() or not file.stat().st_size:
        return True
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as database:
            made = database.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.Error:
        return False
    return {row[0] for row in made} == _newest_revisions()


def _newest_revisions() -> set[str]:
    """Of the migrations in the installed Prefect those that no other one follows."""
    found = importlib.util.find_spec("prefect")
    folders = found.submodule_search_locations if found else None
    own, followed = set[str](), set[str]()
    for file in Path(next(iter(folders or ["."])), MIGRATIONS).glob("*.py"):
        for is_before, name in REVISION.findall(file.read_text(encoding="utf-8")):
            (followed if is_before else own).add(name)
    return own - followed
