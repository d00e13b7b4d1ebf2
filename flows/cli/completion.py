"""What the shell offers for a half-typed word: recipes, keys of a config, kinds of things.

From files that come with foldstack, without an import that takes seconds: a person waits for it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from foldstack.flows.cli.listing import KINDS
from foldstack.flows.config.config_file import RECIPES, recipes


def complete_recipe(incomplete: str) -> list[str]:
    """Recipes whose name begins so; the shell itself offers files."""
    return [name for name in recipes() if name.startswith(incomplete)]


def complete_kind(incomplete: str) -> list[str]:
    """What `foldstack ls` can list."""
    return [kind for kind in KINDS if kind.startswith(incomplete)]


def complete_override(incomplete: str) -> list[str]:
    """Keys of a config that begin so, section by section; values where there are only some."""
    schema = json.loads((RECIPES / "schema.json").read_text(encoding="utf-8"))
    key, has_value, value = incomplete.partition("=")
    offers = dict(_keys(schema, schema, ""))
    if has_value:
        return [f"{key}={each}" for each in offers.get(key, ()) if each.startswith(value)]
    return [f"{name}=" for name in offers if name.startswith(key)]


def _keys(
    schema: Mapping[str, Any], node: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, list[str]]]:
    """Dotted names of what can be set, with the values of those that take one of a few."""
    node = _resolved(schema, node)
    for name, field in node.get("properties", {}).items():
        inner = _resolved(schema, field)
        if inner.get("properties"):
            yield from _keys(schema, inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _values(inner)


def _resolved(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = node.get("$ref")
    return node if reference is None else schema["$defs"][reference.rpartition("/")[2]]


def _values(node: Mapping[str, Any]) -> list[str]:
    if node.get("type") == "boolean":
        return ["true", "false"]
    return [str(each) for each in node.get("enum", ())]
