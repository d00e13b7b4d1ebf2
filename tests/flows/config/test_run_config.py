from pathlib import Path
from typing import Any

import pytest

from foldstack.compression.errors import InputError
from foldstack.compression.methods import METHODS
from foldstack.flows.config.config_file import find_config, put, read_config
from foldstack.flows.config.run_config import (
    RunConfig,
    json_schema,
    load_config,
    parse_config,
    to_yaml,
)

METHODS_ENTRY: dict[str, Any] = {"methods": [{"name": "shortgpt"}]}


def complaint(**data: Any) -> str:
    """What is said of a config that is fine but for `data`."""
    with pytest.raises(InputError) as caught:
        parse_config(METHODS_ENTRY | data)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            {"calibraton": {}},
            "unknown key calibraton at top level; did you mean calibration?",
        ),
        (
            {"calibration": {"num_window": 3}},
            "unknown key num_window in calibration; did you mean num_windows?",
        ),
        (
            {"methods": ["shortgpt", {"name": "svd_llm", "updat": "none"}]},
            "unknown key updat in methods[1]; did you mean update?",
        ),
        ({"methods": ["shortgtp"]}, "got shortgtp; did you mean shortgpt?"),
        (
            {"methods": [{"name": "svd_llm", "update": "closed"}]},
            "methods[0].update must be none or closed_form, got 'closed'",
        ),
        ({"methods": [{"update": "none"}]}, "methods[0].name is missing"),
        ({"methods": []}, "methods must have at least 1 entry, got []"),
        ({"sparsities": [0.2, 1.5]}, "sparsities[1]: it must be less than 1, got 1.5"),
        ({"sparsities": [0]}, "sparsities[0]: it must be greater than 0, got 0"),
        ({"sparsities": 0.3}, "sparsities must be a list, got 0.3"),
        ({"workers": "many"}, "workers must be a whole number or auto, got 'many'"),
        ({"methods": ["shortgpt", "shortgpt"]}, "shortgpt 0.20 stands there twice"),
        ({"model": {"dtype": "float8"}}, "model.dtype must be auto or float32"),
        ({"output": {"home": "a\0b"}}, "output.home must be a path"),
    ],
)
def test_mistake_is_named_with_its_place(data: dict[str, Any], sentence: str) -> None:
    assert sentence in complaint(**data)


@pytest.mark.parametrize(
    "name, expected",
    [("Qwen/Qwen3-0.6B", "Qwen3-0.6B"), ("/", "model"), ("/a/b/..", "a"), ("/a/../..", "model")],
)
def test_no_name_of_a_model_leads_out_of_the_home(name: str, expected: str) -> None:
    assert parse_config(METHODS_ENTRY | {"model": name}).model.short_name == expected


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("methods: &a [*a]", "stands for more than 100000 values"),
        (
            "a0: &a0 [x, x]\n"
            + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
            "stands for more than 100000 values",
        ),
    ],
)
def test_a_config_cannot_fill_the_memory(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_config(tmp_path / "config.yaml")


def test_every_mistake_is_named_at_once() -> None:
    sentences = complaint(sparsities=[2], calibraton={})
    assert "sparsities[0]" in sentences
    assert "calibraton" in sentences


def test_a_method_refuses_a_setting_in_the_words_of_its_entry() -> None:
    entry = {"name": "llm_streamline", "batch_size": 0}
    assert "methods[0].batch_size" in complaint(methods=[entry])


def test_variants_are_methods_times_sparsities_times_seeds() -> None:
    config = parse_config(
        {
            "methods": [{"name": "shortgpt"}, {"name": "svd_llm", "sparsities": [0.4]}],
            "sparsities": [0.1, 0.25],
            "seeds": [0, 1],
        }
    )
    assert [(v.name, v.sparsity, v.seed) for v in config.variants] == [
        ("shortgpt", 0.1, 0),
        ("shortgpt", 0.1, 1),
        ("shortgpt", 0.25, 0),
        ("shortgpt", 0.25, 1),
        ("svd_llm", 0.4, 0),
        ("svd_llm", 0.4, 1),
    ]
    assert config.variants[1].label == "shortgpt 0.10 seed 1"


def test_two_entries_of_one_method_are_told_apart_by_what_differs() -> None:
    entries = [{"name": "svd_llm"}, {"name": "svd_llm", "update": "none"}]
    config = parse_config({"methods": entries})
    assert [v.label for v in config.variants] == ["svd_llm closed_form 0.20", "svd_llm none 0.20"]
    # Labels become names of files: no brackets.
    several = [
        {"name": "search", "budget": {"flops": 0.5}},
        {"name": "search", "library": ["ranks"]},
    ]
    config = parse_config({"methods": several})
    assert [v.label for v in config.variants] == [
        "search widths+removals+maps flops 0.5 0.20", "search ranks none 0.20",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_can_be_named_alone(name: str) -> None:
    asked = -0.3 if name == "flexigpt_extend" else 0.3  # the one that adds parameters
    entry = {"name": name, "sparsities": [asked]}
    (variant,) = parse_config({"methods": [entry], "sparsities": [0.3]}).variants
    assert type(variant.method) is METHODS[name]
    assert variant.method.sparsity == asked


def test_resolved_config_says_the_same_when_read_again(tmp_path: Path) -> None:
    config = parse_config(METHODS_ENTRY | {"recovery": {"learning_rate": 1e-4}})
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(config))
    assert load_config(str(file)) == config


def test_overrides_reach_into_mappings_and_lists() -> None:
    data: dict[str, Any] = {"methods": [{"name": "shortgpt"}, {"name": "svd_llm"}]}
    put(data, "methods.1.update=closed_form")
    put(data, "recovery.learning_rate=1e-4")
    put(data, "sparsities=[0.1, 0.2]")
    config = parse_config(data)
    assert config.variants[-1].label == "svd_llm 0.20"
    assert config.recovery.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sparsities", "looks like key.sub=value, got sparsities"),
        ("methods.7.name=x", "the list has items 0 to 0, and 7 is none of them"),
        ("name.x=1", "name has no keys"),
        ("sparsities=[0.1", "is not valid YAML"),
    ],
)
def test_wrong_override_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(InputError, match="override") as caught:
        put({"methods": [{"name": "shortgpt"}], "name": "t"}, override)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("methods: [", "is not valid YAML: line 1"),
        ("seeds: [0]\nseeds: [1]", "key seeds stands there twice"),
        ("- shortgpt", "must be a mapping of keys, got a list"),
    ],
)
def test_unreadable_file_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_config(file)
    assert sentence in str(caught.value)


def test_missing_file_is_refused_and_recipes_are_offered() -> None:
    with pytest.raises(InputError, match=r"no-such.yaml does not exist; .* demo"):
        find_config("no-such.yaml")


def test_schema_knows_the_keys_of_every_method() -> None:
    schema = json_schema()
    for method in METHODS.values():
        keys = schema["$defs"][f"{method.__name__}Entry"]["properties"]
        assert set(method.model_fields) - {"sparsity", "seed"} < set(keys)
        assert "sparsity" not in keys


def test_title_says_what_is_swept() -> None:
    config = RunConfig.model_validate(
        {"methods": ["shortgpt", "svd_llm"], "sparsities": [0.1, 0.2]}
    )
    assert config.title == "sweep reference 2 methods x 2"
