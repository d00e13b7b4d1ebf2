"""Tracks through lm-eval on local files: whole, early stopped, over seeds, and back from disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.harness import evaluate
from foldstack.compression.evaluation.paired import Item
from foldstack.compression.evaluation.records import PerplexityProtocol
from foldstack.compression.evaluation.tracks.measure import TrackMeasurement
from foldstack.compression.evaluation.tracks.sequential import SequentialRule
from foldstack.compression.evaluation.tracks.settings import Track, TrackText
from foldstack.compression.evaluation.tracks.track_beside_dense import (
    agreement_of,
    evidence_gains,
    track_result_of,
)
from foldstack.compression.evaluation.tracks.track_evaluation import TrackEvaluation
from foldstack.compression.evaluation.tracks.verdict import VerdictRule
from foldstack.compression.text.corpus import TextSource

RULE, LOOKS = VerdictRule(), SequentialRule(looks=4, first_items=20)
NUM_ITEMS = 120
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
fewshot_split: test
output_type: {kind}
doc_to_text: context
doc_to_target: {target}
{more}
metadata: {{version: 1.0}}
"""
CHOICE = (
    'doc_to_choice: choices\ntarget_delimiter: ""\n'
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"
)
WRITING = (
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 2}\n'
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"
)
GROUP = """
group: both
task: [quiz, other_quiz]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., PreTrainedModel], tokenizer: Any) -> PreTrainedModel:
    return tiny_model("llama", vocab_size=len(tokenizer)).eval()


@pytest.fixture(scope="module")
def folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A quiz whose right answers are the model's own: it is the dense one, and knows them all."""
    folder = tmp_path_factory.mktemp("quiz")
    items: list[dict[str, Any]] = [
        {"context": f"item {number}:", "choices": [f" {number * k % 7}" for k in (2, 3, 5)],
         "label": 0}
        for number in range(NUM_ITEMS)
    ]  # fmt: skip
    for name, some in (("quiz", items), ("other_quiz", items[:30])):
        _write(folder, name, some, "multiple_choice", "label", CHOICE)
    answered = evaluate(model, tokenizer, ["quiz"], include_paths=[folder], batch_size=16)
    for item, answer in zip(items, answered.items, strict=True):
        item["label"] = answer.loglikelihoods.index(max(answer.loglikelihoods))
    for name, some in (("quiz", items), ("other_quiz", items[:30])):
        _write(folder, name, some, "multiple_choice", "label", CHOICE)
    _write(folder, "writing", items[:4], "generate_until", '"{{choices[0]}}"', WRITING)
    (folder / "both.yaml").write_text(GROUP)
    return folder


def _write(
    folder: Path, name: str, items: list[dict[str, Any]], kind: str, target: str, more: str
) -> None:
    file = folder / f"{name}.{len(list(folder.iterdir()))}.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    text = TASK.format(name=name, file=file, kind=kind, target=target, more=more)
    (folder / f"{name}.yaml").write_text(text)


Measure = Callable[..., TrackMeasurement]


@pytest.fixture
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    tiny_model: Callable[..., PreTrainedModel],
) -> Measure:
    """Maker of a measurement, of the dense model or of one that knows nothing of it."""

    def make(track: Track, *, stranger: bool = False) -> TrackMeasurement:
        other = tiny_model("llama", seed=7, vocab_size=len(tokenizer)).eval() if stranger else model
        return TrackMeasurement(other, tokenizer, track, [folder], batch_size=16)

    return make


def test_a_track_survives_its_folder(measure: Measure, tmp_path: Path) -> None:
    """Breaks when anything that a verdict is made of is not kept with the artifact."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    read = TrackText(
        source=TextSource(corpus=str(text)), protocol=PerplexityProtocol(window_tokens=16)
    )
    track = Track(tasks=("both", "writing"), texts={"fox": read}, limit={"both": 20})
    found = measure(track).whole()
    assert [len(found.of(name)) for name in ("quiz", "writing")] == [20, 4]
    found.save(tmp_path)
    loaded = TrackEvaluation.load(tmp_path)
    assert (loaded.benchmarks, loaded.items, loaded.texts) == (
        found.benchmarks, tuple(found.items), found.texts,
    )  # fmt: skip
    result = track_result_of("all", track, loaded, loaded, RULE)
    assert {task.task: task.retained for task in result.tasks} == {
        "both": 1.0, "writing": None, "fox": 1.0,
    }  # fmt: skip


def test_a_bad_model_is_read_until_that_is_known(measure: Measure) -> None:
    """Breaks when looks add up to other items than the dense model's, or go on after a verdict."""
    track = Track(tasks=("quiz",))
    dense = measure(track).whole()
    found = measure(track, stranger=True).until_decided(dense, RULE, LOOKS)
    (task,) = track_result_of("quiz", track, dense, found, RULE).tasks
    assert (task.verdict, task.of_items) == ("not matching", NUM_ITEMS)
    assert task.num_items == found.looks["quiz"].counts[-1] == len(found.items) < NUM_ITEMS
    asked = [item.doc_id for item in found.items]
    assert sorted(asked) == sorted(LOOKS.order(NUM_ITEMS)[: len(asked)])
    whole = measure(track, stranger=True).whole()
    (read,) = track_result_of("quiz", track, dense, whole, RULE).tasks
    assert read.verdict == task.verdict
    by_id = {item.doc_id: item for item in whole.items}
    for item in found.items:
        assert item.prompt_hash == by_id[item.doc_id].prompt_hash
        assert item.loglikelihoods == pytest.approx(by_id[item.doc_id].loglikelihoods, abs=1e-3)


def test_a_model_that_changed_nothing_matches_before_the_end(measure: Measure) -> None:
    """Breaks when "matching" needs every item even where not one answer differs; and of a group
    every member must have been asked at each look."""
    track = Track(tasks=("both",))
    dense = measure(track).whole()
    found = measure(track).until_decided(dense, RULE, LOOKS)
    result = track_result_of("quiz", track, dense, found, RULE)
    assert (result.verdict, result.tasks[0].of_items) == ("matching", NUM_ITEMS + 30)
    assert len(found.of("other_quiz")) >= len(found.of("quiz")) / 5 > 0


def test_seeds_are_averaged_by_item_and_spread_is_told(measure: Measure) -> None:
    """Breaks when one sampled run passes for the score."""
    track = Track(tasks=("writing",), seeds=(1, 2), temperature=1.0)
    found = measure(track).whole()
    assert len(found.of("writing")) == 4
    assert found.spread.keys() == {"writing/exact_match"}


def test_examples_that_depend_on_the_order_are_refused(measure: Measure) -> None:
    """Breaks when two models are compared after other examples in the prompt."""
    track = Track(tasks=("quiz",), num_fewshot=2)
    dense = measure(track).whole()
    with pytest.raises(InputError, match="other examples before the items of quiz"):
        measure(track).until_decided(dense, RULE, LOOKS)


def test_a_track_that_cannot_be_is_refused() -> None:
    """Breaks when a typing error in a limit is silently no limit."""
    with pytest.raises(ValueError, match="limit names quizz, and the tasks are quiz"):
        Track(tasks=("quiz",), limit={"quizz": 3})
    with pytest.raises(ValueError, match="needs tasks, files or texts"):
        Track()


def test_local_files_are_read_like_any_task(measure: Measure, tmp_path: Path) -> None:
    """Breaks when tasks over local files need the net, or cannot be stopped early: the macro mean
    of AdvGLUE has every part in it at each look."""
    parts = {
        "sst2": [{"sentence": f"film {n}", "label": n % 2} for n in range(30)],
        "rte": [{"sentence1": f"{n}", "sentence2": "x", "label": n % 2} for n in range(24)],
    }
    (tmp_path / "dev.json").write_text(json.dumps(parts))
    (tmp_path / "ask.jsonl").write_text('{"text": "Why?"}\n{"text": "How?"}\n')
    track = Track.model_validate({"files": {
        "advglue": {"file": tmp_path / "dev.json"},
        "ask": {"file": tmp_path / "ask.jsonl", "form": "instructions"},
    }, "chance": {"advglue": 0.0}})  # fmt: skip
    dense = measure(track).whole()
    early = measure(track, stranger=True).until_decided(dense, RULE, LOOKS)
    result = track_result_of("own", track, dense, early, RULE)
    (task,) = result.tasks
    scores = [dense.benchmarks[f"advglue_{part}"].scores["acc"].value for part in parts]
    assert dense.benchmarks["advglue"].scores["acc"].value == pytest.approx(sum(scores) / 2)
    assert (task.task, task.of_items) == ("advglue", 54)
    assert len(early.of("ask")) == 2
    assert result.agreement.keys() == {"ask"}


def answered(task: str, answers: list[str], right: list[float]) -> list[Item]:
    return [
        Item(benchmark=task, doc_id=number, doc_hash=f"{task}{number}", filter="none", target="",
             responses=(answer,), metrics={"em": score})
        for number, (answer, score) in enumerate(zip(answers, right, strict=True))
    ]  # fmt: skip


def test_what_evidence_adds_is_paired_by_question(tmp_path: Path) -> None:
    """Breaks when open and closed book are compared as if they were other questions."""
    files = {name: {"file": tmp_path / "qa.json", "form": f"triviaqa_{name}"}
             for name in ("open", "closed")}  # fmt: skip
    track = Track.model_validate({"files": files})
    items = [
        *answered("open", ["a", "b", "c", "d"], [1, 1, 1, 0]),
        *answered("closed", ["a", "b", "c", "d"], [1, 0, 1, 0]),
    ]
    (gain,) = evidence_gains(TrackEvaluation(items=items), track).values()
    assert (gain.difference, gain.only_first, gain.only_second) == (0.25, 0, 1)


def test_answers_without_a_right_one_are_compared_with_dense() -> None:
    """Breaks when a model that says something else altogether looks the same."""
    dense = answered("ask", ["the red fox", "no"], [0, 0])
    assert agreement_of(dense, dense) == 1
    assert agreement_of(dense, answered("ask", ["a red dog", "yes"], [0, 0])) == 0.25
