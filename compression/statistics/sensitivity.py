"""What the loss says of each change that may be made to a model, made alone.

A variant is what may stand at a site in place of what is there: an MLP of fewer channels, heads of
fewer coordinates, linears of a lower rank, nothing. Its score is the rise of the loss when it alone
stands in the dense model: KL(dense || changed) in nats per token, one value for each window, so
that every mean has a standard error and differences can be paired.
"""

import json
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from foldstack.compression.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORE_TOKENS = 2048
"""Calibration tokens that variants are scored on."""
SENSITIVITY_FILE = "sensitivity.json"

Family = Literal["widths", "ranks", "removals"]
FAMILIES: tuple[Family, ...] = ("widths", "ranks", "removals")
VariantKind = Literal[
    "mlp_width", "query_key_width", "value_output_width", "mlp_rank", "attention_rank", "absent"
]
FAMILY_OF: dict[VariantKind, Family] = {
    "mlp_width": "widths",
    "query_key_width": "widths",
    "value_output_width": "widths",
    "mlp_rank": "ranks",
    "attention_rank": "ranks",
    "absent": "removals",
}
Part = Literal["mlp", "query_key", "value_output"]
PARTS: tuple[Part, ...] = ("mlp", "query_key", "value_output")
_ATTENTION: tuple[Part, ...] = ("query_key", "value_output")
_PARTS_OF: dict[VariantKind, tuple[Part, ...]] = {
    "mlp_width": ("mlp",),
    "query_key_width": ("query_key",),
    "value_output_width": ("value_output",),
    "mlp_rank": ("mlp",),
    "attention_rank": _ATTENTION,
    "absent": PARTS,
}
Slot = tuple[int, Part]
"""A position and a part of its block: exactly one variant, or the original, stands there."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Variant(_Record):
    """What may stand at a site."""

    kind: VariantKind
    first: int = Field(ge=0)
    """Position of the first block that it is about."""
    stop: int = Field(ge=1)
    """The position behind the last one."""
    level: int = Field(default=0, ge=0)
    """Of a width: the width that is left. Of a rank: the parameters that are left of each linear,
    per mille. 0 where nothing is left."""

    @property
    def slots(self) -> frozenset[Slot]:
        """What it decides about."""
        positions = range(self.first, self.stop)
        return frozenset((p, part) for p in positions for part in _PARTS_OF[self.kind])

    @property
    def site(self) -> tuple[int, int, VariantKind]:
        """What it shares with its other levels."""
        return self.first, self.stop, self.kind

    def __str__(self) -> str:
        where = f"{self.first}" if self.stop == self.first + 1 else f"{self.first}..{self.stop - 1}"
        what = self.kind.replace("_", " ")
        return f"{what} {self.level} of block {where}" if self.level else f"block {where} {what}"


class Saved(_Record):
    """What a variant saves where it stands; negative for what it adds."""

    parameters: int = 0
    flops: int = 0
    """Per token, of linears."""
    kv_bytes: int = 0
    """Per token, in the precision of the model's weights."""


class Score(_Record):
    """A variant with what it saves and what it costs."""

    variant: Variant
    saved: Saved
    kl: tuple[float, ...]
    """KL(dense || changed) of each window, nats per token."""

    @cached_property
    def mean(self) -> float:
        """Nats per token."""
        return fmean(self.kl)

    @cached_property
    def stderr(self) -> float:
        """Standard error of the mean over the windows."""
        return standard_error(self.kl)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; infinite for one alone, of which nobody can say."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


class Sensitivity(_Record):
    """The scores of a model's variants on some windows."""

    num_blocks: int = Field(ge=1)
    num_windows: int = Field(ge=1)
    window_tokens: int = Field(ge=1)
    scores: tuple[Score, ...]

    def __add__(self, other: "Sensitivity") -> "Sensitivity":
        """Those of both: shards of the blocks, or other families of variants.

        Raises:
            InputError: the two are of models of other depths, or of other windows.
        """
        if self._measured_on != other._measured_on:
            raise InputError(
                "scores belong together when they are of one model on the same windows; got "
                f"{self._measured_on} and {other._measured_on} (blocks, windows, tokens of each)"
            )
        scores = {score.variant: score for score in (*self.scores, *other.scores)}
        return self.model_copy(update={"scores": tuple(scores.values())})

    @property
    def _measured_on(self) -> tuple[int, int, int]:
        return self.num_blocks, self.num_windows, self.window_tokens

    def of(self, families: Iterable[str]) -> "Sensitivity":
        """The part about these families of variants.

        Raises:
            InputError: nothing is known of one of them.
        """
        families = set(families)
        known = {FAMILY_OF[score.variant.kind] for score in self.scores}
        if missing := families - known:
            raise InputError(
                f"no variants of {', '.join(sorted(missing))} were scored; "
                f"there are scores of {', '.join(sorted(known)) or 'nothing'}"
            )
        chosen = (s for s in self.scores if FAMILY_OF[s.variant.kind] in families)
        return self.model_copy(update={"scores": tuple(chosen)})

    @property
    def sites(self) -> dict[tuple[int, int, VariantKind], list[Score]]:
        """The scores of every site, those that save least first."""
        found: dict[tuple[int, int, VariantKind], list[Score]] = {}
        for score in sorted(self.scores, key=lambda score: score.saved.parameters):
            found.setdefault(score.variant.site, []).append(score)
        return dict(sorted(found.items()))

    def order_of_removal(self) -> tuple[int, ...]:
        """The blocks of which it is known what their absence costs, from the least."""
        absent = [s for s in self.scores if s.variant.kind == "absent"]
        ranked = sorted(absent, key=lambda score: (score.mean, score.variant.first))
        return tuple(score.variant.first for score in ranked)

    def table(self) -> list[dict[str, Any]]:
        """One row per variant."""
        return [
            {
                "kind": score.variant.kind,
                "first": score.variant.first,
                "stop": score.variant.stop,
                "level": score.variant.level,
                **score.saved.model_dump(),
                "kl": score.mean,
                "stderr": score.stderr,
            }
            for scores in self.sites.values()
            for score in scores
        ]

    def save(self, folder: Path) -> None:
        """Write `sensitivity.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SENSITIVITY_FILE).write_text(self.model_dump_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Sensitivity":
        """The scores saved in `folder`."""
        return cls.model_validate(json.loads((folder / SENSITIVITY_FILE).read_text("utf-8")))


def plot(sensitivity: Sensitivity, path: Path) -> None:
    """Write the picture of the curves to a file of the kind that its name says."""
    curves_figure(sensitivity).savefig(path, dpi=120)


def curves_figure(sensitivity: Sensitivity) -> "Figure":
    """A picture of what every site costs against the parameters that it saves, a panel for each
    kind of variant."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sites = sensitivity.sites
    kinds = sorted({kind for _, _, kind in sites})
    figure = Figure(figsize=(4 * len(kinds) + 1, 4), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display and leaves pyplot's global state alone
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    colors = colormaps["viridis"].resampled(sensitivity.num_blocks)
    for kind, panel in zip(kinds, panels, strict=True):
        for (first, _, of_site), scores in sites.items():
            if of_site == kind:
                _curve(panel, scores, colors(first))
        panel.set(title=kind.replace("_", " "), xlabel="parameters saved", yscale="log")
    panels[0].set_ylabel("KL from the dense model, nats per token")
    shown = figure.axes[0].scatter([], [], c=[], cmap="viridis", vmin=0)
    shown.set_clim(0, max(1, sensitivity.num_blocks - 1))
    figure.colorbar(shown, ax=list(panels), label="block")
    return figure


def _curve(panel: "Axes", scores: Sequence[Score], color: Any) -> None:
    # A KL of zero has no place on a logarithm's axis.
    panel.errorbar(
        [score.saved.parameters for score in scores],
        [max(score.mean, 1e-9) for score in scores],
        yerr=[score.stderr if math.isfinite(score.stderr) else 0.0 for score in scores],
        color=color,
        marker=".",
        linewidth=1,
    )
