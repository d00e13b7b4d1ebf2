"""Factored linears of a model: the inputs they are fitted to, and their tensors in a cut."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.closed_forms.loss_curve import CURVE_STEPS, LossCurve
from foldstack.compression.closed_forms.low_rank import (
    updated_directions,
    updated_directions_operations,
)
from foldstack.compression.closed_forms.selection import spread
from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.methods.in_order import Streams, compressed_in_order
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.refit import Refit
from foldstack.compression.statistics.gathering import Statistics
from foldstack.compression.statistics.sensitivity import Sensitivity
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import linear_shapes
from foldstack.compression.structure.surgery import plan_of

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


def as_held(factors: Factors, model: PreTrainedModel) -> Factors:
    """Factors that wait while other things are computed, in half the memory of float64 unless the
    model itself is."""
    first, second = factors
    precision = torch.promote_types(model.dtype, torch.float32)
    return first.to(precision), second.to(precision)


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
    plan: Plan,
    factors_of: Callable[[int], Mapping[str, Factors]],
    evidence: Evidence,
    what: str,
    dense_target: float,
    refit: Refit,
) -> dict[str, Tensor]:
    """Tensors of the factors of all blocks, each second factor fitted again by least squares on
    the inputs that the compressed blocks before it produce.

    The update of SVD-LLM's released code (`--step 2`). Inside a block every linear sees the inputs
    that its original siblings produce. With x a linear's input in the dense model and x' that
    behind the compressed blocks, the target of W' x' is

        W ((1 - a) x' + a x),   a = `dense_target`

    so that a linear repairs a part of what those before it have spoilt (as layer-wise quantisation
    does, arXiv 2504.09629); at 0 it is the released code's. `refit` then moves those that write
    into the residual stream.

    Linears that several blocks use are fitted when the first of them is reached; the others count
    with their inputs in the dense model, since what compression makes of those is not known yet.

    Args:
        plan: the structure with the factors in it.
        factors_of: the factors of the linears stored at a position, by their name in the block,
            `as_held`; called once for each, and not for those that a killed run has left.
        what: whose progress this is.
    """

    def fitted(owner: int, streams: Streams) -> dict[str, Tensor]:
        factors = factors_of(owner)
        if not factors:
            return {}
        grams, shifts = streams.sums(pass_on=refit == "none")
        for shift in () if shifts is None else shifts.values():
            shift *= dense_target  # in place: they are the largest of what lives here
        return _fitted(model, owner, streams.position, factors, (grams, shifts), evidence)

    return compressed_in_order(
        model, plan, fitted, evidence, what, refit=refit, beside_dense=dense_target > 0
    )


def fitting_arithmetic(
    model: PreTrainedModel, ranks: Mapping[Site, int], num_tokens: int, dense_target: float
) -> Arithmetic:
    """Of `fitted_in_order`, without that of the factors it is given."""
    architecture, shapes, shifted = architecture_of(model), linear_shapes(model), dense_target > 0
    read = {
        (position, site.reads): shapes[position, site.name][1]
        for position in range(len(plan_of(model).blocks))
        for site in architecture.linears
        if (position, site.name) in ranks
    }
    gram = math.fsum(num_tokens * width**2 for width in read.values())
    closed = (
        updated_directions_operations(*shapes[site], rank, shifted=shifted)
        for site, rank in ranks.items()
    )
    thin = sum(rank * sum(shapes[site]) for site, rank in ranks.items())
    dense = sum(rows * columns for rows, columns in shapes.values())
    return Arithmetic(
        float64=math.fsum(closed),
        products=gram * (3 if shifted else 1),  # a shift is not symmetric
        passes=(2 if shifted else 1) + min(1.0, thin / dense),
        streams=2 if shifted else 1,
    )


def _fitted(
    model: PreTrainedModel,
    owner: int,
    position: int,
    factors: Mapping[str, Factors],
    sums: tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None],
    evidence: Evidence,
) -> dict[str, Tensor]:
    """The factors stored at `owner`, fitted on the sums of what enters the linears at `position`,
    as a cut names them."""
    architecture, (grams, shifts) = architecture_of(model), sums
    blocks = architecture.blocks(model)
    fitted: dict[str, Tensor] = {}
    for site in architecture.linears:
        if site.name not in factors:
            continue
        dense = blocks[owner].get_submodule(site.name)
        gram = grams[site.reads].double()
        for user in users_of(plan_of(model), owner):
            if user != position:
                gram = gram + evidence.statistics.gram(user, site.reads).to(gram.device)
        first, second = factors[site.name]
        weight = architecture.weight(dense).detach()
        shift = None if shifts is None else shifts[site.reads]
        second = updated_directions(weight, first, second, gram, shift)
        fitted |= named_factors(owner, site.name, (first, second), dense)
    return fitted


def sensitive_fractions(
    model: PreTrainedModel, sensitivity: Sensitivity, to_remove: float
) -> dict[Site, float]:
    """Of every linear the fraction of its parameters to remove, one for the MLP and one for the
    attention of a block, so that all remove `to_remove` where the measured loss rises least.

    Raises:
        OutOfReach: what was scored saves less.
    """
    shapes, architecture = linear_shapes(model), architecture_of(model)
    is_mlp = {site.name: site.reads.startswith("mlp") for site in architecture.linears}
    sizes: dict[tuple[int, bool], int] = defaultdict(int)
    for (position, name), (rows, columns) in shapes.items():
        sizes[position, is_mlp[name]] += rows * columns
    points: dict[tuple[int, bool], list[tuple[float, float]]] = defaultdict(list)
    for score in sensitivity.scores:
        if score.variant.kind in ("mlp_rank", "attention_rank"):
            part = score.variant.first, score.variant.kind == "mlp_rank"
            points[part].append((float(score.saved.parameters), score.mean))
    curves = {part: LossCurve(known).points(CURVE_STEPS) for part, known in points.items()}
    saved = spread(curves, to_remove)
    return {
        (position, name): saved.get((position, is_mlp[name]), 0.0) / sizes[position, is_mlp[name]]
        for position, name in shapes
    }
