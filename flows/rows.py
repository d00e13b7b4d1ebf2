"""From the artifacts of a branch to its row in the comparison."""

from collections.abc import Mapping

from foldstack.flows.branches import DENSE, Branch, Layout
from foldstack.flows.comparison import Facts, Row
from foldstack.flows.stage_runs import Outcome
from foldstack.tasks.artifacts import Artifact
from foldstack.tasks.models import MODEL_FOLDER

TRAINING = ("steps", "tokens", "seconds_training", "first_loss", "last_loss")


def row_of(layout: Layout, branch: Branch, outcomes: Mapping[str, Outcome]) -> Row:
    """The row of a branch, with the numbers of those of its stages that succeeded."""
    made: dict[str, Artifact] = {}
    for part, stage in branch.stages.items():
        outcome = outcomes.get(stage.fingerprint)
        if outcome is not None and outcome.artifact is not None:
            made[part] = outcome.artifact
    label, failure = _failure(layout, branch, outcomes)
    facts: dict[str, Facts] = {part: dict(item.manifest().facts) for part, item in made.items()}
    variant = branch.variant
    folder = str(layout.model.folder)
    if variant is not None:
        maker = made.get("recover") or made.get("compress")
        folder = str(maker.folder / MODEL_FOLDER) if maker else ""
    return Row(
        label=branch.label,
        method=variant.name if variant else DENSE,
        sparsity=variant.sparsity if variant else None,
        seed=variant.seed if variant else None,
        settings=variant.method.model_dump(mode="json") if variant else {},
        state="failed" if failure else "done",
        cause=f"{label}: {failure.cause}" if failure else "",
        is_input_error=failure is not None and failure.is_input_error,
        folder=folder,
        structure=_structure(facts),
        before=_quality(facts.get("evaluate_before", {})),
        after=_quality(facts.get("evaluate_after", {})),
        speed=facts.get("speed", {}),
        recovery={name: facts["recover"][name] for name in TRAINING if name in facts["recover"]}
        if "recover" in facts
        else {},
        seconds={part: item.manifest().seconds for part, item in made.items()},
        fingerprints={part: item.fingerprint for part, item in made.items()},
    )


def _structure(facts: Mapping[str, Facts]) -> Facts:
    """Size and grade: of the compressed model, or of the one that was only evaluated."""
    if "compress" in facts:
        return facts["compress"]
    sizes = facts.get("evaluate_before", {})
    return {name.removeprefix("size/"): value for name, value in sizes.items() if _is_size(name)}


def _quality(facts: Facts) -> Facts:
    return {name: value for name, value in facts.items() if not _is_size(name)}


def _is_size(name: str) -> bool:
    return name.startswith("size/")


def _failure(
    layout: Layout, branch: Branch, outcomes: Mapping[str, Outcome]
) -> tuple[str, Outcome | None]:
    """The first stage that failed, of those that the branch is made of or depends on."""
    shared = [*layout.windows, *layout.shards, layout.statistics, layout.ranking]
    needed = [] if branch.variant is None else shared
    for stage in [*needed, *branch.stages.values()]:
        outcome = outcomes.get(stage.fingerprint)
        if outcome is not None and outcome.kind == "failed":
            return stage.label, outcome
    return "", None
