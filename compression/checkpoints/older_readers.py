"""Entries of a stock model's JSON files under the names by which older programs read them.

transformers 5 writes the rotary settings as `rope_parameters` and the precision as `dtype`. Readers
of the form of 4.x (and converters that read the JSON) find neither, take a base of 10,000 without a
word, and float32. Both forms stand side by side; transformers 5 reads them to the same config. Of a
tokenizer it names a class that 4.x does not have, and lists tokens where 4.x wants a table: there
the older form alone stands, which both read.
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
    """Change the config.json in `folder`, and its tokenizer_config.json, if there is one."""
    file = folder / "config.json"
    entries = with_older_names(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if file.is_file():
        entries = json.loads(file.read_text(encoding="utf-8"))
        older = tokenizer_of_older_names(entries)
        if older != entries:
            text = json.dumps(older, indent=2, ensure_ascii=False)
            file.write_text(text + "\n", encoding="utf-8")


def tokenizer_of_older_names(entries: dict[str, Any]) -> dict[str, Any]:
    """The entries of a tokenizer's config as 4.x and 5.x read them."""
    older = dict(entries)
    if older.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(older.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    return older
