"""Nobody's database of another version of Prefect is opened, or changed."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from foldstack.flows.running import prefect_database as own
from foldstack.flows.running.prefect_server import TemporaryServer, last_words


def made_by(file: Path, revision: str) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES (?)", (revision,))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    for name in own.CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_newest_migration_is_found_without_importing_prefect() -> None:
    (newest,) = own._newest_revisions()
    assert len(newest) == 12


@pytest.mark.parametrize("state", ["absent", "empty", "same version"])
def test_the_users_own_is_used_where_this_version_made_it(state: str, home: Path) -> None:
    if state == "empty":
        (home / "prefect.db").touch()
    if state == "same version":
        made_by(home / "prefect.db", next(iter(own._newest_revisions())))
    assert own.database_settings() == {}
    assert own.database_file() == home / "prefect.db"


@pytest.mark.parametrize("state", ["newer", "older", "damaged"])
def test_one_of_another_version_is_left_alone(state: str, home: Path) -> None:
    if state == "damaged":
        (home / "prefect.db").write_bytes(b"no database")
    else:
        made_by(home / "prefect.db", {"newer": "ffffffffffff", "older": "9725c1cbee35"}[state])
    before = (home / "prefect.db").read_bytes()
    (address,) = own.database_settings().values()
    assert address.startswith(f"sqlite+aiosqlite:///{home}/foldstack-prefect-")
    assert (home / "prefect.db").read_bytes() == before


def test_what_the_user_chose_is_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_by(home / "prefect.db", "ffffffffffff")
    monkeypatch.setenv(own.CHOSEN_BY[1], "postgresql+asyncpg://somewhere/db")
    assert own.database_settings() == {}
    assert own.is_chosen()


def test_last_words_are_those_about_the_error() -> None:
    log = "INFO starting\nalembic.util.exc.CommandError: Can't locate revision\n\nbye\n"
    assert last_words(log) == "alembic.util.exc.CommandError: Can't locate revision"
    assert last_words("one\ntwo\n") == "two"
    assert last_words("") == "it said nothing"


def test_a_server_that_ends_says_why(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foldstack.compression.errors import InputError

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(home))  # there it finds a Prefect that does not import
    (home / "uvicorn.py").write_text("raise ImportError('no uvicorn here')")
    server = TemporaryServer()
    with pytest.raises(InputError, match=r"ended with code 1 after \d+ s \(.*no uvicorn here\)"):
        server._wait(60)
