"""Which models in the store are the only copy of what an alias in MLflow's registry points to."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from foldstack.compression.errors import InputError
from foldstack.tasks.models import MODEL_FOLDER
from foldstack.tasks.store.artifacts import ArtifactStore
from foldstack.tasks.store.garbage import StoredArtifact
from foldstack.tasks.tracking.receipts import servers_in
from foldstack.tasks.tracking.registry import Aliased


@dataclass(frozen=True)
class HeldModel:
    """A model that must stay as long as MLflow does not hold its weights."""

    uri: str
    entry: Aliased

    @property
    def fingerprint(self) -> str:
        """Of the artifact with the weights: the last model of its run."""
        return self.entry.fingerprints[0]


def held_models(home: Path) -> list[HeldModel]:
    """Every version that an alias points to, and whose weights MLflow does not hold.

    Raises:
        InputError: a tracking server that knows of models from this home does not answer.
    """
    return [
        HeldModel(uri, entry)
        for uri in sorted(_servers_of(home))
        for entry in _aliased_at(uri)
        if not entry.is_uploaded
    ]


def upload_held(
    store: ArtifactStore, held: Iterable[HeldModel], rows: list[StoredArtifact]
) -> None:
    """Have MLflow hold the weights of those that are in the store.

    Raises:
        InputError: an artifact is damaged, or MLflow does not take it.
    """
    there = {row.artifact.fingerprint: row.artifact for row in rows}
    from foldstack.tasks.tracking.registry import upload_aliased

    for model in held:
        if (artifact := there.get(model.fingerprint)) is None:
            continue
        try:
            upload_aliased(model.uri, model.entry, artifact.open() / MODEL_FOLDER)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{model.entry} could not be uploaded: {_first_line(error)}"
            ) from error


def _servers_of(home: Path) -> set[str]:
    known = servers_in(home / "tracking")
    if uri := os.environ.get("MLFLOW_TRACKING_URI", ""):
        known.add(uri)
    file = home / "mlflow.db"
    ours = f"sqlite:///{file}"
    # A database that was moved or removed holds nothing; one that was never used neither.
    known = {uri for uri in known if not uri.startswith("sqlite:///") or _exists(uri)}
    return known | ({ours} if file.exists() else set())


def _exists(uri: str) -> bool:
    return Path(uri.removeprefix("sqlite:///")).exists()


def _aliased_at(uri: str) -> list[Aliased]:
    from foldstack.tasks.tracking.registry import aliased_versions
    from foldstack.tasks.tracking.tracker import check_reachable, impatient_mlflow

    try:
        check_reachable(uri)
        with impatient_mlflow():
            return aliased_versions(uri)
    except Exception as error:
        raise InputError(
            f"MLflow at {uri} does not answer ({_first_line(error)}), and models that its aliases "
            "point to must stay: start it, or say --without_mlflow if they may go"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
