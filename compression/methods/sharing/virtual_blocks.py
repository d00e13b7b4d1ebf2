"""Virtual blocks: borrowed linears, an own low-rank adapter on each, small normed outputs.

FlexiGPT (Smith et al. 2025, arXiv 2501.14713), sections 3.2 to 3.4: which block lends its weights
(equations 2 to 5), what the adapters start from (equations 7 and 8), how big they are.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.closed_forms.low_rank import balance, truncate, whitened_svd
from foldstack.compression.errors import InputError
from foldstack.compression.statistics.gathering import Statistics
from foldstack.compression.structure.architectures import (
    Architecture,
    architecture_of,
    base_config_of,
)
from foldstack.compression.structure.block_plan import LowRank
from foldstack.compression.structure.modeling_foldstack import (
    LowRankLinear,
    is_linear,
    linear_shape,
)
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import plan_of

Factors = tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]
Shapes = dict[str, tuple[int, int]]
"""(out, in) of a block's linears by their name inside the block."""
Aggregate = Literal["sum", "rel"]
Initial = Literal["paper", "balanced", "whitened"]

# Up to this many rows or columns a weight is decomposed in full; above, its leading part alone is
# computed, by the randomised method with some directions to spare.
EXACT_UP_TO = 1024
_SPARE_DIRECTIONS = 64
_POWER_ITERATIONS = 4


def leading_part(weight: Float[Tensor, "out in"], rank: int) -> Factors:
    """U Sigma and V^T of the best matrix of this rank; both have fewer columns where W has."""
    if min(weight.shape) <= max(EXACT_UP_TO, rank + _SPARE_DIRECTIONS):
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    else:
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            torch.manual_seed(0)  # of the sketch: the same weight gives the same factors
            left, values, columns = torch.svd_lowrank(
                weight.float(), q=rank + _SPARE_DIRECTIONS, niter=_POWER_ITERATIONS
            )
        right = columns.T
    return left[:, :rank] * values[:rank], right[:rank]


def distance(first: Factors, second: Factors, rank: int) -> float:
    """What a rank-`rank` adapter on the one matrix cannot express of the other.

    arXiv 2501.14713, equations 2 to 4, with What the leading part of a matrix and D the best
    rank-`rank` approximation of What_i - What_j:

        d = ||What_i - (What_j + D)||_F = sqrt(sum over t > rank of sigma_t(What_i - What_j)^2)

    The difference has rank 2 * `rank` at most, so its singular values are those of R1 R2^T, with R1
    and R2 from thin QRs of [A_i, -A_j] and [B_i; B_j]^T.
    """
    columns = torch.linalg.qr(torch.cat((first[0], -second[0]), dim=1), mode="r").R
    rows = torch.linalg.qr(torch.cat((first[1], second[1])).T, mode="r").R
    return float(torch.linalg.svdvals(columns @ rows.T)[rank:].norm())


def block_distances(
    model: PreTrainedModel,
    positions: Iterable[int],
    candidates: Iterable[int],
    ranks: Mapping[str, int],
    aggregate: Aggregate,
) -> dict[int, dict[int, float]]:
    """Distance of every position to every candidate, summed over the linears of a block.

    With `rel` a linear's distance counts relative to the norm of its leading part at the position.
    """
    positions, candidates = list(positions), list(candidates)
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    total = {i: dict.fromkeys(candidates, 0.0) for i in positions}
    for name, rank in ranks.items():
        # Every matrix is decomposed once; the factors of one name are in memory at a time.
        parts = {
            p: leading_part(linear_values(architecture, blocks[p], name)[0], rank)
            for p in (*positions, *candidates)
        }
        for i in positions:
            scale = float(parts[i][0].norm()) if aggregate == "rel" else 1.0
            for j in candidates:
                total[i][j] += distance(parts[i], parts[j], rank) / max(scale, 1e-30)
    return total


def nearest(distances: Mapping[int, Mapping[int, float]]) -> dict[int, int]:
    """The base of every position (arXiv 2501.14713, equation 5); ties go to the nearer block."""
    return {i: min(to, key=lambda j: (to[j], abs(i - j), j)) for i, to in sorted(distances.items())}


def linear_values(
    architecture: Architecture, block: nn.Module, name: str
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]:
    """Weight and bias of a stored linear, multiplied out where it is factored."""
    module = block.get_submodule(name)
    if isinstance(module, LowRankLinear):
        first: Tensor = module.first.weight  # type: ignore[assignment]
        return (module.second.weight @ first).detach(), _detached(module.second.bias)
    return architecture.weight(module).detach(), _detached(module.bias)


def _detached(bias: Tensor | nn.Module | None) -> Tensor | None:
    return bias.detach() if isinstance(bias, Tensor) else None


def adapters_of_difference(
    model: PreTrainedModel,
    bases: Mapping[int, int],
    ranks: Mapping[str, int],
    initial: Initial,
    statistics: Statistics | None = None,
) -> dict[str, Tensor]:
    """The adapters, as a cut names them, that bring every base nearest to the block it stands for.

    arXiv 2501.14713, equations 7 and 8, with the full difference W_i - W_j = U Sigma V^T:

        A = U[:, :r] Sigma[:r],   B = V[:, :r]^T

    `balanced` gives both the root of Sigma. `whitened` gives the factors nearest to the difference
    on the inputs of block i, which `statistics` have the Grams of (see `low_rank`), balanced too.
    A bias is the difference of the two biases.
    """
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    reads = {site.name: site.reads for site in architecture.linears}
    tensors: dict[str, Tensor] = {}
    for position, base in bases.items():
        for name, rank in ranks.items():
            weight, bias = linear_values(architecture, blocks[position], name)
            base_weight, base_bias = linear_values(architecture, blocks[base], name)
            difference = weight.double() - base_weight.double()
            if initial == "whitened":
                assert statistics is not None, "inputs are needed to whiten"
                gram = statistics.gram(position, reads[name]).to(difference.device)
                first, second = truncate(whitened_svd(difference, gram), rank)
            else:
                second, first = leading_part(difference, rank)
                if initial == "balanced":
                    first, second = balance(first, second)
            place = f"blocks.{position}.{name}.adapter"
            tensors |= {f"{place}.first.weight": first, f"{place}.second.weight": second}
            if bias is not None and base_bias is not None:
                tensors[f"{place}.second.bias"] = bias.double() - base_bias.double()
    return tensors


def gains(model: PreTrainedModel, positions: Iterable[int], value: float) -> dict[str, Tensor]:
    """Gains of both normed outputs of these positions, as a cut names them."""
    width = int(base_config_of(model.config).hidden_size)
    return {
        f"blocks.{position}.{output}.weight": torch.full((width,), value)
        for position in positions
        for output in ("attention_output", "mlp_output")
    }


def lenders(model: PreTrainedModel) -> list[int]:
    """Positions whose linears another position can use: their own, and all of one shape.

    Raises:
        InputError: the blocks differ in their widths.
    """
    plan = plan_of(model)
    found = [p for p, b in enumerate(plan.blocks) if b.has_attention and b.weights_of is None]
    if any(plan.blocks[p].narrow_heads for p in found):
        raise InputError(
            "a virtual block cannot borrow narrow heads; make blocks virtual before narrowing"
        )
    if found and any(block_shapes(model, p) != block_shapes(model, found[0]) for p in found):
        raise InputError(
            "a virtual block borrows from a block of the same widths, and those of this model "
            "differ; make blocks virtual before you narrow them or share heads"
        )
    return found


def borrowable(plan: Plan, positions: Sequence[int]) -> list[int]:
    """Those of `positions` that can give up their linears: plain, and nobody else uses theirs."""
    in_use = {block.weights_of for block in plan.blocks}
    in_use |= {position for position, _ in plan.lenders}
    in_use |= {
        form.basis_of
        for block in plan.blocks
        for form in block.linears.values()
        if isinstance(form, LowRank)
    }
    return [p for p in positions if p not in in_use and plan.blocks[p].outputs == "plain"]


def block_shapes(model: PreTrainedModel, position: int) -> Shapes:
    """The shapes of one block's linears, dense or factored; `model` may be on the meta device."""
    architecture = architecture_of(model)
    block = architecture.blocks(model)[position]
    shapes = {}
    for site in architecture.linears:
        module = block.get_submodule(site.name)
        if is_linear(module):
            shapes[site.name] = linear_shape(module)
        elif isinstance(module, LowRankLinear):
            first: Tensor = module.first.weight  # type: ignore[assignment]
            shapes[site.name] = (module.second.out_features, first.shape[1])
    return shapes


def adapter_ranks(shapes: Shapes, rank: int) -> dict[str, int]:
    """`rank` for every linear, but at most half its smaller side: two of them fill a difference."""
    return {name: max(1, min(rank, min(shape) // 2)) for name, shape in shapes.items()}


def largest_rank(shapes: Shapes) -> int:
    """The rank from which on no adapter grows."""
    return max(adapter_ranks(shapes, max(map(max, shapes.values()))).values())
