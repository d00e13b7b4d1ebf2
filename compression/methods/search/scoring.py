"""What each variant costs: the model with it against the dense one, from its site to the logits.

KL(dense || changed) = sum over tokens of p (log p - log q). Of the dense model's distribution p the
`TOP` likeliest tokens are kept, and the mass of the rest as one more outcome: memory is bounded
whatever the vocabulary, and what is measured is never more than the whole divergence.

What enters a site is computed once, in one pass over the blocks: v variants at each of L blocks
cost one pass and v L passes from their site to the head, half of v L whole ones.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.evaluation.candidate_loss import (
    WINDOWS_AT_ONCE,
    windows_at_once,
    windows_of,
)
from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.methods.method import Evidence, no_progress
from foldstack.compression.methods.search.assembly import Assembly
from foldstack.compression.methods.search.kinds import KIND_OF
from foldstack.compression.methods.search.library import DENSE, Choice, Library, absent
from foldstack.compression.statistics.sensitivity import (
    FAMILIES,
    SCORE_TOKENS,
    Family,
    Score,
    Sensitivity,
    Variant,
)
from foldstack.compression.statistics.stream import (
    BlockStream,
    cpu_precision,
    replacing,
    skipping,
    starting_at,
)
from foldstack.compression.storage.mapped_memory import trim
from foldstack.compression.storage.spool import Spool

TOP = 4096
"""Tokens of the vocabulary whose probabilities are kept."""

Values = Float[Tensor, " windows"]


@dataclass(frozen=True)
class Outcomes:
    """The dense model's distribution for every token of some windows."""

    log_p: Float[Tensor, "windows tokens top"]
    """Of the likeliest tokens, float32."""
    tokens: Int[Tensor, "windows tokens top"] | None
    """Which those are; None where they are the whole vocabulary."""
    log_rest: Float[Tensor, "windows tokens"] | None
    """Of all others together."""

    def divergence(self, index: slice, logits: Float[Tensor, "batch tokens all"]) -> Values:
        """KL(p || q) of the windows at `index`, mean over their tokens, in nats.

        Infinite where the changed model computes no number.
        """
        log_q = logits.float().log_softmax(-1)
        log_p = self.log_p[index].to(logits.device)
        if self.tokens is not None:
            log_q = log_q.gather(-1, self.tokens[index].to(logits.device, torch.long))
        total = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
        if self.log_rest is not None:
            log_rest = self.log_rest[index].to(logits.device)
            total += log_rest.exp() * (log_rest - _log_rest(log_q))
        means = total.mean(-1).cpu()
        return torch.where(torch.isfinite(means), means.clamp_min(0), math.inf)


def _log_rest(log_q: Float[Tensor, "*tokens top"]) -> Float[Tensor, "*tokens"]:
    """The logarithm of the mass that is left over; never that of nothing, which rounding leaves."""
    rest = 1 - log_q.double().exp().sum(-1)
    return rest.clamp_min(1e-12).log().float()


class Scorer:
    """Scores variants on some windows, given that others stand in the model already."""

    def __init__(
        self,
        assembly: Assembly,
        windows: Int[Tensor, "windows tokens"],
        *,
        progress: Callable[[str, int, int], None] = no_progress,
    ) -> None:
        """Compute what the dense model says of the windows.

        On a CPU a model of half precision computes in float32, as a copy of its own.
        """
        self.assembly, self.windows, self.progress = assembly, windows, progress
        self.precision = cpu_precision(assembly.model)
        self.model = assembly.model
        if self.precision is not None:
            self.model = copy.deepcopy(assembly.model).to(self.precision)  # type: ignore[arg-type]
        self.outcomes = self._outcomes()

    @contextmanager
    def standing(self, choice: Choice) -> Iterator[Mapping[int, nn.Module]]:
        """Inside, the model is one with these variants; yields the blocks that are other ones."""
        positions = {p for variant in choice for p in range(variant.first, variant.stop)}
        others = {
            position: self._computing(self.assembly.block(position, choice))
            for position in sorted(positions - absent(choice))
        }
        with replacing(self.model, others), skipping(self.model, absent(choice)):
            yield others

    def loss(self, choice: Choice) -> Values:
        """KL of the model with these variants, of every window."""
        stream = BlockStream(self.model, self.windows, batch_size=WINDOWS_AT_ONCE)
        with self.standing(choice):
            return self._from(0, stream.states.all)

    def losses(
        self,
        alternatives: Sequence[Choice],
        given: Choice = DENSE,
        spool: Spool | None = None,
        name: str = "scores",
    ) -> list[Values]:
        """KL of the model with each of these choices, of every window, where all are little changes
        of what is given.

        What is known of the changes that begin at a block goes to `spool`, under this name; a
        killed run goes on from there.
        """
        spool = spool or Spool(None)
        starts: dict[int, list[int]] = {}
        for index, choice in enumerate(alternatives):
            starts.setdefault(_first_difference(given, choice), []).append(index)
        found: dict[int, Values] = {}
        if given:
            self.assembly.prepare([given, *alternatives])
        with self.standing(given) as others:
            stream = BlockStream(self.model, self.windows, batch_size=WINDOWS_AT_ONCE)
            for position, here in sorted(starts.items()):
                self._advance(stream, position, others, absent(given))
                choices, entering = [alternatives[index] for index in here], stream.states.all
                score = partial(self._losses_from, position, entering, choices, given)
                kl = spool.part(f"{name}-{position}", score)["kl"]
                found |= dict(zip(here, kl, strict=True))
                self.assembly.forget()
                trim()
                self.progress("score variants", len(found), len(alternatives))
        return [found[index] for index in range(len(alternatives))]

    def _losses_from(
        self,
        position: int,
        entering: Float[Tensor, "windows tokens hidden"],
        alternatives: Sequence[Choice],
        given: Choice,
    ) -> dict[str, Float[Tensor, "choices windows"]]:
        """Of choices that differ from what is given from block `position` on."""
        values = []
        for choice in alternatives:
            changed = {p for v in given ^ choice for p in range(v.first, v.stop)}
            gone = absent(choice)
            others = {
                p: self._computing(self.assembly.block(p, choice)) for p in sorted(changed - gone)
            }
            with replacing(self.model, others), skipping(self.model, gone & changed):
                values.append(self._from(position, entering))
        return {"kl": torch.stack(values)}

    def _advance(
        self,
        stream: BlockStream,
        position: int,
        others: Mapping[int, nn.Module],
        gone: frozenset[int],
    ) -> None:
        while stream.position < position:
            at = stream.position
            if at in gone:
                stream.put(stream.hidden, at + 1)
            else:
                stream.advance(others.get(at))

    def _computing(self, block: nn.Module) -> nn.Module:
        return block if self.precision is None else block.to(self.precision)

    def _from(self, position: int, entering: Float[Tensor, "windows tokens hidden"]) -> Values:
        """KL of the model as it stands, with what enters block `position` given."""
        divergences = (
            self.outcomes.divergence(rows, logits)
            for rows, logits in self._logits(position, entering)
        )
        return torch.cat(list(divergences))

    def _logits(
        self, position: int, entering: Float[Tensor, "windows tokens hidden"]
    ) -> Iterator[tuple[slice, Float[Tensor, "batch tokens all"]]]:
        """With what enters block `position` given, a few windows at once; and which those
        are."""
        at_once = windows_at_once(self.model, self.windows.shape[1])
        rows = slice(0, 0)
        with torch.no_grad(), starting_at(self.model, position, lambda: entering[rows]):
            for start in range(0, len(self.windows), at_once):
                rows = slice(start, min(start + at_once, len(self.windows)))
                tokens = self.windows[rows].to(self.model.device, torch.long)
                yield rows, self.model(tokens, use_cache=False).logits

    def _outcomes(self) -> Outcomes:
        stream = BlockStream(self.model, self.windows, batch_size=WINDOWS_AT_ONCE)
        log_p, tokens, log_rest = [], [], []
        for _, logits in self._logits(0, stream.states.all):
            whole = logits.float().log_softmax(-1)
            if whole.shape[-1] <= TOP:
                log_p.append(whole.cpu())
                continue
            top = whole.topk(TOP, dim=-1)
            log_p.append(top.values.cpu())
            tokens.append(top.indices.to("cpu", torch.int32))
            log_rest.append(_log_rest(top.values).cpu())
        return Outcomes(
            torch.cat(log_p),
            torch.cat(tokens) if tokens else None,
            torch.cat(log_rest) if log_rest else None,
        )


def with_variant(choice: Choice, variant: Variant) -> Choice:
    """A choice with this variant in the place of what decides about any of the same slots."""
    return choice - displaced(choice, variant) | {variant}


def displaced(choice: Choice, variant: Variant) -> Choice:
    """What of a choice cannot stand beside a variant."""
    return frozenset(other for other in choice if other.slots & variant.slots)


def _first_difference(given: Choice, choice: Choice) -> int:
    """The first block that is another one; 0 where none is."""
    return min((variant.first for variant in given ^ choice), default=0)


def score_variants(
    assembly: Assembly,
    windows: Int[Tensor, "windows tokens"],
    variants: Iterable[Variant],
    *,
    families: Iterable[Family] = (),
    spool: Spool | None = None,
    progress: Callable[[str, int, int], None] = no_progress,
) -> Sensitivity:
    """The scores of variants, each alone in the dense model; they are all that there is of
    `families`, on some blocks."""
    variants = list(variants)
    scorer = Scorer(assembly, windows, progress=progress)
    losses = scorer.losses([frozenset([variant]) for variant in variants], spool=spool)
    return Sensitivity(
        num_blocks=len(assembly.library.plan.blocks),
        num_windows=len(windows),
        window_tokens=windows.shape[1],
        families=tuple(families),
        scores=tuple(
            Score(variant=variant, saved=assembly.library.saved(variant), kl=tuple(kl.tolist()))
            for variant, kl in zip(variants, losses, strict=True)
        ),
    )


def scored(evidence: Evidence, model: PreTrainedModel, families: Iterable[Family]) -> Evidence:
    """Evidence with the scores of these families of variants: as they were gathered, and what is
    missing gathered now on the first `SCORE_TOKENS` of the calibration."""
    known = evidence.sensitivity
    missing = [
        f for f in FAMILIES if f in set(families) and (known is None or f not in known.known)
    ]
    if not missing:
        return evidence
    sensitivity = score_variants(
        Assembly(Library(model), evidence),
        windows_of(evidence.calibration, SCORE_TOKENS),
        Library(model).variants(missing),
        families=missing,
        spool=evidence.spool(),
        progress=evidence.progress,
    )
    if known is not None and known.is_of_the_windows_of(sensitivity):
        sensitivity = known + sensitivity
    return replace(evidence, sensitivity=sensitivity)


def scoring_arithmetic(model: PreTrainedModel, family: Family, num_tokens: int) -> Arithmetic:
    """Of scoring all variants of a family, in passes of the scored tokens, after statistics of
    `num_tokens`; `model` may be on the meta device."""
    library = Library(model)
    variants = library.variants([family])
    depth = len(library.plan.blocks)
    passes = 2.0 + sum((depth - variant.first) / depth for variant in variants)
    work = Arithmetic(passes=passes, heads=1.0 + len(variants))
    for variant in variants:
        of_tensors = KIND_OF[variant.kind].arithmetic(library, variant, num_tokens)
        # Of its own passes all tokens go, not the scored ones alone.
        scale = max(1.0, num_tokens / SCORE_TOKENS)
        work = work + replace(of_tensors, passes=scale * of_tensors.passes)
    return work
