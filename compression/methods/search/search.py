"""Search: which change where, chosen by what each costs in loss."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
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
from foldstack.compression.methods.search.library import Choice, Library, absent
from foldstack.compression.methods.search.rounds import choice_of, improved, removed_in_turn
from foldstack.compression.methods.search.scoring import Scorer, scored
from foldstack.compression.statistics.sensitivity import (
    SCORE_TOKENS,
    Family,
    Sensitivity,
    standard_error,
)
from foldstack.compression.statistics.variant_times import Seconds
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import size_of
from foldstack.compression.structure.surgery import Cut

logger = logging.getLogger(__name__)

Budget = Literal["parameters", "kv_bytes", "flops", "seconds", "prefill_seconds", "decode_seconds"]
GONE, THERE = "blocks_gone", "blocks_there"
TIMES = ("seconds", "prefill_seconds", "decode_seconds")
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
    cache per token), flops (of linears, per token); and of the time on this machine that a request
    takes whose length `speed` says in the sweep, alone, in its first batch size: prefill_seconds
    (the prompt is read), decode_seconds (new tokens are written), seconds (both)."""
    rounds: int = Field(default=4, ge=0)
    """How often, at most, what is near the choice is scored again and chosen from; it ends when
    that gains nothing."""
    refit: Refit = "residual"
    """What the linears that write into the residual stream are fitted to at the end, in order:
    what the dense model's add, or the dense model's stream (`refit`)."""
    finalists: int = Field(default=1, ge=1)
    """How many choices a sweep makes, trains for a few equal steps (`recovery.finalist_steps`) and
    keeps the best of: the best choice, and the best with fewer blocks gone, and with more. Training
    makes up for some losses better than for others. From a library of removals and others."""
    finalist: int = Field(default=0, ge=0)
    """Which of these: 0 is the best one before training."""
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

    @model_validator(mode="after")
    def _finalists_differ(self) -> "Search":
        kinds = set(self.library)
        if max(self.finalists - 1, self.finalist) and not ("removals" in kinds and len(kinds) > 1):
            raise ValueError(
                "finalists of search differ in how many blocks go, so its library must hold "
                f"removals and something else, got {', '.join(self.library)}"
            )
        return self

    @property
    def contenders(self) -> tuple[Method, ...]:
        return tuple(
            self.model_copy(update={"finalists": 1, "finalist": number})
            for number in range(self.finalists)
        )

    @property
    def times(self) -> frozenset[Family]:
        return self.scores if any(name in TIMES for name in self.budget) else frozenset()

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

    def library_of(self, model: PreTrainedModel, seconds: Seconds | None = None) -> Library:
        """What there is for a model, with the times of variants where they are known."""
        narrowing = MoDeGpt(
            sparsity=0.5,
            mlp_selection=self.mlp_selection,
            mlp_multiple=self.mlp_multiple,
            head_multiple=self.head_multiple,
        )
        return Library(
            model, narrowing=narrowing, rank_multiple=self.rank_multiple, seconds=seconds
        )

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        if self.times and evidence.seconds is None:
            raise InputError(
                "a budget of seconds needs times of variants on this machine, and there are none; "
                "make them with `methods.search.seconds.measure_seconds`"
            )
        library = self.library_of(model, evidence.seconds)
        assembly, spool = Assembly(library, evidence), evidence.spool()
        evidence = scored(evidence, model, self.scores)
        assert evidence.sensitivity is not None
        sensitivity = evidence.sensitivity.of(self.library)
        choice, forecast = self._chosen(assembly, sensitivity, evidence)
        change = assembly.cut(choice, spool, evidence.progress)
        if self.refit != "none":
            change = refitted(model, change, evidence, self.refit)
        return replace(change, forecast=forecast | _time_left(library, choice))

    def _chosen(
        self, assembly: Assembly, sensitivity: Sensitivity, evidence: Evidence
    ) -> tuple[Choice, dict[str, float]]:
        """What stands in the model, and what that is expected to cost in KL before the refit, in
        nats per token: `kl_added` by the scores of the first choice's single changes, `kl` by all
        of the last one's together, on windows that no score has seen."""
        library = assembly.library
        options = options_of(library, sensitivity)
        depth = self._depth_of_finalist(library, options)
        solve = partial(self._solve, library, depth=depth)
        first = solve(options)
        choice, forecast = choice_of(first), {"kl_added": sum(each.loss for each in first)}
        scored_on = evidence.calibration[: sensitivity.num_windows]
        fresh = evidence.calibration[len(scored_on) : 2 * len(scored_on)]
        scorer = Scorer(assembly, scored_on, progress=evidence.progress)
        if set(self.library) <= {"removals", "runs", "maps"}:
            choice = self._removed(library, scorer, sensitivity, choice)
        if self.rounds == 0 or len(fresh) < 2:
            return choice, forecast
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
        kl = judge.loss(choice)
        forecast |= {"kl": float(kl.mean()), "kl_stderr": standard_error(kl.tolist())}
        return choice, forecast

    def _removed(
        self, library: Library, scorer: Scorer, sensitivity: Sensitivity, choice: Choice
    ) -> Choice:
        """Where only blocks can go, sums of single scores choose worst: the better of the choice
        and of the blocks that go one after the other."""
        needs = self._needs(library, _whole(library))

        def is_enough(gone: Choice) -> bool:
            saved = [library.savings(variant) for variant in gone]
            return all(sum(s[name] for s in saved) >= need for name, need in needs.items())

        candidates = [s.variant for s in sensitivity.scores if s.variant.kind == "absent"]
        in_turn = removed_in_turn(library, scorer, candidates, is_enough)
        losses = {c: float(scorer.loss(c).mean()) for c in (choice, in_turn) if c is not None}
        return min(losses, key=losses.__getitem__)

    def _depth_of_finalist(self, library: Library, options: Sequence[Option]) -> int | None:
        """How many blocks stay in this finalist: in every one another number, in the order of what
        single scores say that they cost; None where the program may say it."""
        if self.finalist == 0:
            return None
        best = _num_blocks(library, self._solve(library, options))
        found: list[tuple[float, int]] = []
        for towards in (-1, 1):
            for depth in range(best + towards, best + towards * (self.finalist + 1), towards):
                try:
                    chosen = self._solve(library, options, depth=depth)
                except InputError:  # out of reach, and what is farther is, too
                    break
                found.append((sum(each.loss for each in chosen), depth))
        if len(found) < self.finalist:
            told = f"{len(found) + 1} numbers of blocks that reach these budgets"
            raise InputError(f"search has {told}, and was asked for finalist {self.finalist + 1}")
        return sorted(found)[self.finalist - 1][1]

    def _solve(
        self, library: Library, options: Sequence[Option], depth: int | None = None
    ) -> list[Option]:
        """The options of least loss that keep the budgets, with so many blocks if that is said.

        Raises:
            InputError: no choice keeps them.
        """
        if self.target == "native":
            options = of_one_mlp_width(options)
        if depth is not None:
            options = [_counting_blocks(library, each) for each in options]
        whole = _whole(library)
        needs = self._needs(library, whole)
        if depth is not None:
            needs |= {GONE: len(library.positions) - depth, THERE: depth}
            whole |= {GONE: len(library.positions), THERE: len(library.positions)}
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

    def _needs(self, library: Library, whole: Mapping[str, float]) -> dict[str, float]:
        """What is to be saved, by the name of a budget; nothing of time before that is known."""
        needs: dict[str, float] = {
            name: (1 - left) * whole[_MEASURED_BY.get(name, name)]
            for name, left in self.budget.items()
            if name not in TIMES or library.seconds is not None
        }
        needs["parameters"] = max(needs.get("parameters", 0.0), self.sparsity * whole["parameters"])
        return needs

    def _refusal(
        self, error: OutOfReach, whole: dict[str, float], needs: dict[str, float]
    ) -> InputError:
        by = f"a library of {' and '.join(self.library)} for a {self.target} model"
        farthest = error.reach["parameters"] / whole["parameters"]
        if farthest < self.sparsity - TOLERANCE and len(needs) == 1:
            return InputError(unreachable(self, farthest, by))
        reach = ", ".join(
            f"{name} down to {1 - reach / whole[_MEASURED_BY.get(name, name)]:.1%}"
            for name, reach in error.reach.items()
        )
        asked = ", ".join(
            f"{name} {1 - need / whole[_MEASURED_BY.get(name, name)]:.1%}"
            for name, need in needs.items()
        )
        return InputError(
            f"search cannot keep all budgets of this model at once with {by}: asked were {asked} "
            f"of the dense model, and each alone goes {reach}; ask for less, or for a larger "
            "library"
        )


def _whole(library: Library) -> dict[str, float]:
    """Of the dense model, what budgets are fractions of."""
    sizes = {name: float(size) for name, size in size_of(library.model).as_dict().items()}
    return sizes | dict.fromkeys(TIMES, 1.0)


def _counting_blocks(library: Library, option: Option) -> Option:
    """The same with the blocks that are gone with it, and that are there, among what it saves: so
    that the program can be asked for a number of them."""
    gone = float(len(absent(option.key)))
    there = sum((position, "mlp") in option.slots for position in library.positions) - gone
    return replace(option, saved={**option.saved, GONE: gone, THERE: there})


def _num_blocks(library: Library, chosen: Sequence[Option]) -> int:
    return len(library.positions) - len(absent(choice_of(chosen)))


def _time_left(library: Library, choice: Choice) -> dict[str, float]:
    """The times that a choice is expected to take, as shares of the dense model's, with what the
    fit was off by where it was made; nothing where none were measured."""
    if library.seconds is None:
        return {}
    saved = [library.savings(variant) for variant in choice]
    left = {name: 1 - sum(each.get(name, 0.0) for each in saved) for name in TIMES}
    errors = library.seconds
    return left | {
        "prefill_seconds_error": errors.prefill_error,
        "decode_seconds_error": errors.decode_error,
    }
