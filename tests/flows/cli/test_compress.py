"""`foldstack compress`: the recipe that wishes stand for, what is refused, and how it ends."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from foldstack.compression.checkpoints.checkpoint import load_tokenizer
from foldstack.compression.errors import InputError
from foldstack.compression.methods import METHODS
from foldstack.compression.reference import MODEL_FOLDER
from foldstack.flows.cli import app as cli
from foldstack.flows.cli import command_run
from foldstack.flows.cli.command_compress import (
    check_out,
    copy_out,
    facts_of,
    picking,
    points_of,
    print_points,
    recipe_command,
    usage_of,
)
from foldstack.flows.cli.listing import listing, markdown_table
from foldstack.flows.comparison.result import Comparison, Row
from foldstack.flows.config import model_recipe
from foldstack.flows.config.model_recipe import (
    Wishes,
    method_for,
    recipe_for,
    source_named,
    sparsity_of,
)
from foldstack.flows.config.run_config import ModelChoice, RunConfig, load_config, parse_config

FolderFactory = Callable[..., Path]


def test_a_model_alone_is_compressed_on_what_it_writes(model_folder: FolderFactory) -> None:
    folder = model_folder("llama")
    config = parse_config(recipe_for(Wishes(str(folder)), folder))
    assert config.model == ModelChoice(name=str(folder))
    assert [variant.label for variant in config.variants] == ["search 0.20"]
    assert config.calibration.source.corpus == config.evaluation.perplexity.source.corpus == "self"
    assert config.calibration.source.split != config.evaluation.perplexity.source.split
    assert config.calibration.window_tokens == 128  # its context
    assert config.calibration.bos == config.evaluation.perplexity.protocol.bos == "document"
    assert not config.recovery.steps
    assert not config.evaluation.benchmarks


def test_reference_model_has_a_text_of_its_own() -> None:
    config = parse_config(recipe_for(Wishes("reference"), MODEL_FOLDER))
    assert config.model.name == "reference"
    sources = config.calibration.source, config.evaluation.perplexity.source
    assert [(s.corpus, s.split) for s in sources] == [
        ("python-stdlib", "train"),
        ("python-stdlib", "test"),
    ]
    assert config.calibration.num_windows == 128


def test_every_wish_is_in_the_recipe(model_folder: FolderFactory, tmp_path: Path) -> None:
    folder, text = model_folder("llama"), tmp_path / "some.txt"
    text.write_text("def item(value): return value\n" * 400)
    wishes = Wishes(
        str(folder), sparsity=0.3, method="shortgpt", calibration=str(text), test="data:set",
        recover=3, benchmarks=["piqa"], dtype="float32", device="cpu", home=tmp_path / "home",
    )  # fmt: skip
    config = parse_config(recipe_for(wishes, folder))
    assert [variant.label for variant in config.variants] == ["shortgpt 0.30"]
    assert (config.model.dtype, config.model.device) == ("float32", "cpu")
    assert config.calibration.source.corpus == config.recovery.source.corpus == str(text)
    measured = config.evaluation.perplexity.source
    assert (measured.corpus, measured.subset, measured.split) == ("data", "set", "test")
    assert config.evaluation.benchmarks == ("piqa",)
    assert (config.recovery.steps, config.recovery.windows.seed) == (3, 1)
    assert config.output.home == tmp_path / "home"
    # No more windows than the text fills.
    tokenizer = load_tokenizer(folder)
    tokens = len(tokenizer(text.read_text(), verbose=False)["input_ids"])
    assert config.calibration.num_windows == min(128, tokens // 128) < 128
    assert config.recovery.windows.num_windows == min(24, tokens // 128)


def test_a_tokenizer_without_bos_is_asked_for_none(model_folder: FolderFactory) -> None:
    folder = model_folder("gpt2")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in settings.items() if k != "bos_token"}))
    config = parse_config(recipe_for(Wishes(str(folder)), folder))
    assert config.calibration.bos == config.evaluation.perplexity.protocol.bos == "none"


def test_sparsity_is_what_goes_or_what_stays() -> None:
    assert sparsity_of(None, None) is None
    assert sparsity_of(0.35, None) == 0.35
    assert sparsity_of(None, 0.7) == 0.3
    with pytest.raises(InputError, match="give --sparsity or --to, not both"):
        sparsity_of(0.3, 0.7)
    with pytest.raises(InputError, match="--to must be a fraction between 0 and 1, such as"):
        sparsity_of(None, 1.0)


def test_a_search_is_scored_on_what_the_model_can_afford(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without it a deep model, or one of a large vocabulary, would be scored for hours."""
    wishes = Wishes("reference", method="search")
    chosen = method_for(wishes, MODEL_FOLDER)
    assert chosen == method_for(Wishes("reference"), MODEL_FOLDER, lambda: 1e12)
    assert chosen.tokens
    assert 1024 <= chosen.tokens < 2048
    assert recipe_for(wishes, MODEL_FOLDER)["sensitivity"] == {"tokens": chosen.tokens}
    monkeypatch.setattr(model_recipe, "SCORING_PASSES", 1.0)
    assert method_for(wishes, MODEL_FOLDER).tokens == 512  # two windows
    assert method_for(Wishes("reference", method="shortgpt"), MODEL_FOLDER).why == ""


def test_nobody_waits_for_a_search_that_was_not_asked_for() -> None:
    """Without it a large model on a small machine would be scored for a night by default."""
    chosen = method_for(Wishes("reference"), MODEL_FOLDER, lambda: 1e8)
    assert (chosen.method, chosen.tokens) == ("modegpt", None)
    assert re.search(r"would compute for [\d,]+ minutes here: --method search", chosen.why)
    asked = Wishes("reference", method="search")
    assert method_for(asked, MODEL_FOLDER, lambda: 1e8).method == "search"


def test_a_front_goes_as_far_as_its_method(model_folder: FolderFactory) -> None:
    """Without it a front of a model that is mostly embeddings would be refused as a whole."""
    config = parse_config(
        recipe_for(Wishes("reference", front=True, method="modegpt"), MODEL_FOLDER)
    )
    assert config.sparsities == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert config.speed.enabled
    folder = model_folder("llama", vocab_size=2048)
    wishes = Wishes(str(folder), front=True, method="modegpt")
    config = parse_config(recipe_for(wishes, folder))
    assert len(config.sparsities) == 5
    assert max(config.sparsities) < 0.5
    assert config.speed.prompt_tokens + config.speed.new_tokens <= 128  # its context
    asked = parse_config(recipe_for(replace(wishes, sparsity=0.1), folder))
    assert asked.sparsities == (0.02, 0.04, 0.06, 0.08, 0.1)


def test_a_point_is_picked_by_the_command_that_made_the_front(tmp_path: Path) -> None:
    command = "foldstack compress DIR --front --to=0.6 --home H --json"
    assert picking(command, 0.3) == "foldstack compress DIR --sparsity 0.3 --out FOLDER --home H"
    with pytest.raises(InputError, match="--front makes several models"):
        check_out(tmp_path, is_front=True)


def test_a_front_ends_with_a_folder_for_each_point(
    comparison: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it a person sees the front and cannot have any of it."""
    points = points_of(comparison, RunConfig(methods=("shortgpt",)))
    assert [(point["asked"], point["folder"]) for point in points] == [
        (row.sparsity, row.folder) for row in comparison.rows if not row.is_dense
    ]
    assert points[0]["flops_per_token"].keys() == {"dense", "compressed"}
    print_points(points, "foldstack compress DIR --front", Console(width=80))
    said = capsys.readouterr().out
    assert f"80.0% of the parameters: {points[0]['folder']}" in said
    assert said.splitlines()[-1] == "  " + picking("foldstack compress DIR --front", 0.2)


def test_texts_are_named_in_a_word() -> None:
    assert source_named("self", "test") == {"corpus": "self", "split": "test"}
    assert source_named("a/b.jsonl", "train") == {"corpus": str(Path("a/b.jsonl").absolute())}
    assert source_named("org/set:sub", "train") == {
        "corpus": "org/set",
        "subset": "sub",
        "split": "train",
    }


def test_saved_recipe_is_the_config_that_is_run(
    model_folder: FolderFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = model_folder("llama"), tmp_path / "recipe.yaml"
    monkeypatch.setenv("FOLDSTACK_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder.parent)  # the recipe holds the place as it is from anywhere
    recipe = recipe_command(Wishes(folder.name), file)
    assert file.read_text() == recipe.text
    monkeypatch.chdir("/")
    assert load_config(str(file)) == recipe.config
    with pytest.raises(InputError, match="the recipe cannot be written to"):
        recipe_command(Wishes(str(folder)), tmp_path / "no-folder" / "recipe.yaml")


def made_folder(tmp_path: Path, content: str = "weights") -> Path:
    folder = tmp_path / f"store-{content}" / "model"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text("{}")
    (folder / "model.safetensors").write_text(content)
    return folder


def test_the_model_is_copied_whole_and_nothing_is_written_over(tmp_path: Path) -> None:
    made, out = made_folder(tmp_path), tmp_path / "deep" / "out"
    check_out(out)
    copy_out(made, out)
    assert {file.name: file.read_text() for file in out.iterdir()} == {
        "plan.json": "{}",
        "model.safetensors": "weights",
    }
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    copy_out(made, out)  # again is nothing
    other = made_folder(tmp_path, "others")
    with pytest.raises(InputError, match=f"holds another model, .* the new one is in {other}"):
        copy_out(other, out)
    assert (out / "model.safetensors").read_text() == "weights"

    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty")
    copy_out(made, tmp_path / "empty")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    with pytest.raises(InputError, match=r"new or empty, and .*notes holds other files"):
        check_out(tmp_path / "notes")
    with pytest.raises(InputError, match="is a file"):
        check_out(out / "plan.json")


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    sizes = {"parameters": 1000, "bytes": 4 << 20}
    dense = Row(
        label="dense", method="dense", structure=sizes,
        before={"bits_per_byte": 1.0, "perplexity": 4.0, "piqa/acc": 0.7},
    )  # fmt: skip
    small = Row(
        label="modegpt 0.20", method="modegpt", sparsity=0.2, folder=str(made_folder(tmp_path)),
        structure={"parameters": 800, "bytes": 3 << 20, "grade": "portable",
                   "realised_sparsity": 0.2},
        before={"bits_per_byte": 1.5, "perplexity": 8.0, "piqa/acc": 0.6},
        after={"bits_per_byte": 1.25, "perplexity": 5.6, "piqa/acc": 0.65},
        beside_dense={"bits_per_byte_difference": 0.25, "bits_per_byte_difference_stderr": 0.01},
    )  # fmt: skip
    return Comparison(title="t", sweep="s", model="m", rows=(dense, small), num_stages=7)


def test_what_was_lost_is_said_as_data(comparison: Comparison) -> None:
    facts = facts_of(comparison, comparison.rows[1])
    assert facts["parameters"] == {"dense": 1000, "compressed": 800}
    assert facts["lost"]["bits_per_byte"] == {
        "dense": 1.0, "compressed": 1.25, "before_recovery": 1.5, "difference": 0.25,
        "stderr": 0.01,
    }  # fmt: skip
    assert facts["lost"]["piqa/acc"]["difference"] is None
    assert list(facts["lost"]) == ["bits_per_byte", "perplexity", "piqa/acc"]


@pytest.mark.parametrize(("as_json", "is_named"), [(False, True), (True, True), (True, False)])
def test_command_ends_with_the_folder_and_the_lines_that_use_it(
    comparison: Comparison,
    model_folder: FolderFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    as_json: bool,
    is_named: bool,
) -> None:
    monkeypatch.setenv("FOLDSTACK_HOME", str(tmp_path / "home"))
    seen: list[RunConfig] = []

    def run_command(config: RunConfig, *_: Any) -> Comparison:
        seen.append(config)
        command_run.link_models(config, comparison)
        return comparison

    monkeypatch.setattr(command_run, "run_command", run_command)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # so that none is started
    out, model = tmp_path / "out", model_folder("llama")
    arguments = [str(model), "--to", "0.7", "--recover", "2"]
    if is_named:
        arguments += ["--out", str(out)]
    else:
        out = tmp_path / "home" / "models" / f"{model.name}-modegpt-0.20"
    monkeypatch.setattr(sys, "argv", ["foldstack", "compress", *arguments, *["--json"] * as_json])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    said, told = capfd.readouterr()
    assert [variant.sparsity for variant in seen[0].variants] == [0.3]
    assert (out / "model.safetensors").read_text() == "weights"
    use = usage_of(comparison.rows[1], out)
    assert "trust_remote_code=True" in use[1]
    if as_json:
        found = json.loads(said)
        assert (found["folder"], found["use"]) == (str(out), use)
        assert parse_config(yaml.safe_load(found["recipe"])) == seen[0]
        return
    assert said.splitlines()[0] == f"folder: {out}"
    assert "size: 800 of 1,000 parameters (20.0% gone), 3.0 of 4.0 MiB" in said
    assert "bits_per_byte: 1 -> 1.25 (+0.2500 ±0.0100), before recovery 1.5" in said
    assert "measured on: text that the dense model wrote" in said
    assert said.splitlines()[-3:] == use
    assert "corpus: self" in told  # the recipe


def test_a_mistake_is_one_sentence(
    model_folder: FolderFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FOLDSTACK_HOME", str(tmp_path / "home"))
    folder = str(model_folder("llama"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF?")
    for arguments, sentence in (
        (["no-such-folder"], "no model 'no-such-folder'"),
        ([folder, "--method", "modegtp"], "did you mean modegpt?"),
        ([folder, "--calibration", "no-such.txt"], "a corpus file must exist"),
        ([folder, "--dtype", "int4"], "model.dtype must be auto or float32"),
        ([folder, "--sparsity", "0.97", "--dry-run"], "search can remove at most"),
        ([str(tmp_path / "broken.gguf")], "broken.gguf is not a whole GGUF file"),
    ):
        monkeypatch.setattr(sys, "argv", ["foldstack", "compress", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capfd.readouterr()
        assert caught.value.code == 2, arguments
        assert said.out == ""
        assert sentence in said.err.splitlines()[-1]
        assert said.err.splitlines()[-1].startswith("foldstack: ")


def test_version_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["foldstack", "--version"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert capsys.readouterr().out.startswith("foldstack 0.")


def test_methods_are_a_markdown_table_with_their_papers() -> None:
    lines = list(markdown_table("methods", listing("methods")))
    assert lines[1] == "|---|---|---|"
    assert len(lines) == 2 + len(METHODS)
    row = next(line for line in lines if line.startswith("| `shortgpt` |"))
    assert row.endswith("| arXiv 2403.03853 |")
    assert len(list(markdown_table("recipes", listing("recipes")))) == 2 + len(listing("recipes"))
