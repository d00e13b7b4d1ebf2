"""What can be known to fail is refused before anything is computed."""

import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.tracks.settings import Track
from foldstack.compression.export.forms import Form
from foldstack.flows.planning.needs import check_room
from foldstack.flows.running.branches import Layout
from foldstack.tasks.environment.home import HOME_VARIABLE, disk_full, is_disk_full
from foldstack.tasks.stage import Stage
from foldstack.tasks.store.object_storage import object_storage

logger = logging.getLogger(__name__)


def check(layout: Layout) -> None:
    """Refuse what cannot work; what is in the store already has proven that it can.

    Raises:
        InputError: every objection, a sentence each.
    """
    check_writable(layout)
    missing = {stage.fingerprint for stage in layout.stages if not is_stored(stage, layout)}
    if not missing:
        return
    if layout.config.execution.engine == "dask":
        from foldstack.flows.running.engines import check_dask_workers

        check_dask_workers(layout)
    else:
        from foldstack.tasks.environment.execution import device_named

        device_named(layout.config.model.device)
    check_model(layout)
    objections = [
        *unreachable_variants(layout, missing),
        *unknown_benchmarks(layout, missing),
    ]
    objections = objections or check_room(layout, missing)
    if objections:
        raise InputError("; ".join(objections))


def is_stored(stage: Stage, layout: Layout) -> bool:
    """True when the store holds the stage's artifact."""
    return layout.store.holds(stage.artifact(layout.store))


def check_writable(layout: Layout) -> None:
    """Raises InputError when results cannot be written."""
    home = layout.config.output.home.expanduser()
    probe = home / f".probe-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
    except OSError as error:
        if is_disk_full(error):
            raise InputError(disk_full(home)) from error
        raise InputError(
            f"output.home must be a folder that can be written to, and {home} is not "
            f"({error.strerror or error}); set output.home or {HOME_VARIABLE} to another place"
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink()
    if layout.store.url:
        object_storage(layout.store.url).check()


def check_model(layout: Layout) -> None:
    """Raises InputError when the tokenizer or the windows do not fit the model."""
    from foldstack.compression.checkpoints.agreement import agreement
    from foldstack.compression.checkpoints.checkpoint import (
        check_tokenizer_travels,
        load_config,
        load_tokenizer,
    )
    from foldstack.compression.text.calibration import check_tokenizer

    config, tokenizer = load_config(layout.model.folder), load_tokenizer(layout.model.folder)
    check_tokenizer(tokenizer, config.get_text_config(decoder=True).vocab_size)
    check_tokenizer_travels(layout.model.folder)
    for note in agreement(layout.model.folder).notes:
        logger.warning("%s", note)
    context = getattr(config, "max_position_embeddings", None)
    chosen = layout.config
    lengths = {
        "calibration.window_tokens": chosen.calibration.window_tokens,
        "recovery.windows.window_tokens": (
            chosen.recovery.windows.window_tokens if chosen.recovery.steps else 0
        ),
        "evaluation.perplexity.protocol.window_tokens": (
            chosen.evaluation.perplexity.protocol.window_tokens
        ),
    }
    for key, tokens in lengths.items():
        if context is not None and tokens > context:
            raise InputError(
                f"{key} may be at most the model's context of {context} tokens, got {tokens}"
            )


def unreachable_variants(layout: Layout, missing: set[str]) -> list[str]:
    """A sentence for each variant whose sparsity its method cannot reach for this model, or whose
    structure the target does not keep."""
    waiting = [b for b in layout.branches if b.compress and b.compress.fingerprint in missing]
    if not waiting:
        return []
    from foldstack.compression.checkpoints.checkpoint import load_config
    from foldstack.compression.structure.surgery import build_on_meta

    model = build_on_meta(load_config(layout.model.folder))
    sentences = []
    for branch in waiting:
        assert branch.variant is not None
        try:
            plan = branch.variant.method.outline(model)
        except InputError as error:
            sentences.append(str(error))
            continue
        if layout.config.target and (what := Form.of(layout.config.target).why_not_kept(plan)):
            sentences.append(
                f"target {layout.config.target} does not keep {what}, which {branch.label} makes: "
                "set the method so that it makes none, take another, or another target"
            )
    return sentences


def unknown_benchmarks(layout: Layout, missing: set[str]) -> list[str]:
    """A sentence about benchmarks that nobody knows, and one about those without data; one for each
    file of a track that is not of its form."""
    evaluation = layout.config.evaluation
    names: list[str] = []
    if any(branch.before.fingerprint in missing for branch in layout.branches):
        names += evaluation.benchmarks
    waiting = {
        name: stage.track
        for branch in layout.branches
        for name, stage in branch.tracks.items()
        if stage.fingerprint in missing
    }
    of_tracks = sorted({task for track in waiting.values() for task in track.tasks})
    names = list(dict.fromkeys([*names, *of_tracks]))
    if not names:
        return list(_unfit_files(waiting.values()))
    from foldstack.compression.evaluation.benchmark_index import check_tasks, without_data

    try:
        check_tasks(names, evaluation.include_paths)
    except InputError as error:
        return [str(error), *_unfit_files(waiting.values())]
    return [*without_data(of_tracks, evaluation.include_paths), *_unfit_files(waiting.values())]


def _unfit_files(tracks: Iterable[Track]) -> Iterator[str]:
    """A sentence for each local file that is not of its form."""
    for track in tracks:
        for name, local in track.files.items():
            from foldstack.compression.evaluation.tracks.local_tasks import check_local

            try:
                check_local(name, local)
            except InputError as error:
                yield str(error)
