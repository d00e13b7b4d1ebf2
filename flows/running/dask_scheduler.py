"""A Dask scheduler, asked who its workers are, with a sentence for when it does not answer."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from foldstack.compression.errors import InputError

ANSWER_SECONDS = 10.0
START_A_WORKER = "dask worker {} --nthreads 1 --preload foldstack.flows.prefect_defaults"


def num_dask_workers(address: str) -> int:
    """Workers that the scheduler has now.

    Raises:
        InputError: it does not answer, or has none.
    """
    with connected(address) as client:
        return len(workers_of(client, address))


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """A client of the scheduler."""
    with explained(address):
        from distributed import Client

        client = Client(address, timeout=ANSWER_SECONDS, set_as_default=False)
    with client:
        yield client


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Inside, what fails to reach the scheduler becomes an InputError that says what to do."""
    if find_spec("prefect_dask") is None:
        raise InputError(
            "execution.engine dask needs the package prefect-dask: pip install 'foldstack[dask]'"
        )
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the Dask scheduler at {address} does not answer ({reason}); start one with `dask "
            "scheduler --host 127.0.0.1`, or set execution.engine to processes"
        ) from error


def workers_of(client: Any, address: str) -> dict[str, Any]:
    """What the scheduler knows of each of its workers, by address.

    Raises:
        InputError: it has none.
    """
    workers: dict[str, Any] = client.scheduler_info()["workers"]
    if not workers:
        raise InputError(
            f"the Dask scheduler at {address} has no workers; start some with "
            f"`{START_A_WORKER.format(address)}`"
        )
    return workers
