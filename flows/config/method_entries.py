"""What a config says about methods: an entry per method, expanded to one variant per sparsity."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from foldstack.compression.export.forms import Form
from foldstack.compression.methods import METHODS
from foldstack.compression.methods.method import Method

Sparsity = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0)]
FROM_SWEEP = ("sparsity", "seed")
MULTIPLES = ("rank_multiple", "mlp_multiple")
"""Settings of methods that a form to export to decides, where the user does not."""


class MethodEntry(BaseModel):
    """A method's settings, without the sparsity and the seed: those vary in a sweep."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sparsities: tuple[Sparsity, ...] = ()
    """Sparsities of this method; when empty, those of the sweep."""
    seeds: tuple[Seed, ...] = ()
    """Seeds of this method; when empty, those of the sweep."""

    def settings(self) -> dict[str, Any]:
        """The settings that are the method's own."""
        return {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name not in MethodEntry.model_fields
        }


class _MadeEntry(MethodEntry, use_attribute_docstrings=False):
    """What a made class derives from: its fields bring their descriptions, and pydantic would look
    for its source in every module that is loaded, for a second in all.
    """


def _entry_class(method: type[Method]) -> type[MethodEntry]:
    fields: dict[str, Any] = {
        name: (info.annotation, info)
        for name, info in method.model_fields.items()
        if name not in FROM_SWEEP
    }
    # A method that adds parameters has negative sparsities: the range is the method's own.
    asked = method.model_fields["sparsity"]
    in_range: Any = Annotated[float, *asked.metadata]
    sweep = MethodEntry.model_fields["sparsities"]
    fields["sparsities"] = (tuple[in_range, ...], sweep)
    summary = (method.__doc__ or "").strip().partition("\n\n")[0]
    entry = create_model(f"{method.__name__}Entry", __base__=_MadeEntry, **fields)
    entry.__doc__ = " ".join(summary.split())
    return entry


ENTRIES = {name: _entry_class(method) for name, method in METHODS.items()}

if TYPE_CHECKING:
    AnyEntry = MethodEntry
else:  # one member per registered method, so that the JSON schema knows each one's keys
    AnyEntry = Annotated[reduce(or_, ENTRIES.values()), Field(discriminator="name")]


@dataclass(frozen=True)
class Variant:
    """One method at one sparsity with one seed."""

    method: Method
    name: str
    """The method's name, with what tells it from another entry of the same method."""
    label: str
    """The same with sparsity and, where there are several, seed: "svd_llm 0.20"."""

    @property
    def sparsity(self) -> float:
        return self.method.sparsity

    @property
    def seed(self) -> int:
        return self.method.seed


def expand(
    entries: Sequence[MethodEntry],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    target: str = "",
) -> tuple[Variant, ...]:
    """Every (method, sparsity, seed) that the entries stand for, in their order; with the
    multiples that a form to export to wants, where an entry gives none.

    Raises:
        ValidationError: a method refuses its settings.
        ValueError: two variants are the same.
    """
    names = _names(entries)
    variants: list[Variant] = []
    for entry, name in zip(entries, names, strict=True):
        settings = entry.settings() | _multiples(entry, target)
        of_entry = entry.seeds or seeds
        for sparsity in entry.sparsities or sparsities:
            for seed in of_entry:
                method = METHODS[settings["name"]](sparsity=sparsity, seed=seed, **_plain(settings))
                label = f"{name} {sparsity_text(sparsity)}" + f" seed {seed}" * (len(of_entry) > 1)
                variants.append(Variant(method, name, label))
    counts = Counter(variant.label for variant in variants)
    if repeated := [label for label, count in counts.items() if count > 1]:
        raise ValueError(f"each variant may stand there once, and {repeated[0]} stands there twice")
    return tuple(variants)


def _multiples(entry: MethodEntry, target: str) -> dict[str, int]:
    wanted = Form.of(target).multiple if target else 1
    names = [name for name in MULTIPLES if name in type(entry).model_fields]
    return {name: wanted for name in names if wanted > 1 and name not in entry.model_fields_set}


def sparsity_text(sparsity: float) -> str:
    """Two digits, more where they are needed: 0.20, 0.125."""
    return f"{sparsity:.2f}" if round(sparsity, 2) == sparsity else f"{sparsity:g}"


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "name"}


def _names(entries: Sequence[MethodEntry]) -> list[str]:
    """A method's title, followed by its values that differ between entries of the same title."""
    all_settings = [entry.settings() for entry in entries]
    titles = [METHODS[each["name"]].model_construct(**each).title for each in all_settings]
    names = []
    for title, settings in zip(titles, all_settings, strict=True):
        rivals = [s for t, s in zip(titles, all_settings, strict=True) if t == title]
        told = [
            _told(value)
            for key, value in settings.items()
            if any(other[key] != value for other in rivals)
        ]
        names.append(" ".join([title, *told]))
    return names


def _told(value: Any) -> str:
    """A setting as a part of a name: "0.5", "widths+removals", "kv_bytes 0.5"."""
    if isinstance(value, Mapping):
        return " ".join(f"{key} {inner}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "+".join(each if isinstance(each, str) else repr(each) for each in value)
    return str(value)
