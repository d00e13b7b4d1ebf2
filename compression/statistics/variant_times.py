"""What variants save of the time that a model takes: a linear model of whole ones that were timed.

    1 - t(model) / t(dense) = sum over its variants v of  a_kind f_v - b_kind     a, b >= 0

f_v is the share of the dense model's FLOPs that v saves, and b_kind what it costs to be another
form at all: two linears in the place of one, heads of a size that no fast kernel knows. For an
absent sublayer or block b counts the other way, since norms and calls go too.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from foldstack.compression.errors import InputError
from foldstack.compression.statistics.sensitivity import KINDS, Variant, VariantKind


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Timed(_Record):
    """One whole model that was measured, in turns with the dense one."""

    what: str
    prefill: float
    decode: float
    """Shares of the dense model's time, medians over turns."""


class Slope(_Record):
    """What a kind of variant saves of the dense model's time."""

    per_flops: float = Field(ge=0)
    """For each share of the dense model's FLOPs that it saves."""
    fixed: float
    """For each variant, whatever it saves; negative where another form costs time."""

    def saved(self, flops: float) -> float:
        """Share of the dense model's time, for a share of its FLOPs."""
        return self.per_flops * flops + self.fixed


class Seconds(_Record):
    """What variants of one model save of its time on one machine."""

    prompt_tokens: int
    new_tokens: int
    batch_size: int
    dense_flops: float = Field(gt=0)
    """Per token."""
    dense_prefill: float = Field(gt=0)
    dense_decode: float = Field(gt=0)
    """Seconds of the whole prompt and of all new tokens, medians."""
    prefill: dict[VariantKind, Slope]
    decode: dict[VariantKind, Slope]
    prefill_error: float
    decode_error: float
    """Root mean square of what the fit is off by at the measured models, in shares of dense."""
    measured: tuple[Timed, ...]

    def saved(self, variant: Variant, flops: int) -> dict[str, float]:
        """Shares of the dense model's time that a variant saves, by the name of a budget; of
        `seconds`, which is prefill and decoding together, likewise. Nothing of a kind that was not
        measured.

        Args:
            variant: which one.
            flops: that it saves, per token.
        """
        if variant.kind not in self.prefill:
            return {}
        share = flops / self.dense_flops
        prefill = self.prefill[variant.kind].saved(share)
        decode = self.decode[variant.kind].saved(share)
        whole = self.dense_prefill + self.dense_decode
        both = (prefill * self.dense_prefill + decode * self.dense_decode) / whole
        return {"prefill_seconds": prefill, "decode_seconds": decode, "seconds": both}

    def __add__(self, other: "Seconds") -> "Seconds":
        """Those of both: other families of variants of the same model.

        Raises:
            InputError: the two were measured for other lengths.
        """
        shapes = [(s.prompt_tokens, s.new_tokens, s.batch_size) for s in (self, other)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"times belong together when they are of one request; got {shapes[0]} and "
                f"{shapes[1]} (prompt tokens, new tokens, batch size of each)"
            )
        return self.model_copy(
            update={
                "prefill": self.prefill | other.prefill,
                "decode": self.decode | other.decode,
                "prefill_error": max(self.prefill_error, other.prefill_error),
                "decode_error": max(self.decode_error, other.decode_error),
                "measured": (*self.measured, *other.measured),
            }
        )


Features = dict[VariantKind, tuple[float, int]]
"""By the kind of variants in a model: the share of the FLOPs that they save, and how many."""


def fitted(
    models: Sequence[Features], saved: Sequence[float]
) -> tuple[dict[VariantKind, Slope], float]:
    """What each kind saves, by least squares with no negative number, and what that is off by.

    Args:
        models: what stands in each measured model.
        saved: share of the dense model's time that each saves.
    """
    import numpy as np
    from scipy.optimize import nnls

    kinds = list(dict.fromkeys(kind for model in models for kind in model))
    rows = []
    for model in models:
        pairs = [(model.get(kind, (0.0, 0)), _sign(kind)) for kind in kinds]
        rows.append([number for (share, count), sign in pairs for number in (share, sign * count)])
    matrix, wanted = np.array(rows), np.array(saved)
    # Columns of counts are hundreds of times those of shares.
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1.0
    solution, _ = nnls(matrix / scale, wanted)
    solution = solution / scale
    error = float(np.sqrt(np.mean((matrix @ solution - wanted) ** 2)))
    slopes = {
        kind: Slope(per_flops=solution[2 * i], fixed=_sign(kind) * solution[2 * i + 1])
        for i, kind in enumerate(kinds)
    }
    return slopes, error


def _sign(kind: VariantKind) -> int:
    """Whether being there saves time or costs some."""
    is_gone = KINDS[kind].gone_from is not None or kind.endswith("_absent")
    return 1 if is_gone else -1
