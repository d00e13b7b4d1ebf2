"""lm-eval through our door: the scores of its own, plain numbers, every item, silence."""

import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation import benchmark_index
from foldstack.compression.evaluation.benchmark_index import task_manager
from foldstack.compression.evaluation.beside_dense import Evaluation, beside_dense
from foldstack.compression.evaluation.harness import (
    Item,
    check_tasks,
    evaluate,
    paired_difference,
    read_items,
    write_items,
)
from foldstack.compression.evaluation.paired import mcnemar_p, paired_ratio
from foldstack.compression.evaluation.perplexity import measure_perplexity
from foldstack.compression.evaluation.quiet_lm_eval import quiet_lm_eval
from foldstack.compression.evaluation.records import HarnessResult, PerplexityProtocol
from foldstack.compression.structure.modeling_foldstack import FoldstackForCausalLM
from foldstack.compression.structure.surgery import Cut, cut, plan_of

CHOICE_ITEMS = [
    {
        "context": f"def item_{number}(value):\n    return",
        "choices": [f" value * {number}", " value", f" {number} * len(item)"],
        "label": number % 3,
    }
    for number in range(6)
]
TEXTS = ["def item(value):\n    return value\n", "naïve = '日本語'\n", "x = 1\n" * 40]

CHOICE_TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""
ROLLING_TASK = """
task: toy_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
metadata: {{version: 1.0}}
"""
GENERATION_TASK = """
task: toy_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: context
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
TASKS = ["toy_choice", "toy_rolling", "toy_generation"]


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    choices, texts = folder / "choices.jsonl", folder / "texts.jsonl"
    choices.write_text("".join(json.dumps(item) + "\n" for item in CHOICE_ITEMS))
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "toy_choice.yaml").write_text(CHOICE_TASK.format(file=choices))
    (folder / "toy_rolling.yaml").write_text(ROLLING_TASK.format(file=texts))
    (folder / "toy_generation.yaml").write_text(GENERATION_TASK.format(file=choices))
    return folder


@pytest.fixture(scope="session")
def model(tiny_model: Callable[..., PreTrainedModel], tokenizer: Any) -> PreTrainedModel:
    return tiny_model("llama", vocab_size=len(tokenizer))


@pytest.fixture(scope="session")
def result(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task_folder: Path
) -> HarnessResult:
    return evaluate(model, tokenizer, TASKS, include_paths=[task_folder], batch_size=4)


def of(items: Sequence[Item], benchmark: str) -> list[Item]:
    return [item for item in items if item.benchmark == benchmark]


def log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> float:
    whole = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    with torch.inference_mode():
        log_probabilities = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(log_probabilities[i - 1, whole[i]].item() for i in range(start, len(whole)))


def test_choices_are_scored_by_their_log_likelihood(
    result: HarnessResult, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    items = of(result.items, "toy_choice")
    assert [item.doc_id for item in items] == list(range(len(CHOICE_ITEMS)))
    for item, doc in zip(items, CHOICE_ITEMS, strict=True):
        choices: Any = doc["choices"]
        expected = [log_likelihood(model, tokenizer, str(doc["context"]), c) for c in choices]
        assert item.loglikelihoods == pytest.approx(expected, abs=1e-3)
        assert item.target == str(doc["label"])
        whole, context = (
            [len(tokenizer(text)["input_ids"]) for text in texts]
            for texts in ([str(doc["context"]) + c for c in choices], [str(doc["context"])] * 3)
        )
        assert item.choice_tokens == tuple(a - b for a, b in zip(whole, context, strict=True))
        assert item.metrics["acc"] == float(expected.index(max(expected)) == doc["label"])
    score = result.benchmarks["toy_choice"].scores["acc"]
    right = [item.metrics["acc"] for item in items]
    assert score.value == pytest.approx(sum(right) / len(right))  # type: ignore[arg-type]
    assert score.stderr == pytest.approx(torch.tensor(right).std().item() / math.sqrt(len(right)))
    assert score.higher_is_better is True


def test_rolling_text_is_scored_over_all_its_bytes(
    result: HarnessResult, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    items = of(result.items, "toy_rolling")
    for item, text in zip(items[:2], TEXTS[:2], strict=True):
        expected = log_likelihood(model, tokenizer, str(tokenizer.bos_token), text)
        assert item.metrics["bits_per_byte"] == pytest.approx((expected, len(text.encode())))
    total = sum(item.loglikelihoods[0] for item in items)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    score = result.benchmarks["toy_rolling"].scores["bits_per_byte"]
    assert score.value == pytest.approx(-total / math.log(2) / num_bytes, rel=1e-6)
    assert score.higher_is_better is False
    assert score.stderr is None


def test_generated_answers_are_kept(result: HarnessResult) -> None:
    items = of(result.items, "toy_generation")
    assert len(items) == len(CHOICE_ITEMS)
    for item in items:
        assert len(item.responses) == 1
        assert not item.loglikelihoods
        assert not item.choice_tokens


def test_result_says_what_was_measured(result: HarnessResult) -> None:
    assert set(result.benchmarks) == set(TASKS)
    choice = result.benchmarks["toy_choice"]
    assert (choice.version, choice.num_items, choice.num_fewshot) == ("2.0", 6, 0)
    assert result.lm_eval_version.startswith("0.4.")
    assert result.dtype == "float32"


def test_result_and_items_survive_json(result: HarnessResult, tmp_path: Path) -> None:
    again = HarnessResult.model_validate_json(result.model_dump_json())
    assert again == result.model_copy(update={"items": ()})
    write_items(result.items, tmp_path / "items.jsonl")
    assert read_items(tmp_path / "items.jsonl") == result.items


def test_scores_are_those_of_the_stock_command(
    result: HarnessResult,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task_folder: Path,
    tmp_path: Path,
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stock = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path},device=cpu",
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        bootstrap_iters=10,
        log_samples=False,
    )
    for benchmark, metric in (
        ("toy_choice", "acc"),
        ("toy_choice", "acc_norm"),
        ("toy_rolling", "bits_per_byte"),
        ("toy_generation", "exact_match"),
    ):
        ours = result.benchmarks[benchmark].scores[metric]
        theirs = stock["results"][benchmark]
        assert ours.value == pytest.approx(theirs[f"{metric},none"], rel=1e-6)
        if ours.stderr is not None:
            assert ours.stderr == pytest.approx(theirs[f"{metric}_stderr,none"], rel=1e-6)


def test_a_restructured_model_is_evaluated_like_any_other(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task_folder: Path
) -> None:
    shared = cut(model, Cut(plan_of(model).share(1, [2]), tuple(range(4))))
    assert isinstance(shared, FoldstackForCausalLM)
    result = evaluate(shared, tokenizer, TASKS, include_paths=[task_folder], limit=2)
    items = of(result.items, "toy_choice")
    assert [item.doc_id for item in items] == [0, 1]
    doc: Any = CHOICE_ITEMS[1]
    expected = [log_likelihood(shared, tokenizer, doc["context"], c) for c in doc["choices"]]
    assert items[1].loglikelihoods == pytest.approx(expected, abs=1e-3)


def test_two_models_pair_in_every_score_and_group(
    result: HarnessResult,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task_folder: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "suite.yaml").write_text("group: my_suite\ntask: [toy_choice]")
    shared = cut(model, Cut(plan_of(model).share(1, [2]), tuple(range(4))))
    folders = [task_folder, tmp_path]
    other = evaluate(shared, tokenizer, [*TASKS[1:], "my_suite"], include_paths=folders)
    assert other.benchmarks["my_suite"].members == ("toy_choice",)
    protocol = PerplexityProtocol(window_tokens=16)
    dense, compressed = (
        Evaluation(
            measure_perplexity(each, tokenizer, TEXTS, protocol), found.benchmarks, found.items
        )
        for each, found in ((model, result), (shared, other))
    )
    facts = beside_dense(dense, compressed)
    for name in TASKS:
        for metric, score in result.benchmarks[name].scores.items():
            change = other.benchmarks[name].scores[metric].value - score.value
            assert facts[f"{name}/{metric}_difference"] == pytest.approx(change, abs=1e-6)
            assert facts[f"{name}/{metric}_difference_stderr"] >= 0
    bits = [each.perplexity.bits_per_byte or 0 for each in (dense, compressed)]
    assert facts["bits_per_byte_difference"] == pytest.approx(bits[1] - bits[0])
    assert 0 <= facts["toy_choice/stability"] <= 1
    assert "toy_generation/stability" not in facts


def test_evaluation_is_silent_and_leaves_no_trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task_folder: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from lm_eval.models import huggingface

    bar, level = huggingface.tqdm, logging.getLogger("lm_eval").level
    padding = tokenizer.pad_token
    seen: list[tuple[str, int, int]] = []
    model.train()
    evaluate(
        model,
        tokenizer,
        ["toy_choice"],
        include_paths=[task_folder],
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    was_training = model.training
    model.eval()
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert huggingface.tqdm is bar
    assert logging.getLogger("lm_eval").level == level
    assert tokenizer.pad_token == padding
    assert was_training
    assert seen[-1] == ("benchmarks", 18, 18)


def test_seeds_that_lm_eval_sets_do_not_stay() -> None:
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    with quiet_lm_eval(None):
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(1)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.get_rng_state().tolist() == states[2]


def test_packaged_benchmarks_are_known_without_an_index() -> None:
    check_tasks(["stdlib_continuation", "stdlib_bits_per_byte"])


@pytest.fixture
def no_full_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the whole index was read, which takes 20 seconds")

    monkeypatch.setattr(benchmark_index, "_full_manager", refuse)


@pytest.mark.usefixtures("no_full_index")
def test_stock_tasks_are_found_without_the_whole_index(task_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text("group: my_suite\ntask: [hellaswag, arc_easy, toy_choice]")
    folders = [task_folder, tmp_path]
    for name in ("hellaswag", "my_suite", str(tmp_path / "suite.yaml")):
        check_tasks([name], folders)
        index = task_manager([name], folders).task_index
        assert "hellaswag" in index
        assert len(index) < 100
    assert {"hellaswag", "arc_easy", "toy_choice", "my_suite"} <= set(index)


@pytest.mark.parametrize(
    "name, near", [("hella_swag", "hellaswag"), ("toy_choise", "toy_choice"), ("qqqqqq", "lm-eval")]
)
def test_an_unknown_task_is_told_with_the_nearest_names(
    name: str, near: str, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Manager:
        task_index = dict.fromkeys(["hellaswag", "arc_easy", "piqa"])

    monkeypatch.setattr(benchmark_index, "_full_manager", lambda folders: Manager())
    with pytest.raises(InputError, match=rf"no benchmark '{name}': .*{near}"):
        check_tasks(["toy_choice", name], [task_folder])


def test_an_unknown_task_is_told_before_the_model_is_touched(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(InputError, match=r"no benchmark file nowhere.yaml"):
        evaluate(model, tokenizer, ["nowhere.yaml"])


@pytest.mark.usefixtures("no_full_index")
def test_unusable_tasks_are_told_in_a_sentence(task_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give at least one benchmark"):
        check_tasks([])
    with pytest.raises(InputError, match="include_paths are folders"):
        check_tasks(["toy_choice"], [task_folder / "toy_choice.yaml"])
    (tmp_path / "broken.yaml").write_text("task: toy_broken\nmetric_list: [")
    with pytest.raises(InputError, match=r"toy_broken is declared in .*broken.yaml, which lm-eval"):
        check_tasks(["toy_broken"], [tmp_path], fetch=True)
    (tmp_path / "lost.yaml").write_text(CHOICE_TASK.format(file="nowhere/lost.jsonl"))
    with pytest.raises(InputError, match=r"data is not there: .*lost.jsonl"):
        check_tasks(["toy_choice"], [tmp_path], fetch=True)


@pytest.mark.usefixtures("no_full_index")
@pytest.mark.parametrize("name", ["humaneval", "mbpp_instruct", "my_suite", "my_tag", "suite.yaml"])
def test_code_that_a_model_writes_is_not_run(name: str, tmp_path: Path) -> None:
    """lm-eval fetches and calls what runs it where such a task is only loaded."""
    task = "task: {name}\ntag: my_tag\nunsafe_code: true\nmetric_list: !function lost.metrics\n"
    (tmp_path / "task.yaml").write_text(task.format(name="my_task"))
    (tmp_path / "suite.yaml").write_text("group: my_suite\ntask: [my_task]")
    asked = str(tmp_path / name) if name == "suite.yaml" else name
    with pytest.raises(InputError, match="runs code that the model writes, which foldstack refuse"):
        task_manager([asked], [tmp_path])


def test_data_that_the_hub_cannot_give_is_told_in_a_sentence(tmp_path: Path) -> None:
    on_the_hub = CHOICE_TASK.replace("dataset_path: json", "dataset_path: foldstack-tests/nothing")
    lines = [line for line in on_the_hub.splitlines() if "dataset_kwargs" not in line]
    (tmp_path / "hub.yaml").write_text("\n".join(lines).format(file=""))
    with pytest.raises(InputError, match=r"cannot be fetched from the hub: .*foldstack-tests"):
        check_tasks(["toy_choice"], [tmp_path], fetch=True)


def items_with(metric: str, values: Sequence[float | tuple[float, ...]]) -> list[Item]:
    return [
        Item(
            benchmark="b",
            doc_id=number,
            doc_hash=f"h{number}",
            filter="none",
            target="",
            metrics={metric: value},
        )
        for number, value in enumerate(values)
    ]


def test_paired_difference_by_hand() -> None:
    first, second = items_with("acc", [1.0, 1.0, 1.0, 0.0, 1.0]), items_with("acc", [1, 0, 0, 1, 0])
    found = paired_difference(first, second[::-1], "b", "acc")
    assert (found.first, found.second) == (0.8, 0.4)
    assert found.difference == pytest.approx(-0.4)
    # Differences 0, -1, -1, 1, -1: their variance is (0.16 + 3 * 0.36 + 1.96) / 4 = 0.8.
    assert found.stderr == pytest.approx(math.sqrt(0.8 / 5))
    assert (found.only_first, found.only_second) == (3, 1)
    assert found.mcnemar_p == pytest.approx(2 * (1 + 4) / 16)


def test_mcnemar_by_hand() -> None:
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(3, 3) == 1.0
    assert mcnemar_p(0, 5) == mcnemar_p(5, 0) == pytest.approx(1 / 16)
    assert mcnemar_p(0, 2000) == pytest.approx(0.0, abs=1e-300)


def test_weighted_metric_is_compared_as_a_ratio() -> None:
    first = items_with("bits_per_byte", [(-math.log(2) * 10, 10.0), (-math.log(2) * 30, 20.0)])
    second = items_with("bits_per_byte", [(-math.log(2) * 20, 10.0), (-math.log(2) * 40, 20.0)])
    found = paired_difference(first, second, "b", "bits_per_byte")
    assert found.first == pytest.approx(40 / 30)
    assert found.second == pytest.approx(60 / 30)
    assert found.difference == pytest.approx(20 / 30)
    # Residuals 10 - 2/3 * 10 and 10 - 2/3 * 20, n = 2.
    assert found.stderr == pytest.approx(math.sqrt(2 * (10 / 3) ** 2 * 2) / 30)
    assert found.mcnemar_p is None


def test_ratio_with_equal_weights_is_the_mean() -> None:
    found = paired_ratio([1.0, 2.0, 4.0], [2.0, 2.5, 7.0], [2.0, 2.0, 2.0])
    assert found.difference == pytest.approx((0.5 + 0.25 + 1.5) / 3)
    assert found.stderr == pytest.approx(torch.tensor([0.5, 0.25, 1.5]).std().item() / math.sqrt(3))


def test_items_that_do_not_match_are_refused() -> None:
    first = items_with("acc", [1.0, 0.0, 1.0])
    with pytest.raises(InputError, match="same items for both models, 1 of 3 have no counterpart"):
        paired_difference(first, first[:2], "b", "acc")
    other = [first[0], first[1], first[2].model_copy(update={"doc_hash": "another"})]
    with pytest.raises(InputError, match="2 of 4 have no counterpart"):
        paired_difference(first, other, "b", "acc")
    with pytest.raises(InputError, match="has a metric 'f1'"):
        paired_difference(first, first, "b", "f1")
