"""Stacks of methods: one budget, every order that is promised, and what follows after."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from foldstack.compression.checkpoints.checkpoint import (
    check_reload,
    load_model,
    load_plan,
    save_model,
)
from foldstack.compression.errors import InputError
from foldstack.compression.methods import METHODS
from foldstack.compression.methods.factoring.svd_llm import SvdLlm
from foldstack.compression.methods.method import TOLERANCE, Evidence
from foldstack.compression.methods.removal.shortgpt import ShortGpt
from foldstack.compression.methods.stack import Stack
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.storage.spool import Spool
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import build_on_meta, cut, plan_of
from foldstack.compression.training.recovery import Recovery, recover
from foldstack.flows.config.method_entries import ENTRIES, expand

SHARE = {"name": "block_sharing", "keep_head": 0, "keep_tail": 0, "leader_windows": 2}
PRUNE, FACTOR = {"name": "shortgpt"}, {"name": "svd_llm"}


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (4, 20), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, KINDS)
    return Evidence(windows, statistics, rank_blocks(statistics))


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "gpt2", "gemma3_text"])
@pytest.mark.parametrize(
    "steps", [(PRUNE, SHARE), (PRUNE, FACTOR), (SHARE, FACTOR), (PRUNE, SHARE, FACTOR)], ids=str
)
def test_every_order_lands_on_one_budget(
    steps: tuple[dict[str, Any], ...],
    family: str,
    tiny_model: Callable[..., Any],
    windows: Tensor,
) -> None:
    model = tiny_model(family, **({} if family == "gemma3_text" else {DEPTH[family]: 6}))
    stack = Stack(sparsity=0.4, steps=steps)
    change = stack.compress(model, evidence_of(model, windows))
    smaller = cut(model, change)
    left, dense = count_parameters(smaller), count_parameters(model)
    assert 1 - left / dense >= 0.4 - TOLERANCE
    if any(block.linears for block in change.plan.blocks):  # else blocks alone were enough
        assert 1 - left / dense == pytest.approx(0.4, abs=TOLERANCE)
    outlined = stack.outline(build_on_meta(model.config))
    assert size_of_plan(model.config, outlined).parameters == left
    with torch.no_grad():
        assert torch.isfinite(smaller(windows).logits).all()


DEPTH = {"llama_tied": "num_hidden_layers", "qwen2": "num_hidden_layers", "gpt2": "n_layer"}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("gone", [0, 1, 3])
def test_it_is_its_steps_one_after_the_other(
    family: str, gone: int, tiny_model: Callable[..., Any], windows: Tensor
) -> None:
    """Also where a block's attention is not like its neighbours': each keeps its own."""
    model = tiny_model(family)
    prune = {"protect_first": gone, "protect_last": 3 - gone}
    stack = Stack(sparsity=0.4, steps=({**PRUNE, **prune, "portion": 0.3}, FACTOR))
    change = stack.compress(model, evidence_of(model, windows))
    together = cut(model, change)
    assert change.plan.removed_blocks == (gone,)
    assert change.plan.base_num_blocks == 4
    outlined = stack.outline(build_on_meta(model.config))
    assert len(outlined.blocks) == 3
    assert outlined.base_num_blocks == 4

    pruning = ShortGpt(sparsity=0.12, **prune).compress(model, evidence_of(model, windows))
    pruned = cut(model, pruning)
    left = 1 - 0.6 * count_parameters(model) / count_parameters(pruned)
    factored = SvdLlm(sparsity=left).compress(pruned, evidence_of(pruned, windows))
    apart = cut(pruned, factored)
    assert windows.shape[1] > 16  # the sliding window: full attention sees more
    with torch.no_grad():
        torch.testing.assert_close(together(windows).logits, apart(windows).logits, rtol=0, atol=0)


def test_a_killed_stack_goes_on_in_the_step_where_it_was(
    tiny_model: Callable[..., Any],
    windows: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama_tied", num_hidden_layers=6)
    stack = Stack(sparsity=0.4, steps=({**PRUNE, "portion": 0.3}, FACTOR))
    evidence = evidence_of(model, windows)
    in_memory = stack.compress(model, evidence)
    in_files = replace(evidence, work=tmp_path)
    made: list[str] = []
    part = Spool.part

    def killed_in_the_second(self: Spool, name: str, make: Callable[[], Any]) -> Any:
        made.append(name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return part(self, name, make)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "part", killed_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            stack.compress(model, in_files)
    assert [path.name for path in (tmp_path / "step-0").iterdir()] == ["model"]
    monkeypatch.setattr(ShortGpt, "compress", lambda *_: pytest.fail("it is done"))
    resumed = stack.compress(model, in_files)
    assert resumed.plan == in_memory.plan
    assert resumed.tensors.keys() == in_memory.tensors.keys()
    for name, tensor in in_memory.tensors.items():
        torch.testing.assert_close(resumed.tensors[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_step_whose_model_was_cut_short_is_made_again(
    tiny_model: Callable[..., Any],
    windows: Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    file: str,
) -> None:
    model = tiny_model("llama_tied", num_hidden_layers=6)
    stack = Stack(sparsity=0.4, steps=({**PRUNE, "portion": 0.3}, FACTOR))
    evidence = replace(evidence_of(model, windows), work=tmp_path)
    whole = stack.compress(model, evidence)
    before = {name: tensor.clone() for name, tensor in whole.tensors.items()}  # they are mapped
    hurt = tmp_path / "step-0" / "model" / file
    os.truncate(hurt, hurt.stat().st_size // 2)
    again = stack.compress(model, evidence)
    assert f"{hurt.parent}, left by an earlier run, cannot be read" in caplog.text
    assert again.plan == whole.plan
    for name, tensor in before.items():
        assert torch.equal(again.tensors[name], tensor)


def test_a_step_that_overshoots_leaves_the_next_one_out(
    tiny_model: Callable[..., Any], windows: Tensor
) -> None:
    model = tiny_model("llama")  # four blocks: half of 0.1 is less than one of them
    stack = Stack(sparsity=0.1, steps=(PRUNE, FACTOR))
    plan = stack.compress(model, evidence_of(model, windows)).plan
    assert len(plan.blocks) == 3
    assert plan.is_native


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([PRUNE], "at least 2"),
        ([PRUNE, {"name": "svd_lm"}], "a step is one of .*svd_llm.*got 'svd_lm'"),
        ([PRUNE, {"name": "stack"}], "a step is one of"),
        ([PRUNE, {"name": "svd_llm", "updat": "none"}], "updat"),
        ([PRUNE, {"name": "svd_llm", "sparsity": 0.1}], "sparsity belongs to the whole stack"),
        ([{"name": "slicegpt"}, FACTOR], "slicegpt must be the last step, svd_llm follows it"),
        ([PRUNE, {"name": "flexigpt_extend"}], "flexigpt_extend adds some: use it alone"),
        ([{**PRUNE, "portion": 0.5}, {**FACTOR, "portion": 0.4}], "add up to 1"),
        ([{**PRUNE, "portion": 0.9}, {**SHARE, "portion": 0.1}, FACTOR], "leave nothing"),
    ],
)
def test_what_is_no_stack_gets_a_sentence(steps: list[Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Stack(sparsity=0.3, steps=steps)


def test_stacked_and_recovered_models_load_like_any_other(
    tiny_model: Callable[..., Any], windows: Tensor, tmp_path: Path
) -> None:
    saved = {}
    for steps in ((PRUNE, SHARE), (PRUNE, FACTOR), (SHARE, FACTOR)):
        model = tiny_model("qwen2", num_hidden_layers=6)
        stack = Stack(sparsity=0.4, steps=steps)
        smaller = cut(model, stack.compress(model, evidence_of(model, windows)))
        settings = Recovery(steps=2, batch_size=4, learning_rate=1e-2, lora_rank=4)
        recover(smaller, windows.repeat(4, 1), settings)
        folder = tmp_path / stack.title
        save_model(smaller, folder, tokenizer_from=folder)
        assert load_plan(folder) == plan_of(smaller) == plan_of(load_model(folder))
        saved[folder] = smaller
    for folder, smaller in saved.items():
        check_reload(smaller, folder)


REMOVING: dict[str, dict[str, Any]] = {
    "shortgpt": {},
    "sleb": {},
    "uidl": {},
    "foldgpt": {"gates": {"steps": 4}, "removal_portion": 0.9},
    "llm_streamline": {"replacement": "none"},
}


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("name", REMOVING)
@pytest.mark.parametrize("first", ["flexigpt", "direct_share"])
def test_blocks_go_from_where_others_hang_on_them(
    first: str, name: str, family: str, tiny_model: Callable[..., Any], windows: Tensor
) -> None:
    """Adapters sit on a base that must outlive them; heads pass to the first who uses them."""
    model = tiny_model(family, **{DEPTH[family]: 6})
    before = METHODS[first](sparsity=0.2 if first == "flexigpt" else 0.08)
    shared = cut(model, before.compress(model, evidence_of(model, windows)))
    method = METHODS[name](sparsity=0.2, **REMOVING[name])
    method.outline(build_on_meta(shared.config))
    smaller = cut(shared, method.compress(shared, evidence_of(shared, windows)))
    assert 1 - count_parameters(smaller) / count_parameters(shared) >= 0.2 - TOLERANCE
    with torch.no_grad():
        assert torch.isfinite(smaller(windows).logits).all()


def test_a_step_out_of_reach_is_named_with_what_the_stack_can_do(
    tiny_model: Callable[..., Any],
) -> None:
    pairs = {**SHARE, "keep_head": 1, "keep_tail": 1, "portion": 0.9}
    stack = Stack(sparsity=0.6, steps=(pairs, PRUNE))
    with pytest.raises(InputError, match=r"stack can remove at most .*block_sharing"):
        stack.outline(build_on_meta(tiny_model("llama").config))


def test_a_stack_is_called_by_its_steps() -> None:
    entry = ENTRIES["stack"]
    both = [entry(name="stack", steps=[PRUNE, step]) for step in (SHARE, FACTOR)]
    names = [variant.name for variant in expand(both, [0.3], [0])]
    assert names == ["shortgpt+block_sharing", "shortgpt+svd_llm"]
    rivals = [
        entry(name="stack", steps=[PRUNE, {**FACTOR, "update": update}])
        for update in ("none", "closed_form")
    ]
    names = [variant.name for variant in expand(rivals, [0.3], [0])]
    assert names[1] == "shortgpt+svd_llm shortgpt+svd_llm update=closed_form"


def test_a_stack_depends_on_the_code_of_its_steps() -> None:
    modules = Stack(sparsity=0.3, steps=(PRUNE, FACTOR)).modules()
    methods = "foldstack.compression.methods"
    assert set(modules) == {
        f"{methods}.{name}" for name in ("stack", "removal.shortgpt", "factoring.svd_llm")
    }
