"""Whole models timed in turns with the dense one, to know what variants save of the time.

A sublayer timed by itself is not what it costs in a model: caches are warm, and the calls between
sublayers are missing. So a handful of whole models is timed, each with one kind of variant at one
level in many blocks (`variant_times` says what is fitted to them). Weights decide nothing about
time, so those of the measured models are random.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.generation import Generation, generate_greedily, make_prompt
from foldstack.compression.evaluation.speed import SpeedSpec, in_turns
from foldstack.compression.methods.search.library import Library, absent
from foldstack.compression.statistics.sensitivity import Family, Slot, Variant, VariantKind
from foldstack.compression.statistics.variant_times import Features, Seconds, Timed, fitted
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import size_of
from foldstack.compression.structure.surgery import (
    Cut,
    all_tensors,
    build_on_meta,
    config_for,
    cut,
)

Progress = Callable[[str, int, int], None]
SMALL_WEIGHT = 0.02
DENSE, MADE = "dense", "made"
LEVELS, SITES = (0.25, 0.55), (0.25, 0.5)
"""How far down their levels the sites of the two measured models of a kind are; where a kind has
one level, on how many sites it stands, as a share of the blocks. Two, since two numbers are fitted.
"""


def measure_seconds(
    library: Library, family: Family, spec: SpeedSpec, progress: Progress | None = None
) -> Seconds:
    """Time whole models with variants of one family, and fit what each kind saves.

    Args:
        library: of the dense model, whose weights are there.
        family: of variants.
        spec: prompt, new tokens and turns; of its batch sizes the first.
        progress: told of models that are done.

    Raises:
        InputError: the library has no such variants for this model.
    """
    choices = measured_choices(library, family)
    if not choices:
        raise InputError(f"this model has no variants of {family} whose time could be measured")
    model, batch_size = library.model, spec.batch_sizes[0]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompt = make_prompt(spec.prompt_tokens, batch_size, vocabulary, spec.seed).to(model.device)
    timed: list[Timed] = []
    dense: list[Generation] = []
    for number, (what, choice) in enumerate(choices):
        models = {DENSE: model, MADE: stand_in(library, choice)}

        def turn(name: str, models: dict[str, PreTrainedModel] = models) -> Generation:
            return generate_greedily(models[name], prompt, spec.new_tokens)

        turns = in_turns(list(models), turn, spec, lambda _done, _total: None)
        pairs = list(zip(turns[MADE], turns[DENSE], strict=True))
        dense += turns[DENSE]
        timed.append(
            Timed(
                what=what,
                prefill=median([made.prefill / whole.prefill for made, whole in pairs]),
                decode=median([made.decode / whole.decode for made, whole in pairs]),
            )
        )
        if progress is not None:
            progress("time variants", number + 1, len(choices))
    flops = size_of(model).flops_per_token
    shares = [_features(library, choice, flops) for _, choice in choices]
    prefill, prefill_error = fitted(shares, [1 - each.prefill for each in timed])
    decode, decode_error = fitted(shares, [1 - each.decode for each in timed])
    return Seconds(
        prompt_tokens=spec.prompt_tokens,
        new_tokens=spec.new_tokens,
        batch_size=batch_size,
        dense_flops=flops,
        dense_prefill=median([each.prefill for each in dense]),
        dense_decode=median([each.decode for each in dense]),
        prefill=prefill,
        decode=decode,
        prefill_error=prefill_error,
        decode_error=decode_error,
        measured=tuple(timed),
    )


def measured_choices(library: Library, family: Family) -> list[tuple[str, list[Variant]]]:
    """The models that are timed, each as what it is called and the variants that stand in it: two
    of every kind, and one with the first of all kinds."""
    sites: dict[VariantKind, dict[tuple[int, int], list[Variant]]] = {}
    for variant in library.variants([family]):
        place = variant.first, variant.stop
        sites.setdefault(variant.kind, {}).setdefault(place, []).append(variant)
    found: list[tuple[str, list[Variant]]] = []
    firsts: list[Variant] = []
    for kind, levels in sites.items():
        has_levels = any(len(own) > 1 for own in levels.values())
        chosen = _at_levels(levels.values()) if has_levels else _at_some(library, levels.values())
        found += [(f"{kind.replace('_', ' ')}, {what}", choice) for what, choice in chosen.items()]
        firsts += next(iter(chosen.values()), [])
    if len(sites) > 1:
        found.append((f"all kinds of {family}", _disjoint(firsts)))
    return [(what, choice) for what, choice in found if choice]


def _at_levels(sites: Iterable[Sequence[Variant]]) -> dict[str, list[Variant]]:
    """All sites, each at the level that is so far down its own, which save more and more."""
    return {
        f"{gone:.0%} down": _disjoint(own[min(len(own) - 1, int(gone * len(own)))] for own in sites)
        for gone in LEVELS
    }


def _at_some(library: Library, sites: Iterable[Sequence[Variant]]) -> dict[str, list[Variant]]:
    """Some sites, evenly spaced so that blocks of all forms are among them."""
    all_of_them = _disjoint(own[0] for own in sites)
    found: dict[str, list[Variant]] = {}
    for share in SITES:
        count = min(len(all_of_them), max(1, round(share * len(library.positions))))
        spaced = [all_of_them[i * len(all_of_them) // count] for i in range(count)]
        if len(absent(spaced)) < len(library.positions):
            found[f"{count} of them"] = spaced
    return found


def _disjoint(variants: Iterable[Variant]) -> list[Variant]:
    """The first ones, of which no two decide about the same."""
    taken: set[Slot] = set()
    kept = []
    for variant in variants:
        if not taken & variant.slots:
            taken |= variant.slots
            kept.append(variant)
    return kept


def stand_in(library: Library, choice: Sequence[Variant]) -> PreTrainedModel:
    """A model with the structure of a choice, whose changed weights are random."""
    plan, survivors = library.structure(choice)
    tensors = _random_tensors(library.model, plan, survivors)
    made: Any = cut(library.model, Cut(plan, survivors, tensors), share_memory=True)
    on_device: PreTrainedModel = made.to(library.model.device)
    return on_device


def _random_tensors(
    model: PreTrainedModel, plan: Plan, survivors: Sequence[int]
) -> dict[str, Tensor]:
    there = all_tensors(model)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, wanted in all_tensors(build_on_meta(config_for(model.config, plan))).items():
        if not name.startswith("blocks."):
            continue
        _, position, inside = name.split(".", 2)
        has = there.get(f"blocks.{survivors[int(position)]}.{inside}")
        if has is None or has.shape != wanted.shape:
            random = torch.randn(wanted.shape, generator=generator) * SMALL_WEIGHT
            # Numbers of coordinates become zeros, which is one of them.
            dtype = model.dtype if wanted.is_floating_point() else wanted.dtype
            tensors[name] = random.to(dtype)
    return tensors


def _features(library: Library, choice: Iterable[Variant], flops: int) -> Features:
    found: Features = {}
    for variant in choice:
        share, count = found.get(variant.kind, (0.0, 0))
        found[variant.kind] = share + library.saved(variant).flops / flops, count + 1
    return found
