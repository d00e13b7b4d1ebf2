"""The machine that a figure was measured on, in words."""

import os
import platform
import sys
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def hardware() -> str:
    """The machine in words, without its name: "AMD EPYC 7B13, 2 cores, 23 GiB, no GPU"."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [_processor(), f"{os.cpu_count()} cores", f"{memory:.0f} GiB"]
    torch = sys.modules.get("torch")  # imported where a GPU was used; not for a sentence
    if torch is None or not torch.cuda.is_available():
        return ", ".join([*parts, "no GPU"])
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(parts + gpus)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
