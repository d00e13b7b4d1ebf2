"""SliceGPT: the residual stream in its principal directions, of which the last ones go."""

import logging
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from jaxtyping import Float64
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.methods.method import Evidence, Method, check_evidence, nearest_reaching
from foldstack.compression.methods.narrowing.residual_slicing import (
    check_sliceable,
    principal_basis,
    sliced_tensors,
)
from foldstack.compression.structure.architectures import base_config_of
from foldstack.compression.structure.block_plan import Sliced
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import linear_shapes
from foldstack.compression.structure.surgery import Cut, plan_of

logger = logging.getLogger(__name__)

Energies = list[Float64[Tensor, " hidden"]]


class SliceGpt(Method):
    """Narrow the residual stream to its leading principal directions, link by link.

    SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024, section 3). With X the signal at a link and
    X^T X = Q Lambda Q^T (equation 8), every matrix that reads the link becomes W Q_s and every one
    that writes to it Q_s^T W, Q_s the s leading columns of Q; each residual link gets the matrix
    Q_s^T Q_s' that leads to the next link's basis. The gains of the norms are made part of the
    linears behind them. Every PCA sees the signal that the links sliced before it have left. Heads,
    MLP widths and the KV cache keep their sizes; tied embeddings become untied, since the head
    keeps the full width.

    Departs from the paper: `sparsity` is of the whole model's parameters, and the widths follow
    from it (the paper's is the share of one s; with its added matrices and an untied head 10 % of
    the width make Llama-2-7B larger, which is refused). The embeddings of models with RMS norms are
    not centred, which would change them. What leaves the last block is in the original basis, so
    the final norm and the head stay what they were; the function is the paper's.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    steps_of: ClassVar[str] = "widths of the residual stream"
    name: Literal["slicegpt"] = "slicegpt"
    widths: Literal["even", "one", "explained_variance"] = "even"
    """one: the same width at all links, the paper's; even: the same, and the deepest links one
    step narrower where that hits the size; explained_variance: at each as many directions as
    leave the same share of the dense signal's energy out (the paper's appendix; helps OPT, hurts
    Llama-2)."""
    round_interval: int = Field(default=8, ge=1)
    """Widths are multiples of this; 64 or 128 suit tensor cores."""
    orientation: Literal["random", "pca"] = "random"
    """Basis of the kept directions: random spreads the energy over the coordinates, which suits
    half precision; pca keeps the order of the energies. The function is the same."""
    calibration_signal: Literal["damaged", "dense"] = "damaged"
    """Signal that the PCAs see: what earlier slicing left of it, or that of the whole model."""
    skip_first_token: bool = False
    """Leave the first token of each window out of the PCAs: it is often an attention sink whose
    state is far larger than all others."""

    def outline(self, model: PreTrainedModel) -> Plan:
        # The energies are not known yet: even widths stand in.
        return self._plan_of_even_widths(model)

    @property
    def goes_in_turn(self) -> bool:
        return True

    def arithmetic(self, model: PreTrainedModel, num_tokens: int) -> Arithmetic:
        hidden, num_links = self._hidden(model), 2 * len(plan_of(model).blocks)
        linears = sum(rows * columns for rows, columns in linear_shapes(model).values())
        bases = num_links * (9.0 * hidden**3 + 2.0 * num_tokens * hidden**2)
        return Arithmetic(float64=bases + 4.0 * hidden * linears, passes=1.5, streams=1)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        plan = self._plan_of_even_widths(model)
        positions = tuple(range(len(plan.blocks)))
        if not plan.is_sliced:
            return Cut(plan, positions)
        if self.widths == "explained_variance":
            plan = self._plan_by_energies(model, self._dense_energies(model, evidence))
        widths = [w for b in plan.blocks if b.sliced for w in (b.sliced.entering, b.sliced.middle)]
        logger.info("slicegpt: the residual stream is %s wide", " ".join(map(str, widths)))

        def choose(link: int, moments: Tensor) -> Tensor:
            _, directions = principal_basis(moments)
            return self._oriented(directions[:, : widths[link]], link)

        tensors = sliced_tensors(
            model,
            evidence.calibration,
            choose,
            dense_signal=self.calibration_signal == "dense",
            skip_first_token=self.skip_first_token,
            work=evidence.work,
            progress=lambda done: evidence.progress("slicegpt", done, len(positions)),
        )
        return Cut(plan, positions, tensors)

    def _oriented(self, basis: Tensor, link: int) -> Tensor:
        if self.orientation == "pca":
            return basis
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + link)
        size = basis.shape[1]
        normal = torch.randn(size, size, generator=generator, dtype=basis.dtype)
        turned, upper = torch.linalg.qr(normal)
        uniform = turned * upper.diagonal().sign()  # or QR's convention would favour some rotations
        return basis @ uniform.to(basis.device)

    def _dense_energies(self, model: PreTrainedModel, evidence: Evidence) -> Energies:
        """Per link the energies of the dense signal, as shares of their sum, descending."""
        energies: Energies = []

        def note(_link: int, moments: Tensor) -> Tensor:
            found, directions = principal_basis(moments)
            energies.append((found / found.sum().clamp_min(torch.finfo(found.dtype).tiny)).cpu())
            return directions

        sliced_tensors(
            model,
            evidence.calibration,
            note,
            dense_signal=True,
            skip_first_token=self.skip_first_token,
            progress=lambda done: evidence.progress("slicegpt energies", done, len(energies) // 2),
        )
        return energies

    def _plan_of_even_widths(self, model: PreTrainedModel) -> Plan:
        plan, hidden = plan_of(model), self._hidden(model)
        choices, num_links = self._choices(hidden), 2 * len(plan.blocks)
        at_once = num_links if self.widths == "one" else 1  # links narrowed together

        def widths(count: int) -> list[int]:
            narrower, deepest = divmod((count - 1) * at_once, num_links)
            steps = [narrower] * (num_links - deepest) + [narrower + 1] * deepest
            return [choices[-1 - step] for step in steps]

        most = 1 + (len(choices) - 1) * num_links // at_once if choices else 0
        what = f"steps of {self.round_interval} among {hidden} residual coordinates"
        return self._nearest_plan(model, widths, most, what)

    def _plan_by_energies(self, model: PreTrainedModel, energies: Energies) -> Plan:
        """The plan with the least share of energy left out, the same limit at all links."""
        choices = self._choices(self._hidden(model))
        left_out = [[float(1 - shares[:width].sum()) for width in choices] for shares in energies]
        limits = sorted({share for of_link in left_out for share in of_link})

        def widths(count: int) -> list[int]:
            limit = limits[count - 1]
            return [
                next((w for w, s in zip(choices, of_link, strict=True) if s <= limit), choices[-1])
                for of_link in left_out
            ]

        return self._nearest_plan(model, widths, len(limits), "limits of the energy left out")

    def _nearest_plan(
        self, model: PreTrainedModel, widths: Callable[[int], list[int]], most: int, what: str
    ) -> Plan:
        """The plan of those of widths(1), widths(2), ... that come nearest to the sparsity.

        Raises:
            InputError: none does, or the model's residual stream cannot be sliced.
        """
        check_sliceable(model)

        def plan_for(count: int) -> Plan:
            return _sliced(plan_of(model), widths(count), self._hidden(model))

        plan_of(model).slice([Sliced(entering=1, middle=1, leaving=1)] * len(plan_of(model).blocks))
        count = nearest_reaching(self, model, plan_for, most, what)
        return plan_for(count) if count else plan_of(model)

    def _choices(self, hidden: int) -> list[int]:
        """All widths below the whole one, ascending."""
        return list(range(self.round_interval, hidden, self.round_interval))

    def _hidden(self, model: PreTrainedModel) -> int:
        return int(base_config_of(model.config).hidden_size)


def _sliced(plan: Plan, widths: list[int], hidden: int) -> Plan:
    """The plan with these widths at its links; what leaves the last block is whole."""
    ends = [*widths, hidden]
    return plan.slice(
        [
            Sliced(entering=ends[at], middle=ends[at + 1], leaving=ends[at + 2])
            for at in range(0, len(widths), 2)
        ]
    )
