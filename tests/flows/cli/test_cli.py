"""The command line as a person meets it: help, exit codes, one sentence per mistake."""

import errno
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from foldstack.compression.errors import InputError
from foldstack.compression.methods import METHODS
from foldstack.flows.cli import app as cli
from foldstack.flows.cli.listing import listing
from foldstack.flows.cli.output import output_for_result
from foldstack.tasks.environment.home import disk_full

CONFIG = "methods: [shortgpt]\n"


def foldstack(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "foldstack.flows.cli.app", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=250,
    )


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["foldstack", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_output_that_cannot_hold_a_sign_shows_another(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Otherwise a run ends with a traceback when its table is printed, after all its work."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)

    def show() -> None:
        sys.stdout.write("modegpt 0.012 ± 0.001\n")
        with output_for_result() as output:
            print("the table 3 ± 1", file=output)

    monkeypatch.setattr(cli, "app", show)
    cli.main()
    terminal.seek(0)
    assert terminal.read() == "modegpt 0.012 ? 0.001\n"
    assert "the table 3 ? 1\n" in capfd.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
sys.argv = ["foldstack", "--help"]
from foldstack.flows.cli.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code
heavy = {"torch", "transformers", "prefect", "mlflow", "datasets", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    started = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for command in ("run", "plan", "evaluate", "bench", "compare", "ls", "cache", "schema", "ui"):
        assert f" {command} " in done.stdout
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "no-such.yaml"], "config no-such.yaml does not exist"),
        (["plan", "{config}", "calibraton={}"], "did you mean calibration?"),
        (["plan", "{config}", "sparsities=[2]"], "sparsities[0]: it must be less than 1, got 2"),
        (["plan", "{config}", "model=no-such-folder"], "no model 'no-such-folder'"),
        (["ls", "method"], "did you mean methods?"),
        (["compare"], "run one with `foldstack run CONFIG`"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    sentence: str,
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    monkeypatch.setenv("FOLDSTACK_HOME", str(tmp_path / "home"))
    # A server that is never asked, so that none is started.
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    code = call(monkeypatch, *(text.replace("{config}", str(config)) for text in arguments))
    output, said = capfd.readouterr()
    assert code == 2
    assert output == ""
    assert said.startswith("foldstack: ")
    assert sentence in said
    assert said.count("\n") == 1


def test_wrong_usage_is_exit_code_2_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "run", "--no_such_option", "x") == 2


def test_options_are_taken_with_underscores_and_with_dashes() -> None:
    for option in ("--dry_run", "--dry-run"):
        assert foldstack("run", option, "--help").returncode == 0


def test_schema_is_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "foldstack run"


def test_listings_name_everything() -> None:
    assert list(listing("methods")) == list(METHODS)
    assert all(listing("methods").values())
    assert "llama" in listing("architectures")
    assert "demo" in listing("recipes")
    with pytest.raises(InputError, match="did you mean recipes"):
        listing("recipe")


def test_dry_run_prints_one_json_object_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    model_folder: Callable[..., Path],
) -> None:
    folder = model_folder("llama")
    config = tmp_path / "config.yaml"
    config.write_text(
        "methods: [shortgpt]\nsparsities: [0.15]\nmodel: {device: cpu}\n"
        "calibration: {num_windows: 2, window_tokens: 16, bos: none}\n"
        "evaluation: {perplexity: {protocol: {window_tokens: 16}}}\n"
    )
    home = f"output.home={tmp_path / 'home'}"
    arguments = ["run", str(config), f"model.name={folder}", home, "--dry_run", "--json"]
    assert call(monkeypatch, *arguments) == 0
    expected = json.loads(capfd.readouterr().out)
    assert [entry["label"] for entry in expected["models"]] == ["dense", "shortgpt 0.15"]
    assert not any(stage["is_stored"] for stage in expected["stages"])


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/rows.json"), "/data/rows.json"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the results"),
    ],
)
def test_full_disk_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    place: str,
) -> None:
    def fill(what: str) -> dict[str, str]:
        raise error

    monkeypatch.setattr("foldstack.flows.cli.listing.listing", fill)
    assert call(monkeypatch, "ls", "methods") == 2
    assert capfd.readouterr().err == f"foldstack: {disk_full(place)}\n"


def test_cache_explains_every_stage(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    model_folder: Callable[..., Path],
) -> None:
    folder = model_folder("llama")
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    monkeypatch.setenv("FOLDSTACK_HOME", str(tmp_path / "home"))
    arguments = ["cache", "explain", str(config), f"model.name={folder}", "--json"]
    assert call(monkeypatch, *arguments) == 0
    stages = json.loads(capfd.readouterr().out)["stages"]
    assert {stage["stage"] for stage in stages} > {"gather_statistics", "compress_model"}
    assert not any(stage["is_hit"] for stage in stages)

    assert call(monkeypatch, "cache", "ls", "--json") == 0
    assert json.loads(capfd.readouterr().out)["artifacts"] == []
    assert call(monkeypatch, "cache", "gc", "--dry_run", "--json") == 0
    assert json.loads(capfd.readouterr().out)["removed"] == []
    assert call(monkeypatch, "cache", "gc", "--keep", "no-such-sweep") == 2
    assert "keep must name a sweep" in capfd.readouterr().err
