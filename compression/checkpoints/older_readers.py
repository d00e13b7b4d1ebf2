"""Entries of a stock config.json under the names by which older programs read them.

transformers 5 writes the rotary settings as `rope_parameters` and the precision as `dtype`. Readers
of the form of 4.x (and converters that read the JSON) find neither, take a base of 10,000 without a
word, and float32. Both forms stand side by side; transformers 5 reads them to the same config.
"""

import json
from pathlib import Path
from typing import Any

# Of Gemma 3, the one supported family with two rotary embeddings: which is which in 4.x.
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def with_older_names(entries: dict[str, Any]) -> dict[str, Any]:
    """The entries of a stock config, and what 4.x calls those that have another name today."""
    older: dict[str, Any] = {}
    if entries.get("dtype") is not None:
        older["torch_dtype"] = entries["dtype"]
    rope = entries.get("rope_parameters")
    if rope and _GLOBAL in rope:
        older |= _of_one(rope[_GLOBAL])
        older["rope_local_base_freq"] = rope[_LOCAL]["rope_theta"]
    elif rope:
        older |= _of_one(rope)
    return entries | older


def _of_one(rope: dict[str, Any]) -> dict[str, Any]:
    beside = ("rope_theta", "partial_rotary_factor")
    scaling = {name: value for name, value in rope.items() if name not in beside}
    is_scaled = scaling.get("rope_type", "default") != "default"
    named = {name: rope[name] for name in beside if name in rope}
    return named | {"rope_scaling": scaling if is_scaled else None}


def write_older_names(folder: Path) -> None:
    """Add the older names to the config.json in `folder`."""
    file = folder / "config.json"
    entries = with_older_names(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
