"""Every recipe that comes with foldstack can be read; the published schema is current."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from foldstack.compression.methods.method import TOLERANCE
from foldstack.compression.reference import MODEL_FOLDER
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import build_on_meta
from foldstack.flows.config.config_file import RECIPES, recipes
from foldstack.flows.config.run_config import json_schema, load_config


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipe_is_valid(name: str) -> None:
    config = load_config(name)
    assert config.variants
    assert config.evaluation.benchmarks or config.evaluation.tracks


def test_recipes_are_found() -> None:
    """Where they are not, the tests made from them vanish, and `foldstack run demo` fails."""
    assert {"demo", "local-model"} <= set(recipes())


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


@pytest.mark.parametrize("name", ["prune-then-share", "prune-then-factor", "share-then-factor"])
def test_a_recipe_that_stacks_has_one_budget_and_recovers(name: str) -> None:
    config = load_config(name)
    assert config.recovery.steps > 0
    model = build_on_meta(AutoConfig.from_pretrained(MODEL_FOLDER))
    (stack,) = [variant.method for variant in config.variants if variant.method.name == "stack"]
    alone = {variant.method.name for variant in config.variants} - {"stack"}
    assert {step.name for step in stack.steps} == alone  # beside each alone, at the same size
    left = size_of_plan(model.config, stack.outline(model)).parameters
    removed = 1 - left / count_parameters(model)
    assert removed >= stack.sparsity - TOLERANCE
    if "factor" in name:
        assert removed == pytest.approx(stack.sparsity, abs=TOLERANCE)


def test_published_schema_is_current() -> None:
    published = json.loads((RECIPES / "schema.json").read_text())
    assert published == json_schema(), "run: foldstack schema > flows/recipes/schema.json"
