"""Benchmarks over files of the user's own, in the forms that their authors publish.

The released suites around these data have defects that change scores (a question searched for its
own answer, an empty answer that is right, letters that mean one thing in the examples and another
in the scoring); the forms here have none of them, and are tested for each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.tracks.answers import (
    distinct,
    exact_match,
    f1,
    repetition,
    rouge_l,
)
from foldstack.compression.evaluation.tracks.local_records import (
    CANONICAL,
    Record,
    read_records,
)
from foldstack.compression.evaluation.tracks.settings import FORMS, LocalFile

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

Config = dict[str, Any]
CLOSED_BOOK = "Answer these questions:\n\nQ: {question}\nA:"
FACTOID = "Please give answer to this question: {question}\nThe answer is"
SUMMARY = "{article}\n\nSummary:"
FACTOID_TOKENS, ANSWER_TOKENS, SUMMARY_TOKENS, INSTRUCTION_TOKENS = 16, 32, 128, 256
LENGTHS = ("short", "middle", "long")
GLUE = ("sst2", "qqp", "mnli", "qnli", "rte")
"""The parts of AdvGLUE that are scored; lm-eval's tasks of these names lend prompts and words."""


@dataclass(frozen=True)
class Reader:
    """The model that will read the prompts."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Tokens that prompt and answer may have together."""

    def room(self, tokens: int) -> int:
        """So many tokens for an answer, or half of a short context."""
        return min(tokens, self.max_length // 2)

    def cut(self, text: str, tokens: int) -> str:
        """The beginning of a text, of so many tokens."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= tokens:
            return text
        return str(self.tokenizer.decode(ids[: max(0, tokens)], skip_special_tokens=True))

    def length(self, text: str) -> int:
        """Its tokens, special ones included."""
        return len(self.tokenizer(text)["input_ids"])


def check_local(name: str, local: LocalFile) -> None:
    """Refuse a file that is not there, or whose records are not of its form.

    Raises:
        InputError: says which field is missing.
    """
    form = local.form or name
    records = read_records(local.file)
    if form not in _FORMS:
        _stock_config(form)
    else:
        for number, record in enumerate(records):
            try:
                CANONICAL[form](record)
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise InputError(
                    f"record {number} of {local.file} is not of the form {form}, which needs "
                    f"{FORMS[form]}: {type(error).__name__} {error}"
                ) from error


def local_task(name: str, local: LocalFile, reader: Reader) -> "Task | Group":
    """An lm-eval task, or a group, over a file of yours.

    Args:
        name: what it is called.
        local: the file, and its form.
        reader: whose tokens evidence is cut by.

    Raises:
        InputError: the file cannot be read, or is not of the form.
    """
    check_local(name, local)
    form = local.form or name
    records = read_records(local.file)
    if form in _FORMS:
        return _FORMS[form](name, [CANONICAL[form](each) for each in records], local, reader)
    return _stock(name, records, _stock_config(form))


def _task(name: str, docs: Sequence[Record], config: Config) -> "Task":
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    dataset = Dataset.from_list([dict(doc) for doc in docs])
    base = {
        "task": name, "custom_dataset": lambda **_: {"test": dataset}, "test_split": "test",
        "num_fewshot": 0, "metadata": {"version": 1.0},
    }  # fmt: skip
    return ConfigurableTask(config=base | config)


def _mean(*metrics: str) -> list[Config]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics]


def _group(name: str, tasks: Sequence["Task"], metric: str) -> "Group":
    """Every part has one vote, however many items it has."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    group = Group.from_config(GroupConfig(
        group=name, task=[task.task_name for task in tasks],
        aggregate_metric_list=[{"metric": metric, "weight_by_size": False}],
    ))  # fmt: skip
    for task in tasks:
        group.add(task)
    return group


def _writing(tokens: int, stop: Sequence[str] = ("\n",)) -> Config:
    return {
        "output_type": "generate_until",
        "generation_kwargs": {"until": [*stop], "max_gen_toks": tokens, "do_sample": False},
    }


# What is made of the records.


def _choices_task(name: str, docs: Sequence[Record], local: LocalFile, _: Reader) -> "Task":
    return _task(name, docs, {
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: doc["query"] + local.suffix,
        "doc_to_choice": lambda doc: doc["choices"], "doc_to_target": lambda doc: doc["gold"],
        "metric_list": _mean("acc", "acc_norm"),
    })  # fmt: skip


def _cloze_task(name: str, docs: Sequence[Record], local: LocalFile, _: Reader) -> "Task":
    return _task(name, docs, {
        "output_type": "loglikelihood",
        "doc_to_text": lambda doc: doc["context"] + local.suffix,
        "doc_to_target": lambda doc: " " + doc["continuation"].lstrip(),
        "metric_list": _mean("acc"),
    })  # fmt: skip


def _contexts_task(name: str, docs: Sequence[Record], _: LocalFile, __: Reader) -> "Task":
    return _task(name, docs, {
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: doc["gold"], "doc_to_choice": lambda doc: doc["contexts"],
        "doc_to_target": lambda doc: doc["continuation"], "metric_list": _mean("acc"),
    })  # fmt: skip


def _answered(doc: Record, answers: Sequence[str]) -> dict[str, float]:
    (answer,) = answers
    return {"em": exact_match(answer, doc["answers"]), "f1": f1(answer, doc["answers"])}


def _factoid_task(name: str, docs: Sequence[Record], _: LocalFile, reader: Reader) -> "Task":
    return _task(name, docs, {
        **_writing(reader.room(FACTOID_TOKENS)), "doc_to_text": lambda doc: FACTOID.format(**doc),
        "doc_to_target": lambda doc: doc["answers"][0], "process_results": _answered,
        "metric_list": _mean("em", "f1"),
    })  # fmt: skip


def _closed_task(name: str, docs: Sequence[Record], _: LocalFile, reader: Reader) -> "Task":
    return _task(name, docs, {
        **_writing(reader.room(ANSWER_TOKENS)),
        "doc_to_text": lambda doc: CLOSED_BOOK.format(question=doc["question"]),
        "doc_to_target": lambda doc: doc["answers"][0], "process_results": _answered,
        "metric_list": _mean("em", "f1"),
    })  # fmt: skip


def _open_task(name: str, docs: Sequence[Record], local: LocalFile, reader: Reader) -> "Task":
    prompts = [{**doc, "prompt": open_book(doc, reader)} for doc in docs]
    return _task(name, prompts, {
        **_writing(reader.room(ANSWER_TOKENS)), "doc_to_text": lambda doc: doc["prompt"],
        "doc_to_target": lambda doc: doc["answers"][0], "process_results": _answered,
        "metric_list": _mean("em", "f1"),
    })  # fmt: skip


def open_book(doc: Record, reader: Reader) -> str:
    """The evidence, cut where question and answer would not fit behind it, and the question."""
    asked = CLOSED_BOOK.format(question=doc["question"])
    evidence = "\n\n".join(doc["evidence"])
    answer = reader.room(ANSWER_TOKENS)
    room = reader.max_length - answer - reader.length(asked) - 2
    while room > 0:  # tokens of two texts joined may be more than of each
        prompt = f"{reader.cut(evidence, room)}\n\n{asked}"
        over = reader.length(prompt) + answer - reader.max_length
        if over <= 0:
            return prompt
        room -= over
    return asked


def _adversarial_group(name: str, docs: Sequence[Record], _: LocalFile, __: Reader) -> "Group":
    tasks = []
    for part in GLUE:
        some = [doc for doc in docs if doc["part"] == part]
        if some:
            tasks.append(_stock(f"{name}_{part}", some, _stock_config(part)))
    if not tasks:
        raise InputError(f"AdvGLUE has the parts {', '.join(GLUE)}, and the file none of them")
    return _group(name, tasks, "acc")


def _summaries_group(name: str, docs: Sequence[Record], _: LocalFile, reader: Reader) -> "Group":
    """Thirds of the articles by their tokens, each article cut to leave room for a summary."""
    room = (
        reader.max_length - reader.room(SUMMARY_TOKENS) - reader.length(SUMMARY.format(article=""))
    )
    by_length = sorted(docs, key=lambda doc: reader.length(doc["article"]))
    tasks = []
    for number, length in enumerate(LENGTHS):
        some = by_length[number * len(docs) // 3 : (number + 1) * len(docs) // 3]
        prompts = [
            {**doc, "prompt": SUMMARY.format(article=reader.cut(doc["article"], room))}
            for doc in some
        ]
        if prompts:
            tasks.append(_task(f"{name}_{length}", prompts, {
                **_writing(reader.room(SUMMARY_TOKENS), ["\n\n"]),
                "doc_to_text": lambda doc: doc["prompt"],
                "doc_to_target": lambda doc: doc["highlights"],
                "process_results": lambda doc, answers: {
                    "rougeL": rouge_l(answers[0], doc["highlights"])
                },
                "metric_list": _mean("rougeL"),
            }))  # fmt: skip
    return _group(name, tasks, "rougeL")


def _instructions_task(
    name: str, docs: Sequence[Record], local: LocalFile, reader: Reader
) -> "Task":
    def described(doc: Record, answers: Sequence[str]) -> dict[str, float]:
        (answer,) = answers
        return {
            "distinct_1": distinct(answer, 1), "distinct_2": distinct(answer, 2),
            "tokens": float(reader.length(answer)), "repetition": repetition(answer),
        }  # fmt: skip

    return _task(name, docs, {
        **_writing(reader.room(INSTRUCTION_TOKENS), []),
        "doc_to_text": lambda doc: doc["question"] + local.suffix,
        "doc_to_target": lambda doc: "", "process_results": described,
        "metric_list": _mean("distinct_1", "distinct_2", "tokens", "repetition"),
    })  # fmt: skip


_FORMS: dict[str, Callable[[str, Sequence[Record], LocalFile, Reader], Any]] = {
    "choices": _choices_task, "cloze": _cloze_task, "contexts": _contexts_task,
    "freebaseqa": _factoid_task, "triviaqa_closed": _closed_task, "triviaqa_open": _open_task,
    "advglue": _adversarial_group, "summaries": _summaries_group,
    "instructions": _instructions_task,
}  # fmt: skip


def _stock_config(task: str) -> Config:
    """What lm-eval says of one of its tasks.

    Raises:
        InputError: it has none of that name that is a plain task.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    from foldstack.compression.evaluation.benchmark_index import file_of_task

    file = file_of_task(task)
    if file is None:
        raise InputError(
            f"a file is read in one of the forms {', '.join(FORMS)}, or as one of lm-eval's tasks; "
            f"{task} is none"
        )
    config: Config = load_yaml(file)
    return config


def _stock(name: str, records: Sequence[Record], config: Config) -> "Task":
    """One of lm-eval's tasks over other items: its prompts, its words, its metrics."""
    kept = {
        key: value
        for key, value in config.items()
        if key not in ("dataset_path", "dataset_name", "dataset_kwargs", "tag", "group",
                       "training_split", "validation_split", "fewshot_split")
    }  # fmt: skip
    return _task(name, records, kept | {"test_split": "test", "task": name})
