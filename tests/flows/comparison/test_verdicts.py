"""The verdict is what is read first: in words, tables, the report, and MLflow's page of a run."""

from collections.abc import Callable

import pytest

from foldstack.compression.evaluation.records import Sample
from foldstack.compression.evaluation.tracks.result import (
    ModelVerdict,
    TaskResult,
    TrackResult,
    model_verdict,
    track_result,
)
from foldstack.flows.comparison.findings import findings
from foldstack.flows.comparison.report import page_of_sweeps
from foldstack.flows.comparison.result import Comparison, Row
from foldstack.flows.comparison.sweep_log import metrics, run_note
from foldstack.flows.comparison.tables import arranged, columns, markdown


def task(name: str, retained: float, verdict: str, items: int = 500) -> TaskResult:
    return TaskResult(
        task=name, metric="acc", dense=0.6, other=0.6 * retained, num_items=items, of_items=500,
        chance=0.25, retained=retained, stderr=0.02, raw_ratio=retained, verdict=verdict,
        items_needed=1830 if verdict == "open" else None,
    )  # fmt: skip


@pytest.fixture
def judged(make_row: Callable[..., Row], make_comparison: Callable[..., Comparison]) -> Comparison:
    tracks = {
        "good": [track_result("inference", [task("piqa", 0.99, "matching")])],
        "bad": [track_result("inference", [task("piqa", 0.5, "not matching", 66)])],
        "unsure": [track_result("inference", [task("piqa", 0.96, "open")])],
    }
    rows = [
        make_row(
            name,
            0.2,
            1.1,
            tracks=tuple(some),
            verdict=model_verdict(some, 0.05),
            samples=(Sample(prompt="Once <upon>", continuation=f"{name} & so on"),),
        )
        for name, some in tracks.items()
    ]
    return make_comparison(*rows)


def test_sentences_begin_with_the_verdict(judged: Comparison) -> None:
    """Breaks when a best model reads like a good one although it no longer matches."""
    first, second = findings(judged)
    assert first == (
        "Beside dense, matching: good 0.20; not matching: bad 0.20; open: unsure 0.20."
    )
    assert second.startswith("At 20 % good is best, matching (piqa is within 5 % of dense): 0.100")


def test_the_table_has_it_behind_the_name(judged: Comparison) -> None:
    """Breaks when a person must look for it, or a track is shown without its error."""
    frame = arranged(judged.frame())
    assert [column.name for column in columns(frame)][:3] == ["model", "verdict", "track_inference"]
    assert "| bad 0.20 | not matching | 0.500 ±0.020 |" in markdown(frame)


def test_the_report_opens_with_it(judged: Comparison) -> None:
    """Breaks when the card of a size does not say it before anything else."""
    page = page_of_sweeps([judged])
    card = page[page.index('<section class="card">') :]
    assert card.index('class="verdict matching"') < card.index('class="name"')
    assert 'class="text verdict not-matching"' in page


def test_the_report_has_what_every_model_writes(judged: Comparison) -> None:
    """Breaks when a model's words stand beside another's prompt, or are taken for markup."""
    page = page_of_sweeps([judged])
    panel = page[page.index("What they write") :]
    assert panel.index("Once &lt;upon&gt;") < panel.index("<dt>good 0.20</dt><dd>good &amp; so on")
    assert "<dt>bad 0.20</dt><dd>bad &amp; so on" in panel


def test_mlflow_shows_it_first(judged: Comparison) -> None:
    """Breaks when a run's page does not begin with it, or its tracks are no metrics."""
    row = judged.rows[2]
    note = run_note(row)["mlflow.note.content"]
    assert note.splitlines()[0] == "**not matching: piqa -50.0 % on 66 of 500 items**"
    assert "- inference, piqa (acc): 0.3 beside 0.6, 0.500 ± 0.020 left, not matching" in note
    assert metrics(row)["track/inference"] == 0.5
    assert metrics(row)["track/inference/piqa_items"] == 66


def test_an_open_verdict_names_the_task_that_takes_most() -> None:
    """Breaks when a reader learns that more is needed, and not how much of what."""
    tracks = [
        TrackResult(track="a", tasks=(task("piqa", 0.97, "open"), task("arc", 0.99, "matching")))
    ]
    assert model_verdict(tracks, 0.05) == ModelVerdict(
        verdict="open", because="piqa takes about 1,900 items, 500 items are read"
    )
