"""MLflow's SQLite file: it appears whole or not at all, whoever opens it first.

MLflow makes its tables by dozens of migrations, each of them in steps. Two processes that do so in
one file at once, or one that is killed on the way, leave a file that no MLflow opens any more.
"""

from pathlib import Path

from foldstack.tasks.store.leases import leased

SCHEME = "sqlite:///"


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


def _make_at_once(file: Path) -> None:
    from mlflow import MlflowClient

    unfinished = file.with_name(f"{file.name}.unfinished")
    for left in file.parent.glob(f"{unfinished.name}*"):  # by one who was killed; its journal too
        left.unlink()
    MlflowClient(tracking_uri=f"{SCHEME}{unfinished}").search_experiments(max_results=1)
    unfinished.replace(file)
