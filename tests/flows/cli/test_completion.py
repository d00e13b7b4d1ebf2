"""What the shell offers, without an import that a person would wait for."""

import subprocess
import sys

from foldstack.flows.cli.completion import complete_kind, complete_override, complete_recipe
from foldstack.flows.config.config_file import recipes


def test_recipes_and_kinds_complete() -> None:
    assert complete_recipe("dem") == ["demo"]
    assert set(complete_recipe("")) == set(recipes())
    assert complete_kind("arch") == ["architectures"]


def test_keys_complete_section_by_section_and_values_where_there_are_few() -> None:
    assert complete_override("recovery.st") == ["recovery.steps="]
    assert complete_override("tracking.upload_models=") == [
        "tracking.upload_models=best",
        "tracking.upload_models=all",
        "tracking.upload_models=none",
    ]
    assert complete_override("speed.enabled=f") == ["speed.enabled=false"]


def test_what_lists_and_completes_imports_nothing_heavy() -> None:
    code = """
import sys
import foldstack.flows.cli.command_cache, foldstack.flows.cli.completion
heavy = {"torch", "transformers", "prefect", "mlflow", "datasets", "numpy"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
