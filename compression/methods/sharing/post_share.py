"""PostShare: heads are pulled towards their donors by training, then they share."""

import copy
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.methods.method import Evidence, check_evidence
from foldstack.compression.methods.sharing.head_sharing import HeadSharing, head_cuts
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.head_slices import Slice
from foldstack.compression.structure.modeling_foldstack import slice_indices
from foldstack.compression.structure.surgery import Cut, all_tensors, cut
from foldstack.compression.training.block_training import BatchLoss, Schedule, fit


class PostShare(HeadSharing):
    """Train the whole model with a penalty that pulls heads towards their donors, then share.

    PostShare (Cao et al. 2024, arXiv 2402.11819, and its released code). The pairs are those of
    DirectShare on the given weights and stay what they are; then all parameters are trained on the
    calibration windows with

        (1 - pull) CE + pull / |pairs| * sum over pairs of |Wq - Wq'| + |Wk - Wk'| + |Wv - Wv'|

    (Frobenius norms, not squared), and the pairs share the trained weights, the donor's.

    Departs from the paper: as DirectShare does; the state with the lowest loss on held-out windows
    is taken; a bias is one more column of its weight; `pull_output` adds |Wo - Wo'|. AdamW has its
    usual second beta, 0.999.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    name: Literal["post_share"] = "post_share"
    pull: float = Field(default=0.5, ge=0, le=1)
    """Weight of the penalty; the next-token loss has the rest."""
    pull_output: bool = False
    """Whether the columns of the output projection are pulled too; the paper leaves them."""
    epochs: int = Field(default=1, ge=0)
    """Passes over the calibration windows."""
    batch_size: int = Field(default=8, ge=1)
    """Windows per optimizer step."""
    learning_rate: float = Field(default=5e-5, gt=0)
    min_learning_rate_fraction: float = Field(default=0.0, ge=0, le=1)
    """Learning rate of the last step, as a fraction of the highest."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the optimizer steps in which the learning rate rises to its peak."""
    weight_decay: float = Field(default=0.1, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the windows that choose the best state and train nothing."""

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        donors = self.donors(model)
        plan = self.shared(model, donors)
        positions = tuple(range(len(plan.blocks)))
        if not donors:
            return Cut(plan, positions)
        trained = self._trained(model, donors, evidence)
        return Cut(plan, positions, all_tensors(cut(trained, Cut(plan, positions))))

    def _trained(
        self, model: PreTrainedModel, donors: Mapping[Slice, Slice], evidence: Evidence
    ) -> PreTrainedModel:
        student = copy.deepcopy(model).float().requires_grad_(True)
        schedule = Schedule(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            min_learning_rate=self.learning_rate * self.min_learning_rate_fraction,
            warmup_fraction=self.warmup_fraction,
            weight_decay=self.weight_decay,
            gradient_clip=self.gradient_clip,
            validation_fraction=self.validation_fraction,
            seed=self.seed,
        )
        fit(
            nn.ParameterList(student.parameters()),  # each once, also those that are tied
            self._loss(student, donors, evidence.calibration),
            len(evidence.calibration),
            schedule,
            checkpoints=None if evidence.work is None else evidence.work / self._run_name,
            progress=evidence.progress,
        )
        return student

    @property
    def _run_name(self) -> str:
        """Tells training states apart by what `fit` does not know: the loss and the pairs."""
        return f"post_share-{self.match}-{self.sparsity}-{self.pull}-{self.pull_output}"

    def _loss(
        self,
        student: PreTrainedModel,
        donors: Mapping[Slice, Slice],
        windows: Int[Tensor, "windows tokens"],
    ) -> BatchLoss:
        def loss_of(batch: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
            pulled = self.pull * pair_distance(student, donors, self.pull_output)
            if self.pull == 1:
                return pulled
            tokens = windows[batch].to(student.device, torch.long)
            logits = student(tokens, use_cache=False).logits[:, :-1]
            ce = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            return (1 - self.pull) * ce + pulled

        return loss_of


def pair_distance(
    model: PreTrainedModel, donors: Mapping[Slice, Slice], with_output: bool
) -> Float[Tensor, ""]:
    """Mean over pairs of the sum of norms |W - W'| of their projections, biases as a column.

    A fused projection counts as its parts, queries, keys and values.
    """
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    total = next(model.parameters()).new_zeros(())
    for name, form in head_cuts(model).items():
        if form.axis == "in" and not with_output:
            continue
        rows: dict[int, Tensor] = {}
        for position in {p for pair in donors.items() for p, _ in pair}:
            module = blocks[position].get_submodule(name)
            weight, bias = architecture.weight(module), module.bias
            if form.axis == "in":
                weight = weight.T
            elif isinstance(bias, Tensor):
                weight = torch.cat([weight, bias[:, None]], dim=1)
            rows[position] = weight
        width = len(next(iter(rows.values())))
        indices = slice_indices(form.model_dump(), width)
        sizes = [part // len(form.slices) for part in form.parts or (width,)]
        for (position, index), (donor, theirs) in donors.items():
            difference = rows[position][indices[index]] - rows[donor][indices[theirs]]
            for part in difference.split(sizes):
                total = total + torch.linalg.vector_norm(part)
    return total / len(donors)
