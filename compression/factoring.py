"""Factored linears of a model: the inputs they are fitted to, and their tensors in a cut."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.architectures import architecture_of
from foldstack.compression.grams import summed_inputs
from foldstack.compression.low_rank import updated_directions
from foldstack.compression.mapped_memory import release
from foldstack.compression.method import Evidence
from foldstack.compression.modeling_foldstack import AdaptedLinear, LowRankLinear
from foldstack.compression.plan import Plan
from foldstack.compression.statistics import Statistics
from foldstack.compression.stream import BlockStream, cpu_precision, tensors_of
from foldstack.compression.surgery import plan_of

Site = tuple[int, str]
"""Position and name of a linear that is stored there."""
Factors = tuple[Tensor, Tensor]
"""first, (rank, in), and second, (out, rank): W' = second @ first."""


def users_of(plan: Plan, position: int) -> list[int]:
    """The positions that run with the linears stored at `position`, itself among them, in order."""
    return [user for user in range(len(plan.blocks)) if plan.owner(user) == position]


def gram_of_users(plan: Plan, position: int, reads: str, statistics: Statistics) -> Tensor:
    """The Gram of all inputs that the linears stored at `position` see, borrowers' included."""
    grams = [statistics.gram(user, reads) for user in users_of(plan, position)]
    return torch.stack(grams).sum(0) if len(grams) > 1 else grams[0]


def named_factors(
    position: int, name: str, factors: Factors, dense: nn.Module
) -> dict[str, Tensor]:
    """The factors as a cut names them, in the precision of the weight; the bias once, on
    `second`."""
    weight, bias = dense.weight, dense.bias
    assert isinstance(weight, Tensor)
    place = f"blocks.{position}.{name}"
    first, second = (factor.to(weight.dtype) for factor in factors)
    tensors = {f"{place}.first.weight": first, f"{place}.second.weight": second}
    if bias is not None:
        assert isinstance(bias, Tensor)
        tensors[f"{place}.second.bias"] = bias.detach()
    return tensors


def fitted_in_order(
    model: PreTrainedModel,
    factors_of: Callable[[int], Mapping[str, Factors]],
    evidence: Evidence,
    what: str,
) -> dict[str, Tensor]:
    """Tensors of the factors of all blocks, each second factor fitted again by least squares on
    the inputs that the compressed blocks before it produce.

    The update of SVD-LLM's released code (`--step 2`). Inside a block every linear sees the inputs
    that its original siblings produce. Linears that several blocks use are fitted when the first of
    them is reached; the others count with their inputs in the dense model, since what compression
    makes of those is not known yet.

    Args:
        factors_of: the factors of the linears stored at a position, by their name in the block;
            called once for each, and not for those that a killed run has left.
        what: whose progress this is.
    """
    plan, spool = plan_of(model), evidence.spool()
    stream = BlockStream(
        model, evidence.calibration, dtype=cpu_precision(model), folder=evidence.work
    )
    fitted: dict[int, dict[str, LowRankLinear]] = {}
    for position, block in enumerate(stream.blocks):
        owner = plan.owner(position)
        if owner not in fitted:
            fit = partial(_fitted, model, stream, factors_of, evidence)
            tensors = spool.part(f"block-{owner}", fit)
            fitted[owner] = _thin_linears(tensors, owner, model.device)
        stream.advance(_with_linears(block, fitted[owner]))
        release(tensors_of(block))
        release(t for linear in fitted[owner].values() for t in linear.parameters())
        evidence.progress(what, position + 1, len(stream.blocks))
    return spool.tensors


def _fitted(
    model: PreTrainedModel,
    stream: BlockStream,
    factors_of: Callable[[int], Mapping[str, Factors]],
    evidence: Evidence,
) -> dict[str, Tensor]:
    """The factors that the block before which the stream stands uses, fitted on what it holds, as
    a cut names them."""
    architecture, plan = architecture_of(model), plan_of(model)
    position, block = stream.position, stream.blocks[stream.position]
    owner = plan.owner(position)
    factors = factors_of(owner)
    if not factors:
        return {}
    with summed_inputs(block, architecture) as deviated:
        for _ in stream.outputs(block):
            pass
    fitted: dict[str, Tensor] = {}
    for site in architecture.linears:
        if site.name not in factors:
            continue
        dense = stream.blocks[owner].get_submodule(site.name)
        gram = deviated.grams[site.reads].double()
        for user in users_of(plan, owner):
            if user != position:
                gram = gram + evidence.statistics.gram(user, site.reads).to(gram.device)
        first, second = factors[site.name]
        second = updated_directions(architecture.weight(dense).detach(), first, second, gram)
        fitted |= named_factors(owner, site.name, (first, second), dense)
    return fitted


def _thin_linears(
    tensors: Mapping[str, Tensor], position: int, device: torch.device
) -> dict[str, LowRankLinear]:
    """The factored linears of the block at `position` by their names, from the tensors of a cut."""
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, factor, attribute = key.removeprefix(f"blocks.{position}.").rsplit(".", 2)
        states[name][f"{factor}.{attribute}"] = tensor.to(device)
    linears = {}
    for name, state in states.items():
        rank, in_features = state["first.weight"].shape
        with torch.device("meta"):
            out_features, has_bias = len(state["second.weight"]), "second.bias" in state
            linears[name] = LowRankLinear(in_features, out_features, rank, has_bias)
        linears[name].load_state_dict(state, assign=True)
    return linears


def _with_linears(block: nn.Module, linears: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the block with these linears in place; the block itself when there are none."""
    if not linears:
        return block
    changed = copy.deepcopy(block)
    for name, linear in linears.items():
        replaced = changed.get_submodule(name)
        if isinstance(replaced, AdaptedLinear):
            name = f"{name}.borrowed"  # the adapter on it stays
        parent_path, _, attribute = name.rpartition(".")
        setattr(changed.get_submodule(parent_path), attribute, linear)
    return changed
