"""What the methods that share attention heads have in common: the pairs and the plan."""

import logging
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Method, smallest_reaching
from foldstack.compression.methods.sharing.head_matching import Match, choose_donors, cosines
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.head_slices import HeadSlices, Slice
from foldstack.compression.structure.heads import head_sizes
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import plan_of

logger = logging.getLogger(__name__)


def head_cuts(model: PreTrainedModel) -> dict[str, HeadSlices]:
    """How each linear of a block's attention is cut into groups of heads, by its name."""
    sizes, architecture = head_sizes(model), architecture_of(model)
    own = (None,) * sizes.kv_heads
    reading = [site.name for site in architecture.linears if site.reads == "attention_input"]
    keys = sizes.kv_heads * sizes.head_dim
    fused = (sizes.heads * sizes.head_dim, keys, keys) if len(reading) == 1 else ()
    cuts = {name: HeadSlices(axis="out", slices=own, parts=fused) for name in reading}
    (output,) = [s.name for s in architecture.linears if s.reads == "attention_output"]
    return {**cuts, output: HeadSlices(axis="in", slices=own)}


def groups_of_heads(model: PreTrainedModel) -> list[Slice]:
    """The groups that may take part: those that a block with whole dense heads stores itself."""
    plan, cuts = plan_of(model), head_cuts(model)
    count = head_sizes(model).kv_heads
    groups = []
    for position, block in enumerate(plan.blocks):
        if not block.has_attention or block.weights_of is not None or block.narrow_heads:
            continue
        forms = [block.linears.get(name, cut) for name, cut in cuts.items()]
        if all(isinstance(form, HeadSlices) for form in forms):
            groups += [
                (position, index)
                for index in range(count)
                if all(
                    isinstance(form, HeadSlices) and form.slices[index] is None for form in forms
                )
            ]
    return groups


class HeadSharing(Method):
    """The settings of every method that lets attention heads use the weights of earlier ones."""

    steps_of: ClassVar[str] = "groups of attention heads"

    match: Match = Field(default="qk")
    """What is compared. qk, q, k, v, qkv: the projections themselves; product: the logits' and the
    outputs' bilinear forms, which rotations inside a head leave alone; random: nothing, the
    baseline of the others."""

    def outline(self, model: PreTrainedModel) -> Plan:
        candidates = self._replaceable(model)
        count = self._count(model)
        # Which ones are alike is not known yet: those of the deepest blocks stand in.
        return self._with_stand_ins(model, candidates, count)

    def donors(self, model: PreTrainedModel) -> dict[Slice, Slice]:
        """Every replaced group of `model` and its donor."""
        count = self._count(model)
        if count == 0:
            return {}
        groups = groups_of_heads(model)
        positions = sorted({position for position, _ in groups})
        # Blocks are compared whole; then those groups are left that may take part.
        per_block = head_sizes(model).kv_heads
        rows = [positions.index(p) * per_block + index for p, index in groups]
        cosine = cosines(model, positions, self.match, self.seed)[rows][:, rows]
        chosen = choose_donors(cosine, groups, count, lending=_lending(model))
        number = {group: row for row, group in enumerate(groups)}
        selected = torch.stack([cosine[number[a], number[b]] for a, b in chosen.items()])
        logger.info(
            "%s %s: %d of %d groups of heads are replaced; match of their pairs %.4f on average, "
            "%.4f at least, of all pairs %.4f",
            *(self.name, self.match, len(chosen), len(groups)),
            *(float(selected.mean()), float(selected.min()), _mean_of_pairs(cosine, groups)),
        )
        return chosen

    def shared(self, model: PreTrainedModel, donors: dict[Slice, Slice]) -> Plan:
        return plan_of(model).share_slices(head_cuts(model), donors)

    def _count(self, model: PreTrainedModel) -> int:
        candidates = self._replaceable(model)
        return smallest_reaching(
            self,
            model,
            lambda count: self._with_stand_ins(model, candidates, count),
            len(candidates),
            f"of {len(groups_of_heads(model))} groups of attention heads",
        )

    def _replaceable(self, model: PreTrainedModel) -> list[Slice]:
        """Groups that may be replaced: not of the first block that has some, and no donors yet."""
        groups, lending = groups_of_heads(model), _lending(model)
        if not groups:
            raise InputError(
                f"{self.name} shares attention heads that are stored whole and dense, and this "
                "model has none; share heads before you factor or narrow them"
            )
        return [g for g in groups if g[0] != groups[0][0] and g not in lending]

    def _with_stand_ins(
        self, model: PreTrainedModel, candidates: Sequence[Slice], count: int
    ) -> Plan:
        donor = groups_of_heads(model)[0]
        return self.shared(model, dict.fromkeys(candidates[len(candidates) - count :], donor))


def _lending(model: PreTrainedModel) -> set[Slice]:
    """Groups whose weights other positions use already."""
    return {
        origin
        for block in plan_of(model).blocks
        for name in head_cuts(model)
        if isinstance(form := block.linears.get(name), HeadSlices)
        for origin in form.slices
        if origin is not None
    }


def _mean_of_pairs(cosine: torch.Tensor, groups: Sequence[Slice]) -> float:
    positions = torch.tensor([position for position, _ in groups])
    return float(cosine[positions[:, None] > positions].mean())
