"""The jobs that the pinned workers build from our templates: their environment, secrets, policy."""

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    temporary_settings,
)

DEPLOY = Path(__file__).parents[2] / "deploy"
pytestmark = pytest.mark.foreign_warnings


class Server:
    """Of a Prefect server, what a worker asks for when it fills a template in."""

    async def read_block_document_by_name(self, name: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(data={"value": f"value of {name}"})


def built(kind: type[Any], pool: str, **values: Any) -> Any:
    """The job of a flow run, as the worker has it before it hands it to Docker or Kubernetes."""
    template = json.loads((DEPLOY / f"{pool}-pool.json").read_text())
    # Without the decorator that would put a client of a real server in the place of ours.
    job = asyncio.run(kind.from_template_and_values(template, values, client=Server()))
    settings = {PREFECT_API_URL: "http://prefect:4200/api", PREFECT_API_AUTH_STRING: "admin:TOP"}
    with temporary_settings(updates=settings):
        job.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="nightly reference"))
    return job


def test_a_container_knows_mlflow_its_password_and_the_store() -> None:
    worker = pytest.importorskip(
        "prefect_docker.worker", reason="pip install foldstack[containers]"
    )
    job = built(worker.DockerWorkerJobConfiguration, "docker", env={"EXTRA": "1"})
    assert job.env["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert job.env["MLFLOW_TRACKING_PASSWORD"] == "value of foldstack-mlflow-password"
    assert job.env["HF_TOKEN"] == "value of foldstack-hf-token"
    assert job.env["FOLDSTACK_HOME"] == "/data"
    assert job.env["EXTRA"] == "1", "what a deployment sets is added"
    assert job.env["PREFECT_API_URL"] == "http://prefect:4200/api"
    assert job.volumes == ["foldstack_results:/data"]
    assert job.container_create_kwargs["read_only"]
    assert job.container_create_kwargs["cap_drop"] == ["ALL"]


def test_a_kubernetes_job_takes_its_secrets_from_the_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = pytest.importorskip(
        "prefect_kubernetes.worker", reason="pip install foldstack[containers]"
    )
    for variable in settings_of_the_worker():
        monkeypatch.setenv(variable["name"], variable["value"])
    job = built(worker.KubernetesWorkerJobConfiguration, "kubernetes", gpus=1, memory="8Gi")
    from prefect_kubernetes.settings import KubernetesSettings

    settings = KubernetesSettings()
    assert settings.observer.namespaces == {"foldstack"}
    asyncio.run(
        worker.KubernetesWorker._replace_env_variable_with_secret(
            SimpleNamespace(),
            env_variable_name="PREFECT_API_AUTH_STRING",
            configuration=job,
            secret_name=settings.worker.api_auth_string_secret_name,
            secret_key=settings.worker.api_auth_string_secret_key,
        )
    )
    assert "TOP" not in json.dumps(job.job_manifest), "the password stands in clear"
    pod = job.job_manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    named = {each["name"]: each for each in container["env"]}
    key = named["PREFECT_API_AUTH_STRING"]["valueFrom"]["secretKeyRef"]
    assert key == {"name": "foldstack", "key": "PREFECT_API_AUTH_STRING"}
    assert container["envFrom"] == [
        {"configMapRef": {"name": "foldstack"}},
        {"secretRef": {"name": "foldstack"}},
    ]
    assert container["imagePullPolicy"] == "IfNotPresent"
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["resources"]["requests"]["ephemeral-storage"] == "10Gi"
    assert pod["securityContext"]["runAsNonRoot"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {
        "/data", "/home/foldstack", "/tmp",
    }  # fmt: skip


def settings_of_the_worker() -> list[dict[str, str]]:
    (worker,) = [
        each
        for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
        if (each["kind"], each["metadata"]["name"]) == ("Deployment", "worker")
    ]
    found: list[dict[str, str]] = worker["spec"]["template"]["spec"]["containers"][0]["env"]
    return found


def test_one_line_puts_an_image_everywhere_also_into_the_pool(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "deploy" / "kustomization.yaml"
    mine = '{name: foldstack, newName: registry.example/foldstack, newTag: "7"}'
    before = "{name: foldstack, newName: foldstack, newTag: latest}"
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, mine))
    done = subprocess.run(["kubectl", "kustomize", file.parent], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = set()
    for each in yaml.safe_load_all(done.stdout):
        pod = each.get("spec", {}).get("template", {}).get("spec", {})
        for container in [*pod.get("containers", []), *pod.get("initContainers", [])]:
            images.add(container["image"])
            if each["metadata"]["name"] == "deployments":
                named = {entry["name"]: entry["value"] for entry in container["env"]}
                assert named["FOLDSTACK_IMAGE"] == "registry.example/foldstack:7"
    assert images == {"postgres:17", "registry.example/foldstack:7"}
