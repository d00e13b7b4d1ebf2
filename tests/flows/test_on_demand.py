"""What the short form in Prefect's pages stands for."""

import pytest

from foldstack.compression.errors import InputError
from foldstack.flows.on_demand import config_of


def test_the_form_changes_what_is_asked_and_keeps_the_recipes_settings() -> None:
    demo = config_of("demo")
    asked = config_of("demo", "a/model", ["modegpt", "mka"], [0.1], ["recovery.steps=0"])
    assert (asked.model.name, asked.sparsities, asked.recovery.steps) == ("a/model", (0.1,), 0)
    kept = {method.name: method for method in demo.methods}
    assert [method.name for method in asked.methods] == ["modegpt", "mka"]
    assert asked.methods[0] == kept["modegpt"]
    assert config_of("demo", overrides=["name=mine"]).title == "mine"


def test_what_the_form_cannot_mean_is_said() -> None:
    with pytest.raises(InputError, match="demo"):
        config_of("dmeo")
    with pytest.raises(InputError, match="recovery"):
        config_of("demo", overrides=["recovery.stepz=1"])
