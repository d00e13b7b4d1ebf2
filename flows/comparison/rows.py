"""From the artifacts of a branch to its row in the comparison."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from foldstack.compression.evaluation.beside_dense import (
    beside_dense,
    bits_per_byte_difference,
    loss_difference,
)
from foldstack.compression.evaluation.tracks.costs import footprint, speed_score
from foldstack.compression.evaluation.tracks.result import TrackResult, model_verdict
from foldstack.compression.evaluation.tracks.track_beside_dense import (
    measured_anyway,
    track_result_of,
)
from foldstack.flows.comparison.result import Comparison, Facts, Rival, Row
from foldstack.flows.running.branches import DENSE, ENGINE_SPEED, EXPORT, TRACK, Branch, Layout
from foldstack.flows.running.stage_runs import Outcome
from foldstack.tasks.evaluate_model import load_evaluation, load_perplexity
from foldstack.tasks.evaluate_track import load_track
from foldstack.tasks.models import MODEL_FOLDER
from foldstack.tasks.stage import Stage
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.write_samples import load_samples

FORECAST = "forecast/"
TRAINING = (
    "steps", "tokens", "seconds_training", "first_loss", "last_loss",
    "validation_before", "validation_after",
)  # fmt: skip


def row_of(layout: Layout, branch: Branch, outcomes: Mapping[str, Outcome]) -> Row:
    """The row of a branch, with the numbers of those of its stages that succeeded."""
    made = _made(branch, outcomes)
    label, failure = _failure(layout, branch, outcomes)
    facts: dict[str, Facts] = {part: dict(item.manifest().facts) for part, item in made.items()}
    variant = branch.variant
    folder = str(layout.model.folder)
    if variant is not None:
        maker = made.get("recover") or made.get("compress")
        folder = str(maker.folder / MODEL_FOLDER) if maker else ""
    tracks = _tracks(made, layout, outcomes) if variant else []
    rule = layout.config.evaluation.verdict
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
        beside_dense=_beside_dense(_evaluated(made), layout, outcomes) if variant else {},
        forecast=_forecast(facts, made, _dense_evaluated(layout, outcomes)),
        speed=facts.get("speed", {}),
        verdict=model_verdict(tracks, rule.within) if tracks else None,
        tracks=tuple(tracks),
        samples=tuple(load_samples(made["samples"])) if "samples" in made else (),
        costs=_costs(facts, layout, outcomes) if variant else {},
        engines=_engines(branch, facts),
        recovery={name: facts["recover"][name] for name in TRAINING if name in facts["recover"]}
        if "recover" in facts
        else {},
        seconds={part: item.manifest().seconds for part, item in made.items()},
        fingerprints={part: item.fingerprint for part, item in made.items()},
    )


def _engines(branch: Branch, facts: Mapping[str, Facts]) -> Facts:
    """What was exported and how fast it is, by form: "gguf-q4_k_m/decode_speedup"."""
    return {
        f"{form}/{name}": value
        for form in branch.exports
        for part in (EXPORT, ENGINE_SPEED)
        for name, value in facts.get(part + form, {}).items()
    }


def rivals(
    layout: Layout, comparison: Comparison, outcomes: Mapping[str, Outcome]
) -> tuple[Rival, ...]:
    """Every two finished variants of a sparsity, on the same windows."""
    perplexities = {
        branch.label: load_perplexity(evaluated)
        for branch in layout.branches
        if (evaluated := _evaluated(_made(branch, outcomes))) is not None
    }
    found = []
    for rows in comparison.by_sparsity().values():
        for lower, row in combinations(rows, 2):
            bits = bits_per_byte_difference(perplexities[lower.label], perplexities[row.label])
            if bits is not None:
                found.append(
                    Rival(row=row.label, lower=lower.label, difference=bits[0], stderr=bits[1])
                )
    return tuple(found)


def _made(branch: Branch, outcomes: Mapping[str, Outcome]) -> dict[str, Artifact]:
    """What there is of a branch, by the part that made it."""
    found = {part: outcomes.get(stage.fingerprint) for part, stage in branch.stages.items()}
    return {part: each.artifact for part, each in found.items() if each and each.artifact}


def _evaluated(made: Mapping[str, Artifact]) -> Artifact | None:
    """The evaluation of the model that a branch ends with."""
    return made.get("evaluate_after") or made.get("evaluate_before")


def _beside_dense(
    evaluated: Artifact | None, layout: Layout, outcomes: Mapping[str, Outcome]
) -> Facts:
    dense = _dense_evaluated(layout, outcomes)
    if evaluated is None or dense is None:
        return {}
    return {**beside_dense(load_evaluation(dense), load_evaluation(evaluated))}


def _dense_evaluated(layout: Layout, outcomes: Mapping[str, Outcome]) -> Artifact | None:
    return _evaluated(_made(layout.branches[0], outcomes))


def _forecast(
    facts: Mapping[str, Facts], made: Mapping[str, Artifact], dense: Artifact | None
) -> Facts:
    """What the method expected, if it says so, beside the rise of the loss on the text."""
    told: Facts = {
        name.removeprefix(FORECAST): value
        for name, value in facts.get("compress", {}).items()
        if name.startswith(FORECAST)
    }
    before = made.get("evaluate_before")
    if not told or before is None or dense is None:
        return told
    first, second = load_perplexity(dense), load_perplexity(before)
    if first.num_windows > 1:
        rise = loss_difference(first, second)
        told |= {"loss_rise": rise.difference, "loss_rise_stderr": rise.stderr}
    return told


def _tracks(
    made: Mapping[str, Artifact], layout: Layout, outcomes: Mapping[str, Outcome]
) -> list[TrackResult]:
    """What is left of the dense model, as far as both were measured."""
    dense, evaluation = _made(layout.branches[0], outcomes), layout.config.evaluation
    rule, found = evaluation.verdict, []
    of_dense, of_other = _evaluated(dense), _evaluated(made)
    if of_dense is not None and of_other is not None:
        found += measured_anyway(load_evaluation(of_dense), load_evaluation(of_other), rule)
    for name, track in evaluation.tracks.items():
        pair = dense.get(TRACK + name), made.get(TRACK + name)
        if pair[0] is not None and pair[1] is not None:
            found.append(
                track_result_of(name, track, load_track(pair[0]), load_track(pair[1]), rule)
            )
    return found


def _costs(facts: Mapping[str, Facts], layout: Layout, outcomes: Mapping[str, Outcome]) -> Facts:
    dense = {
        part: dict(item.manifest().facts)
        for part, item in _made(layout.branches[0], outcomes).items()
    }
    speed = facts.get("speed", {})
    costs = {
        "footprint": footprint(_structure(dense), _structure(facts), dense.get("speed", {}), speed),
        "speed": speed_score(speed),
    }
    return {name: value for name, value in costs.items() if value is not None}


def _structure(facts: Mapping[str, Facts]) -> Facts:
    """Size and grade: of the compressed model, or of the one that was only evaluated."""
    if "compress" in facts:
        made = facts["compress"]
        return {name: value for name, value in made.items() if not name.startswith(FORECAST)}
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
    shared: list[Stage] = [*layout.windows, *layout.shards, layout.statistics, layout.ranking]
    method = None if branch.variant is None else branch.variant.method
    if method is not None:
        shared += [stage for stage in layout.scores if stage.family in method.scores]
        shared += [stage for stage in layout.times if stage.family in method.times]
    text = [] if layout.evaluation_windows is None else [layout.evaluation_windows]
    needed: Sequence[Stage] = text if branch.variant is None else shared
    for stage in [*needed, *branch.stages.values()]:
        outcome = outcomes.get(stage.fingerprint)
        if outcome is not None and outcome.kind == "failed":
            return stage.label, outcome
    return "", None
