"""Whether a new result may take the place of the last accepted one, in MLflow's model registry.

The accepted result of a model at a sparsity is the version that carries the alias
`accepted-at-<sparsity>`. A night that is worse than it by more than the gate allows fails, one that
is as good or better becomes the accepted one, and one in between passes without becoming it: else
every night could be a little worse than the night before.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from foldstack.tasks.tracking.registry import version_of
from foldstack.tasks.tracking.run_record import PREFIX

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

QUALITY_METRIC = "quality/bits_per_byte"
VERDICT_TAG = f"{PREFIX}verdict"
ALLOWED = {
    "any": ("matching", "open", "not matching", "not judged"),
    "not refuted": ("matching", "open"),
    "matching": ("matching",),
}
"""Verdicts that pass, by what the gate demands."""
# What two results must have in common to be compared: the dense model, and how they were measured.
SAME_TAGS = (f"{PREFIX}base_fingerprint",)
SAME_PARAMS = "evaluation."


class Gate(BaseModel):
    """The rule of the quality gate."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_worse_bits_per_byte: float = Field(default=0.01, ge=0)
    """Bits per byte that the best model at a sparsity may be above the accepted one at it."""
    verdict: Literal["any", "not refuted", "matching"] = "any"
    """What the best model's verdict beside the dense one must be: matching; not refuted, which is
    matching or open; or any."""


class Verdict(BaseModel):
    """What the gate says of the best model at one sparsity."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sparsity: str
    model: str
    bits_per_byte: float
    accepted_model: str = ""
    accepted_bits_per_byte: float | None = None
    outcome: Literal["accepted", "passed", "refused"]
    """accepted: is now what the next ones are compared with; passed: is not, but good enough."""
    reason: str

    def __str__(self) -> str:
        return f"{self.model} at {self.sparsity} is {self.outcome}: {self.reason}"


def judge(sparsity: str, candidate: "Run", accepted: "Run | None", gate: Gate) -> Verdict:
    """The verdict on `candidate`, beside the run that was accepted last, if there is one."""
    value = candidate.data.metrics[QUALITY_METRIC]
    verdict = Verdict(
        sparsity=sparsity,
        model=str(candidate.info.run_name),
        bits_per_byte=value,
        outcome="accepted",
        reason="nothing was accepted before",
    )
    found = candidate.data.tags.get(VERDICT_TAG) or "not judged"
    if found not in ALLOWED[gate.verdict]:
        reason = f"its verdict beside dense is {found}, and {gate.verdict} is demanded"
        return verdict.model_copy(update={"outcome": "refused", "reason": reason})
    if accepted is None:
        return verdict
    before = accepted.data.metrics.get(QUALITY_METRIC)
    told = {"accepted_model": accepted.info.run_name, "accepted_bits_per_byte": before}
    if (difference := _incomparable(candidate, accepted)) or before is None:
        what = difference or f"{QUALITY_METRIC} of the accepted run is missing"
        told |= {"outcome": "refused", "reason": f"not comparable with what was accepted: {what}"}
        return verdict.model_copy(update=told)
    worse = value - before
    reason = f"{value:.4f} bits per byte, {worse:+.4f} beside the accepted {before:.4f}"
    if worse > gate.max_worse_bits_per_byte:
        reason += f", and {gate.max_worse_bits_per_byte:+.4f} is allowed"
        told |= {"outcome": "refused", "reason": reason}
    else:
        told |= {"outcome": "accepted" if worse <= 0 else "passed", "reason": reason}
    return verdict.model_copy(update=told)


def apply_gate(
    uri: str, experiment: str, model: str, best: Mapping[str, str], gate: Gate
) -> list[Verdict]:
    """Judge the best model at each sparsity, and move the alias to those that are accepted.

    Args:
        uri: MLflow's tracking server, which is its registry as well.
        experiment: where the runs are.
        model: name of the registered model.
        best: fingerprint of the best run by sparsity.
        gate: the rule.

    Raises:
        LookupError: a run is not in MLflow, so there is nothing to judge.
    """
    from mlflow import MlflowClient

    from foldstack.tasks.tracking.tracker import find_run

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.get_experiment_by_name(experiment)
    verdicts = []
    for sparsity, fingerprint in best.items():
        run = find_run(client, found.experiment_id, fingerprint) if found else None
        if run is None or QUALITY_METRIC not in run.data.metrics:
            raise LookupError(
                f"the gate judges what MLflow holds, and the best run at sparsity {sparsity} is "
                f"not in experiment {experiment}; see the warnings of the sweep"
            )
        alias = f"accepted-at-{sparsity.replace('.', '-')}"
        verdict = judge(sparsity, run, _run_behind(client, model, alias), gate)
        client.set_tag(run.info.run_id, f"{PREFIX}gate", str(verdict))
        if verdict.outcome == "accepted":
            figures = {"sparsity": sparsity, "bits_per_byte": f"{verdict.bits_per_byte:.4f}"}
            version = version_of(client, model, run.info.run_id, str(verdict), figures)
            client.set_registered_model_alias(model, alias, version.version)
        verdicts.append(verdict)
    return verdicts


def refused(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.outcome == "refused"]


def _run_behind(client: "MlflowClient", model: str, alias: str) -> "Run | None":
    """The run of the version that carries `alias`; None where no version does."""
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return client.get_run(str(version.run_id))


def _incomparable(candidate: "Run", accepted: "Run") -> str:
    """The first thing that both should have in common and have not."""
    pairs = {
        name: (_common(candidate).get(name, ""), _common(accepted).get(name, ""))
        for name in sorted({*_common(candidate), *_common(accepted)})
    }
    for name, (new, old) in pairs.items():
        if new != old:
            return f"{name} was {old or 'not set'} and is {new or 'not set'}"
    return ""


def _common(run: "Run") -> dict[str, str]:
    params = {k: v for k, v in run.data.params.items() if k.startswith(SAME_PARAMS)}
    texts = run.inputs.dataset_inputs if run.inputs else []
    digests = {
        f"the text {each.dataset.name}": each.dataset.digest
        for each in texts
        if any(tag.value == "evaluation" for tag in each.tags)
    }
    return params | digests | {name: run.data.tags.get(name, "") for name in SAME_TAGS}
