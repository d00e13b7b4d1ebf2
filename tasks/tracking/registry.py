"""Versions of registered models in MLflow, and the aliases by which people find them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from foldstack.tasks.tracking.logged_models import DIGEST_TAG, UPLOADED_TAG, upload
from foldstack.tasks.tracking.run_record import PREFIX, ModelFiles

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion


def model_of(run: "Run") -> str | None:
    """Id of the LoggedModel that a run made; None where it made none."""
    models = run.outputs.model_outputs if run.outputs else []
    return str(models[0].model_id) if models else None


def version_of(
    client: "MlflowClient",
    model: str,
    run_id: str,
    description: str,
    tags: Mapping[str, str] | None = None,
) -> "ModelVersion":
    """The version of the registered `model` that is this run's model, made if it is new.

    Raises:
        LookupError: the run has no model.
    """
    from mlflow.exceptions import MlflowException

    model_id = model_of(client.get_run(run_id))
    if model_id is None:
        raise LookupError(f"the MLflow run {run_id} has no model that could be registered")
    # Not "models:/<id>": MLflow would look for that wherever this process tracks by default.
    source = client.get_logged_model(model_id).artifact_location
    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{model}' and run_id = '{run_id}'"):
        if version.source == source:
            return version
    return client.create_model_version(
        model,
        source,
        run_id=run_id,
        model_id=model_id,
        description=description,
        tags=dict(tags or {}),
        await_creation_for=0,  # it says that it waits, and there is nothing to wait for
    )


def name_best(
    client: "MlflowClient",
    model: str,
    alias: str,
    run_id: str,
    description: str,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Point `alias` of the registered model at the version of this run's model."""
    version = version_of(client, model, run_id, description, tags)
    client.set_registered_model_alias(model, alias, version.version)


@dataclass(frozen=True)
class Aliased:
    """A registered model's version that people find by name."""

    model: str
    version: str
    aliases: tuple[str, ...]
    model_id: str
    fingerprints: tuple[str, ...]
    """Of the artifacts that the run's stages made, the last model's first."""
    is_uploaded: bool

    def __str__(self) -> str:
        names = ", ".join(f"{self.model}@{alias}" for alias in self.aliases)
        return f"{names} (version {self.version})"


def aliased_versions(uri: str) -> list[Aliased]:
    """Every version of a registered model that an alias points to, and that foldstack made."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = []
    for model in client.search_registered_models(max_results=1000):
        names: dict[str, list[str]] = {}
        for alias, number in dict(model.aliases or {}).items():
            names.setdefault(str(number), []).append(alias)
        for number, aliases in names.items():
            entry = _aliased(client, str(model.name), number, tuple(sorted(aliases)))
            if entry.fingerprints:
                found.append(entry)
    return found


def upload_aliased(uri: str, entry: Aliased, folder: Path) -> None:
    """Have MLflow hold the weights of a version, which lie in `folder`.

    Raises:
        LookupError: the version is not of a model that MLflow knows by its own id.
    """
    from mlflow import MlflowClient

    if not entry.model_id:
        raise LookupError(
            f"{entry} was registered without a model of MLflow's own: run its sweep again, which "
            "registers it anew"
        )
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    model = client.get_logged_model(entry.model_id)
    upload(client, model, ModelFiles(folder, model.tags[DIGEST_TAG], upload=True))


def _aliased(client: "MlflowClient", name: str, number: str, aliases: tuple[str, ...]) -> Aliased:
    version = client.get_model_version(name, number)
    run = client.get_run(version.run_id) if version.run_id else None
    model_id = model_of(run) if run else None
    makers = (f"{PREFIX}stage.recover", f"{PREFIX}stage.compress")
    uploaded = model_id and client.get_logged_model(model_id).tags.get(UPLOADED_TAG)
    return Aliased(
        model=name,
        version=number,
        aliases=aliases,
        model_id=model_id or "",
        fingerprints=tuple(run.data.tags[m] for m in makers if m in run.data.tags) if run else (),
        is_uploaded=bool(uploaded),
    )
