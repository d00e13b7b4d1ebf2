"""The flow on a tiny model: what runs, what is found again, what a failure leaves alone."""

import errno
import html
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.states import Failed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.checkpoints import checkpoint
from foldstack.compression.checkpoints.checkpoint import ReloadReport, load_plan
from foldstack.compression.errors import InputError
from foldstack.compression.evaluation import benchmark_index, speed
from foldstack.compression.methods.factoring.svd_llm import SvdLlm
from foldstack.compression.methods.method import TOLERANCE
from foldstack.flows.cli.command_cache import gc_command
from foldstack.flows.comparison.files import load
from foldstack.flows.comparison.findings import findings
from foldstack.flows.comparison.result import Comparison
from foldstack.flows.comparison.tables import records
from foldstack.flows.config.run_config import RunConfig, load_config, parse_config
from foldstack.flows.planning.forecast import dry_run
from foldstack.flows.planning.preflight import check
from foldstack.flows.running.branches import lay_out
from foldstack.flows.running.stage_runs import outcome_of
from foldstack.flows.sweep import SweepFailed, run_sweep
from foldstack.tasks.environment.home import disk_full
from foldstack.tasks.tracking.run_record import RunRecord
from foldstack.tasks.tracking.tracker import Tracker

pytestmark = pytest.mark.foreign_warnings

Make = Callable[..., RunConfig]
Run = Callable[[RunConfig], tuple[Comparison, dict[str, str]]]


# The tiny model has four blocks: two of them may share.
SHARING = {"name": "block_sharing", "keep_head": 1, "keep_tail": 1}
SHORT_WINDOWS = {"perplexity": {"protocol": {"window_tokens": 32}}}


@pytest.fixture(scope="module", autouse=True)
def no_fresh_processes() -> Iterator[None]:
    """What libraries do in fresh processes is tested with them; here it would cost minutes."""
    seen = ReloadReport(1.0, 0.0, 0.0, True, (1,), 1, "LlamaForCausalLM", 0.0)
    patch = pytest.MonkeyPatch()
    patch.setattr(checkpoint, "check_reload", lambda model, folder, **_: seen)
    patch.setattr(speed, "peak_memory", lambda folders, *_: dict.fromkeys(folders, 1))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory, model: Path, text_lines: tuple[str, ...]
) -> Make:
    """Maker of a config on the tiny model; `home` and everything else can be set."""
    text = tmp_path_factory.mktemp("text") / "lines.txt"
    text.write_text("\n\n".join(text_lines))
    source = {"corpus": str(text), "separator": "\n\n"}
    windows = {"num_windows": 4, "window_tokens": 16, "bos": "none"}

    def config(home: Path, **changes: Any) -> RunConfig:
        data: dict[str, Any] = {
            "model": {"name": str(model), "device": "cpu"},
            "calibration": {"source": source, **windows},
            "methods": ["shortgpt", "svd_llm"],
            "sparsities": [0.15],
            "recovery": {"steps": 2, "batch_size": 2, "source": source, "windows": windows},
            "evaluation": {
                "perplexity": {
                    "source": source,
                    "protocol": {"window_tokens": 32, "max_tokens": 200},
                },
                "tracks": {
                    "reading": {
                        "texts": {
                            "lines": {
                                "source": source,
                                "protocol": {"window_tokens": 16, "max_tokens": 200},
                            }
                        }
                    }
                },
                "samples": {"count": 2, "prompt_tokens": 3, "new_tokens": 2},
            },
            "speed": {"prompt_tokens": 4, "new_tokens": 2, "repeats": 1, "load_repeats": 1},
            "tracking": {"enabled": False},
            "output": {"home": str(home)},
            "workers": 2,
        }
        return parse_config(data | changes)

    return config


@pytest.fixture(scope="module")
def run(new_display: Callable[[], Any]) -> Run:
    """Runs a config; gives the comparison, and what became of each stage."""

    def run(config: RunConfig) -> tuple[Comparison, dict[str, str]]:
        heard = new_display()
        layout = lay_out(config)
        check(layout)
        return run_sweep(layout, heard), heard.outcomes

    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(make: Make, home: Path, prefect_server: str, run: Run) -> Comparison:
    comparison, _ = run(make(home, tracking={"enabled": True}))
    return comparison


def test_every_model_has_its_row(first: Comparison) -> None:
    assert [row.label for row in first.rows] == ["dense", "shortgpt 0.15", "svd_llm 0.15"]
    for row in first.rows:
        assert row.state == "done", row.cause
        assert row.number("bits_per_byte") is not None
        assert row.number("decode_tokens_per_second", "speed") is not None
        assert (Path(row.folder) / "config.json").is_file()
    dense, *smaller = first.rows
    removed = load_plan(Path(smaller[0].folder))
    assert (removed.base_num_blocks, len(removed.removed_blocks)) == (4, 1)
    for row in smaller:
        assert row.after["bits_per_byte"] != row.before["bits_per_byte"]
        assert row.number("parameters", "structure") < dense.number("parameters", "structure")  # type: ignore[operator]
        realised = row.number("realised_sparsity", "structure")
        assert realised == pytest.approx(0.15, abs=0.12)
        is_off = abs(realised - 0.15) > TOLERANCE
        assert is_off == any(
            s.startswith(f"{row.method} removed {realised:.1%}") for s in first.missed
        )


def test_every_variant_has_a_verdict_its_tracks_and_samples(first: Comparison) -> None:
    """Breaks when a track of one model is held against another's, or a row has no verdict."""
    dense, *smaller = first.rows
    assert (dense.verdict, dense.tracks) == (None, ())
    assert len(dense.samples) == 2
    for row in smaller:
        assert [track.track for track in row.tracks] == ["text", "reading"]
        (lines,) = row.tracks[1].tasks
        assert (lines.task, lines.metric) == ("lines", "perplexity")
        assert row.tracks[1].score == pytest.approx(min(1.0, lines.dense / lines.other))
        assert row.verdict is not None
        assert row.verdict.verdict in ("matching", "not matching", "open")
        assert [sample.prompt for sample in row.samples] == [s.prompt for s in dense.samples]
        assert 0 < row.costs["footprint"] < 1.2  # type: ignore[operator]
    assert findings(first)[0].startswith("Beside dense, ")


def test_every_variant_is_paired_with_the_dense_model_and_the_best(first: Comparison) -> None:
    dense, *smaller = first.rows
    assert dense.beside_dense == {}
    for row in smaller:
        difference = row.number("bits_per_byte_difference", "beside_dense")
        assert difference == pytest.approx(
            row.final["bits_per_byte"] - dense.final["bits_per_byte"]
        )  # type: ignore[operator]
        assert row.number("bits_per_byte_difference_stderr", "beside_dense") > 0  # type: ignore[operator]
    best = first.best()[0.15]
    (other,) = (row for row in smaller if row != best)
    (rival,) = first.rivals
    assert (rival.row, rival.lower) == (other.label, best.label)
    assert rival.difference == pytest.approx(
        other.final["bits_per_byte"] - best.final["bits_per_byte"]  # type: ignore[operator]
    )
    assert rival.is_level == any("cannot be told apart" in told for told in findings(first))


def test_report_holds_table_picture_and_resolved_config(first: Comparison, make: Make) -> None:
    folder = Path(first.links["report"])
    assert load(folder).rows == first.rows
    assert (folder / "quality_against_size.png").read_bytes().startswith(b"\x89PNG")
    assert Path(first.links["page"]).read_text().startswith("<!doctype html>")
    assert load_config(str(folder / "config.yaml")).methods == make(folder).methods
    for row, record in zip(first.rows[1:], records(first.frame())[1:], strict=True):
        assert record["over dense"] == pytest.approx(
            row.number("bits_per_byte_difference", "beside_dense"), rel=1e-5
        )
    for sentence in findings(first):
        assert sentence in html.unescape((folder / "report.html").read_text())
        assert sentence in (folder / "comparison.md").read_text()


def test_garbage_leaves_a_sweep_that_is_kept(first: Comparison, home: Path) -> None:
    options: dict[str, Any] = {"keep_days": -1, "max_gib": None, "dry_run": True, "as_json": True}
    everything = json.loads(gc_command(home, keep=(), **options))
    besides = json.loads(gc_command(home, keep=[Path(first.links["report"]).name], **options))
    stages = {"compress_model", "recover_model", "evaluate_model", "gather_statistics"}

    def stages_that_go(report: dict[str, Any]) -> set[str]:
        paths = [Path(each["path"]) for each in report["removed"] if each["kind"] == "artifact"]
        return {path.parent.name for path in paths}

    assert stages <= stages_that_go(everything)
    assert stages_that_go(besides) == set()


def test_mlflow_has_a_run_per_model_and_one_of_the_sweep(first: Comparison) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=first.links["mlflow"])
    experiment = client.get_experiment_by_name("foldstack/tiny-llama")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"dense", "shortgpt 0.15", "svd_llm 0.15", first.title}
    variant = runs["svd_llm 0.15"]
    assert variant.info.status == "FINISHED"
    assert variant.data.params["method.name"] == "svd_llm"
    assert variant.data.params["sparsity"] == "0.15"
    assert variant.data.tags["foldstack.sweeps"] == first.sweep
    assert {
        "quality/bits_per_byte",
        "before_recovery/bits_per_byte",
        "beside_dense/bits_per_byte_difference_stderr",
        "size/parameters",
    } <= set(variant.data.metrics)
    contexts = {tag.value for use in variant.inputs.dataset_inputs for tag in use.tags}
    assert contexts == {"calibration", "recovery", "evaluation"}
    files = {file.path for file in client.list_artifacts(variant.info.run_id)}
    assert {"plan.json", "config.yaml", "ranking", "recover", "environment.json"} <= files


def test_mlflow_shows_the_comparison_as_a_table(
    first: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", first.links["mlflow"])  # what load_table asks
    client = MlflowClient(tracking_uri=first.links["mlflow"])
    (experiment,) = client.search_experiments(filter_string="name = 'foldstack/tiny-llama'")
    runs = client.search_runs([experiment.experiment_id], "tags.`foldstack.kind` = 'sweep'")
    table = client.load_table(
        experiment.experiment_id, "comparison_table.json", [runs[0].info.run_id]
    )
    assert list(table["model"]) == [row.label for row in first.rows]
    assert table["bits/byte"].dtype.kind == "f"
    note = runs[0].data.tags["mlflow.note.content"]
    assert all(sentence in note for sentence in findings(first))


def test_best_variant_is_registered(first: Comparison) -> None:
    from mlflow import MlflowClient

    uri = first.links["mlflow"]
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    version = client.get_model_version_by_alias("foldstack-tiny-llama", "best-at-0-15")
    run = client.get_run(version.run_id or "")
    assert run.info.run_name == first.best()[0.15].label
    assert version.tags["bits_per_byte"] == f"{first.best()[0.15].number('bits_per_byte'):.4g}"


def test_every_variant_has_a_model_and_mlflow_holds_the_best(first: Comparison) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=first.links["mlflow"])
    experiment = client.get_experiment_by_name("foldstack/tiny-llama")
    assert experiment is not None
    models = {each.name: each for each in client.search_logged_models([experiment.experiment_id])}
    assert set(models) == {"shortgpt-0-15", "svd_llm-0-15"}
    uploaded = {name for name, each in models.items() if "foldstack.uploaded" in each.tags}
    assert uploaded == {re.sub(r"[ .]", "-", first.best()[0.15].label)}
    run = client.get_run(models["svd_llm-0-15"].source_run_id)
    assert {"mlflow.user", "mlflow.source.name"} <= set(run.data.tags)
    seconds = sum(first.rows[2].seconds.values())
    assert run.info.end_time - run.info.start_time == pytest.approx(1000 * seconds, abs=5)


def test_prefect_shows_ranking_and_comparison(first: Comparison) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = {artifact.key: artifact for artifact in client.read_artifacts()}
        said = {run.state.message for run in client.read_flow_runs() if run.state}
    assert {found[f"{page}-tiny-llama"].type for page in ("ranking", "comparison")} == {"table"}
    assert found["sweep-of-tiny-llama"].type == "markdown"
    for page in ("ranking", "comparison"):
        plot = found[f"{page}-tiny-llama-plot"]
        assert "](data:image/png;base64," in plot.data
    assert " ".join(findings(first)[:6]) in said, "a list of runs does not say what was found"


def test_second_run_finds_everything_and_logs_nothing(
    first: Comparison, make: Make, home: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    def refuse(self: Tracker, item: RunRecord) -> None:
        raise AssertionError(f"{item} was logged again")

    page = Path(first.links["page"])
    drawn = page.stat().st_mtime_ns
    monkeypatch.setattr(Tracker, "_write", refuse)
    again, outcomes = run(make(home, tracking={"enabled": True}))
    assert set(outcomes.values()) == {"cached"}
    assert again.num_cached == again.num_stages == len(outcomes)
    assert again.warnings == ()
    assert again.rows == first.rows
    assert again.sweep == first.sweep
    assert page.stat().st_mtime_ns == drawn


def test_a_method_that_is_added_runs_alone(
    first: Comparison, make: Make, home: Path, run: Run
) -> None:
    methods = ["shortgpt", "svd_llm", SHARING]
    more, outcomes = run(make(home, methods=methods))
    ran = {label for label, outcome in outcomes.items() if outcome != "cached"}
    assert ran == {label for label in outcomes if "block_sharing" in label}
    assert more.rows[:3] == first.rows


def test_a_native_model_is_distilled_from_the_tail_of_its_teacher(
    first: Comparison, make: Make, home: Path, run: Run
) -> None:
    """A stock model does not say which blocks it lacks: its plan file does."""
    recovery = make(home).model_dump(mode="json")["recovery"] | {"tail_distillation": 1.0}
    found, outcomes = run(
        make(home, methods=["shortgpt"], recovery=recovery, speed={"enabled": False})
    )
    assert found.failed == ()
    assert outcomes["compress shortgpt 0.15"] == "cached"
    assert load_plan(Path(found.rows[1].folder)) == load_plan(Path(first.rows[1].folder))


def test_dry_run_knows_sizes_and_what_is_stored(first: Comparison, make: Make, home: Path) -> None:
    expected = dry_run(make(home, methods=["shortgpt", SHARING]))
    sizes = {entry.label: entry.parameters for entry in expected.models}
    for row in first.rows[:2]:
        assert sizes[row.label] == row.structure["parameters"]
    stored = {entry.label for entry in expected.stages if entry.is_stored}
    assert "compress shortgpt 0.15" in stored
    assert "rank blocks" in stored


@pytest.mark.usefixtures("prefect_server")
def test_a_branch_that_fails_stops_no_other(
    make: Make, home: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    def fail(self: SvdLlm, *_: object) -> None:
        raise ArithmeticError("no such root")

    monkeypatch.setattr(SvdLlm, "compress", fail)
    config = make(home, sparsities=[0.25], speed={"enabled": False})
    with pytest.raises(
        SweepFailed, match=r"1 of 3 models failed.*svd_llm 0\.25.*no such root"
    ) as caught:
        run(config)
    comparison = caught.value.comparison
    states = {row.label: row.state for row in comparison.rows}
    assert states == {"dense": "done", "shortgpt 0.25": "done", "svd_llm 0.25": "failed"}
    assert comparison.rows[1].number("bits_per_byte") is not None


@pytest.mark.usefixtures("prefect_server", "first")
def test_a_dead_tracking_server_costs_a_warning(make: Make, home: Path, run: Run) -> None:
    dead = {"enabled": True, "uri": "http://127.0.0.1:9"}
    comparison, _ = run(make(home, tracking=dead, methods=["shortgpt"], speed={"enabled": False}))
    assert comparison.failed == ()
    (warning,) = comparison.warnings
    assert "next run logs what is missing" in warning


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sparsities": [0.99]}, "shortgpt can remove at most"),
        ({"model": "no/such model"}, "no model 'no/such model'"),
        ({"model": {"name": "{model}", "device": "cuda:99"}}, "device must be"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    make: Make, model: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    if isinstance(changes.get("model"), dict):
        changes = {"model": changes["model"] | {"name": str(model)}}
    with pytest.raises(InputError) as caught:
        check(lay_out(make(tmp_path / "home", **changes)))
    assert sentence in str(caught.value)
    assert not (tmp_path / "home" / "store").exists()


def test_unknown_benchmark_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(names: tuple[str, ...], include_paths: tuple[Path, ...]) -> None:
        raise InputError(f"no benchmark {names[0]}")

    monkeypatch.setattr(benchmark_index, "check_tasks", refuse)  # it would read 14,000 files
    evaluation = {**SHORT_WINDOWS, "benchmarks": ["stdlib_continuatio"]}
    with pytest.raises(InputError, match="no benchmark stdlib_continuatio"):
        check(lay_out(make(tmp_path, evaluation=evaluation)))


def test_window_longer_than_the_context_is_refused(make: Make, tmp_path: Path) -> None:
    config = make(tmp_path)
    longer = config.calibration.model_copy(update={"window_tokens": 4096})
    with pytest.raises(InputError, match="window_tokens may be at most the model's context of 128"):
        check(lay_out(config.model_copy(update={"calibration": longer})))


def test_home_that_cannot_be_written_to_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="must be a folder that can be written to"):
        check(lay_out(make(tmp_path / "file")))


def test_disk_that_was_full_when_a_result_was_kept_is_that_sentence() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/data/records/1.json")
    outcome = outcome_of(Failed(data=error))
    assert (outcome.kind, outcome.is_input_error) == ("failed", True)
    assert outcome.cause == disk_full("/data/records/1.json")


@pytest.mark.usefixtures("prefect_server")
def test_text_that_is_too_short_ends_the_run_at_once(make: Make, tmp_path: Path, run: Run) -> None:
    config = make(tmp_path)
    more = config.calibration.model_copy(update={"num_windows": 10**6})
    with pytest.raises(InputError, match="windows of 16 tokens"):
        run(config.model_copy(update={"calibration": more}))
