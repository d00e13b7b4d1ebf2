"""What one pass over the calibration windows tells about a model, as sums that add up.

Two kinds. "similarity": for all pairs of boundaries (boundary l is the input of block l, the last
one is the last block's output BEFORE the final norm) the cosine of the two hidden states of a
token, summed over tokens, and the angle at the last token of a window. "gram": for every distinct
input of a block's linears (at most 4 per block) the matrix X^T X over all tokens, and the sum of X,
which outputs with a bias need.

Everything is a sum over tokens, so the statistics of two shards of the data add.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float64, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from foldstack.compression.architectures import Architecture, architecture_of
from foldstack.compression.errors import InputError
from foldstack.compression.stream import BlockStream
from foldstack.compression.surgery import plan_of

logger = logging.getLogger(__name__)

Kind = Literal["similarity", "gram"]
KINDS: frozenset[str] = frozenset({"similarity", "gram"})
Progress = Callable[[str, int, int], None]
GramKey = tuple[int, str]

INPUT_SUMS_FILE = "input_sums.safetensors"

# Cosine of a pair in which one hidden state is exactly zero: ShortGPT's released code replaces such
# a NaN by 0.5 before it averages.
COSINE_OF_ZERO = 0.5
# Tokens whose hidden states at all boundaries are compared at once, in float64.
TOKENS_AT_ONCE = 512
# The hidden states of this many tokens are kept at every boundary: 18 GB of CPU memory for an 8B
# model in bfloat16; the mean cosine does not move in the third digit beyond it.
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


@dataclass(frozen=True)
class Statistics:
    """The sums, and the means that the methods ask for."""

    num_blocks: int
    num_tokens: int
    """Tokens seen: what the Grams are sums over."""
    similarity_sums: Similarity | None = None
    grams: Mapping[GramKey, Tensor] = field(default_factory=dict)
    input_sums: Mapping[GramKey, Float64[Tensor, " n"]] = field(default_factory=dict)
    """Sum over tokens of the inputs that the Grams are of."""

    @property
    def kinds(self) -> frozenset[str]:
        has_similarity = {"similarity"} if self.similarity_sums is not None else set()
        return frozenset(has_similarity | ({"gram"} if self.grams else set()))

    @property
    def similarity(self) -> Float64[Tensor, "boundaries boundaries"]:
        """Mean over tokens of cos(x^(a), x^(b))."""
        sums = self._similarity_sums()
        return sums.cosine_sum / sums.num_tokens

    @property
    def last_token_angle(self) -> Float64[Tensor, "boundaries boundaries"]:
        """Mean over windows of arccos(cos) / pi at the last token (UIDL, arXiv 2403.17887)."""
        sums = self._similarity_sums()
        return sums.last_token_angle_sum / sums.num_windows

    def gram(self, position: int, reads: str) -> Float64[Tensor, "n n"]:
        """Sum over tokens of x x^T, x the input of this block's linears that read `reads`."""
        if (position, reads) not in self.grams:
            raise InputError(
                f"no Gram of {reads} at block {position} was gathered; the statistics hold "
                f"{sorted(self.kinds)} of {self.num_blocks} blocks"
            )
        return self.grams[position, reads].double()

    def input_sum(self, position: int, reads: str) -> Float64[Tensor, " n"]:
        """Sum over tokens of x, x the input of this block's linears that read `reads`."""
        if (position, reads) not in self.input_sums:
            raise InputError(
                f"no sum of {reads} at block {position} was gathered; gather 'gram' anew"
            )
        return self.input_sums[position, reads]

    def _similarity_sums(self) -> Similarity:
        if self.similarity_sums is None:
            raise InputError("the similarity of the blocks was not gathered; ask for 'similarity'")
        return self.similarity_sums

    def __add__(self, other: "Statistics") -> "Statistics":
        """The statistics of both shards of the data together.

        Raises:
            InputError: the two are not about the same model and the same kinds.
        """
        same_grams = set(self.grams) == set(other.grams)
        if (self.num_blocks, self.kinds) != (other.num_blocks, other.kinds) or not same_grams:
            raise InputError(
                "statistics add when they are of one model and of the same kinds; got "
                f"{self.num_blocks} blocks with {sorted(self.kinds)} and "
                f"{other.num_blocks} blocks with {sorted(other.kinds)}"
            )
        similarity = None
        if self.similarity_sums is not None and other.similarity_sums is not None:
            similarity = self.similarity_sums + other.similarity_sums
        grams = {
            key: (self.gram(*key) + other.gram(*key)).to(self.grams[key].dtype)
            for key in self.grams
        }
        return Statistics(
            num_blocks=self.num_blocks,
            num_tokens=self.num_tokens + other.num_tokens,
            similarity_sums=similarity,
            grams=grams,
            input_sums={
                key: total + other.input_sum(*key) for key, total in self.input_sums.items()
            },
        )

    def save(self, folder: Path) -> None:
        """Write `statistics.json`, `similarity.safetensors`, `input_sums.safetensors` and one file
        of Grams per block."""
        folder.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"num_blocks": self.num_blocks, "num_tokens": self.num_tokens}
        if (sums := self.similarity_sums) is not None:
            record["similarity"] = {
                "num_tokens": sums.num_tokens,
                "num_windows": sums.num_windows,
                "skip_first_token": sums.skip_first_token,
            }
            tensors = {"cosine_sum": sums.cosine_sum, "angle_sum": sums.last_token_angle_sum}
            save_file(tensors, folder / "similarity.safetensors")
        is_written = isinstance(self.grams, _GramFiles) and self.grams.folder == folder
        for position in sorted({position for position, _ in self.grams} if not is_written else ()):
            of_block = {reads: g for (p, reads), g in self.grams.items() if p == position}
            save_file(of_block, _gram_file(folder, position))
        record["grams"] = [list(key) for key in sorted(self.grams)]
        if self.input_sums:
            sums_by_name = {f"{p}.{reads}": total for (p, reads), total in self.input_sums.items()}
            save_file(sums_by_name, folder / INPUT_SUMS_FILE)
        (folder / "statistics.json").write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Statistics":
        """The statistics saved in `folder`; the Grams are read when they are asked for."""
        record = json.loads((folder / "statistics.json").read_text())
        similarity = None
        if "similarity" in record:
            with safe_open(folder / "similarity.safetensors", framework="pt") as file:
                similarity = Similarity(
                    cosine_sum=file.get_tensor("cosine_sum"),
                    last_token_angle_sum=file.get_tensor("angle_sum"),
                    **record["similarity"],
                )
        keys = [(p, reads) for p, reads in record["grams"]]
        return cls(
            num_blocks=record["num_blocks"],
            num_tokens=record["num_tokens"],
            similarity_sums=similarity,
            grams=_GramFiles(folder, keys),
            input_sums=_input_sums(folder / INPUT_SUMS_FILE, keys),
        )


def _input_sums(path: Path, keys: Iterable[GramKey]) -> dict[GramKey, Tensor]:
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        return {(p, reads): file.get_tensor(f"{p}.{reads}") for p, reads in keys}


def _gram_file(folder: Path, position: int) -> Path:
    return folder / f"grams-{position:03d}.safetensors"


class _GramFiles(Mapping[GramKey, Tensor]):
    """Grams on disk, read one at a time: all of an 8B model's are tens of gigabytes."""

    def __init__(self, folder: Path, keys: Iterable[GramKey]) -> None:
        self.folder = folder
        self._keys = dict.fromkeys(keys)

    def __getitem__(self, key: GramKey) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        position, reads = key
        with safe_open(_gram_file(self.folder, position), framework="pt") as file:
            gram: Tensor = file.get_tensor(reads)
            return gram

    def __iter__(self) -> Iterator[GramKey]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def gather(
    model: nn.Module,
    windows: Int[Tensor, "windows tokens"],
    kinds: Iterable[str],
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
    skip_first_token: bool = True,
    similarity_tokens: int = SIMILARITY_TOKENS,
    folder: Path | None = None,
) -> Statistics:
    """The statistics of `kinds` over `windows`, in one pass that holds one block's Grams at a time.

    `skip_first_token` leaves the first token of each window out of the mean cosine: it attends to
    itself alone, is often an attention sink with a hidden state of its own size, and says nothing
    about text. The papers count it. `similarity_tokens` limits what the cosines are averaged over
    (whole windows); with `folder`, Grams go straight to disk there.

    Raises:
        InputError: a kind is unknown, hidden states are not finite, or those of two boundaries
            cannot be compared.
    """
    kinds = frozenset(kinds)
    if unknown := kinds - KINDS:
        raise InputError(f"statistics are {sorted(KINDS)}, got {sorted(unknown)}")
    if "similarity" in kinds and plan_of(model).is_sliced:
        raise InputError(
            "the blocks of a sliced model cannot be compared: what enters and what leaves them is "
            "in different bases; compare, rank and remove blocks before slicing"
        )
    architecture = architecture_of(model)
    stream = BlockStream(model, windows, batch_size=batch_size)
    num_compared = min(len(windows), -(-similarity_tokens // windows.shape[1]))
    boundaries: list[Tensor] = []
    grams: dict[GramKey, Tensor] = {}
    input_sums: dict[GramKey, Tensor] = {}
    while True:
        if "similarity" in kinds:
            boundaries.append(_first_windows(stream.hidden, num_compared))
        if stream.position == len(stream.blocks):
            break
        if "gram" in kinds:
            of_block, sums = _pass_with_grams(stream, architecture)
            input_sums |= {(stream.position - 1, reads): total for reads, total in sums.items()}
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(of_block, _gram_file(folder, stream.position - 1))
            for reads, gram in of_block.items():
                # On disk only: what is kept of it here is its key.
                grams[stream.position - 1, reads] = gram if folder is None else gram.new_empty(0)
        else:
            stream.advance()
        if progress is not None:
            progress("gather statistics", stream.position, len(stream.blocks))
    return Statistics(
        num_blocks=len(stream.blocks),
        num_tokens=windows.numel(),
        similarity_sums=_similarity(boundaries, skip_first_token) if boundaries else None,
        grams=grams if folder is None else _GramFiles(folder, grams),
        input_sums=input_sums,
    )


def _first_windows(
    hidden: list[Tensor], num_windows: int
) -> Float[Tensor, "windows tokens hidden"]:
    batches, left = [], num_windows
    for batch in hidden:
        batches.append(batch[:left])
        left -= len(batches[-1])
    return torch.cat(batches)


def _pass_with_grams(
    stream: BlockStream, architecture: Architecture
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Advance the stream by one block; the Gram and the sum of each distinct input of its
    linears."""
    block = stream.blocks[stream.position]
    input_sums: dict[str, Tensor] = {}

    def add(reads: str, rows: Tensor) -> None:
        total = rows.sum(0, dtype=torch.float64).cpu()
        input_sums[reads] = input_sums[reads] + total if reads in input_sums else total

    with gram_hooks(block, architecture) as sums, _input_hooks(block, architecture, add):
        stream.advance()
    return {reads: total.cpu() for reads, total in sums.items()}, input_sums


@contextmanager
def gram_hooks(block: nn.Module, architecture: Architecture) -> Iterator[dict[str, Tensor]]:
    """Inside, every call of `block` adds its inputs' X^T X to what is yielded, by `reads`.

    A product is taken in float32 (or the block's own precision, if higher) per batch and the
    batches add up in float64; at the end they are rounded to the precision of the products, so that
    sums kept in memory and sums read from disk are equal.
    """
    sums: dict[str, Tensor] = {}
    precision = torch.float32

    def add(reads: str, rows: Tensor) -> None:
        nonlocal precision
        precision = torch.promote_types(rows.dtype, torch.float32)
        rows = rows.to(precision)
        product = (rows.T @ rows).double()
        sums[reads] = sums[reads] + product if reads in sums else product

    try:
        with _input_hooks(block, architecture, add):
            yield sums
    finally:
        sums.update({reads: total.to(precision) for reads, total in sums.items()})


@contextmanager
def _input_hooks(
    block: nn.Module, architecture: Architecture, see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Inside, `see(reads, rows)` gets each distinct input of the block's linears, a row a token."""
    present = dict(block.named_modules())
    readers = {
        site.reads: present[site.name] for site in architecture.linears if site.name in present
    }

    def hook(_module: nn.Module, args: tuple[Tensor, ...], reads: str) -> None:
        see(reads, args[0].detach().reshape(-1, args[0].shape[-1]))

    handles = [
        module.register_forward_pre_hook(partial(hook, reads=reads))
        for reads, module in readers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _similarity(
    boundaries: list[Float[Tensor, "windows tokens hidden"]], skip_first_token: bool
) -> Similarity:
    num_windows, num_tokens, _ = boundaries[0].shape
    first = 1 if skip_first_token and num_tokens > 1 else 0
    count = len(boundaries)
    cosine_sum = torch.zeros(count, count, dtype=torch.float64)
    angle_sum = torch.zeros(count, count, dtype=torch.float64)
    windows_at_once = max(1, TOKENS_AT_ONCE // num_tokens)
    for start in range(0, num_windows, windows_at_once):
        hidden = torch.stack([b[start : start + windows_at_once] for b in boundaries]).double()
        cosine_sum += summed_cosines(hidden[:, :, first:].flatten(1, 2))
        angle_sum += summed_angles(hidden[:, :, -1])
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
