"""Records of local files: read, and put into one form whatever the release of their data."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.tracks.answers import normalised
from foldstack.compression.evaluation.tracks.settings import LocalFile

Record = Mapping[str, Any]


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl, .json, .csv, .tsv or .parquet file; a JSON object of lists gives the
    records of each list with its key as "part".

    Raises:
        InputError: it cannot be read, or holds no records.
    """
    import pandas as pd

    try:
        match file.suffix:
            case ".jsonl":
                lines = file.read_text(encoding="utf-8").splitlines()
                found = [json.loads(line) for line in lines if line.strip()]
            case ".json":
                found = list(_in_json(json.loads(file.read_text(encoding="utf-8"))))
            case ".csv" | ".tsv":
                frame = pd.read_csv(file, sep="\t" if file.suffix == ".tsv" else ",")
                found = frame.to_dict("records")
            case ".parquet":
                found = pd.read_parquet(file).to_dict("records")
            case other:
                raise InputError(
                    f"{file} must be .jsonl, .json, .csv, .tsv or .parquet, got {other or 'none'}"
                )
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if not found or not all(isinstance(record, dict) for record in found):
        raise InputError(f"{file} must hold records, one per item")
    return found


def _in_json(data: Any) -> Iterator[Any]:
    if isinstance(data, list):
        yield from data
        return
    for part, records in data.items():
        if isinstance(records, list):
            yield from ({"part": part, **record} for record in records)


def questions_in(local: LocalFile) -> list[str]:
    """What a file of instructions asks, in its order."""
    return [_instruction(record)["question"] for record in read_records(local.file)]


# What a record of each form says, in one way whatever the release of its data.


def _choice(record: Record) -> Record:
    choices = [str(choice) for choice in record["choices"]]
    gold = int(record["gold"])
    if not 0 <= gold < len(choices):
        raise ValueError(f"gold is {gold} of {len(choices)} choices")
    return {"query": str(record["query"]).rstrip(), "choices": choices, "gold": gold}


def _cloze(record: Record) -> Record:
    return {"context": str(record["context"]), "continuation": str(record["continuation"])}


def _contexts(record: Record) -> Record:
    options, gold = [str(each) for each in record["context_options"]], int(record["gold"])
    options[gold]
    return {"contexts": options, "continuation": str(record["continuation"]), "gold": gold}


def _factoid(record: Record) -> Record:
    """FreebaseQA's own form, with all names of the answers of all parses, or a plain one."""
    if "Parses" in record:
        names = (
            name
            for parse in record["Parses"]
            for answer in parse["Answers"]
            for name in answer["AnswersName"]
        )
        return {"question": str(record["RawQuestion"]), "answers": _some(names)}
    return {"question": str(record["question"]), "answers": _some(record["answers"])}


def _trivia(record: Record) -> Record:
    """TriviaQA's record with its evidence, wiki before web, or a plain one with `evidence`."""
    if "answer" not in record:
        evidence = [str(each) for each in record.get("evidence", ())]
        return {**_factoid(record), "evidence": evidence}
    answer = record["answer"]
    names = _some([answer["value"], *answer["aliases"]])
    pages = record.get("entity_pages", {}), record.get("search_results", {})
    texts = [*pages[0].get("wiki_context", ()), *pages[1].get("search_context", ())]
    return {"question": str(record["question"]), "answers": names, "evidence": texts}


def _adversarial(record: Record) -> Record:
    return {**record, "part": str(record["part"]), "label": int(record["label"])}


def _article(record: Record) -> Record:
    return {"article": str(record["article"]).strip(), "highlights": str(record["highlights"])}


def _instruction(record: Record) -> Record:
    """A FastChat question, of which the first turn is asked, or a plain one."""
    text = record["turns"][0] if "turns" in record else record["text"]
    return {"question": str(text)}


def _some(names: Any) -> list[str]:
    """Names of an answer but those of which nothing is left, which would accept an empty one."""
    found = [name for name in dict.fromkeys(map(str, names)) if normalised(name)]
    if not found:
        raise ValueError("no answer is accepted")
    return found


CANONICAL: dict[str, Callable[[Record], Record]] = {
    "choices": _choice, "cloze": _cloze, "contexts": _contexts, "freebaseqa": _factoid,
    "triviaqa_closed": _trivia, "triviaqa_open": _trivia, "advglue": _adversarial,
    "summaries": _article, "instructions": _instruction,
}  # fmt: skip
