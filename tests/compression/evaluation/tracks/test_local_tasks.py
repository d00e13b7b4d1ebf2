"""Own tasks over local files: each defect of the released suites undone, and tested for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.tracks.answers import (
    distinct,
    exact_match,
    f1,
    normalised,
    repetition,
    rouge_l,
)
from foldstack.compression.evaluation.tracks.local_tasks import Reader, check_local, local_task
from foldstack.compression.evaluation.tracks.settings import FORMS, LocalFile

FREEBASE = {
    "Questions": [
        {
            "RawQuestion": "Which city is the capital of France?",
            "Parses": [
                {"Answers": [{"AnswersName": ["paris", "City of Light"]}]},
                {"Answers": [{"AnswersName": ["Lutetia"]}]},
            ],
        }
    ]
}
TRIVIA = {
    "question": "Who wrote Hamlet?",
    "answer": {"value": "Shakespeare", "aliases": ["William Shakespeare", "The"]},
    "entity_pages": {"wiki_context": ["wiki " * 30]},
    "search_results": {"search_context": ["web " * 30]},
}
ADVERSARIAL = {
    "sst2": [{"sentence": "a grea t film", "label": 1, "idx": 0}] * 6,
    "qqp": [{"question1": "a?", "question2": "b?", "label": 1, "idx": 0}],
    "mnli": [{"premise": "It rains", "hypothesis": "It is dry.", "label": 2, "idx": 0}],
    "qnli": [{"question": "Who?", "sentence": "He did.", "label": 0, "idx": 0}],
    "rte": [{"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0, "idx": 0}],
}
Make = Callable[..., Any]


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Make:
    """Maker of a task from records: `make("freebaseqa", records)`."""

    def of(form: str, records: Any, max_length: int = 128, **more: Any) -> Any:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        file.write_text(json.dumps(records))
        local = LocalFile(file=file, form=form, **more)
        return local_task("mine", local, Reader(tokenizer, max_length))

    return of


def scores(task: Any, answer: str, number: int = 0) -> dict[str, float]:
    return dict(task.process_results(task.dataset["test"][number], [answer]))


def test_answers_are_normalised_as_squad_does() -> None:
    """Breaks when an article or a full stop makes an answer wrong, or nothing makes it right."""
    assert normalised("The  Eiffel-Tower, a.") == "eiffeltower"
    assert exact_match(" Paris.\n", ["the paris"]) == 1
    assert exact_match("", ["", "the"]) == exact_match("the", ["a", "paris"]) == 0
    assert exact_match("not Paris", ["Paris"]) == 0  # containment is no match
    assert f1("william shakespeare", ["Shakespeare", "Bacon"]) == pytest.approx(2 / 3)
    assert f1("", ["Paris"]) == 0


def test_variety_by_hand() -> None:
    """Breaks when a text that says one thing over and over looks as rich as another."""
    assert distinct("a b a b", 1) == 0.5
    assert distinct("a b a b", 2) == pytest.approx(2 / 3)
    assert repetition("a b c d a b c d") == pytest.approx(1 - 4 / 5)
    assert (distinct("", 1), repetition("a b")) == (0.0, 0.0)
    assert rouge_l("the cat sat", "the cat ran") == pytest.approx(2 / 3)


def test_every_answer_of_every_parse_counts_and_an_empty_one_never(make: Make) -> None:
    """FreebaseQA: the first parse alone was accepted, as a substring of question and answer."""
    task = make("freebaseqa", FREEBASE)
    assert [scores(task, each)["em"] for each in ("Paris", " lutetia.", "city of light")] == [1] * 3
    assert [scores(task, each)["em"] for each in ("", "France", "Paris is it")] == [0] * 3
    (doc,) = task.dataset["test"]
    assert task.doc_to_text(doc).endswith("France?\nThe answer is")  # no space to tokenise apart
    assert task.config.generation_kwargs["until"] == ["\n"]


def test_the_number_of_items_is_that_of_the_file(make: Make) -> None:
    """The released script counted one item more than it divided by."""
    plain = [{"question": f"{n}?", "answers": ["yes"]} for n in range(7)]
    task = make("freebaseqa", plain)
    assert len(task.dataset["test"]) == len(task.eval_docs) == 7


def test_open_book_prompts_fit_and_wiki_comes_first(
    make: Make, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Evidence was cut by characters: the question fell out of the context, or nothing was cut."""
    for max_length in (64, 128, 4096):
        task = make("triviaqa_open", [TRIVIA], max_length=max_length)
        prompt = task.doc_to_text(task.dataset["test"][0])
        assert prompt.endswith("Answer these questions:\n\nQ: Who wrote Hamlet?\nA:")
        assert len(tokenizer(prompt)["input_ids"]) + 32 <= max(max_length, 96)
    assert prompt.index("wiki") < prompt.index("web")
    closed = make("triviaqa_closed", [TRIVIA])
    assert closed.doc_to_text(closed.dataset["test"][0]) == prompt[prompt.index("Answer these") :]
    assert scores(task, "William  Shakespeare")["em"] == 1
    assert scores(task, "") == {"em": 0.0, "f1": 0.0}  # "The" is an alias of which nothing is left


def test_adversarial_answers_are_those_of_the_clean_tasks(make: Make) -> None:
    """AdvGLUE: examples said A where scoring meant B; and the largest part decided."""
    group = make("advglue", ADVERSARIAL)
    right = {"sst2": "positive", "qqp": "yes", "mnli": "False", "qnli": "yes", "rte": "True"}
    tasks = {task.task_name: task for task in group.get_all_tasks()}
    assert set(tasks) == {f"mine_{part}" for part in right}
    for part, word in right.items():
        task = tasks[f"mine_{part}"]
        (doc, *_) = task.dataset["test"]
        choices = task.doc_to_choice(doc)
        assert choices[task.doc_to_target(doc)] == word
        copied = [(-1.0 if choice == word else -5.0, False) for choice in choices]
        assert task.process_results(doc, copied)["acc"] == 1
    (aggregate,) = group.aggregate_metric_list
    assert (aggregate.metric, aggregate.weight_by_size) == ("acc", False)


def test_summaries_are_scored_in_thirds_by_length(make: Make) -> None:
    """Bins by words of the whole set mixed lengths; and an article may fill the whole context."""
    records = [{"article": "word " * (n + 1), "highlights": f"gold {n}"} for n in range(9)]
    group = make("summaries", records, max_length=160)
    bins = {task.task_name: task for task in group.get_all_tasks()}
    lengths = [
        [len(doc["article"]) for doc in bins[f"mine_{each}"].dataset["test"]]
        for each in ("short", "middle", "long")
    ]
    assert [len(each) for each in lengths] == [3, 3, 3]
    assert max(lengths[0]) < min(lengths[1]) <= max(lengths[1]) < min(lengths[2])
    assert scores(bins["mine_short"], "gold 0")["rougeL"] == 1


def test_instructions_are_described_and_not_scored(make: Make) -> None:
    """Breaks when a question file without right answers gets a score."""
    task = make("instructions", [{"turns": ["Tell me.", "And then?"]}, {"text": "Why?"}])
    docs = task.dataset["test"]
    assert [task.doc_to_text(doc) for doc in docs] == ["Tell me.", "Why?"]
    assert scores(task, "no no no")["distinct_1"] == pytest.approx(1 / 3)


def test_choices_are_asked_as_lm_eval_asks_them(make: Make) -> None:
    """Breaks when the space before a choice is lost, or a suffix does not follow the question."""
    records = [{"query": "Question: Which?\n", "choices": ["this", "that"], "gold": 1}]
    task = make("choices", records, suffix="\nAnswer:")
    (doc,) = task.dataset["test"]
    assert task.doc_to_text(doc) == "Question: Which?\nAnswer:"
    assert (task.config.target_delimiter, task.doc_to_choice(doc)) == (" ", ["this", "that"])
    cloze = make("cloze", [{"context": "I do not care about", "continuation": "signs"}])
    assert cloze.doc_to_target(cloze.dataset["test"][0]) == " signs"


def test_any_task_of_lm_eval_reads_a_file(make: Make) -> None:
    """Breaks when a local copy of a data set gets other prompts than the hub's."""
    record = {
        "activity_label": "Jumping", "ctx_a": "He stands.", "ctx_b": "he", "label": 1,
        "endings": ["sits [title] down.", "jumps.", "eats.", "flies."],
    }  # fmt: skip
    task = make("hellaswag", [record])
    (doc,) = task.eval_docs
    assert task.doc_to_text(doc) == "Jumping: He stands. He"
    assert task.doc_to_choice(doc)[0] == "sits. down."
    with pytest.raises(InputError, match="or as one of lm-eval's tasks; mmmlu is none"):
        make("mmmlu", [record])


@pytest.mark.parametrize("form", sorted(FORMS))
def test_records_of_another_form_are_refused_by_number_and_field(form: str, tmp_path: Path) -> None:
    """Breaks when a wrong file is found out after the model was loaded, or by a traceback."""
    file = tmp_path / "some.jsonl"
    file.write_text('{"something": 1}\n')
    with pytest.raises(InputError, match=rf"record 0 of .* is not of the form {form}, which needs"):
        check_local("mine", LocalFile(file=file, form=form))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """Breaks when a missing or empty file becomes a benchmark without items."""
    for name, content, told in (
        ("none.jsonl", None, "cannot be read"), ("empty.jsonl", "\n", "must hold records"),
        ("some.txt", "x", "must be .jsonl"), ("broken.json", "{", "cannot be read"),
    ):  # fmt: skip
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=told):
            check_local("mine", LocalFile(file=tmp_path / name, form="choices"))
    table = tmp_path / "some.csv"
    table.write_text("context,continuation\nI do not care about,signs\n")
    check_local("mine", LocalFile(file=table, form="cloze"))
