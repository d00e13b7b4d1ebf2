"""Factored linears of a model: the inputs they are fitted to, and their tensors in a cut."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.closed_forms.low_rank import (
    updated_directions,
    updated_directions_operations,
)
from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.methods.method import Evidence
from foldstack.compression.statistics.gathering import Statistics
from foldstack.compression.statistics.grams import paired_inputs, summed_inputs
from foldstack.compression.statistics.hidden_states import MEMORY_BYTES
from foldstack.compression.statistics.kept_pass import KeptPass
from foldstack.compression.statistics.stream import BlockStream, cpu_precision, tensors_of
from foldstack.compression.storage.mapped_memory import release, trim
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.modeling_foldstack import AdaptedLinear, LowRankLinear
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import linear_shapes
from foldstack.compression.structure.surgery import plan_of

DEVIATED, DENSE = "deviated", "dense"
TOKENS_AT_ONCE = 1024
"""That pass a block beside the sums, which are most of what is in memory then."""

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
    factors_of: Callable[[int], Mapping[str, Factors]],
    evidence: Evidence,
    what: str,
    dense_target: float,
) -> dict[str, Tensor]:
    """Tensors of the factors of all blocks, each second factor fitted again by least squares on
    the inputs that the compressed blocks before it produce.

    The update of SVD-LLM's released code (`--step 2`). Inside a block every linear sees the inputs
    that its original siblings produce. With x a linear's input in the dense model and x' that
    behind the compressed blocks, the target of W' x' is

        W ((1 - a) x' + a x),   a = `dense_target`

    so that a linear repairs a part of what those before it have spoilt (as layer-wise quantisation
    does, arXiv 2504.09629); at 0 it is the released code's.

    Linears that several blocks use are fitted when the first of them is reached; the others count
    with their inputs in the dense model, since what compression makes of those is not known yet.

    Args:
        factors_of: the factors of the linears stored at a position, by their name in the block,
            `as_held`; called once for each, and not for those that a killed run has left.
        what: whose progress this is.
    """
    plan, spool = plan_of(model), evidence.spool()
    streams = _Streams(model, evidence, dense_target)
    streams.resume(lambda position: spool.has(f"block-{plan.owner(position)}"))
    fitted: dict[int, dict[str, LowRankLinear]] = {}
    for position, block in enumerate(streams.deviated.blocks):
        owner = plan.owner(position)
        if owner not in fitted:
            fit = partial(_fitted, model, streams, factors_of, evidence)
            tensors = spool.part(f"block-{owner}", fit)
            fitted[owner] = _thin_linears(tensors, owner, model.device)
        if streams.deviated.position == position:
            streams.advance(_with_linears(block, fitted[owner]))
        release(tensors_of(block))
        release(t for linear in fitted[owner].values() for t in linear.parameters())
        evidence.progress(what, position + 1, len(streams.deviated.blocks))
    return spool.tensors


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


class _Streams:
    """The compressed model's hidden states and, where the target asks for them, the dense one's;
    kept where a killed run has left them."""

    def __init__(self, model: PreTrainedModel, evidence: Evidence, dense_target: float) -> None:
        kinds = (DEVIATED, DENSE) if dense_target > 0 else (DEVIATED,)
        work = None if evidence.work is None else evidence.work / "streams"
        self.kept = KeptPass(work, kinds)
        open_stream = partial(
            BlockStream,
            model,
            evidence.calibration,
            batch_size=max(1, TOKENS_AT_ONCE // evidence.calibration.shape[1]),
            dtype=cpu_precision(model),
            memory_bytes=MEMORY_BYTES // len(kinds),
            folder=work,
        )
        self.architecture = architecture_of(model)
        self.dense_target = dense_target
        self.deviated = open_stream(name=self.kept.name(DEVIATED))
        self.dense = open_stream(name=self.kept.name(DENSE)) if dense_target > 0 else None

    def resume(self, is_made: Callable[[int], bool]) -> None:
        """Stand where a killed run has stood, if what it made of the blocks before is there."""
        if not all(map(is_made, range(self.kept.position))):
            self.kept.begin_anew()
        for stream in (self.deviated, self.dense):
            if stream is not None and self.kept.position > 0:
                stream.resume(self.kept.position)

    def sums(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """By what the linears of the block at hand read: the sums of x' x'^T, and unless a = 0
        those of a (x - x') x'^T. The dense stream passes the block meanwhile."""
        block = self.deviated.blocks[self.deviated.position]
        if self.dense is None:
            with summed_inputs(block, self.architecture) as seen:
                for _ in self.deviated.outputs(block):
                    pass
            return seen.grams, None
        with paired_inputs(block, self.architecture) as paired:
            self.dense.advance(block, beside=self.deviated)
        for shift in paired.shifts.values():
            shift *= self.dense_target  # in place: they are the largest of what lives here
        return paired.grams, paired.shifts

    def advance(self, compressed: nn.Module) -> None:
        """Pass the block, compressed; where nothing was fitted in it, the dense one as well."""
        self.deviated.advance(compressed)
        if self.dense is not None and self.dense.position < self.deviated.position:
            self.dense.advance()
        self.kept.checkpoint(self.deviated.position)


def _fitted(
    model: PreTrainedModel,
    streams: _Streams,
    factors_of: Callable[[int], Mapping[str, Factors]],
    evidence: Evidence,
) -> dict[str, Tensor]:
    """The factors that the block before which the streams stand uses, fitted on what they hold, as
    a cut names them."""
    architecture, plan = architecture_of(model), plan_of(model)
    position, blocks = streams.deviated.position, streams.deviated.blocks
    owner = plan.owner(position)
    factors = factors_of(owner)
    if not factors:
        return {}
    trim()  # after much that was large and is gone, and before the sums
    grams, shifts = streams.sums()
    fitted: dict[str, Tensor] = {}
    for site in architecture.linears:
        if site.name not in factors:
            continue
        dense = blocks[owner].get_submodule(site.name)
        gram = grams[site.reads].double()
        for user in users_of(plan, owner):
            if user != position:
                gram = gram + evidence.statistics.gram(user, site.reads).to(gram.device)
        first, second = factors[site.name]
        weight = architecture.weight(dense).detach()
        shift = None if shifts is None else shifts[site.reads]
        second = updated_directions(weight, first, second, gram, shift)
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
