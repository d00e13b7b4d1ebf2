"""How alike the hidden states of a token are at all pairs of boundaries between blocks."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from foldstack.compression.errors import InputError
from foldstack.compression.statistics.hidden_states import HiddenStates, file_name

# Cosine of a pair in which one hidden state is exactly zero: ShortGPT's released code replaces such
# a NaN by 0.5 before it averages.
COSINE_OF_ZERO = 0.5
# What the hidden states that are compared at once, in float64, may take.
BYTES_AT_ONCE = 64 << 20
# The hidden states of this many tokens are kept at every boundary: 18 GB, on disk, for an 8B model
# in bfloat16; the mean cosine does not move in the third digit beyond it.
SIMILARITY_TOKENS = 65_536


@dataclass(frozen=True)
class Similarity:
    """Sums over tokens and windows for all pairs of boundaries."""

    num_tokens: int
    cosine_sum: Float64[Tensor, "boundaries boundaries"]
    num_windows: int
    last_token_angle_sum: Float64[Tensor, "boundaries boundaries"]
    skip_first_token: bool

    def __add__(self, other: "Similarity") -> "Similarity":
        if self.skip_first_token != other.skip_first_token:
            raise InputError("statistics with and without the first token do not add up")
        return Similarity(
            num_tokens=self.num_tokens + other.num_tokens,
            cosine_sum=self.cosine_sum + other.cosine_sum,
            num_windows=self.num_windows + other.num_windows,
            last_token_angle_sum=self.last_token_angle_sum + other.last_token_angle_sum,
            skip_first_token=self.skip_first_token,
        )


class Boundaries:
    """The hidden states of the first windows at every boundary passed so far."""

    def __init__(
        self,
        num_windows: int,
        num_boundaries: int,
        *,
        memory_bytes: int,
        folder: Path | None,
        name: str | None = None,
    ) -> None:
        """With a `name`, they are in files in `folder` that stay and start with it."""
        self.num_windows = num_windows
        self._memory_bytes = memory_bytes // num_boundaries
        self._folder = folder or Path(tempfile.gettempdir())
        self._name = name
        self._states: list[HiddenStates] = []

    def add(self, states: HiddenStates) -> None:
        """Keep the next boundary's."""
        first = states.all[: self.num_windows]
        kept = HiddenStates(
            (first.shape[0], first.shape[1], first.shape[2]),
            first.dtype,
            memory_bytes=self._memory_bytes,
            folder=self._folder,
            name=None if self._name is None else file_name(self._name, len(self._states)),
        )
        kept.all.copy_(first)
        kept.let_go()
        states.let_go()
        self._states.append(kept)

    def reopen(self, count: int, num_tokens: int, dtype: torch.dtype) -> None:
        """Take the first `count` boundaries from the files that an earlier run has left."""
        assert self._name is not None
        for boundary in range(count):
            file = self._folder / file_name(self._name, boundary)
            shape = (self.num_windows, num_tokens)
            self._states.append(HiddenStates.reopened(file, shape, dtype))

    def compare(self, *, skip_first_token: bool, device: torch.device | str = "cpu") -> Similarity:
        """The sums for all pairs, computed on `device`.

        Raises:
            InputError: hidden states are not finite.
        """
        count = len(self._states)
        num_windows, num_tokens, width = self._states[0].all.shape
        first = 1 if skip_first_token and num_tokens > 1 else 0
        cosine_sum = torch.zeros(count, count, dtype=torch.float64)
        angle_sum = torch.zeros_like(cosine_sum)
        tokens_at_once = max(1, BYTES_AT_ONCE // (count * width * cosine_sum.itemsize))
        for window in range(num_windows):
            for start in range(first, num_tokens, tokens_at_once):
                stop = start + tokens_at_once
                hidden = torch.stack([s.all[window, start:stop] for s in self._states])
                cosine_sum += summed_cosines(hidden.to(device).double()).cpu()
            last = torch.stack([s.all[window, -1:] for s in self._states])
            angle_sum += summed_angles(last.to(device).double()).cpu()
            for states in self._states:
                states.let_go()
        return Similarity(
            num_tokens=num_windows * (num_tokens - first),
            cosine_sum=cosine_sum,
            num_windows=num_windows,
            last_token_angle_sum=angle_sum,
            skip_first_token=skip_first_token,
        )


def summed_cosines(
    hidden: Float64[Tensor, "boundaries tokens hidden"],
) -> Float64[Tensor, "boundaries boundaries"]:
    """Sum over tokens of cos(x^(a), x^(b)): one product of the rows of all tokens laid end to
    end."""
    unit, is_zero = _directions(hidden)
    rows = unit.flatten(1)
    some = (~is_zero).double()
    pairs_with_zero = hidden.shape[1] - some @ some.T
    return rows @ rows.T + COSINE_OF_ZERO * pairs_with_zero


def summed_angles(
    hidden: Float64[Tensor, "boundaries windows hidden"],
) -> Float64[Tensor, "boundaries boundaries"]:
    """Sum over windows of arccos(cos(x^(a), x^(b))) / pi."""
    unit, is_zero = _directions(hidden)
    cosine = torch.einsum("awh,bwh->wab", unit, unit).clamp(-1, 1)
    has_zero = is_zero.T[:, :, None] | is_zero.T[:, None, :]
    return (torch.where(has_zero, COSINE_OF_ZERO, cosine).arccos() / torch.pi).sum(0)


def _directions(
    hidden: Float64[Tensor, "boundaries tokens hidden"],
) -> tuple[Float64[Tensor, "boundaries tokens hidden"], Bool[Tensor, "boundaries tokens"]]:
    norm = hidden.norm(dim=-1)
    if not torch.isfinite(norm).all():
        boundary = int((~torch.isfinite(norm)).any(dim=1).nonzero()[0])
        raise InputError(
            f"hidden states must be finite, got NaN or infinity at the input of block {boundary}; "
            "run the model in float32 or bfloat16"
        )
    is_zero = norm == 0
    return hidden / torch.where(is_zero, torch.ones_like(norm), norm)[..., None], is_zero
