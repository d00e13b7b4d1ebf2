"""What `foldstack ls` prints: names, and a line about each."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from foldstack.compression.errors import InputError
from foldstack.flows.config.config_errors import did_you_mean
from foldstack.flows.config.config_file import RECIPES, recipes

ARXIV = re.compile(r"(?<![\d.])\d{4}\.\d{5}(?![\d.])")
"""A paper's number."""
KINDS = ("methods", "architectures", "recipes")


def kinds() -> dict[str, str]:
    """How to list what there is."""
    return {kind: f"foldstack ls {kind}" for kind in KINDS}


def listing(what: str) -> dict[str, str]:
    """Name and meaning of everything of a kind.

    Raises:
        InputError: there is no such kind.
    """
    match what:
        case "methods":
            return _methods()
        case "architectures":
            from foldstack.compression.structure.architectures import ARCHITECTURES

            return {name: _blocks(entry) for name, entry in sorted(ARCHITECTURES.items())}
        case "recipes":
            return {
                name: _first_comment(path.read_text(encoding="utf-8"))
                for name, path in recipes().items()
            }
    hint = did_you_mean(what, KINDS)
    raise InputError(f"`ls` lists {', '.join(KINDS)}, got {what}{hint}")


def markdown_table(what: str, entries: Mapping[str, str]) -> Iterator[str]:
    """Lines of a Markdown table of a listing; that of methods has a column for their papers."""
    if what != "methods":
        yield f"| {what} | |"
        yield "|---|---|"
        yield from (f"| `{name}` | {meaning} |" for name, meaning in entries.items())
        return
    from foldstack.compression.methods import METHODS

    yield "| method | what it does | source |"
    yield "|---|---|---|"
    for name, meaning in entries.items():
        papers = dict.fromkeys(ARXIV.findall(METHODS[name].__doc__ or ""))
        source = f"arXiv {', '.join(papers)}" if papers else ""
        yield f"| `{name}` | {meaning} | {source} |"


def _methods() -> dict[str, str]:
    """From the schema, which a test holds to the code: methods themselves import torch."""
    schema = json.loads(schema_text())
    entries = schema["properties"]["methods"]["items"]["oneOf"]
    methods = [schema["$defs"][entry["$ref"].rpartition("/")[2]] for entry in entries]
    return {
        method["properties"]["name"]["const"]: " ".join(method["description"].split())
        for method in methods
    }


def schema_text() -> str:
    """The JSON schema of configs as it comes with foldstack; of one that is just being written
    anew (`foldstack schema > flows/recipes/schema.json`) from the code.
    """
    if text := (RECIPES / "schema.json").read_text(encoding="utf-8"):
        return text
    from foldstack.flows.config.run_config import json_schema

    return json.dumps(json_schema(), indent=2) + "\n"


def _blocks(architecture: Any) -> str:
    linears = " ".join(site.name for site in architecture.linears)
    return f"blocks at {architecture.blocks_path}; linears {linears}"


def _first_comment(text: str) -> str:
    """The first comment that is not for the editor."""
    for line in text.splitlines():
        if line.startswith("#") and "yaml-language-server" not in line:
            return line.lstrip("# ")
    title = (yaml.safe_load(text) or {}).get("name", "")
    return str(title)
