"""The quality gate against a real registry: what is accepted, what passes, what is refused."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from foldstack.tasks.tracking.quality_gate import Gate, Verdict, apply_gate, refused
from foldstack.tasks.tracking.run_record import DatasetUse, ModelFiles, RunRecord
from foldstack.tasks.tracking.tracker import Tracker

pytestmark = pytest.mark.foreign_warnings

EXPERIMENT = "foldstack/tiny"
MODEL = "foldstack-tiny"
GATE = Gate(max_worse_bits_per_byte=0.01)


class Nights:
    """Logs the result of a night, and has it judged."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self._folder = folder

    def judge(
        self, bits: float, window: int = 64, text: str = "t1", dense: str = "d1", at: str = "0.30",
        found: str = "", gate: Gate = GATE,
    ) -> Verdict:  # fmt: skip
        fingerprint = f"{bits}-{window}-{text}-{dense}-{at}-{found}"
        record = RunRecord(
            name=f"shortgpt {at}",
            fingerprint=fingerprint,
            params={"evaluation.perplexity.protocol.window_tokens": window, "method.name": "x"},
            metrics={"quality/bits_per_byte": bits},
            tags={"foldstack.base_fingerprint": dense, "foldstack.verdict": found},
            model=ModelFiles(self._folder / "model", fingerprint),
            datasets=[DatasetUse("lines for evaluation", text, "lines.txt", "evaluation")],
        )
        tracker = Tracker(self.uri, EXPERIMENT, self._folder / "receipts", self._folder / "files")
        tracker.log(record)
        tracker.finish()
        assert tracker.warnings == []
        (verdict,) = apply_gate(self.uri, EXPERIMENT, MODEL, {at: fingerprint}, gate)
        return verdict

    def accepted(self, at: str = "0-30") -> float:
        """Bits per byte of the version that carries the alias."""
        client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        version = client.get_model_version_by_alias(MODEL, f"accepted-at-{at}")
        return float(client.get_run(str(version.run_id)).data.metrics["quality/bits_per_byte"])


@pytest.fixture
def nights(tmp_path: Path, database: bytes) -> Nights:
    (tmp_path / "mlflow.db").write_bytes(database)
    return Nights(tmp_path)


def test_first_result_is_accepted_and_a_better_one_takes_its_place(nights: Nights) -> None:
    assert nights.judge(1.5).outcome == "accepted"
    assert nights.accepted() == 1.5
    assert nights.judge(1.4).outcome == "accepted"
    assert nights.accepted() == 1.4


def test_the_same_result_is_accepted_again(nights: Nights) -> None:
    nights.judge(1.5)
    assert nights.judge(1.5).outcome == "accepted"


def test_a_little_worse_passes_but_many_nights_cannot_drift(nights: Nights) -> None:
    nights.judge(1.5)
    assert nights.judge(1.508).outcome == "passed"
    assert nights.accepted() == 1.5
    verdict = nights.judge(1.516)  # within the gate of the night before, not of what was accepted
    assert verdict.outcome == "refused"
    assert "1.5160 bits per byte, +0.0160 beside the accepted 1.5000" in verdict.reason
    assert nights.accepted() == 1.5
    assert refused([verdict]) == [verdict]


def test_each_sparsity_has_an_accepted_result_of_its_own(nights: Nights) -> None:
    nights.judge(1.5)
    assert nights.judge(1.9, at="0.50").outcome == "accepted"
    assert (nights.accepted(), nights.accepted("0-50")) == (1.5, 1.9)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"window": 128}, "window_tokens was 64 and is 128"),
        ({"text": "t2"}, "the text lines for evaluation was t1 and is t2"),
        ({"dense": "d2"}, "base_fingerprint was d1 and is d2"),
    ],
)
def test_what_was_measured_otherwise_is_no_improvement(
    nights: Nights, change: dict[str, object], name: str
) -> None:
    nights.judge(1.5)
    verdict = nights.judge(1.0, **change)  # type: ignore[arg-type]
    assert verdict.outcome == "refused"
    assert name in verdict.reason
    assert nights.accepted() == 1.5


def test_verdict_stands_on_the_run_that_was_judged(nights: Nights) -> None:
    verdict = nights.judge(1.5)
    client = MlflowClient(tracking_uri=nights.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["foldstack.gate"] == str(verdict)


def test_nothing_is_judged_that_is_not_in_mlflow(nights: Nights) -> None:
    nights.judge(1.5)
    with pytest.raises(LookupError, match=r"sparsity 0\.30 is not in experiment foldstack/tiny"):
        apply_gate(nights.uri, EXPERIMENT, MODEL, {"0.30": "another"}, GATE)


def test_the_gate_can_demand_a_verdict(nights: Nights) -> None:
    """Breaks when a model that no longer matches the dense one is accepted where that is asked."""
    demanding, lenient = Gate(verdict="matching"), Gate(verdict="not refuted")
    refused_one = nights.judge(1.5, found="open", gate=demanding)
    assert refused_one.outcome == "refused"
    assert refused_one.reason == "its verdict beside dense is open, and matching is demanded"
    assert nights.judge(1.5, found="not matching", gate=lenient).outcome == "refused"
    assert nights.judge(1.5, found="open", gate=lenient).outcome == "accepted"
    assert nights.judge(1.4, found="matching", gate=demanding).outcome == "accepted"
