"""The flow behind the short form in Prefect's pages: what a person asks for by hand."""

import foldstack.flows.prefect_defaults  # noqa: F401 (before Prefect)

# isort: split

from collections.abc import Sequence
from typing import Annotated, Any

from prefect import flow, runtime
from pydantic import Field

from foldstack.compression.methods import METHODS
from foldstack.flows.comparison.result import Comparison
from foldstack.flows.config.config_file import find_config, put, read_config, recipes
from foldstack.flows.config.run_config import RunConfig, parse_config
from foldstack.flows.sweep import answered, dated, sweep

RecipeName = Annotated[str, Field(json_schema_extra={"enum": sorted(recipes())})]
MethodName = Annotated[str, Field(json_schema_extra={"enum": list(METHODS)})]


def _name() -> str:
    asked = runtime.flow_run.parameters
    methods = ", ".join(asked.get("methods") or [])
    return dated(str(asked.get("model") or asked.get("recipe")), methods)


@flow(name="compress", flow_run_name=_name, persist_result=False)
def on_demand(
    recipe: RecipeName = "demo",
    model: str = "",
    methods: list[MethodName] = [],  # noqa: B006 (a form shows it; nothing writes to it)
    sparsities: list[float] = [],  # noqa: B006
    overrides: list[str] = [],  # noqa: B006
) -> Comparison:
    """Run a recipe, on another model, with other methods or at other sparsities if that is asked.

    Args:
        recipe: what is done, where nothing below says otherwise.
        model: a folder that the worker sees, a GGUF file, or a name on the hub; empty: the
            recipe's.
        methods: which ones; empty: the recipe's. Those of the recipe keep its settings.
        sparsities: fractions of the model to remove, like 0.3; empty: the recipe's.
        overrides: more settings, one a line, like recovery.steps=0.

    Raises:
        InputError: something of it cannot work; nothing has been computed then.
        SweepFailed: some variants failed.
    """
    config = config_of(recipe, model, methods, sparsities, overrides)
    return answered(sweep(config))


def config_of(
    recipe: str,
    model: str = "",
    methods: Sequence[str] = (),
    sparsities: Sequence[float] = (),
    overrides: Sequence[str] = (),
) -> RunConfig:
    """The config that the form stands for.

    Raises:
        InputError: a name is unknown, or a value does not fit.
    """
    path = find_config(recipe)
    data = read_config(path)
    if model:
        data["model"] = model
    if methods:
        known = {_method_of(entry): entry for entry in data.get("methods", [])}
        data["methods"] = [known.get(name, name) for name in methods]
    if sparsities:
        data["sparsities"] = list(sparsities)
    for override in overrides:
        put(data, override)
    return parse_config(data, where=f"the form, on {path}")


def _method_of(entry: Any) -> Any:
    return entry.get("name") if isinstance(entry, dict) else entry
