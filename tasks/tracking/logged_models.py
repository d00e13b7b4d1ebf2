"""Models as MLflow holds them: with their weights where that was asked for, else with their place.

What is uploaded is MLflow's own `transformers` flavour, so that `mlflow.transformers.load_model`
and `mlflow models serve` work wherever MLflow and transformers are, without foldstack. Weights go
from the store to the server file by file: there is no copy of them on the way.
"""

import json
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from foldstack.tasks.tracking.run_record import PREFIX, ModelFiles, RunRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import Model, ModelSignature

TASK = "text-generation"
PROMPT = "Once upon a time"
NEW_TOKENS = 32
"""How much a served model writes when it is not told."""
CARD = "README.md"
REQUIRED = ("mlflow", "torch", "transformers", "tokenizers", "safetensors")
FINGERPRINT_TAG = f"{PREFIX}fingerprint"
DIGEST_TAG = f"{PREFIX}model_digest"
UPLOADED_TAG = f"{PREFIX}uploaded"
"""Holds the digest of the weights that MLflow has; without it, it has none."""

Uploaded = Callable[[int], None]
"""Told before each file how many bytes it has: a server that is at them does not stand still."""


def log_model(
    client: "MlflowClient",
    experiment_id: str,
    run_id: str,
    record: RunRecord,
    about_to_send: Uploaded = lambda _: None,
) -> str:
    """Bring the LoggedModel of a record's run up to what is to be known of it; gives its id."""
    files = record.model
    assert files is not None
    model = find_model(client, experiment_id, record.fingerprint)
    if model is None:
        model = _create(client, experiment_id, run_id, record, files)
    if files.upload and model.tags.get(UPLOADED_TAG) != files.digest:
        upload(client, model, files, about_to_send)
    return str(model.model_id)


def find_model(
    client: "MlflowClient", experiment_id: str, fingerprint: str
) -> "LoggedModel | None":
    """The newest model that carries this fingerprint, if there is one."""
    found = client.search_logged_models(
        [experiment_id],
        filter_string=f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'",
        max_results=1,
        order_by=[{"field_name": "creation_time", "ascending": False}],
    )
    return found[0] if found else None


def upload(
    client: "MlflowClient",
    model: "LoggedModel",
    files: ModelFiles,
    about_to_send: Uploaded = lambda _: None,
) -> None:
    """Have MLflow hold the weights; what is cut off is begun anew the next time."""
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

    model_id = str(model.model_id)
    for weights in _weights(files.folder):
        about_to_send(weights.stat().st_size)
        client.log_model_artifact(model_id, str(weights), "model")
    with tempfile.TemporaryDirectory(prefix="foldstack-") as temporary:
        package = Path(temporary) / "package"
        _save_all_but_weights(files.folder, package, model)
        about_to_send(0)
        client.log_model_artifacts(model_id, str(package))
    client.set_logged_model_tags(model_id, {UPLOADED_TAG: files.digest})
    if model.tags.get(MLFLOW_MODEL_IS_EXTERNAL):
        client.delete_logged_model_tag(model_id, MLFLOW_MODEL_IS_EXTERNAL)


def _create(
    client: "MlflowClient", experiment_id: str, run_id: str, record: RunRecord, files: ModelFiles
) -> "LoggedModel":
    """A model of which MLflow knows where its weights are, and no more."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models.model import MLMODEL_FILE_NAME
    from mlflow.models.utils import get_external_mlflow_model_spec
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

    tags = {FINGERPRINT_TAG: record.fingerprint, MLFLOW_MODEL_IS_EXTERNAL: "true"}
    tags |= {f"{PREFIX}model_uri": files.folder.as_uri(), DIGEST_TAG: files.digest}
    model = client.create_logged_model(
        experiment_id,
        name=re.sub(r"[^\w-]+", "-", record.name),  # MLflow refuses "0.30"
        source_run_id=run_id,
        tags=tags,
        params={key: str(value)[:500] for key, value in record.params.items()},
        model_type=TASK,
    )
    model_id = str(model.model_id)
    with tempfile.TemporaryDirectory(prefix="foldstack-") as temporary:
        file = Path(temporary) / MLMODEL_FILE_NAME
        get_external_mlflow_model_spec(model).save(str(file))
        client.log_model_artifact(model_id, str(file))
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    return client.finalize_logged_model(model_id, "READY")


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _save_all_but_weights(folder: Path, package: Path, model: "LoggedModel") -> None:
    """The model as MLflow's flavour lays it out, with everything that is small.

    Written here, as `mlflow.transformers.save_model` of MLflow 3.17 takes no folder beside
    transformers 5, and of a model in memory it would write the weights once more.
    """
    import transformers
    from mlflow import pyfunc
    from mlflow.models import Model
    from mlflow.models.model import MLMODEL_FILE_NAME
    from mlflow.transformers.flavor_config import FlavorKey

    weights = {file.name for file in _weights(folder)}
    shutil.copytree(folder, package / "model", ignore=lambda _, names: weights.intersection(names))
    tokenizer = transformers.AutoTokenizer.from_pretrained(package / "model")
    tokenizer.save_pretrained(package / "components" / FlavorKey.TOKENIZER)
    described: Model = Model(
        artifact_path=model.artifact_location,
        run_id=model.source_run_id,
        model_uuid=model.model_id,
        model_id=model.model_id,
        signature=signature(),
        model_size_bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    )
    described.add_flavor(
        "transformers",
        **{
            "transformers_version": package_version("transformers"),
            FlavorKey.TASK: TASK,
            FlavorKey.INSTANCE_TYPE: transformers.TextGenerationPipeline.__name__,
            FlavorKey.MODEL_TYPE: _architecture(folder),
            FlavorKey.MODEL_BINARY: "model",
            FlavorKey.COMPONENTS: [FlavorKey.TOKENIZER],
            FlavorKey.COMPONENT_TYPE.format(FlavorKey.TOKENIZER): type(tokenizer).__name__,
        },
    )
    pyfunc.add_to_model(
        described, loader_module="mlflow.transformers", python_env="python_env.yaml"
    )
    save_example(described, package)
    described.save(str(package / MLMODEL_FILE_NAME))
    if (card := folder / CARD).exists():
        shutil.copy(card, package / "model_card.md")
    (package / "requirements.txt").write_text("\n".join(requirements()) + "\n")
    environment = {
        "python": platform.python_version(),
        "build_dependencies": ["pip"],
        "dependencies": ["-r requirements.txt"],
    }
    (package / "python_env.yaml").write_text(yaml.safe_dump(environment, sort_keys=False))


def _architecture(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config["architectures"][0])


def signature() -> "ModelSignature":
    """A prompt in, a text out."""
    from mlflow.models import infer_signature

    return infer_signature([PROMPT], [PROMPT], params={"max_new_tokens": NEW_TOKENS})


def save_example(described: "Model", package: Path) -> None:
    """What the model may be asked, beside what is known of it."""
    from mlflow.models.utils import _save_example

    _save_example(described, ([PROMPT], {"max_new_tokens": NEW_TOKENS}), str(package))


def requirements() -> list[str]:
    """What reads the folder, in the versions that were here; a build of torch's is left to choose.

    Accelerate stands not among them: nothing is spread over devices unless somebody asks for it.
    """
    versions = {name: package_version(name) for name in REQUIRED}
    return [f"{name}=={version.partition('+')[0]}" for name, version in versions.items()]
