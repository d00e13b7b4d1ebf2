"""What is wrong with a configuration: sentences that name the key and the nearest known one."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

Location = tuple[str | int, ...]


def problems(error: ValidationError, schema: Mapping[str, Any]) -> list[str]:
    """One sentence for each complaint in `error`; `schema` is the JSON schema that was failed."""
    sentences: list[str] = []
    for detail in error.errors(include_url=False):
        sentence = _sentence(dict(detail), schema)
        if sentence not in sentences:
            sentences.append(sentence)
    return sentences


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known word, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _sentence(detail: dict[str, Any], schema: Mapping[str, Any]) -> str:
    location: Location = detail["loc"]
    got, context = detail.get("input"), detail.get("ctx", {})
    where = readable(location, schema)
    match detail["type"]:
        case "extra_forbidden":
            key, parent = str(location[-1]), readable(location[:-1], schema)
            known = known_keys(location[:-1], schema)
            place = f"in {parent}" if parent else "at top level"
            hint = did_you_mean(key, known) or f"; known there: {', '.join(known)}"
            return f"unknown key {key} {place}{hint}"
        case "missing":
            return f"{where} is missing; give it a value"
        case "union_tag_invalid":
            tag, tags = str(context["tag"]), _tags(context["expected_tags"])
            hint = did_you_mean(tag, tags)
            return f"{where}.name must be one of {', '.join(tags)}, got {tag}{hint}"
        case "union_tag_not_found":
            return f"{where}.name is missing; say which method it is"
        case "literal_error":
            words = _tags(context["expected"].replace(" or ", ", "))
            return f"{where} must be one of {', '.join(words)}, got {got!r}" + did_you_mean(
                str(got), words
            )
        case "value_error":
            reason = str(context.get("error", detail["msg"]))
            return f"{where}: {reason}" if where else reason
        case _:
            rule = detail["msg"][0].lower() + detail["msg"][1:]
            return f"{where}: {rule}, got {_short(got)}"


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
