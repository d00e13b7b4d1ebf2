"""What the loss says of each change that may be made to a model, made alone.

A variant is what may stand at a site in place of what is there: an MLP of fewer channels, heads of
fewer coordinates, linears of a lower rank, another block's weights, nothing. Its score is the rise
of the loss when it alone stands in the dense model: KL(dense || changed) in nats per token, one
value for each window, so that every mean has a standard error and differences can be paired.
"""

import json
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field

from foldstack.compression.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORE_TOKENS = 2048
"""Calibration tokens that variants are scored on."""
SENSITIVITY_FILE = "sensitivity.json"

Family = Literal["widths", "ranks", "removals", "sublayers", "kv_groups", "runs", "maps", "sharing"]
FAMILIES: tuple[Family, ...] = get_args(Family)
VariantKind = Literal[
    "mlp_width",
    "query_key_width",
    "value_output_width",
    "mlp_rank",
    "attention_rank",
    "absent",
    "attention_absent",
    "mlp_absent",
    "kv_heads",
    "run_absent",
    "run_map",
    "shared",
]
Part = Literal["mlp", "query_key", "value_output"]
PARTS: tuple[Part, ...] = ("mlp", "query_key", "value_output")
_ATTENTION: tuple[Part, ...] = ("query_key", "value_output")


class KindOfVariant(NamedTuple):
    """What a kind of variant is about, wherever it stands."""

    family: Family
    parts: tuple[Part, ...] = PARTS
    """Of every block, that it decides about."""
    parts_of_first: tuple[Part, ...] | None = None
    """Those of its first block, where they are others."""
    gone_from: int | None = None
    """From which of its blocks on, counted from 0, they are not there any more."""


KINDS: dict[VariantKind, KindOfVariant] = {
    "mlp_width": KindOfVariant("widths", ("mlp",)),
    "query_key_width": KindOfVariant("widths", ("query_key",)),
    "value_output_width": KindOfVariant("widths", ("value_output",)),
    "mlp_rank": KindOfVariant("ranks", ("mlp",)),
    "attention_rank": KindOfVariant("ranks", _ATTENTION),
    "absent": KindOfVariant("removals", gone_from=0),
    "attention_absent": KindOfVariant("sublayers", _ATTENTION),
    "mlp_absent": KindOfVariant("sublayers", ("mlp",)),
    "kv_heads": KindOfVariant("kv_groups", _ATTENTION),
    "run_absent": KindOfVariant("runs", gone_from=0),
    "run_map": KindOfVariant("maps", parts_of_first=("mlp",), gone_from=1),
    "shared": KindOfVariant("sharing"),
}
FAMILY_OF: dict[VariantKind, Family] = {kind: about.family for kind, about in KINDS.items()}
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
    per mille. Of KV heads: how many are left. Of shared weights: whose they are, counted from its
    first block. 0 where nothing is left."""

    @property
    def slots(self) -> frozenset[Slot]:
        """What it decides about."""
        about = KINDS[self.kind]
        of_first = about.parts if about.parts_of_first is None else about.parts_of_first
        rest = ((p, part) for p in range(self.first + 1, self.stop) for part in about.parts)
        return frozenset([*((self.first, part) for part in of_first), *rest])

    @property
    def gone(self) -> range:
        """Positions whose blocks are not there any more."""
        start = KINDS[self.kind].gone_from
        return range(0) if start is None else range(self.first + start, self.stop)

    @property
    def site(self) -> tuple[int, int, VariantKind]:
        """What it shares with its other levels."""
        return self.first, self.stop, self.kind

    def __str__(self) -> str:
        if self.kind == "run_map":
            run = f"{self.gone.start}..{self.gone.stop - 1}" if len(self.gone) > 1 else self.gone[0]
            return f"block {run} as a map of what block {self.first} adds"
        if self.kind == "shared":
            return (
                f"blocks {self.first} and {self.first + 1} on weights of {self.first + self.level}"
            )
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
    families: tuple[Family, ...] = ()
    """Those that were asked for, of which a model may have no variant at all."""

    def __add__(self, other: "Sensitivity") -> "Sensitivity":
        """Those of both: shards of the blocks, or other families of variants.

        Raises:
            InputError: the two are of models of other depths, or of other windows.
        """
        if not self.is_of_the_windows_of(other):
            raise InputError(
                "scores belong together when they are of one model on the same windows; got "
                f"{self._measured_on} and {other._measured_on} (blocks, windows, tokens of each)"
            )
        scores = {score.variant: score for score in (*self.scores, *other.scores)}
        families = tuple(dict.fromkeys((*self.families, *other.families)))
        return self.model_copy(update={"scores": tuple(scores.values()), "families": families})

    @property
    def known(self) -> frozenset[Family]:
        """The families whose variants were scored."""
        return frozenset([*self.families, *(FAMILY_OF[s.variant.kind] for s in self.scores)])

    def is_of_the_windows_of(self, other: "Sensitivity") -> bool:
        """Whether both are of as many windows of one length, and of models of one depth."""
        return self._measured_on == other._measured_on

    @property
    def _measured_on(self) -> tuple[int, int, int]:
        return self.num_blocks, self.num_windows, self.window_tokens

    def of(self, families: Iterable[str]) -> "Sensitivity":
        """The part about these families of variants.

        Raises:
            InputError: nothing is known of one of them.
        """
        families = set(families)
        if missing := families - self.known:
            raise InputError(
                f"no variants of {', '.join(sorted(missing))} were scored; "
                f"there are scores of {', '.join(sorted(self.known)) or 'nothing'}"
            )
        chosen = tuple(s for s in self.scores if FAMILY_OF[s.variant.kind] in families)
        asked = tuple(f for f in self.families if f in families)
        return self.model_copy(update={"scores": chosen, "families": asked})

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

    def loss_of_run(
        self, run: range, kind: Literal["run_absent", "run_map"] = "run_absent"
    ) -> float:
        """What it costs, in nats per token, that a run of blocks is gone: as it was scored, or the
        least sum of what is known of its parts; infinite where nothing is known of some of it.
        Nothing for no blocks."""
        kinds = ("absent", "run_absent") if kind == "run_absent" else (kind,)
        known = {place: loss for k in kinds for place, loss in self._runs.get(k, {}).items()}
        least = {run.start: 0.0}
        for stop in range(run.start + 1, run.stop + 1):
            parts = (
                least[start] + known.get((start, stop), math.inf)
                for start in range(run.start, stop)
            )
            least[stop] = min(parts)
        return known.get((run.start, run.stop), least[run.stop])

    def losses_of_runs(self, length: int) -> tuple[float, ...]:
        """What it costs that a run is gone, for every run of `length` blocks."""
        starts = range(self.num_blocks - length + 1)
        return tuple(self.loss_of_run(range(start, start + length)) for start in starts)

    @cached_property
    def _runs(self) -> dict[str, dict[tuple[int, int], float]]:
        """The losses of runs that are gone, by kind."""
        runs: dict[str, dict[tuple[int, int], float]] = {}
        for score in self.scores:
            gone = score.variant.gone
            if gone:
                runs.setdefault(score.variant.kind, {})[gone.start, gone.stop] = score.mean
        return runs

    def losses_of_sharing(self) -> dict[int, float]:
        """By the first of two neighbours, what it costs that both use the linears of one, the
        better one."""
        losses: dict[int, float] = {}
        for score in self.scores:
            if score.variant.kind == "shared":
                first = score.variant.first
                losses[first] = min(losses.get(first, math.inf), score.mean)
        return losses

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
