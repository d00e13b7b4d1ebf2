"""Every recipe that comes with foldstack can be read; the published schema is current."""

import json
from pathlib import Path

import pytest

from foldstack.flows.config_file import RECIPES, recipes
from foldstack.flows.run_config import json_schema, load_config


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipe_is_valid(name: str) -> None:
    config = load_config(name)
    assert config.variants
    assert config.evaluation.benchmarks


@pytest.mark.parametrize("path", sorted(recipes().values()), ids=lambda path: path.stem)
def test_recipe_begins_with_its_schema_and_says_what_it_is(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    assert first == "# yaml-language-server: $schema=schema.json"
    assert second.startswith("# ")


def test_recipes_on_the_hub_are_pinned() -> None:
    for name in recipes():
        model = load_config(name).model
        if model.name.count("/") == 1:  # a hub id
            assert model.revision is not None, f"{name} follows a branch"
            assert len(model.revision) == 40, f"{name} follows a branch"


def test_published_schema_is_current() -> None:
    published = json.loads((RECIPES / "schema.json").read_text())
    assert published == json_schema(), "run: foldstack schema > flows/recipes/schema.json"
