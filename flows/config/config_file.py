"""A YAML file and `key.sub=value` overrides, read into plain data."""

import difflib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from foldstack.compression.errors import InputError

RECIPES = Path(__file__).parents[1] / "recipes"
MAX_VALUES = 100_000
"""A config of more values, each alias counted with all that it stands for, is no config."""


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands there twice: YAML itself would keep the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)

    def get_single_node(self) -> yaml.Node | None:
        """Refuses aliases that are short to write and would fill the memory, or never end."""
        root: yaml.Node | None = super().get_single_node()
        if root is not None and _num_values(root, {}) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"it stands for more than {MAX_VALUES} values", root.start_mark
            )
        return root


def _num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for; endlessly many when it is a part of itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # until it is counted
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        below = (each for part in parts for each in (part if isinstance(part, tuple) else (part,)))
        known[id(node)] = 1 + sum(_num_values(each, known) for each in below)
    return known[id(node)]


def recipes() -> dict[str, Path]:
    """The configs that come with foldstack, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file of that path, or the recipe of that name.

    Raises:
        InputError: there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name in recipes():
        return recipes()[name]
    what = "is a directory" if path.is_dir() else "does not exist"
    near = difflib.get_close_matches(name, recipes(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(
        f"config {name} {what}; give a YAML file, or a recipe: {', '.join(recipes())}{hint}"
    )


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a config file with the overrides put in.

    Raises:
        InputError: the file or an override cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} cannot be read: {error}") from error
    data = _parse(text, str(path))
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise InputError(f"config {path} must be a mapping of keys, got a {type(data).__name__}")
    for override in overrides:
        put(data, override)
    return data


def put(data: dict[str, Any], override: str) -> None:
    """Set what `key.sub=value` names; a number names an item of a list.

    Raises:
        InputError: it has no "=", or its place does not exist.
    """
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise InputError(f"an override looks like key.sub=value, got {override}")
    value = _parse(text, f"override {override}")
    place: Any = data
    for depth, part in enumerate(path[:-1]):
        place = _enter(place, part, ".".join(path[: depth + 1]))
    if isinstance(place, list):
        place[_index(place, path[-1], key)] = value
    elif isinstance(place, dict):
        place[path[-1]] = value
    else:
        raise InputError(f"override {override}: {'.'.join(path[:-1])} has no keys")


def _enter(place: Any, part: str, where: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, where)]
    if isinstance(place, dict):
        if place.get(part) is None:
            place[part] = {}
        return place[part]
    raise InputError(f"override {where}: {where.rpartition('.')[0]} has no keys")


def _index(items: list[Any], part: str, where: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise InputError(
        f"override {where}: the list has items 0 to {len(items) - 1}, and {part} is none of them"
    )


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError:
        raise InputError(f"{where} is nested too deeply to be a config") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where} is not valid YAML:{place} {problem}") from error
