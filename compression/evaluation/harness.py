"""Benchmarks through lm-eval's Python API, with the result of every single item kept."""

import copy
import importlib.metadata
import json
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.benchmark_index import check_tasks, data_errors, task_manager
from foldstack.compression.evaluation.paired import Item, PairedDifference, paired_difference
from foldstack.compression.evaluation.quiet_lm_eval import quiet_lm_eval
from foldstack.compression.evaluation.records import Benchmark, HarnessResult, Score
from foldstack.compression.evaluation.shared_prefix import share_prefixes

__all__ = [
    "Benchmark",
    "HarnessResult",
    "Item",
    "PairedDifference",
    "Score",
    "check_tasks",
    "evaluate",
    "paired_difference",
    "read_items",
    "write_items",
]

Progress = Callable[[str, int, int], None]

SEED = 1234  # lm-eval's own
LONGEST_TARGET = 200  # characters; of a rolling benchmark it is the whole document
SOME_ITERATIONS = 1000  # any number above 0 asks lm-eval for standard errors


def write_items(items: Iterable[Item], file: Path) -> None:
    """One line of JSON per item."""
    lines = (item.model_dump_json() + "\n" for item in items)
    file.write_text("".join(lines), encoding="utf-8")


def read_items(file: Path) -> tuple[Item, ...]:
    """What `write_items` wrote."""
    with file.open(encoding="utf-8") as lines:
        return tuple(Item.model_validate_json(line) for line in lines)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    local: Callable[[Any], Sequence[Any]] | None = None,
    include_paths: Sequence[Path] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    samples: Mapping[str, Sequence[int]] | None = None,
    chat_template: bool = False,
    temperature: float = 0.0,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = SEED,
    progress: Progress | None = None,
) -> HarnessResult:
    """Scores of `model` on lm-eval's benchmarks, as the `lm_eval` command gives them.

    Args:
        model: stock or ours, on the device it shall run on.
        tokenizer: the model's.
        tasks: names or YAML files, see `check_tasks`.
        local: makes further tasks of lm-eval's, when it is given the model that will be asked.
        include_paths: folders with further task YAML files.
        num_fewshot: examples before each item; None = as each benchmark says.
        limit: items per benchmark, from its beginning; None = all.
        samples: places of the items to ask, by task (a group's members, not the group); what is
            left out of it is asked whole. Not together with `limit`.
        chat_template: whether prompts are wrapped as the tokenizer's chat template says.
        temperature: answers are sampled at it; 0: as each benchmark says, mostly greedily.
        batch_size: fixed, so that results do not depend on the memory at hand.
        max_length: context in tokens; None = the model's.
        seed: of the few-shot examples, numpy and torch during the evaluation.
        progress: told of the requests answered.

    Raises:
        InputError: no such benchmark, or its data cannot be had.
    """
    if tasks or local is None:
        check_tasks(tasks, include_paths)
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template; set chat_template to false")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    was_training = model.training
    with quiet_lm_eval(progress), data_errors():
        lm = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives it a padding token
            batch_size=batch_size,
            max_length=max_length,
        )
        share_prefixes(lm)
        found = simple_evaluate(
            lm,
            tasks=[*tasks, *(() if local is None else local(lm))],
            task_manager=task_manager(tasks, include_paths),
            num_fewshot=num_fewshot,
            limit=limit,
            samples=None if samples is None else {name: [*ids] for name, ids in samples.items()},
            apply_chat_template=chat_template,
            gen_kwargs={"do_sample": True, "temperature": temperature} if temperature else None,
            bootstrap_iters=SOME_ITERATIONS,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    model.train(was_training)
    return HarnessResult(
        benchmarks={name: _benchmark(name, found) for name in found["results"]},
        lm_eval_version=importlib.metadata.version("lm_eval"),
        seed=seed,
        limit=limit,
        batch_size=batch_size,
        dtype=str(model.dtype).removeprefix("torch."),
        items=tuple(_items(found["samples"], tokenizer)),
    )


def _benchmark(name: str, found: Mapping[str, Any]) -> Benchmark:
    values: dict[str, Any] = found["results"][name]
    higher_is_better = found["higher_is_better"].get(name, {})
    scores = {}
    for key, value in values.items():
        metric, comma, answer_filter = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
            continue
        stderr = values.get(f"{metric}_stderr,{answer_filter}")
        scores[_score_name(metric, answer_filter)] = Score(
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, numbers.Real) else None,
            higher_is_better=higher_is_better.get(metric),
        )
    return Benchmark(
        version=str(found["versions"].get(name)),
        num_fewshot=int(found["n-shot"].get(name) or 0),
        num_items=int(found["n-samples"].get(name, {}).get("effective", 0)),
        members=tuple(sorted(found["group_subtasks"].get(name, ()))),
        scores=scores,
    )


def _score_name(metric: str, answer_filter: str) -> str:
    return metric if answer_filter == "none" else f"{metric},{answer_filter}"


def _items(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], tokenizer: PreTrainedTokenizerBase
) -> Iterable[Item]:
    for benchmark, documents in samples.items():
        for sample in documents:
            answers = [_first(answer) for answer in sample["filtered_resps"]]
            yield Item(
                benchmark=benchmark,
                doc_id=int(sample["doc_id"]),
                doc_hash=sample["doc_hash"],
                prompt_hash=sample["prompt_hash"],
                filter=sample["filter"],
                target=_text(sample["target"]),
                loglikelihoods=tuple(float(a) for a in answers if isinstance(a, numbers.Real)),
                choice_tokens=_choice_tokens(sample["arguments"], tokenizer),
                responses=tuple(a for a in answers if isinstance(a, str)),
                metrics=_numbers({name: sample[name] for name in sample["metrics"]}),
            )


def _choice_tokens(arguments: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens of each choice behind its context; none for what is no choice between texts."""
    pairs = [pair for pair in arguments if len(pair) == 2 and isinstance(pair[1], str)]
    if len(pairs) < 2:
        return ()
    # As lm-eval splits them: spaces at a context's end are the choice's.
    contexts = [context.rstrip() for context, _ in pairs]
    texts = contexts + [context + choice for context, choice in pairs]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    wholes = lengths[len(contexts) :]
    return tuple(max(1, whole - part) for whole, part in zip(wholes, lengths, strict=False))


def _first(answer: Any) -> Any:
    """The log likelihood of an answer that lm-eval gives with whether it is the greedy one."""
    return answer[0] if isinstance(answer, Sequence) and not isinstance(answer, str) else answer


def _text(target: Any) -> str:
    return (target if isinstance(target, str) else json.dumps(target, default=str))[:LONGEST_TARGET]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float | tuple[float, ...]]:
    """Metrics as plain floats; those that are computed from something else are left out."""
    plain: dict[str, float | tuple[float, ...]] = {}
    for name, value in metrics.items():
        if isinstance(value, numbers.Real):
            plain[name] = float(value)
        elif isinstance(value, Sequence) and all(isinstance(v, numbers.Real) for v in value):
            plain[name] = tuple(float(v) for v in value)
    return plain
