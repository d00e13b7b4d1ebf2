"""What is wrong with a configuration: sentences that name the key and the nearest known one."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

Location = tuple[str | int, ...]

# pydantic speaks of Python's types, a YAML file has others.
KINDS = {
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "path_type": "a path",
}


def problems(error: ValidationError, schema: Mapping[str, Any]) -> list[str]:
    """One sentence for each complaint in `error`; `schema` is the JSON schema that was failed."""
    details: list[dict[str, Any]] = [dict(d) for d in error.errors(include_url=False)]
    places = [detail["loc"] for detail in details]
    sentences: dict[str, str] = {}
    for detail in details:
        place = detail["loc"]
        if any(len(other) > len(place) and other[: len(place)] == place for other in places):
            continue  # a list that lost a wrong item is also too short
        where, rule, got = _complaint(detail, schema)
        if where in sentences and got:  # the other forms that a union would have taken
            rule = (
                f"{sentences[where].removesuffix(got)} or {rule.removeprefix(f'{where} must be ')}"
            )
        sentences[where if got else rule] = rule + got
    return list(sentences.values())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known word, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _complaint(detail: dict[str, Any], schema: Mapping[str, Any]) -> tuple[str, str, str]:
    """Place, sentence, and its end that says what came (empty when it is inside the sentence)."""
    location: Location = detail["loc"]
    value, context = detail.get("input"), detail.get("ctx", {})
    where, got = readable(location, schema), f", got {_short(value)}"
    match detail["type"]:
        case "extra_forbidden":
            return where, _unknown_key(location, schema), ""
        case "missing":
            return where, f"{where} is missing; give it a value", ""
        case "union_tag_invalid":
            tag, tags = str(context["tag"]), _tags(context["expected_tags"])
            rule = f"{where}.name must be one of {', '.join(tags)}, got {tag}"
            return where, rule + did_you_mean(tag, tags), ""
        case "union_tag_not_found":
            return where, f"{where}.name is missing; say which one it is", ""
        case "literal_error":
            words = _tags(context["expected"].replace(" or ", ", "))
            hint = did_you_mean(str(value), words)
            return where, f"{where} must be {' or '.join(words)}", got + hint
        case "value_error":
            reason = str(context.get("error", detail["msg"]))
            return where, f"{where}: {reason}" if where else reason, ""
        case "too_short":
            return where, f"{where} must have at least {context['min_length']} entry", got
        case kind if kind in KINDS:
            return where, f"{where} must be {KINDS[kind]}", got
        case _:
            rule = detail["msg"][0].lower() + detail["msg"][1:]
            return where, f"{where}: {rule.replace('input should', 'it must')}", got


def _unknown_key(location: Location, schema: Mapping[str, Any]) -> str:
    key, parent = str(location[-1]), readable(location[:-1], schema)
    known = known_keys(location[:-1], schema)
    place = f"in {parent}" if parent else "at top level"
    hint = did_you_mean(key, known) or f"; known there: {', '.join(known)}"
    return f"unknown key {key} {place}{hint}"


def readable(location: Location, schema: Mapping[str, Any]) -> str:
    """`methods[1].rank` for ("methods", 1, "svd_llm", "rank"): union tags are not keys."""
    text, node = "", _resolve(schema, schema)
    for part in location:
        if isinstance(part, str) and part not in node.get("properties", {}) and _has_union(node):
            node = _step(node, part, schema)
            continue
        node = _step(node, part, schema)
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def known_keys(location: Location, schema: Mapping[str, Any]) -> list[str]:
    """The keys that the mapping at `location` may have."""
    node = _resolve(schema, schema)
    for part in location:
        node = _step(node, part, schema)
    if "properties" not in node:
        for option in _options(node):
            candidate = _resolve(option, schema)
            if "properties" in candidate:
                node = candidate
                break
    return list(node.get("properties", {}))


def _step(node: Mapping[str, Any], part: str | int, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(part, int):
        for candidate in (node, *(_resolve(option, schema) for option in _options(node))):
            if "items" in candidate:
                return _resolve(candidate["items"], schema)
        return {}
    mapping = node.get("discriminator", {}).get("mapping", {})
    if part in mapping:
        return _resolve({"$ref": mapping[part]}, schema)
    for candidate in (node, *(_resolve(option, schema) for option in _options(node))):
        if part in candidate.get("properties", {}):
            return _resolve(candidate["properties"][part], schema)
    return node if _options(node) else {}


def _resolve(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node


def _options(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*node.get("anyOf", []), *node.get("oneOf", [])]


def _has_union(node: Mapping[str, Any]) -> bool:
    return bool(_options(node))


def _tags(listed: str) -> list[str]:
    return [tag.strip().strip("'\"") for tag in listed.split(",")]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
