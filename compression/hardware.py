"""What a measurement ran on."""

import platform
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict


class Hardware(BaseModel):
    """What times were taken on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    cpu: str
    num_threads: int
    """That torch computes with."""
    accelerator: str | None
    torch_version: str


def hardware_of(device: str) -> Hardware:
    """The hardware that a model on `device` runs on."""
    return Hardware(
        cpu=_cpu_name(),
        num_threads=torch.get_num_threads(),
        accelerator=None if device == "cpu" else torch.cuda.get_device_name(device),
        torch_version=torch.__version__,
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
