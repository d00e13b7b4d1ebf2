"""One stage computed by several processes together, as torchrun and accelerate start them.

They find one another by a file in the stage's work folder and talk over the loopback interface
alone. Only the first one tells how it gets on, and what came of it. Where one dies the others end:
they would wait for it.
"""

import logging
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from uuid import uuid4

from foldstack.compression.errors import InputError
from foldstack.tasks.environment.execution import Execution, cores, device_named
from foldstack.tasks.environment.inherited import own_environment
from foldstack.tasks.running.messages import (
    PACKAGE_LOGGER,
    ProcessDied,
    begun,
    how_it_ended,
    passed_on,
    portable,
)
from foldstack.tasks.running.worker_pool import SECONDS_TO_LEAVE, ComputedStage
from foldstack.tasks.stage import Progress, no_progress
from foldstack.tasks.store.manifest import Facts

LONGEST_WAIT = timedelta(hours=2)
"""Of one process for another, which may still be opening its model."""
LOOPBACK = "lo"

_is_rank = False


def is_rank() -> bool:
    """Whether this process is one of several that `compute_together` started."""
    return _is_rank


def fsdp_environment(execution: Execution, num_processes: int) -> dict[str, str]:
    """What `accelerate launch --use_fsdp --fsdp_version 2` would tell each process.

    Raises:
        InputError: there are not as many GPUs, or it is neither they nor the CPU that compute.
    """
    import torch

    device = device_named(execution.device)
    if device not in ("cpu", "cuda"):
        raise InputError(
            f"recovery.processes {num_processes} needs model.device auto, cuda or cpu, got {device}"
        )
    told = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    if device == "cpu":
        threads = execution.threads or max(1, cores() // num_processes)
        return told | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
    if num_processes > (here := torch.cuda.device_count()):
        raise InputError(
            f"recovery.processes {num_processes} wants as many GPUs, and {here} are here: set it "
            f"to {here} or less, or model.device to cpu"
        )
    return told


def compute_together(
    stage: ComputedStage,
    num_processes: int,
    environment: Mapping[str, str],
    folder: Path,
    work: Path,
    progress: Progress,
) -> Facts:
    """What `stage.compute` says in the first of so many processes, all of which compute it.

    Args:
        environment: of each, besides that of this process and what makes it one of many.

    Raises:
        ProcessDied: one was killed.
        Exception: whatever the stage raises in one of them.
    """
    meeting = work / f"meeting-{uuid4().hex}"
    ranks = [_Rank(number, num_processes, environment) for number in range(num_processes)]
    try:
        for rank in ranks:
            rank.begin((stage, folder, work, meeting))
        return _facts(stage, ranks, progress)
    finally:
        for rank in ranks:
            rank.end()
        meeting.unlink(missing_ok=True)


def part() -> bool:
    """Leave the others, if there are any; True for the one that goes on alone."""
    if not _is_rank:
        return True
    from torch import distributed

    is_first = distributed.get_rank() == 0
    distributed.destroy_process_group()
    own_environment()
    return is_first


class _Rank:
    """One of the processes, as seen by the one that started them."""

    def __init__(self, number: int, num_processes: int, environment: Mapping[str, str]) -> None:
        self.number = number
        self.reader, writer = Pipe(duplex=False)
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": num_processes}
        place["LOCAL_WORLD_SIZE"] = num_processes
        told = {name: str(value) for name, value in place.items()}
        if LOOPBACK in (name for _, name in socket.if_nameindex()):
            told |= {f"{library}_SOCKET_IFNAME": LOOPBACK for library in ("GLOO", "NCCL")}
        command = "from foldstack.tasks.running.ranks import serve; serve()"
        arguments = (writer.fileno(), os.getpid(), PACKAGE_LOGGER.getEffectiveLevel())
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", command, *map(str, arguments)],
            env={**os.environ, **environment, **told},
            stdin=subprocess.PIPE,
            pass_fds=[writer.fileno()],
        )
        writer.close()

    def begin(self, work: object) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead, which is found out when it says nothing
            self.process.stdin.write(pickle.dumps(work))
            self.process.stdin.close()

    def end(self) -> None:
        """Wait for it where it has told all, else kill it."""
        if not self.reader.closed:
            self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS_TO_LEAVE)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.reader.close()


def _facts(stage: ComputedStage, ranks: list[_Rank], progress: Progress) -> Facts:
    found: Facts = {}
    waiting = {rank.reader: rank for rank in ranks}
    while waiting:
        for reader in wait(list(waiting)):
            assert isinstance(reader, Connection)
            rank = waiting[reader]
            try:
                kind, content = reader.recv()
            except (EOFError, ConnectionResetError):
                raise _died(stage, rank) from None
            if kind == "error":
                for other in ranks:  # whose death may be what this one complains of
                    if other is not rank and (other.process.poll() or 0) < 0:
                        raise _died(stage, other) from None
            if not passed_on(kind, content, progress):
                found = content if rank.number == 0 else found
                del waiting[reader]
                reader.close()
    return found


def _died(stage: ComputedStage, rank: _Rank) -> ProcessDied:
    with suppress(subprocess.TimeoutExpired):
        rank.process.wait(SECONDS_TO_LEAVE)
    return ProcessDied(
        f"{stage.label}: its process {rank.number} {how_it_ended(rank.process.poll())}"
    )


def serve() -> None:
    """The life of one of the processes."""
    global _is_rank
    writer, parent, level = Connection(int(sys.argv[1]), readable=False), *map(int, sys.argv[2:])
    is_first = os.environ["RANK"] == "0"
    sender = begun(writer, parent, level if is_first else logging.ERROR)
    _is_rank = True
    try:
        stage, folder, work, meeting = pickle.load(sys.stdin.buffer)
        _meet(meeting)
        facts = stage.compute(folder, work, sender.progress if is_first else no_progress)
    except Exception as error:
        sender.send("error", portable(error))
    else:
        sender.send("facts", facts)


def _meet(meeting: Path) -> None:
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "true"
    torch.distributed.init_process_group(
        "gloo" if on_cpu else "nccl",
        init_method=f"file://{meeting.absolute()}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=LONGEST_WAIT,
    )
