"""MoDeGPT: the same blocks with narrower insides, pair of matrices by pair of matrices."""

import logging
import math
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.closed_forms.channel_removal import (
    Removals,
    centred,
    refitted_bias,
    refitting_operations,
    removal_operations,
    removals,
)
from foldstack.compression.closed_forms.inner_pairs import (
    kept_coordinates,
    leverage_scores,
    narrower_values,
    narrowing_operations,
    output_energy,
    refitted,
    top,
)
from foldstack.compression.closed_forms.selection import OutOfReach
from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.candidate_loss import loss_of_cut, windows_of
from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.methods.in_order import compressed_in_order
from foldstack.compression.methods.method import (
    TOLERANCE,
    Evidence,
    Method,
    check_evidence,
    scores_of,
    unreachable,
)
from foldstack.compression.methods.narrowing.inner_widths import (
    BlockSparsities,
    InnerDimension,
    Widths,
    chosen_widths,
    farthest,
    influence_sparsities,
    sensitive_widths,
    uniform_sparsities,
)
from foldstack.compression.methods.refit import Refit, refit_arithmetic
from foldstack.compression.statistics.sensitivity import SCORE_TOKENS, Family, Sensitivity
from foldstack.compression.storage.mapped_memory import release, trim
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.block_plan import BlockPlan, NarrowHeads
from foldstack.compression.structure.heads import (
    Heads,
    HeadSizes,
    has_value_bias,
    head_sizes,
    heads_of,
    rotary_pairs_place,
    stored_heads,
    with_value_bias,
)
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, linear_shapes
from foldstack.compression.structure.surgery import Cut, as_stored, plan_of

logger = logging.getLogger(__name__)

Orders = dict[int, Removals]
"""By block, the order in which the channels of its MLP go."""

# What "better" chooses from.
_ALLOCATIONS = ("influence", "uniform")
_WEIGHTS = (0.5, 0.25)
# Nats per token by which what comes later there must be better: on other text less says nothing.
_CLEARLY = 0.02


class MoDeGpt(Method):
    """Narrow the inner dimensions of every block, each so that its pair of matrices changes its
    output least.

    MoDeGPT (Lin et al. 2024, arXiv 2408.09632, algorithms 1 to 3). With phi the sparsity of a
    block, its MLP keeps the (1 - phi) d_int channels of largest ridge leverage score and the down
    projection is fitted again on them; the query and key heads keep the coordinates with the
    largest product of norms, in rotary pairs, the same ones for all query heads of a key head; the
    value heads and what reads them become the best product of rank (1 - phi) d. The scale of the
    attention scores stays that of whole heads. A value bias moves into the output projection's,
    which is exact. Parameters, FLOPs and the KV cache shrink alike. A model in which only the MLP
    narrows, by one width, is a stock model.

    Departs from the paper: `sparsity` is of the whole model; the allocation is the paper's or one
    sparsity for all blocks, and queries and keys lose a half or a quarter of what the rest of their
    block does, since nothing makes up for what they lose and per parameter they matter most: what
    is better is measured (`allocation`, `query_key_weight`); the block influence is not seen
    through the final norm; grouped queries choose the values' subspace by all outputs of the group
    (`value_subspace` values is the published re-implementations'); the ridge is relative to the
    channels' mean energy; rounding leaves no parameters unspent. Families that norm their queries
    and keys (Qwen3, Gemma 3) keep those whole: dropping coordinates would change what the norms
    divide by.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "similarity"})

    steps_of: ClassVar[str] = "widths of heads and MLPs"
    name: Literal["modegpt"] = "modegpt"
    mlp: bool = True
    """Whether the MLPs become narrower."""
    query_key: bool = True
    """Whether queries and keys do; never where they are normed head by head."""
    value_output: bool = True
    """Whether values do."""
    allocation: Literal["better", "influence", "uniform", "sensitivity"] = "better"
    """influence: more sparsity where the block influence is low (equation 11); uniform: one for all
    blocks; better: uniform where its loss on 2,048 calibration tokens is clearly lower, and else
    influence; sensitivity: widths where the measured loss rises least
    (`statistics.sensitivity`)."""
    smoothing: float = Field(default=0.1, gt=0)
    """epsilon of allocation influence: the larger, the more alike the blocks."""
    max_block_sparsity: float = Field(default=0.8, gt=0, lt=1)
    """The most that any block loses of any inner dimension."""
    query_key_weight: Annotated[float, Field(gt=0, le=1)] | Literal["better"] = "better"
    """Sparsity of queries and keys over that of their block, 1 in the paper; better: 0.25 where its
    loss on 2,048 calibration tokens is clearly lower, else 0.5."""
    mlp_selection: Literal["leverage", "greedy"] = "leverage"
    """Which channels of an MLP stay. leverage: those of largest ridge leverage score, as in the
    paper; greedy: what is left when the channel that costs the output least goes, again and again
    (`channel_removal`)."""
    ridge: float = Field(default=0.01, gt=0)
    """lambda of the leverage scores, over the mean energy of the channels."""
    pair_score: Literal["energy", "sum"] = "energy"
    """Score of a rotary pair: product of its energies, or sum of its coordinates' scores."""
    value_subspace: Literal["stacked", "values"] = "stacked"
    """What the values' subspace is the best one for: all outputs of the group, or themselves."""
    refit: Refit = "none"
    """What the linears that write into the residual stream are fitted to, block by block on what
    the compressed model computes: what the dense model's add, or the dense model's stream
    (`refit`)."""
    mlp_multiple: int = Field(default=1, ge=1)
    """MLP widths are multiples of this; 64 or 128 suit tensor cores."""
    head_multiple: int = Field(default=1, ge=1)
    """Head widths are multiples of this; 8 or 16 suit tensor cores."""

    @property
    def scores(self) -> frozenset[Family]:
        return frozenset({"widths"}) if self.allocation == "sensitivity" else frozenset()

    def outline(self, model: PreTrainedModel) -> Plan:
        # The influence is not known yet: the uniform allocation stands in.
        dimensions = self.inner_dimensions(model)
        widths = self._widths(model, dimensions, self._uniform(dimensions))
        return self.narrow_plan(model, widths)

    @property
    def goes_in_turn(self) -> bool:
        return True

    def arithmetic(self, model: PreTrainedModel, num_tokens: int) -> Arithmetic:
        shapes, architecture = linear_shapes(model), architecture_of(model)
        plan, total, ordered = self.outline(model), 0.0, 0.0
        for position, block in enumerate(plan.blocks):
            for site in architecture.linears:
                rows, columns = shapes.get((position, site.name), (0, 0))
                if site.reads == "mlp_output" and block.mlp_width:
                    if self.mlp_selection == "greedy":
                        ordered += removal_operations(rows, columns, block.mlp_width)
                        total += refitting_operations(rows, columns, block.mlp_width)
                    else:
                        total += narrowing_operations(rows, columns, block.mlp_width)
                elif site.reads == "attention_input" and block.narrow_heads is not None:
                    total += 2.0 * rows * columns**2
        work = Arithmetic(float64=ordered + total)
        forms = len(self._allocations) + len(self._weights(model)) - 1
        if forms > 1:
            compared = forms * min(1.0, SCORE_TOKENS / num_tokens)
            made = forms + (self.refit != "none")
            work = Arithmetic(
                float64=ordered + made * total, passes=compared, heads=compared, streams=1
            )
        if self.refit == "none":
            return work
        return work + refit_arithmetic(model, plan_of(model), num_tokens)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        allocations, weights = self._allocations, self._weights(model)
        orders: Orders = {}
        if len(allocations) == len(weights) == 1:
            return self._form(allocations[0], weights[0])._cut(model, evidence, orders, self.refit)
        windows = windows_of(evidence.calibration, SCORE_TOKENS)
        best: tuple[float, MoDeGpt, Cut] | None = None

        def compare(form: MoDeGpt) -> None:
            nonlocal best
            change = form._cut(
                model, evidence, orders, "none", f"{form.allocation}-{form.query_key_weight}"
            )
            loss = loss_of_cut(model, change, windows)
            logger.info("modegpt by %s: next-token loss %.4f", form._choice, loss)
            if best is None or loss < best[0] - _CLEARLY:
                best = loss, form, change

        for allocation in allocations:
            compare(self._form(allocation, weights[0]))
        assert best is not None
        for weight in weights[1:]:
            compare(self._form(best[1].allocation, weight))
        _, form, change = best
        logger.info("modegpt narrows by %s", form._choice)
        return change if self.refit == "none" else form._cut(model, evidence, orders, self.refit)

    @property
    def _allocations(self) -> tuple[str, ...]:
        return _ALLOCATIONS if self.allocation == "better" else (self.allocation,)

    def _weights(self, model: PreTrainedModel) -> tuple[float, ...]:
        """Those of queries and keys that reach the sparsity, where they narrow at all."""
        if self.query_key_weight != "better":
            return (self.query_key_weight,)
        first, *others = _WEIGHTS
        if self.allocation == "sensitivity" or not self.query_key or head_sizes(model).has_norms:
            return (first,)
        whole, cap = count_parameters(model), self.max_block_sparsity
        enough = (self.sparsity - TOLERANCE) * whole
        forms = {weight: self._form("uniform", weight) for weight in others}
        reaching = (
            w for w, f in forms.items() if farthest(f.inner_dimensions(model), cap) >= enough
        )
        return (first, *reaching)

    def _form(self, allocation: str, weight: float) -> "MoDeGpt":
        """This method with nothing left to choose by measuring."""
        return self.model_copy(update={"allocation": allocation, "query_key_weight": weight})

    @property
    def _choice(self) -> str:
        return f"allocation {self.allocation}, query_key_weight {self.query_key_weight}"

    def _cut(
        self,
        model: PreTrainedModel,
        evidence: Evidence,
        orders: Orders,
        refit: Refit,
        part: str = "block",
    ) -> Cut:
        """The cut of a form; what is made goes to the spool, block by block, under `part`."""
        widths = self._widths_of(model, evidence)
        plan = self.narrow_plan(model, widths)

        def narrow(position: int, _streams: object = None) -> dict[str, Tensor]:
            is_narrow = (position, "mlp") in widths
            return self.narrow_block(
                model, position, plan.blocks[position], evidence, orders, mlp=is_narrow
            )

        inherits = tuple(range(len(plan.blocks)))
        if refit != "none":
            tensors = compressed_in_order(model, plan, narrow, evidence, "modegpt", refit=refit)
            return Cut(plan, inherits, tensors)
        blocks, spool = architecture_of(model).blocks(model), evidence.spool()
        for position in inherits:
            spool.part(f"{part}-{position}", partial(narrow, position))
            release(blocks[position])
            trim()
            evidence.progress("modegpt", position + 1, len(plan.blocks))
        return Cut(plan, inherits, spool.tensors)

    def _widths_of(self, model: PreTrainedModel, evidence: Evidence) -> Widths:
        dimensions = self.inner_dimensions(model)
        if self.allocation == "sensitivity":
            return self._sensitive_widths(model, dimensions, scores_of(evidence, self))
        return self._widths(model, dimensions, self._block_sparsities(dimensions, evidence))

    def narrow_block(
        self,
        model: PreTrainedModel,
        position: int,
        form: BlockPlan,
        evidence: Evidence,
        orders: Orders,
        *,
        mlp: bool,
        heads: bool = True,
    ) -> dict[str, Tensor]:
        """What changes of one block, as the model stores it: its MLP, its heads, or both.

        The order in which the channels of its MLP go serves all widths of this evidence: it is
        taken from `orders`, or put there."""
        tensors: dict[str, Tensor] = {}
        if mlp and form.mlp_width is not None:
            tensors |= self._narrow_mlp(model, position, form.mlp_width, evidence, orders)
        if heads and form.narrow_heads is not None:
            tensors |= self._narrow_heads(model, position, form.narrow_heads, evidence)
        return as_stored(tensors, model)

    def _sensitive_widths(
        self, model: PreTrainedModel, dimensions: list[InnerDimension], sensitivity: Sensitivity
    ) -> Widths:
        whole = count_parameters(model)
        try:
            return sensitive_widths(
                dimensions, sensitivity, self.sparsity * whole, self.max_block_sparsity
            )
        except OutOfReach as error:
            by = "the narrowest widths that were scored"
            raise InputError(unreachable(self, error.reach["parameters"] / whole, by)) from None

    def _uniform(self, dimensions: list[InnerDimension]) -> BlockSparsities:
        return uniform_sparsities(sorted({d.position for d in dimensions}))

    def _block_sparsities(
        self, dimensions: list[InnerDimension], evidence: Evidence
    ) -> BlockSparsities:
        if self.allocation == "uniform":
            return self._uniform(dimensions)
        scores = evidence.ranking.scores["block_influence"]
        influence = {position: scores[position] for position in {d.position for d in dimensions}}
        return influence_sparsities(influence, self.smoothing, self.max_block_sparsity)

    def inner_dimensions(self, model: PreTrainedModel) -> list[InnerDimension]:
        """The inner dimensions that may become narrower.

        Raises:
            InputError: blocks share weights, or are factored or narrowed already.
        """
        plan, sizes = plan_of(model), head_sizes(model)
        for position, block in enumerate(plan.blocks):
            if block.weights_of is not None or block.linears or block.narrow_heads is not None:
                what = "shared" if block.weights_of is not None else "factored or narrowed"
                raise InputError(
                    f"modegpt narrows dense blocks with weights of their own, and block {position} "
                    f"of this model is {what} already; use modegpt before that"
                )
        dimensions = []
        for position, block in enumerate(plan.blocks):
            if block.has_attention:
                dimensions += self._of_block(model, position, sizes)
        return dimensions

    def _of_block(
        self, model: PreTrainedModel, position: int, sizes: HeadSizes
    ) -> list[InnerDimension]:
        architecture = architecture_of(model)
        block = architecture.blocks(model)[position]
        linears: dict[str, list[Any]] = {}
        for site in architecture.linears:
            linears.setdefault(site.reads, []).append(block.get_submodule(site.name))
        (down,), (output,) = linears["mlp_output"], linears["attention_output"]
        hidden, width = architecture.weight(down).shape
        ups = sum(p.numel() for m in linears["mlp_input"] for p in m.parameters(recurse=False))
        has_bias = linears["attention_input"][0].bias is not None
        is_fused = len(linears["attention_input"]) == 1
        dim, pair = sizes.head_dim, 2 if sizes.rotary_dim else 1
        of_qk = (sizes.heads + sizes.kv_heads) * (hidden + has_bias)
        of_values = (sizes.heads + sizes.kv_heads) * hidden
        # A value bias of its own goes, one of zeros stays where it is fused with others.
        freed = 0
        if has_bias:
            freed = -hidden if output.bias is None else 0
            freed += 0 if is_fused else sizes.kv_heads * dim
            of_values += sizes.kv_heads if is_fused else 0
        step = self.head_multiple
        dimensions = []
        if self.mlp and width > 0:
            price = hidden + ups // width
            dimensions.append(InnerDimension(position, "mlp", width, self.mlp_multiple, price))
        if self.query_key and not sizes.has_norms:
            given = self.query_key_weight
            weight, even = _WEIGHTS[0] if given == "better" else given, math.lcm(step, pair)
            dimensions.append(
                InnerDimension(position, "query_key", dim, even, of_qk, weight=weight)
            )
        if self.value_output:
            dimensions.append(
                InnerDimension(position, "value_output", dim, step, of_values, freed=freed)
            )
        return dimensions

    def _widths(
        self,
        model: PreTrainedModel,
        dimensions: list[InnerDimension],
        sparsities: BlockSparsities,
    ) -> Widths:
        whole, cap = count_parameters(model), self.max_block_sparsity
        most = farthest(dimensions, cap) / whole
        if self.sparsity - TOLERANCE > most or not dimensions:
            by = f"{cap:.0%} of every inner dimension that may shrink"
            raise InputError(unreachable(self, most, by))
        only_mlp = {d.kind for d in dimensions} == {"mlp"}
        return chosen_widths(
            dimensions,
            sparsities,
            self.sparsity * whole,
            cap,
            even=self.allocation == "uniform",
            slack=TOLERANCE * whole if only_mlp else 0.0,
        )

    def narrow_plan(self, model: PreTrainedModel, widths: Widths) -> Plan:
        """The structure with these widths; dimensions without an entry stay whole."""
        sizes, shapes = head_sizes(model), linear_shapes(model)
        down = next(s.name for s in architecture_of(model).linears if s.reads == "mlp_output")
        mlp_widths = {
            position: width
            for (position, kind), width in widths.items()
            if kind == "mlp" and width < shapes.get((position, down), (0, 0))[1]
        }
        biased = has_value_bias(model)
        heads = {}
        for position in sorted({position for position, _ in widths}):
            qk = widths.get((position, "query_key"), sizes.head_dim)
            v = widths.get((position, "value_output"), sizes.head_dim)
            if min(qk, v) < sizes.head_dim:
                heads[position] = NarrowHeads(
                    qk_dim=qk,
                    v_dim=v,
                    rotary_dim=_kept_rotary(qk, sizes),
                    value_bias_in_output=biased and v < sizes.head_dim,
                )
        return plan_of(model).narrow(mlp_widths, heads)

    def _narrow_mlp(
        self,
        model: PreTrainedModel,
        position: int,
        width: int,
        evidence: Evidence,
        orders: Orders,
    ) -> dict[str, Tensor]:
        """The MLP on the channels that stay, the down projection fitted again."""
        architecture = architecture_of(model)
        block = architecture.blocks(model)[position]
        tensors = {}
        (down_name,) = (s.name for s in architecture.linears if s.reads == "mlp_output")
        down: Any = block.get_submodule(down_name)
        weight = architecture.weight(down).detach().to(model.device)
        gram = evidence.statistics.gram(position, "mlp_output").to(model.device)
        place = f"blocks.{position}.{down_name}"
        if self.mlp_selection == "leverage" and width > 0:
            kept = top(leverage_scores(gram, self.ridge), width)
            narrow = refitted(weight, gram, kept)
        else:
            input_sum = evidence.statistics.input_sum(position, "mlp_output").to(model.device)
            num_tokens = evidence.statistics.num_tokens
            if down.bias is not None:
                gram = centred(gram, input_sum, num_tokens)
            if width > 0:
                kept = _order(orders, position, weight, gram, width).kept(width, len(gram))
                narrow = refitted(weight, gram, kept)
            else:  # its mean output stays, where there is a bias to hold it
                kept, narrow = torch.arange(0, device=gram.device), weight[:, :0].double()
            if down.bias is not None:
                bias, mean = down.bias.detach().to(model.device), input_sum / num_tokens
                tensors[f"{place}.bias"] = refitted_bias(bias, weight, narrow, mean, kept)
        tensors[f"{place}.weight"] = architecture.stored_weight(down, narrow)
        for site in architecture.linears:
            if site.reads != "mlp_input":
                continue
            up: Any = block.get_submodule(site.name)
            rows = architecture.weight(up).detach().to(model.device)
            # gate and up fused: the channels of both halves.
            halves = range(0, len(rows), len(gram))
            chosen = torch.cat([start + kept for start in halves])
            place = f"blocks.{position}.{site.name}"
            tensors[f"{place}.weight"] = architecture.stored_weight(up, rows[chosen])
            if up.bias is not None:
                tensors[f"{place}.bias"] = up.bias.detach().to(model.device)[chosen]
        return tensors

    def _narrow_heads(
        self, model: PreTrainedModel, position: int, form: NarrowHeads, evidence: Evidence
    ) -> dict[str, Tensor]:
        sizes = head_sizes(model)
        heads = heads_of(model, position, sizes)
        device = heads.query.device
        gram = evidence.statistics.gram(position, "attention_input").to(device)
        input_sum = evidence.statistics.input_sum(position, "attention_input").to(device)
        num_tokens = evidence.statistics.num_tokens
        kept, pairs = self._kept(heads, sizes, form, (gram, input_sum, num_tokens))
        of_query = kept.repeat_interleave(sizes.group, dim=0)
        value, output = heads.value, heads.output
        value_bias, output_bias = heads.value_bias, heads.output_bias
        if not form.attends:
            value, output = value[:, :0], output[..., :0]
        elif form.v_dim < sizes.head_dim:
            value, output = self._narrow_values(heads, sizes, form.v_dim, gram / num_tokens)
        if form.value_bias_in_output:
            output_bias = with_value_bias(heads, sizes)
            value_bias = None
        narrow = Heads(
            query=_rows(heads.query, of_query),
            key=_rows(heads.key, kept),
            value=value,
            output=output,
            query_bias=None if heads.query_bias is None else heads.query_bias.gather(1, of_query),
            key_bias=None if heads.key_bias is None else heads.key_bias.gather(1, kept),
            value_bias=value_bias,
            output_bias=output_bias,
        )
        tensors = stored_heads(model, position, narrow)
        if form.rotary_dim:
            tensors[rotary_pairs_place(model, position)] = pairs
        return tensors

    def _kept(
        self,
        heads: Heads,
        sizes: HeadSizes,
        form: NarrowHeads,
        inputs: tuple[Tensor, Tensor, int],
    ) -> tuple[Tensor, Tensor]:
        """Per key head the coordinates that it keeps, and the rotary pairs among them."""
        queries = output_energy(heads.query, heads.query_bias, *inputs)
        keys = output_energy(heads.key, heads.key_bias, *inputs)
        chosen = [
            kept_coordinates(
                group,
                key,
                sizes.rotary_dim,
                form.rotary_dim // 2,
                form.qk_dim - form.rotary_dim,
                self.pair_score,
            )
            for group, key in zip(queries.split(sizes.group), keys, strict=True)
        ]
        return torch.stack([kept for kept, _ in chosen]), torch.stack([p for _, p in chosen])

    def _narrow_values(
        self, heads: Heads, sizes: HeadSizes, width: int, gram: Tensor
    ) -> tuple[Tensor, Tensor]:
        values, outputs = [], []
        for value, group in zip(heads.value, heads.output.split(sizes.group), strict=True):
            by_values = self.value_subspace == "values"
            narrow, read = narrower_values(value, group, gram, width, by_values_alone=by_values)
            values.append(narrow)
            outputs.append(read)
        return torch.stack(values), torch.cat(outputs)


def _order(orders: Orders, position: int, down: Tensor, gram: Tensor, width: int) -> Removals:
    """How the channels of an MLP go, down to a width at least: all of them, where a second width
    asks for more than the first did."""
    known, needed = orders.get(position), len(gram) - width
    if known is None or needed > len(known.order):
        count = needed if known is None else len(gram) - 1
        known = orders[position] = removals(down, gram, count)
    return known


def _kept_rotary(qk_dim: int, sizes: HeadSizes) -> int:
    """How many of the kept coordinates rotate: their share of the whole head, in pairs."""
    still = sizes.head_dim - sizes.rotary_dim
    pairs = round(qk_dim * sizes.rotary_dim / sizes.head_dim / 2)
    fewest = -(-max(0, qk_dim - still) // 2)
    return 2 * min(max(pairs, fewest), sizes.rotary_dim // 2, qk_dim // 2)


def _rows(weight: Tensor, kept: Tensor) -> Tensor:
    """[heads, dim, hidden] with the kept [heads, k] of each head's rows."""
    return weight.gather(1, kept[:, :, None].expand(-1, -1, weight.shape[-1]))
