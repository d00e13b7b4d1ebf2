"""Linears of which other positions hold some slices: the form in a plan, and how a change of order
moves it.

A root says whose slice it is: the position and index where it was stored before any change.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Slice = tuple[int, int]
"""A position, and the index of a slice of its linear."""


class HeadSlices(BaseModel):
    """A linear y = W x + b cut along one axis into equal slices, some stored at other positions.

    Along the outputs, a slice has its part of b with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["head_slices"] = "head_slices"
    axis: Literal["out", "in"]
    """Whether a slice is some of the outputs (rows of W) or some of the inputs (columns)."""
    slices: tuple[Slice | None, ...] = Field(min_length=1)
    """Per slice, the position and index of the stored one that is used; None for an own one."""
    parts: tuple[int, ...] = ()
    """Widths of what a fused linear computes (queries, keys, values): a slice is the same share of
    each. Empty when the linear is one part."""

    def same_cut(self, other: "HeadSlices") -> bool:
        """True when both are cut in the same way, whoever stores which slice."""
        return (self.axis, self.parts, len(self.slices)) == (
            other.axis,
            other.parts,
            len(other.slices),
        )

    def roots(self, position: int) -> list[Slice]:
        """Where each slice of the linear at `position` is stored."""
        return [
            (position, index) if origin is None else origin
            for index, origin in enumerate(self.slices)
        ]

    def with_origins(self, origins: Sequence[Slice | None]) -> "HeadSlices":
        return self.model_copy(update={"slices": tuple(origins)})


def settle(
    forms: Mapping[int, HeadSlices], old_position: Mapping[int, int], stored_at: Mapping[int, int]
) -> dict[int, HeadSlices | None]:
    """The forms of one linear in a new order of positions; None where all slices are own ones.

    A slice whose position is gone passes to the first that uses it.

    Args:
        forms: by new position, the forms as they were.
        old_position: by new position, where what it stores was stored.
        stored_at: by old position, where what it stored is now; gone ones are missing.
    """
    first_user: dict[Slice, Slice] = {}
    settled: dict[int, HeadSlices | None] = {}
    for position, form in sorted(forms.items()):
        origins: list[Slice | None] = []
        for index, root in enumerate(form.roots(old_position[position])):
            if root[0] in stored_at:
                at = stored_at[root[0]], root[1]
            else:
                at = first_user.setdefault(root, (position, index))
            origins.append(None if at == (position, index) else at)
        is_dense = all(origin is None for origin in origins)
        settled[position] = None if is_dense else form.with_origins(origins)
    return settled
