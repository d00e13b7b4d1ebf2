"""A model multiplied out is of the stock class and computes the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from foldstack.compression.errors import InputError
from foldstack.compression.export.forms import why_no_stock
from foldstack.compression.export.multiplied_out import multiplied_out
from foldstack.compression.structure.block_plan import NarrowHeads
from foldstack.compression.structure.modeling_foldstack import FoldstackForCausalLM, NarrowAttention
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import config_for, plan_of

REFUSED = ("light_block", "light_first", "sliced", "virtual_blocks")
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt2"]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 97, (2, 20), generator=torch.Generator().manual_seed(5))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_the_same_in_the_stock_class_or_says_why_not(
    structure: str, family: str, structured: Callable[..., Any], ids: torch.Tensor
) -> None:
    if structure == "sliced" and family == "gemma2":
        return  # no such structure
    if structure == "narrow_heads" and family == "qwen3":
        return  # queries and keys are normed whole
    model = structured(structure, family)
    if structure in REFUSED:
        with pytest.raises(
            InputError, match=r"cannot be multiplied out .*; its own folder runs in"
        ):
            multiplied_out(model)
        return
    _move_pairs(model)
    stock = multiplied_out(model)
    assert type(stock).__module__.startswith("transformers.")
    expected = logits(model, ids)
    torch.testing.assert_close(logits(stock, ids), expected, rtol=1e-5, atol=1e-5)
    assert plan_of(stock).is_native


def _move_pairs(model: Any) -> None:
    """Every key head keeps other rotary pairs, out of order; not where coordinates are normed."""
    for module in model.modules():
        if not isinstance(module, NarrowAttention) or module.q_norm is not None:
            continue
        if module.rotary_pairs is not None:
            heads, pairs = module.rotary_pairs.shape
            kept = torch.tensor([[3, 1], [0, 2]])[:heads]
            module.rotary_pairs.copy_(kept if pairs == 2 else module.rotary_pairs.flip(-1))


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
def test_a_value_bias_in_the_output_goes_back_where_the_stock_class_has_one(
    family: str, tiny_model: Callable[..., Any], ids: torch.Tensor
) -> None:
    dense = tiny_model(family)
    rotary = 0 if family == "gpt2" else 4
    form = {"qk_dim": rotary or 5, "v_dim": 6, "rotary_dim": rotary}
    form["value_bias_in_output"] = family == "qwen2"
    plan = plan_of(dense).model_dump(mode="json")
    plan["blocks"][1]["narrow_heads"] = form
    model = FoldstackForCausalLM(config_for(dense.config, Plan.model_validate(plan))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    torch.testing.assert_close(
        logits(multiplied_out(model), ids), logits(model, ids), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_fewer_key_heads_stand_there_as_often_as_they_are_read(
    family: str, tiny_model: Callable[..., Any], ids: torch.Tensor
) -> None:
    dense = tiny_model(family)
    heads = NarrowHeads(qk_dim=4, v_dim=7, rotary_dim=4, kv_heads=1)
    plan = plan_of(dense).narrow(heads={1: heads, 3: heads})
    model = FoldstackForCausalLM(config_for(dense.config, plan)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    torch.testing.assert_close(
        logits(multiplied_out(model), ids), logits(model, ids), rtol=1e-5, atol=1e-5
    )


def test_what_cannot_be_is_named() -> None:
    plan = Plan.identity("llama", 4)
    assert why_no_stock(plan) is None
    assert "light network" in str(why_no_stock(plan.replace(1, 3, "ffn", 8)))
    assert "norm what attention" in str(why_no_stock(plan.borrow({3: 1}, {}, outputs="normed")))
