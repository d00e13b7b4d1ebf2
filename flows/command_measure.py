"""`foldstack evaluate` and `foldstack bench`: one model, measured like those of a sweep."""

import sys
from collections.abc import Sequence

from foldstack.flows.config_file import find_config, read_config
from foldstack.flows.measures import evaluation_digests, evaluation_of, speed_of
from foldstack.flows.run_config import RunConfig, parse_config
from foldstack.flows.terminal import console_on, display_on
from foldstack.tasks.artifacts import ArtifactStore
from foldstack.tasks.execution import Execution, cores
from foldstack.tasks.manifest import Facts
from foldstack.tasks.stage import ModelRef, Stage, run_stage


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


def evaluate_command(config: RunConfig) -> Facts:
    """Perplexity, bits per byte and benchmarks of the config's model, from the store if there.

    Raises:
        InputError: the model, the text or a benchmark cannot be had.
    """
    from foldstack.compression.benchmark_index import check_tasks

    if config.evaluation.benchmarks:
        check_tasks(config.evaluation.benchmarks, config.evaluation.include_paths)
    model = ModelRef.of(config.model.name, config.model.revision)
    execution = Execution(device=config.model.device, threads=cores())
    digests = evaluation_digests(config)
    return _run(config, evaluation_of(config, model, config.model.name, execution, digests))


def bench_command(config: RunConfig, against: str) -> Facts:
    """Speed of the config's model, in turns with the one that it is compared with.

    Raises:
        InputError: a model cannot be had.
    """
    model = ModelRef.of(config.model.name, config.model.revision)
    dense = ModelRef.of(against) if against else model
    return _run(config, speed_of(config, dense, model, config.model.name))


def _run(config: RunConfig, stage: Stage) -> Facts:
    store = ArtifactStore(config.output.home / "store", config.output.store)
    with display_on(console_on(sys.stderr)) as display:
        display.begin(stage.label, 1)
        artifact = run_stage(
            stage, store, lambda what, done, total: display.report(stage.label, what, done, total)
        )
        manifest = artifact.manifest()
        display.finished(stage.label, "done", manifest.seconds)
    return manifest.facts
