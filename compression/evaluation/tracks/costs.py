"""The tracks that nothing is asked for: footprint and speed, from what is measured anyway.

They are never mixed with quality: how much smaller makes up for how much worse is not ours to say.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

FOOTPRINT = ("parameters", "bytes", "flops_per_token", "kv_bytes_per_token")
"""Of a model's size."""
MEMORY = ("peak_memory_bytes", "weight_bytes_on_disk")
"""Of what its speed was measured with."""
SPEEDS = ("prefill_speedup", "decode_speedup")
Figures = Mapping[str, Any]


def footprint(
    dense_size: Figures, size: Figures, dense_speed: Figures, speed: Figures
) -> float | None:
    """Geometric mean of compressed over dense: parameters, bytes, FLOPs and KV cache per token, and
    where they were measured memory and files. Lower is better; None where nothing is known."""
    pairs = [(dense_size.get(name), size.get(name)) for name in FOOTPRINT]
    pairs += [(dense_speed.get(name), speed.get(name)) for name in MEMORY]
    return _mean([b / a for a, b in pairs if a and b])


def speed_score(speed: Figures) -> float | None:
    """Geometric mean of how many times as fast as the dense model it reads and writes: the dense
    time over its own. None where it was not measured."""
    return _mean([speed[name] for name in SPEEDS if speed.get(name)])


def _mean(ratios: Sequence[float]) -> float | None:
    if not ratios:
        return None
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
