"""What every method promises, for every method and every supported family."""

import copy
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from foldstack.compression import methods
from foldstack.compression.checkpoints.checkpoint import check_reload, save_model
from foldstack.compression.errors import InputError
from foldstack.compression.methods import METHODS, AnyMethod
from foldstack.compression.methods.method import TOLERANCE, Evidence, Method, missed
from foldstack.compression.methods.support import page
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import build_on_meta, cut, plan_of
from foldstack.compression.training.recovery import Recovery, recover

# Each method as its tests build it: small enough to run in a moment on four blocks.
QUICK: dict[str, dict[str, Any]] = {
    "shortgpt": {},
    "svd_llm": {"update": "closed_form"},
    "llm_streamline": {"epochs": 1, "replacement": "layer"},
    "replaceme": {},
    "block_sharing": {"keep_head": 1, "keep_tail": 0, "leader_windows": 2},
    "foldgpt": {"keep_head": 1, "keep_tail": 0, "leader_windows": 2, "gates": {"steps": 10}},
    "modegpt": {},
    "sleb": {},
    "uidl": {},
    "laco": {},
    "mka": {"protect_first": 0, "protect_last": 0, "neighbours": 1, "weight": 0.5},
    "basis_sharing": {"update": "layerwise"},
    "stack": {
        "steps": [
            {"name": "shortgpt"},
            {"name": "block_sharing", "keep_head": 0, "keep_tail": 0, "leader_windows": 2},
        ]
    },
    "flexigpt": {},
    "flexigpt_extend": {},
    "slicegpt": {},
    "search": {},
    "direct_share": {},
    "post_share": {"epochs": 1},
}
# The same method with a structure that only a portable checkpoint holds.
VARIANTS: dict[str, dict[str, Any]] = {
    "basis_sharing": {"update": "global", "group_size": 3, "coefficients": "paper"},
    "foldgpt": {"removal_portion": 0, "keep_head": 0, "keep_tail": 0, "scale_outputs": True},
    "llm_streamline": {"epochs": 1, "replacement": "ffn"},
    "replaceme": {"fitted": "map", "weighting": "equal", "choice": "loss", "runs": 2},
    "modegpt": {"allocation": "uniform", "value_subspace": "values", "pair_score": "sum"},
    "direct_share": {"match": "product"},
    "flexigpt": {"allocation": "paper", "init": "balanced", "agg": "rel"},
    "slicegpt": {"widths": "explained_variance", "round_interval": 1, "orientation": "pca"},
}
PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"
# How far the outline's size may be off, as a share of the model: a method whose widths wait for the
# data rounds them otherwise before it.
OUTLINE_SLACK = {"modegpt": TOLERANCE, "search": TOLERANCE}
SPARSITY = 0.25
# Methods that add parameters, and the sparsity that their tests ask for.
GROWING = {"flexigpt_extend": -0.16}
# Methods that cannot remove as much, and what theirs ask for.
MODEST = {"direct_share": 0.1, "post_share": 0.1}


@pytest.fixture(params=sorted(METHODS))
def method_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=sorted(set(METHODS) - set(GROWING)))
def shrinking_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def method(method_name: str) -> Method:
    sparsity = (GROWING | MODEST).get(method_name, SPARSITY)
    return METHODS[method_name](sparsity=sparsity, **QUICK[method_name])


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (4, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def evidence(windows: Tensor) -> Callable[[Any], Evidence]:
    def of(model: Any) -> Evidence:
        statistics = gather(model, windows, KINDS)
        return Evidence(windows, statistics, rank_blocks(statistics))

    return of


def logits(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(windows, use_cache=False).logits


def cached_logits(model: Any, windows: Tensor) -> Tensor:
    """The logits of decoding from a cache: a prompt, then token by token."""
    cache, parts = None, []
    prompt = windows.shape[1] - 3
    with torch.no_grad():
        for tokens in (windows[:, :prompt], *windows[:, prompt:].split(1, dim=1)):
            out = model(tokens, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    return torch.cat(parts, dim=1)


NUM_NEW = 4


def generated(model: Any, prompt: Tensor) -> list[int]:
    """What the stock `generate` writes, greedily and without an end."""
    written = model.generate(
        prompt, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0
    )
    return list(written[0, prompt.shape[1] :].tolist())


def greedy(model: Any, prompt: Tensor) -> list[int]:
    """The same by whole forward passes; id 0 ends a text, which `generate` was told not to do."""
    tokens = prompt
    for _ in range(NUM_NEW):
        best = logits(model, tokens)[:, -1:, 1:].argmax(-1) + 1
        tokens = torch.cat([tokens, best], dim=1)
    return list(tokens[0, prompt.shape[1] :].tolist())


def documented(method: str, model_type: str) -> str:
    """What the page about architectures says of a method and a family."""
    lines = [line.removesuffix(" |") for line in PAGE.read_text().splitlines()]
    heads = next(line for line in lines if line.startswith("| method |")).split(" | ")
    row = next(line for line in lines if line.startswith(f"| `{method}` |"))
    return row.split(" | ")[heads.index(model_type)]


def test_it_shrinks_saves_decodes_and_leaves_its_input_alone_or_says_why_not(
    method: Method,
    family: str,
    tiny_model: Any,
    windows: Tensor,
    evidence: Callable[[Any], Evidence],
    tmp_path: Path,
) -> None:
    model = tiny_model(family)
    said = documented(method.name, model.config.model_type)
    if said.startswith("no"):
        with pytest.raises(InputError) as refusal:
            method.outline(build_on_meta(model.config))
        assert f"{said[4:-1]}. {refusal.value}\n" in PAGE.read_text()
        return
    before = copy.deepcopy(model.state_dict())
    change = method.compress(model, evidence(model))
    smaller = cut(model, change)

    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{method.name} changed {name} of its input"
    assert all(not module._forward_pre_hooks for module in model.modules())

    assert change.plan.base_num_blocks == len(plan_of(model).blocks)
    for block, inherited in zip(change.plan.blocks, change.inherits, strict=True):
        assert inherited is None or inherited in block.stands_for
    types = getattr(model.config, "layer_types", None)
    if types is not None:  # a block keeps the attention that it was trained with
        kept = [types[block.source] for block in change.plan.blocks]
        assert smaller.config.get_text_config().layer_types == kept or not all(
            block.has_attention for block in change.plan.blocks
        )

    dense, left = count_parameters(model), count_parameters(smaller)
    assert 1 - left / dense >= method.sparsity - TOLERANCE
    planned = size_of_plan(model.config, change.plan).parameters
    outlined = size_of_plan(model.config, method.outline(build_on_meta(model.config))).parameters
    assert left == planned
    assert abs(outlined - left) <= OUTLINE_SLACK.get(method.name, 0) * dense

    got = logits(smaller, windows)
    assert torch.isfinite(got).all()
    assert (got - logits(model, windows)).abs().max() > 1e-3  # the tensors really changed
    torch.testing.assert_close(cached_logits(smaller, windows), got, rtol=1e-4, atol=1e-4)
    assert generated(smaller, windows[:1, :8]) == greedy(smaller, windows[:1, :8])

    grade = save_model(smaller, tmp_path, tokenizer_from=tmp_path)
    assert (grade == "native") == change.plan.is_native
    # In a fresh process without foldstack: logits, cached decoding, generation, size.
    report = check_reload(smaller, tmp_path)
    assert report.logits_difference <= 1e-6 * report.logits_scale
    assert report.generated_tokens


@pytest.mark.slow
def test_the_page_about_architectures_is_what_the_methods_answer() -> None:
    assert page() == PAGE.read_text(), (
        "run: python -m foldstack.compression.methods.support > docs/architectures.md"
    )


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_the_other_structures_of_a_method_hold_too(
    name: str,
    family: str,
    tiny_model: Any,
    windows: Tensor,
    evidence: Callable[[Any], Evidence],
) -> None:
    model = tiny_model(family)
    sparsity = MODEST.get(name, SPARSITY)
    change = METHODS[name](sparsity=sparsity, **VARIANTS[name]).compress(model, evidence(model))
    smaller = cut(model, change)
    assert 1 - count_parameters(smaller) / count_parameters(model) >= sparsity - TOLERANCE
    got = logits(smaller, windows)
    torch.testing.assert_close(cached_logits(smaller, windows), got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_what_it_made_can_be_trained_back(
    method: Method,
    family: str,
    tiny_model: Any,
    windows: Tensor,
    evidence: Callable[[Any], Evidence],
) -> None:
    """Adapters find the stored weights whatever form they have, and merge without a trace."""
    model = tiny_model(family)
    smaller = cut(model, method.compress(model, evidence(model)))
    before, names = logits(smaller, windows), smaller.state_dict().keys()
    with torch.no_grad():
        start = float(smaller(windows, labels=windows).loss)
    settings = Recovery(steps=8, batch_size=4, learning_rate=1e-2, lora_rank=4)
    recover(smaller, windows.repeat(8, 1), settings)
    assert smaller.state_dict().keys() == names
    assert (logits(smaller, windows) - before).abs().max() > 1e-3
    with torch.no_grad():
        assert float(smaller(windows, labels=windows).loss) < start


def test_a_bfloat16_model_stays_one(
    method: Method, tiny_model: Any, windows: Tensor, evidence: Callable[[Any], Evidence]
) -> None:
    """With an attention mask that is a tensor of the model's precision (sliding windows)."""
    model = tiny_model("mistral").bfloat16()
    smaller = cut(model, method.compress(model, evidence(model)))
    assert {parameter.dtype for parameter in smaller.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(smaller, windows)).all()


@pytest.mark.parametrize("dead", ["embed_tokens", "up_proj", "v_proj"])
@pytest.mark.parametrize("name", ["svd_llm", "basis_sharing", "modegpt"])
def test_inputs_that_are_always_zero_break_no_closed_form(
    name: str,
    dead: str,
    tiny_model: Any,
    windows: Tensor,
    evidence: Callable[[Any], Evidence],
) -> None:
    """Nothing is lost on such inputs whatever replaces the weights: the model computes the same."""
    model = tiny_model("llama")
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if dead in place:
                parameter.zero_()
    method = METHODS[name](sparsity=SPARSITY, **QUICK[name])
    smaller = cut(model, method.compress(model, evidence(model)))
    got = logits(smaller, windows)
    assert torch.isfinite(got).all()
    if dead == "embed_tokens":
        torch.testing.assert_close(got, logits(model, windows))


def test_the_same_seed_gives_the_same_cut(
    method: Method, tiny_model: Any, evidence: Callable[[Any], Evidence]
) -> None:
    changes = []
    for _ in range(2):
        model = tiny_model("llama")
        changes.append(method.compress(model, evidence(model)))
    first, second = changes
    assert first.plan == second.plan == Plan.model_validate_json(first.plan.model_dump_json())
    assert first.inherits == second.inherits
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name


def test_a_cut_model_can_be_cut_by_every_method(
    method: Method, tiny_model: Any, windows: Tensor, evidence: Callable[[Any], Evidence]
) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    one_block = METHODS["shortgpt"](sparsity=0.1)
    pruned = cut(model, one_block.compress(model, evidence(model)))
    smaller = cut(pruned, method.compress(pruned, evidence(pruned)))
    removed = 1 - count_parameters(smaller) / count_parameters(pruned)
    assert removed >= method.sparsity - TOLERANCE
    assert torch.isfinite(logits(smaller, windows)).all()


def test_a_sparsity_that_counts_as_nothing_changes_nothing(
    shrinking_name: str, tiny_model: Any, windows: Tensor, evidence: Callable[[Any], Evidence]
) -> None:
    """Removing whole blocks or sharing them cannot remove a thousandth; factoring and narrowing
    can."""
    model = tiny_model("llama")
    method = METHODS[shrinking_name](sparsity=0.001, **QUICK[shrinking_name])
    smaller = cut(model, method.compress(model, evidence(model)))
    removed = 1 - count_parameters(smaller) / count_parameters(model)
    assert 0 <= removed <= 0.001 + TOLERANCE
    if shrinking_name not in ("svd_llm", "basis_sharing", "modegpt", "search"):
        assert torch.equal(logits(smaller, windows), logits(model, windows))


def test_a_sparsity_that_it_misses_is_explained(
    method: Method, tiny_model: Any, windows: Tensor, evidence: Callable[[Any], Evidence]
) -> None:
    """Only what goes in whole blocks or groups misses a quarter of so small a model by much."""
    model = tiny_model("llama")
    smaller = cut(model, method.compress(model, evidence(model)))
    realised = 1 - count_parameters(smaller) / count_parameters(model)
    sentence = missed(method, realised)
    is_off = abs(realised - method.sparsity) > TOLERANCE
    assert is_off == (sentence is not None)
    assert not (is_off and method.steps_of in ("ranks", "widths of heads and MLPs"))
    if sentence is not None:
        assert sentence.startswith(f"{method.title} removed {realised:.1%} of the parameters where")
        assert f"in steps of {method.steps_of}, and one step fewer would have left" in sentence


def test_a_sparsity_out_of_reach_is_refused_before_any_data(
    shrinking_name: str, tiny_model: Any
) -> None:
    method = METHODS[shrinking_name](sparsity=0.99, **QUICK[shrinking_name])
    model = build_on_meta(tiny_model("llama").config)
    with pytest.raises(InputError, match=r"can remove at most .* got sparsity 0\.99") as caught:
        method.outline(model)
    offered = re.search(r"\(0, (0\.\d+)\]", str(caught.value))
    assert offered is not None
    reachable = method.model_copy(update={"sparsity": float(offered[1])})
    size = size_of_plan(model.config, reachable.outline(model)).parameters
    assert 1 - size / count_parameters(model) >= reachable.sparsity - TOLERANCE


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, float("nan")])
def test_a_sparsity_outside_0_and_1_is_refused(shrinking_name: str, sparsity: float) -> None:
    with pytest.raises(ValidationError, match="sparsity"):
        METHODS[shrinking_name](sparsity=sparsity)


@pytest.mark.parametrize("name", sorted(GROWING))
@pytest.mark.parametrize("sparsity", [0, -1, 0.1, float("nan")])
def test_a_method_that_grows_a_model_refuses_to_shrink_it(name: str, sparsity: float) -> None:
    with pytest.raises(ValidationError, match="sparsity"):
        METHODS[name](sparsity=sparsity)


def test_an_unknown_setting_or_method_is_refused_by_name(method_name: str) -> None:
    asked = GROWING.get(method_name, 0.2)
    read = TypeAdapter(AnyMethod).validate_python
    assert read({"name": method_name, "sparsity": asked}) == METHODS[method_name](sparsity=asked)
    with pytest.raises(ValidationError, match="spasrity_x"):
        read({"name": method_name, "sparsity": asked, "spasrity_x": 1})
    with pytest.raises(ValidationError, match=r"expected tags.*shortgpt"):
        read({"name": "shrotgpt", "sparsity": 0.2})


def test_the_docstring_names_its_source(method_name: str) -> None:
    text = METHODS[method_name].__doc__ or ""
    assert re.search(r"arXiv \d{4}\.\d{5}", text)
    assert "Departs from the paper" in text


def test_what_it_needs_is_something_that_can_be_gathered(method_name: str) -> None:
    assert METHODS[method_name].needs <= KINDS


def test_what_it_computes_is_told_from_shapes_alone(method_name: str, tiny_model: Any) -> None:
    on_meta = build_on_meta(tiny_model("llama").config)
    method = METHODS[method_name](sparsity=GROWING.get(method_name, 0.2), **QUICK[method_name])
    few, many = (method.arithmetic(on_meta, tokens) for tokens in (1 << 8, 1 << 20))
    told = (few.float64, few.products, few.passes, few.heads, float(few.streams))
    assert all(0 <= amount < float("inf") for amount in told)
    assert many.float64 >= few.float64
    assert many.products >= few.products
    decides_by_similarity_alone = {"shortgpt", "uidl"}
    assert any(told) == (method_name not in decides_by_similarity_alone)


def subclasses_of(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from subclasses_of(subclass)


def test_every_method_of_the_wing_is_registered() -> None:
    prefix = f"{methods.__name__}."
    for module in pkgutil.walk_packages(methods.__path__, prefix):
        importlib.import_module(module.name)
    written = {
        cls
        for cls in subclasses_of(Method)
        if cls.__module__.startswith(prefix) and not inspect.isabstract(cls)
    }
    assert written == set(METHODS.values())
    assert set(QUICK) == set(METHODS)
