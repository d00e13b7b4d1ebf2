"""Where a stage computes and with how many threads: never a part of what it computes."""

import os
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from foldstack.compression.errors import InputError
from foldstack.tasks.environment.cgroup import processors

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Execution(BaseModel):
    """Device and threads of one stage."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    device: str = "auto"
    """"auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", "mps"."""
    threads: int = Field(default=0, ge=0)
    """Threads of one operation on the CPU; 0 leaves the choice to torch."""

    def begin(self) -> str:
        """Set this thread up and return the device to use.

        Raises:
            InputError: there is no such device.
        """
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)  # counts for the calling thread only
        return device_named(self.device)


def device_named(name: str) -> str:
    """The device that `name` stands for on this machine.

    Raises:
        InputError: there is no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device must be auto, cpu or one that is here, got {name}: {reason}"
        ) from None
    return name


def torch_dtype(name: Dtype) -> "torch.dtype | None":
    """The precision of that name; None for the one that the weights are stored in."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def cores() -> int:
    """Processor cores that this process may use, in a container as many as are its share."""
    has_mask = hasattr(os, "sched_getaffinity")
    allowed = len(os.sched_getaffinity(0)) if has_mask else os.cpu_count() or 1
    share = processors()
    return allowed if share is None else max(1, min(allowed, round(share)))
