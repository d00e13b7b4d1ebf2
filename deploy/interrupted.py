"""Flow runs that were under way when the machine went down: they go on when the stack is back.

    python deploy/local_stack.py --home DIR --run python deploy/interrupted.py

is what `local_stack.py` does by itself at its start, before there is a worker: what that has just
taken would be taken for lost. Without it such runs would be shown as running for ever, and hold
their place in the queue `gpu`, so that no night would begin any more. Prints a sentence on each.
"""

import argparse
import asyncio
import re
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]
from stack import POOL

import foldstack.flows.prefect_defaults  # noqa: F401 (before Prefect)

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

TRIES = 3
"""A run that was begun so often and never ended may be what takes the machine down."""
RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
"""In the environment of a process that computes a flow run."""


async def go_on() -> list[str]:
    """Schedule the runs again that nobody computes any more; gives a sentence on each."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkPoolFilter,
        WorkPoolFilterName,
    )
    from prefect.states import AwaitingRetry, Cancelled, Crashed, StateType

    under_way = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    told = []
    async with get_client() as client:
        runs = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=under_way))
            ),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
        )
        for run in [run for run in runs if not is_computed(run)]:
            if run.state is not None and run.state.is_cancelling():
                state, what = Cancelled(), "is cancelled"
            elif run.run_count < TRIES:
                state, what = AwaitingRetry(message="the machine went down under it"), "goes on"
            else:
                what = f"was begun {run.run_count} times and never ended: it is not tried again"
                state = Crashed(message=what)
            await client.set_flow_run_state(run.id, state)
            told.append(f"{run.name} was under way when the machine went down; it {what}")
    return told


def is_computed(run: "FlowRun") -> bool:
    """Whether the process of a run is still there. Its number alone says nothing after a restart
    of the machine: another one may have it.
    """
    number = re.search(r"\d+$", run.infrastructure_pid or "")
    with suppress(psutil.Error):
        if number is not None:
            environment = psutil.Process(int(number[0])).environ()
            return environment.get(RUN_VARIABLE) == str(run.id)
    return False


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    for sentence in asyncio.run(go_on()):
        print(sentence)


if __name__ == "__main__":
    main()
