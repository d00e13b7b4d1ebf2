"""Search: which change where, chosen by what each costs in loss."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from transformers import PreTrainedModel

from foldstack.compression.closed_forms.selection import Option, OutOfReach, select
from foldstack.compression.errors import InputError
from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.methods.in_order import refitted
from foldstack.compression.methods.method import (
    TOLERANCE,
    Evidence,
    Method,
    check_evidence,
    unreachable,
)
from foldstack.compression.methods.narrowing.modegpt import MoDeGpt
from foldstack.compression.methods.refit import Refit, refit_arithmetic
from foldstack.compression.methods.search.assembly import Assembly
from foldstack.compression.methods.search.curves import (
    SILENCED,
    neighbours_counted_wrong,
    of_one_mlp_width,
    option,
    options_of,
    originals,
)
from foldstack.compression.methods.search.library import Choice, Library
from foldstack.compression.methods.search.rounds import choice_of, improved, removed_in_turn
from foldstack.compression.methods.search.scoring import Scorer, scored
from foldstack.compression.statistics.sensitivity import (
    SCORE_TOKENS,
    Family,
    Sensitivity,
)
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import size_of
from foldstack.compression.structure.surgery import Cut

logger = logging.getLogger(__name__)

Budget = Literal["parameters", "kv_bytes", "flops"]
_MEASURED_BY: dict[str, str] = {
    "parameters": "parameters",
    "kv_bytes": "kv_bytes_per_token",
    "flops": "flops_per_token",
}


class Search(Method):
    """Choose for every site of the model what stands there, by the loss that each change costs.

    A library of variants (widths of MLPs and heads; sublayers, blocks and runs of blocks absent, or
    a linear map in their place; linears of a lower rank; one set of them for two blocks), each with
    a score: KL(dense || changed) when it alone stands in the dense model. A binary program
    chooses one for every site, with the least sum of scores, such that the model loses `sparsity`
    of its parameters and keeps every other budget. Scores of single changes do not add up, so what
    is near the choice is scored again with the rest of it in place, and chosen again (`rounds`), as
    long as the loss on windows that no score has seen falls by more than its standard error.

    Scoring blocks alone and choosing by a program: Puzzle (Bercovich et al. 2024,
    arXiv 2411.19146); scoring around what was chosen: EvoPress (Sieberling et al. 2024,
    arXiv 2410.14649), here of all kinds of changes and by the program. Tensors: MoDeGPT
    (arXiv 2408.09632) for widths, SVD-LLM (arXiv 2403.07378) for ranks. The scores are evidence
    like the statistics: gathered once, they serve every sparsity and budget, and every method that
    asks for them.

    Departs from the papers: nothing is trained for the library or in the search; scores are of
    single sublayers' widths and of removals together, with their errors; between scored widths the
    loss is read off a curve.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    steps_of: ClassVar[str] = "what its library has"
    name: Literal["search"] = "search"
    library: tuple[Family, ...] = Field(default=("widths", "removals", "maps"), min_length=1)
    """What may become of a site: widths (narrower MLPs and heads), removals (blocks absent),
    maps (blocks absent and a linear map in their place that the MLP before them takes in), runs
    (several blocks absent, scored together), sublayers (attention or the MLP of a block absent),
    kv_groups (fewer key and value heads), ranks (all linears of an MLP or of an attention in two
    factors), sharing (two neighbours on the linears of one)."""
    target: Literal["portable", "native"] = "portable"
    """native: only what the stock class loads, blocks absent and one width for all MLPs."""
    budget: dict[Budget, Annotated[float, Field(gt=0, le=1)]] = Field(default={})
    """Fractions of the dense model that may be left, beside `sparsity`: parameters, kv_bytes (KV
    cache per token), flops (of linears, per token)."""
    rounds: int = Field(default=4, ge=0)
    """How often, at most, what is near the choice is scored again and chosen from; it ends when
    that gains nothing."""
    refit: Refit = "residual"
    """What the linears that write into the residual stream are fitted to at the end, in order:
    what the dense model's add, or the dense model's stream (`refit`)."""
    mlp_selection: Literal["greedy", "leverage"] = "greedy"
    """Which channels narrower MLPs keep: see `modegpt`."""
    mlp_multiple: int = Field(default=1, ge=1)
    """MLP widths are multiples of this; 64 or 128 suit tensor cores."""
    head_multiple: int = Field(default=1, ge=1)
    """Head widths are multiples of this; 8 or 16 suit tensor cores."""
    rank_multiple: int = Field(default=1, ge=1)
    """Ranks are multiples of this; 64 suits tensor cores."""

    @property
    def scores(self) -> frozenset[Family]:
        return frozenset(self.library)

    def outline(self, model: PreTrainedModel) -> Plan:
        # No loss is known yet: narrower is dearer, and the farther back a block the less it costs.
        library = self.library_of(model)
        depth = len(library.plan.blocks)
        options = originals(library)
        for variant in library.variants(self.library):
            saved = library.saved(variant).parameters
            steepness = 2.0 if variant.gone else 1.0
            loss = (saved * 1e-6) ** 2 * steepness * (1 + 0.01 * (depth - variant.first))
            options.append(option(library, variant, loss))
        choice = choice_of(self._solve(library, options))
        return library.structure(choice)[0]

    @property
    def goes_in_turn(self) -> bool:
        return False

    def arithmetic(self, model: PreTrainedModel, num_tokens: int) -> Arithmetic:
        library = self.library_of(model)
        moves = 2 * len(library.dimensions) + len(library.positions)
        share = min(1.0, SCORE_TOKENS / num_tokens)
        evaluations = self.rounds * (moves / 2 + 4)
        work = Arithmetic(passes=share * evaluations, heads=share * self.rounds * moves)
        if self.refit == "none":
            return work
        return work + refit_arithmetic(model, self.outline(model), num_tokens)

    def library_of(self, model: PreTrainedModel) -> Library:
        """What there is for a model."""
        narrowing = MoDeGpt(
            sparsity=0.5,
            mlp_selection=self.mlp_selection,
            mlp_multiple=self.mlp_multiple,
            head_multiple=self.head_multiple,
        )
        return Library(model, narrowing=narrowing, rank_multiple=self.rank_multiple)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        library = self.library_of(model)
        assembly, spool = Assembly(library, evidence), evidence.spool()
        evidence = scored(evidence, model, self.scores)
        assert evidence.sensitivity is not None
        sensitivity = evidence.sensitivity.of(self.library)
        choice = self._chosen(assembly, sensitivity, evidence)
        change = assembly.cut(choice, spool, evidence.progress)
        return change if self.refit == "none" else refitted(model, change, evidence, self.refit)

    def _chosen(self, assembly: Assembly, sensitivity: Sensitivity, evidence: Evidence) -> Choice:
        library = assembly.library
        solve = partial(self._solve, library)
        choice = choice_of(solve(options_of(library, sensitivity)))
        scored_on = evidence.calibration[: sensitivity.num_windows]
        fresh = evidence.calibration[len(scored_on) : 2 * len(scored_on)]
        scorer = Scorer(assembly, scored_on, progress=evidence.progress)
        if set(self.library) <= {"removals", "runs", "maps"}:
            choice = self._removed(library, scorer, sensitivity, choice)
        if self.rounds == 0 or len(fresh) < 2:
            return choice
        known = {score.variant: score.mean for score in sensitivity.scores}
        judge = Scorer(assembly, fresh, progress=evidence.progress)
        choice, _ = improved(
            library,
            scorer,
            judge,
            choice,
            solve,
            self.rounds,
            evidence.spool(),
            known,
            one_width=self.target == "native",
        )
        return choice

    def _removed(
        self, library: Library, scorer: Scorer, sensitivity: Sensitivity, choice: Choice
    ) -> Choice:
        """Where only blocks can go, sums of single scores choose worst: the better of the choice
        and of the blocks that go one after the other."""
        needs = self._needs(size_of(library.model).as_dict())

        def is_enough(gone: Choice) -> bool:
            saved = [library.saved(variant).model_dump() for variant in gone]
            return all(sum(s[name] for s in saved) >= need for name, need in needs.items())

        candidates = [s.variant for s in sensitivity.scores if s.variant.kind == "absent"]
        in_turn = removed_in_turn(library, scorer, candidates, is_enough)
        losses = {c: float(scorer.loss(c).mean()) for c in (choice, in_turn) if c is not None}
        return min(losses, key=losses.__getitem__)

    def _solve(self, library: Library, options: Sequence[Option]) -> list[Option]:
        """The options of least loss that keep the budgets.

        Raises:
            InputError: no choice keeps them.
        """
        if self.target == "native":
            options = of_one_mlp_width(options)
        whole = size_of(library.model).as_dict()
        needs = self._needs(whole)
        try:
            return select(
                options,
                needs,
                neighbours_counted_wrong(options),
                # A cache counts the tokens so far in the blocks that attend.
                limits={SILENCED: len(library.attending) - 1.0},
            )
        except OutOfReach as error:
            raise self._refusal(error, whole, needs) from None

    def _needs(self, whole: Mapping[str, int]) -> dict[str, float]:
        """What is to be saved, by the name of a budget."""
        needs: dict[str, float] = {
            name: (1 - left) * whole[_MEASURED_BY[name]] for name, left in self.budget.items()
        }
        needs["parameters"] = max(needs.get("parameters", 0.0), self.sparsity * whole["parameters"])
        return needs

    def _refusal(
        self, error: OutOfReach, whole: dict[str, int], needs: dict[str, float]
    ) -> InputError:
        by = f"a library of {' and '.join(self.library)} for a {self.target} model"
        farthest = error.reach["parameters"] / whole["parameters"]
        if farthest < self.sparsity - TOLERANCE and len(needs) == 1:
            return InputError(unreachable(self, farthest, by))
        reach = ", ".join(
            f"{name} down to {1 - reach / whole[_MEASURED_BY[name]]:.1%}"
            for name, reach in error.reach.items()
        )
        asked = ", ".join(
            f"{name} {1 - need / whole[_MEASURED_BY[name]]:.1%}" for name, need in needs.items()
        )
        return InputError(
            f"search cannot keep all budgets of this model at once with {by}: asked were {asked} "
            f"of the dense model, and each alone goes {reach}; ask for less, or for a larger "
            "library"
        )
