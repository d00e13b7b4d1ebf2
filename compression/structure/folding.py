"""Factored linears that store no less than their product, multiplied out: a model's last step."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.block_plan import LowRank
from foldstack.compression.structure.modeling_foldstack import LowRankLinear
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import Cut, build_on_meta, config_for, cut, plan_of

logger = logging.getLogger(__name__)

Site = tuple[int, str]
"""Position and name of a linear that is stored there."""


def unpaid_factors(model: PreTrainedModel) -> tuple[Site, ...]:
    """The factored linears of a model that would store no more, and compute less, as one matrix.

    Linears on one basis are weighed together, and go together: of g matrices (m x n) at rank k,
    k (n + g m) >= g m n; of one alone, k >= m n / (m + n). Methods do not factor so; a basis is
    left to too few of its linears where blocks go after it was made.
    """
    groups: dict[Site, list[Site]] = defaultdict(list)
    for position, block in enumerate(plan_of(model).blocks):
        for name, form in block.linears.items():
            if isinstance(form, LowRank):
                holder = position if form.basis_of is None else form.basis_of
                groups[holder, name].append((position, name))
    return tuple(
        site for members in groups.values() if not _pays(model, members) for site in members
    )


def _pays(model: PreTrainedModel, members: list[Site]) -> bool:
    (rank, inputs), outputs = (0, 0), 0
    for site in members:
        first, second = _factors(model, site)
        (rank, inputs), outputs = first.shape, outputs + len(second)
    return bool(rank * (inputs + outputs) < inputs * outputs)


def _factors(model: PreTrainedModel, site: Site) -> tuple[Tensor, Tensor]:
    linear: Any = architecture_of(model).blocks(model)[site[0]].get_submodule(site[1])
    assert isinstance(linear, LowRankLinear)
    first: Any = linear.first
    return first.weight, linear.second.weight


@torch.no_grad()
def fold(model: PreTrainedModel, plan: Plan | None = None) -> tuple[PreTrainedModel, Plan]:
    """A model without `unpaid_factors`, and its plan; the model itself where it has none.

    It computes the same up to rounding; the products are made in float64.

    Args:
        model: any; it stays as it is, and what does not change is shared with it.
        plan: the model's, where that says more than its config does.
    """
    plan = plan_of(model) if plan is None else plan
    sites = unpaid_factors(model)
    if not sites:
        return model, plan
    named = ", ".join(f"{name} of block {position}" for position, name in sites)
    logger.info("two factors store no less than their product, which stays instead: %s", named)
    inner = plan_of(model).multiply_out(sites)
    target = build_on_meta(config_for(model.config, inner))
    tensors: dict[str, Tensor] = {}
    for site in sites:
        tensors |= _multiplied(model, target, site)
    inherits = tuple(range(len(inner.blocks)))
    made = cut(model, Cut(inner, inherits, tensors), share_memory=True)
    return made, plan.multiply_out(sites)


def _multiplied(
    model: PreTrainedModel, target: PreTrainedModel, site: Site
) -> Mapping[str, Tensor]:
    position, name = site
    architecture = architecture_of(model)
    first, second = _factors(model, site)
    place: Any = architecture.blocks(target)[position].get_submodule(name)
    whole = (second.double() @ first.double()).to(second.dtype)
    at = f"blocks.{position}.{name}"
    tensors = {f"{at}.weight": architecture.stored_weight(place, whole)}
    linear: Any = architecture.blocks(model)[position].get_submodule(name)
    if linear.second.bias is not None:
        tensors[f"{at}.bias"] = linear.second.bias.detach()
    return tensors
