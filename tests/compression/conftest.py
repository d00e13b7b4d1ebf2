"""One model of every structure that a plan can describe, random and tiny."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from foldstack.compression.methods.sharing.head_sharing import head_cuts
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.block_plan import NarrowHeads, Sliced
from foldstack.compression.structure.heads import head_sizes
from foldstack.compression.structure.modeling_foldstack import FoldstackForCausalLM
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import config_for, plan_of

PlanOf = Callable[[Any, Plan], Plan]


def _linears(model: Any) -> list[str]:
    return [site.name for site in architecture_of(model).linears]


def _factored(model: Any, plan: Plan) -> Plan:
    return plan.factor({(0, _linears(model)[0]): 5, (2, _linears(model)[-1]): 6})


def _shared_basis(model: Any, plan: Plan) -> Plan:
    name = _linears(model)[-2]
    return plan.factor({(p, name): 5 for p in (1, 2)}, {(2, name): 1})


def _narrow_heads(model: Any, plan: Plan) -> Plan:
    rotary = 0 if model.config.model_type in ("gpt2", "opt") else 4
    heads = NarrowHeads(qk_dim=rotary or 5, v_dim=7, rotary_dim=rotary)
    return plan.narrow(heads={1: heads, 3: heads})


def _fewer_heads(model: Any, plan: Plan) -> Plan:
    sizes = head_sizes(model)
    whole = {"qk_dim": sizes.head_dim, "v_dim": sizes.head_dim, "rotary_dim": sizes.rotary_dim}
    return plan.narrow(heads={1: NarrowHeads(kv_heads=1, **whole)})


def _sliced(model: Any, plan: Plan) -> Plan:
    widths = [20, 21, 22, 23, model.config.hidden_size]
    pairs = itertools.pairwise(widths)
    return plan.slice([Sliced(entering=a, middle=24, leaving=b) for a, b in pairs])


def _shared_heads(model: Any, plan: Plan) -> Plan:
    donors = {(1, 0): (0, 1), (2, 0): (0, 1), (2, 1): (3, 1)}
    return plan.share_slices(head_cuts(model), donors)


STRUCTURES: dict[str, PlanOf] = {
    "factored": _factored,
    "shared_basis": _shared_basis,
    "shared_blocks": lambda _, plan: plan.share(1, [2]),
    "scaled_outputs": lambda _, plan: plan.share(2, [3], outputs="scaled"),
    "virtual_blocks": lambda model, plan: plan.borrow(
        {3: 1}, {_linears(model)[0]: 3, _linears(model)[-1]: 2}, outputs="normed"
    ),
    "narrow_heads": _narrow_heads,
    "fewer_heads": _fewer_heads,
    "narrow_mlps": lambda _, plan: plan.narrow({0: 24, 2: 40}),
    "light_block": lambda _, plan: plan.replace(1, 3, "swiglu", 16),
    "light_first": lambda _, plan: plan.replace(0, 2, "ffn", 16),
    "sliced": _sliced,
    "shared_heads": _shared_heads,
}


@pytest.fixture(params=sorted(STRUCTURES))
def structure(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def structures() -> tuple[str, ...]:
    return tuple(STRUCTURES)


@pytest.fixture
def structured(tiny_model: Callable[..., Any]) -> Callable[..., FoldstackForCausalLM]:
    """Maker of a random model of a structure: `structured("narrow_heads", "gpt2")`."""

    def make(structure: str, family: str = "llama", **overrides: Any) -> FoldstackForCausalLM:
        dense = tiny_model(family, **overrides)
        plan = STRUCTURES[structure](dense, plan_of(dense))
        model = FoldstackForCausalLM(config_for(dense.config, plan))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                is_vector = parameter.ndim == 1
                scale = 0.2 if is_vector else max(1, parameter.shape[-1]) ** -0.5
                parameter.copy_(scale * noise + (parameter if is_vector else 0))
        return model.eval()

    return make
