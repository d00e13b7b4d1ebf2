"""`foldstack evaluate` and `foldstack bench`: one model, measured like those of a sweep."""

import logging
import sys
from collections.abc import Sequence

from foldstack.compression.evaluation.beside_dense import beside_dense
from foldstack.compression.evaluation.tracks.result import model_verdict
from foldstack.compression.evaluation.tracks.track_beside_dense import measured_anyway
from foldstack.flows.config.config_file import find_config, read_config
from foldstack.flows.config.run_config import RunConfig, parse_config
from foldstack.flows.running.measures import (
    assistant_of,
    evaluation_digests,
    evaluation_of,
    speed_of,
)
from foldstack.flows.running.progress import console_on, display_on
from foldstack.tasks.dequantize_model import find_model
from foldstack.tasks.environment.execution import Execution, cores
from foldstack.tasks.evaluate_model import load_evaluation
from foldstack.tasks.stage import ModelRef, Stage, run_stage
from foldstack.tasks.store.artifacts import Artifact, ArtifactStore
from foldstack.tasks.store.manifest import Facts

logger = logging.getLogger(__name__)


def config_for(
    config: str,
    model: str,
    *,
    revision: str | None = None,
    benchmarks: Sequence[str] = (),
    limit: int | None = None,
) -> RunConfig:
    """The config of that name, for another model and perhaps other benchmarks.

    Raises:
        InputError: it cannot be read, or something in it is wrong.
    """
    data = read_config(find_config(config))
    device = data["model"].get("device", "auto") if isinstance(data.get("model"), dict) else "auto"
    data["model"] = {"name": model, "revision": revision, "device": device}
    evaluation = dict(data.get("evaluation") or {})
    if benchmarks:
        evaluation["benchmarks"] = list(benchmarks)
    if limit is not None:
        evaluation["limit"] = limit
    return parse_config(data | {"evaluation": evaluation}, where=config)


def evaluate_command(config: RunConfig, against: str = "") -> Facts:
    """Perplexity, bits per byte and benchmarks of the config's model, from the store if there; with
    `against` also the verdict beside that model, and the differences from it under "beside_dense/".

    Raises:
        InputError: a model, the text or a benchmark cannot be had, or the two models do not read
            the text as the same windows of tokens.
    """
    from foldstack.compression.evaluation.benchmark_index import check_tasks

    if config.evaluation.benchmarks:
        check_tasks(config.evaluation.benchmarks, config.evaluation.include_paths)
    models = [_find(config, config.model.name, config.model.revision)]
    if against:  # found before the first one is measured
        models.append(_find(config, against))
    execution = Execution(device=config.model.device, threads=cores())
    digests = evaluation_digests(config)
    evaluated, *dense = (
        _run(config, evaluation_of(config, model, model.name, execution, digests))
        for model in models
    )
    facts = evaluated.manifest().facts
    if not dense:
        return facts
    pair = load_evaluation(dense[0]), load_evaluation(evaluated)
    rule = config.evaluation.verdict
    verdict = model_verdict(measured_anyway(*pair, rule), rule.within)
    beside = {f"beside_dense/{name}": value for name, value in beside_dense(*pair).items()}
    return {"verdict": str(verdict), **facts, **beside}


def bench_command(config: RunConfig, against: str) -> Facts:
    """Speed of the config's model, in turns with the one that it is compared with; and what it is
    worth as that one's assistant.

    Raises:
        InputError: a model cannot be had.
    """
    model = _find(config, config.model.name, config.model.revision)
    dense = _find(config, against) if against else model
    facts = _run(config, speed_of(config, dense, model, config.model.name)).manifest().facts
    if model == dense:
        return facts
    assisted = _run(config, assistant_of(config, dense, model, config.model.name))
    return {**facts, **assisted.manifest().facts}


def _find(config: RunConfig, model: str, revision: str | None = None) -> ModelRef:
    found = find_model(_store(config), model, revision, config.model.dtype)
    if found.origin:
        logger.warning("%s", found.origin)
    return found


def _store(config: RunConfig) -> ArtifactStore:
    return ArtifactStore(config.output.home / "store", config.output.store)


def _run(config: RunConfig, stage: Stage) -> Artifact:
    store = _store(config)
    with display_on(console_on(sys.stderr)) as display:
        display.begin(stage.label, 1)
        artifact = run_stage(
            stage, store, lambda what, done, total: display.report(stage.label, what, done, total)
        )
        display.finished(stage.label, "done", artifact.manifest().seconds)
    return artifact
