"""The night that ends when it should, and what it announces; sweeps are tested elsewhere."""

from threading import Event
from typing import Any

import pytest
from prefect import flow

from foldstack.flows import nightly as module
from foldstack.flows.comparison.result import Comparison, Row
from foldstack.flows.config.run_config import RunConfig, parse_config
from foldstack.flows.nightly import GateRefused, TookTooLong, nightly
from foldstack.flows.sweep import SweepFailed
from foldstack.tasks.tracking.quality_gate import Verdict

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def config() -> RunConfig:
    return parse_config({"methods": ["shortgpt"], "sparsities": [0.25]})


told_to_end = Event()


@flow(name="sweep", persist_result=False)
def endless(config: RunConfig) -> Comparison:
    """Ends as the real one does when its processes are killed."""
    assert told_to_end.wait(120), "it was not ended"
    failed = Row(label="dense", method="dense", state="failed", cause="the run was told to end")
    raise SweepFailed(Comparison(title="endless", sweep="abc", model="tiny", rows=(failed,)))


@flow(name="sweep", persist_result=False)
def quick(config: RunConfig) -> Comparison:
    return Comparison(
        title="quick", sweep="abc", model="tiny", rows=(Row(label="dense", method="dense"),)
    )


def test_a_night_that_overruns_is_ended_and_says_so(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "sweep", endless)
    monkeypatch.setattr(module, "end_workers", told_to_end.set)
    with pytest.raises(TookTooLong, match=r"was ended after 0\.0005 h"):
        nightly(config, limit_hours=0.0005)


def test_what_the_gate_decides_is_an_event(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {"model": "shortgpt 0.25", "bits_per_byte": 1.5, "reason": "because"}
    verdicts = [
        Verdict(sparsity="0.25", outcome="accepted", **told),
        Verdict(sparsity="0.50", outcome="refused", **told),
    ]
    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "sweep", quick)
    monkeypatch.setattr(module, "quality_gate", lambda *_: verdicts)
    monkeypatch.setattr(module, "emit_event", lambda **event: heard.append(event))
    with pytest.raises(GateRefused, match="1 of 2 models refused"):
        nightly(config)
    names = [each["event"] for each in heard]
    assert names == ["foldstack.model.accepted", "foldstack.model.refused"]
    assert heard[0]["resource"]["prefect.resource.id"] == "foldstack.model.foldstack-reference.0.25"
    assert heard[0]["payload"]["reason"] == "because"
