"""lm-eval without its noise: log lines, bars, git calls, bootstrap processes, changed seeds."""

import logging
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

Progress = Callable[[str, int, int], None]

NOISY_LOGGERS = ("lm_eval", "transformers", "datasets", "huggingface_hub", "fsspec")

# lm-eval sets the seeds of the whole process, and what is swapped below is shared by all threads.
_one_at_a_time = threading.Lock()


@contextmanager
def quiet_lm_eval(progress: Progress | None) -> Iterator[None]:
    """One evaluation at a time, silent but for `progress`; everything is put back afterwards.

    lm-eval reports standard errors that have a closed form (means); the others it would bootstrap
    in forked processes, which a process with threads had better not do: they are left out.
    """
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.evaluator_utils
    import lm_eval.models.huggingface
    from lm_eval.api import metrics

    closed = {metrics.mean: metrics.mean_stderr, metrics.acc_all: metrics.acc_all_stderr}

    def closed_form(metric: Any, bootstrap_iters: int) -> Any:
        return closed.get(metric)

    with _one_at_a_time, ExitStack() as stack:
        for swap in (
            (lm_eval.evaluator, "get_git_commit_hash", lambda: None),
            (lm_eval.evaluator, "add_env_info", lambda _results: None),
            (lm_eval.evaluator_utils, "stderr_for_metric", closed_form),
            (lm_eval.api.model, "tqdm", _bar_reporting_to(None)),
            (lm_eval.api.task, "tqdm", _bar_reporting_to(None)),
            (lm_eval.models.huggingface, "tqdm", _bar_reporting_to(progress)),
        ):
            stack.enter_context(_swapped(*swap))
        stack.enter_context(quiet_loggers())
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        stack.enter_context(_random_state_kept())
        yield


def _bar_reporting_to(progress: Progress | None) -> type:
    """A stand-in for tqdm whose bars add up to one progress."""
    counts = {"done": 0, "total": 0}

    class Bar:
        def __init__(self, iterable: Iterable[Any] = (), total: int = 0, **_: Any) -> None:
            self.iterable = iterable
            counts["total"] += total

        def __iter__(self) -> Iterator[Any]:
            return iter(self.iterable)

        def update(self, n: int = 1) -> None:
            counts["done"] += n
            if progress is not None:
                progress("benchmarks", counts["done"], counts["total"])

        def close(self) -> None:
            pass

    return Bar


@contextmanager
def _swapped(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    if not hasattr(module, name):  # another version of lm-eval: noisier, not broken
        yield
        return
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def quiet_loggers() -> Iterator[None]:
    """Nothing below an error from lm-eval and what it stands on."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
