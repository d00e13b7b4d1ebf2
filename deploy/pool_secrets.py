"""Store the passwords that runs of the Docker pool need as secret blocks of the Prefect server.

    MLFLOW_TRACKING_PASSWORD=... HF_TOKEN=... python deploy/pool_secrets.py

Prefect hands a container its PREFECT_ settings only; docker-pool.json names these blocks for the
others. Run it again after a change. HF_TOKEN may be left out.
"""

import argparse
import asyncio
import os
import sys

import foldstack.flows.prefect_defaults  # noqa: F401 (before Prefect)
from foldstack.compression.errors import InputError

BLOCKS = {
    "foldstack-mlflow-password": "MLFLOW_TRACKING_PASSWORD",
    "foldstack-hf-token": "HF_TOKEN",
}
OPTIONAL = ("HF_TOKEN",)


async def register(values: dict[str, str]) -> None:
    """Make or renew the blocks; `values` by their names."""
    from prefect.blocks.system import Secret

    for name, value in values.items():
        await Secret(value=value).save(name, overwrite=True)


def values_from_environment() -> dict[str, str]:
    """What each block holds.

    Raises:
        InputError: a variable that must be set is not.
    """
    values = {block: os.environ.get(variable, "") for block, variable in BLOCKS.items()}
    for block, variable in BLOCKS.items():
        if not values[block] and variable not in OPTIONAL:
            raise InputError(f"{variable} must hold what the block {block} is to hand to runs")
    return values


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    try:
        values = values_from_environment()
        asyncio.run(register(values))
    except InputError as error:
        sys.exit(f"pool_secrets: {error}")
    print(f"registered: {', '.join(values)}")


if __name__ == "__main__":
    main()
