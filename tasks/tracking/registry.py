"""Versions of registered models in MLflow, and the aliases by which people find them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def version_of(client: "MlflowClient", model: str, run_id: str, description: str) -> "ModelVersion":
    """The version of the registered `model` that was made from this run, made if it is new."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{model}' and run_id = '{run_id}'")
    if versions:
        return versions[0]
    return client.create_model_version(
        model, f"runs:/{run_id}/model", run_id=run_id, description=description
    )


def name_best(
    client: "MlflowClient", model: str, alias: str, run_id: str, description: str
) -> None:
    """Point `alias` of the registered model at the version made from this run."""
    version = version_of(client, model, run_id, description)
    client.set_registered_model_alias(model, alias, version.version)
