"""What `foldstack run` does around the flow: a server, progress, Ctrl-C, and folders to find."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from foldstack.compression.errors import InputError, told
from foldstack.flows.cli.quick_imports import importing
from foldstack.flows.comparison.result import Comparison, Row
from foldstack.flows.comparison.unchanged import Question, note
from foldstack.flows.config.run_config import RunConfig
from foldstack.flows.running.prefect_server import (
    TemporaryServer,
    cancel_flow_run,
    has_pages,
    settings_of_prefect,
)
from foldstack.flows.running.progress import Display, console_on, display_on
from foldstack.tasks.environment.home import in_this_home, telling_disk_full
from foldstack.tasks.running.worker_pool import end_workers, worker_processes

INTERRUPTED = 130
STOPPING = (signal.SIGINT, signal.SIGTERM)


def run_command(
    config: RunConfig,
    server: TemporaryServer,
    again: str,
    question: Question | None = None,
) -> Comparison:
    """Run the sweep of `config`, shown in the terminal; `again` is the command that resumes it.

    What the run went by is noted under `question`, unless its pages are to stay on a server.

    Raises:
        InputError: something in `config` cannot work, or a disk is full.
    """
    from foldstack.flows.planning.preflight import check
    from foldstack.flows.running.branches import lay_out

    console = console_on(sys.stderr)
    with (
        stopping_on_signal(server, console, again),
        display_on(console) as display,
        warnings_on(display),
        worker_processes(),
    ):
        layout = lay_out(config)
        check(layout)
        with importing():
            settings_of_prefect()
            from foldstack.flows.sweep import SweepFailed, run_sweep

        server.ready()
        with telling_disk_full(config.output.home.expanduser()):
            try:
                comparison = run_sweep(layout, display)
            except SweepFailed as failure:
                comparison = failure.comparison
            except RuntimeError as error:
                if "Failed to reach API" not in str(error):
                    raise
                raise InputError(f"Prefect cannot be worked with: {told(error)}") from error
    link_models(config, comparison)
    if question is not None and not has_pages():
        note(question, layout, comparison)
    return comparison


def link_models(config: RunConfig, comparison: Comparison) -> None:
    """Give every finished model directory a name that a person can find, under <home>/models."""
    home = config.output.home.expanduser().resolve()
    folder = home / "models"
    _mend_links(folder, home)
    for row in comparison.rows:
        if row.is_dense or not row.folder or row.state != "done":
            continue
        link, target = link_of(config, row), _seen_from(folder, Path(row.folder), home)
        if link.is_symlink() and Path(os.readlink(link)) == target:
            continue
        made = folder / f".{link.name}.{os.getpid()}"
        with suppress(OSError):  # a file system without links: the store's own path still works
            folder.mkdir(parents=True, exist_ok=True)
            made.symlink_to(target)
            made.replace(link)


def link_of(config: RunConfig, row: Row) -> Path:
    """Where `link_models` puts the link to a row's model."""
    name = f"{config.model.short_name}-{row.label}".replace(" ", "-")
    return config.output.home.expanduser().resolve() / "models" / name


def _seen_from(folder: Path, target: Path, home: Path) -> Path:
    """What a link in `folder` is to say: a way inside the home goes wherever the home goes."""
    is_inside = target.is_relative_to(home)
    return Path(os.path.relpath(target, folder)) if is_inside else target


def _mend_links(folder: Path, home: Path) -> None:
    """Links of a home that has another place now lead into this one."""
    with suppress(OSError):
        for link in folder.iterdir():
            if not link.is_symlink() or link.exists():
                continue
            found = in_this_home(os.readlink(link), home)
            made = folder / f".{link.name}.{os.getpid()}"
            if found is not None:
                made.symlink_to(_seen_from(folder, found, home))
                made.replace(link)


@contextmanager
def warnings_on(display: Display) -> Iterator[None]:
    """Show the library's warnings between the lines of progress."""
    handler = _Shown(display)
    package = logging.getLogger("foldstack")
    package.addHandler(handler)
    propagates, package.propagate = package.propagate, True
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.propagate = propagates


class _Shown(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.say(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def stopping_on_signal(server: TemporaryServer, console: Console, again: str) -> Iterator[None]:
    """End at once on Ctrl-C or SIGTERM: a stage cannot be interrupted, but it can be resumed.

    Whoever else takes a signal meanwhile: Prefect does, raises an error in the flow, and tells its
    server of it for minutes if that got the signal too. So it is heard of where the kernel brings
    it, by a thread of its own, which needs no answer of the main one either.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int) -> None:
        console.show_cursor()
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        text = f"\nfoldstack: stopped{by}; what is finished is kept, to go on: {again}\n"
        os.write(2, text.encode())
        end_workers()
        cancel_flow_run()
        server.abandon()
        os._exit(_code(number))

    def listen() -> None:
        stopping: threading.Thread | None = None
        while numbers := os.read(heard, 1):
            if (number := numbers[0]) not in STOPPING:
                continue
            if stopping is None:
                stopping = threading.Thread(target=stop, args=[number], daemon=True)
                stopping.start()
            elif number == signal.SIGINT:  # somebody cannot wait
                os._exit(_code(number))

    heard, told = os.pipe()
    os.set_blocking(told, False)
    before = {number: signal.signal(number, lambda *_: None) for number in STOPPING}
    told_before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(told_before)
        os.close(told)  # the thread reads to the end
        for number, handler in before.items():
            signal.signal(number, handler)


def _code(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else 128 + number
