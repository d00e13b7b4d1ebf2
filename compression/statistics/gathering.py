"""What one pass over the calibration windows tells about a model, as sums that add up.

Two kinds. "similarity": for all pairs of boundaries (boundary l is the input of block l, the last
one is the last block's output BEFORE the final norm) the cosine of the two hidden states of a
token, summed over tokens, and the angle at the last token of a window. "gram": for every distinct
input of a block's linears (at most 4 per block) the matrix X^T X over all tokens, and the sum of X,
which outputs with a bias need.

Everything is a sum over tokens, so the statistics of two shards of the data add.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float64, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.statistics.gram_files import AddedGrams, GramFiles, GramKey, save_grams
from foldstack.compression.statistics.grams import rank_bounds, report_ranks, summed_inputs
from foldstack.compression.statistics.hidden_states import MEMORY_BYTES
from foldstack.compression.statistics.kept_pass import BOUNDARIES, STATES, KeptPass
from foldstack.compression.statistics.similarity import SIMILARITY_TOKENS, Boundaries, Similarity
from foldstack.compression.statistics.stream import BlockStream, cpu_precision, tensors_of
from foldstack.compression.storage.mapped_memory import release, trim
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.surgery import plan_of

Kind = Literal["similarity", "gram"]
KINDS: frozenset[str] = frozenset({"similarity", "gram"})
Progress = Callable[[str, int, int], None]

INPUT_SUMS_FILE = "input_sums.safetensors"


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
        """The statistics of both shards of the data together; their Grams are added when asked for.

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
        return Statistics(
            num_blocks=self.num_blocks,
            num_tokens=self.num_tokens + other.num_tokens,
            similarity_sums=similarity,
            grams=AddedGrams(self.grams, other.grams),
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
        is_written = isinstance(self.grams, GramFiles) and self.grams.folder == folder
        for position in sorted({position for position, _ in self.grams} if not is_written else ()):
            of_block = {reads: g for (p, reads), g in self.grams.items() if p == position}
            save_grams(folder, position, of_block)
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
            grams=GramFiles(folder, keys),
            input_sums=_input_sums(folder / INPUT_SUMS_FILE, keys),
        )


def _input_sums(path: Path, keys: Iterable[GramKey]) -> dict[GramKey, Tensor]:
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        return {(p, reads): file.get_tensor(f"{p}.{reads}") for p, reads in keys}


def gather(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows tokens"],
    kinds: Iterable[str],
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
    skip_first_token: bool = True,
    similarity_tokens: int = SIMILARITY_TOKENS,
    folder: Path | None = None,
    memory_bytes: int = MEMORY_BYTES,
    work: Path | None = None,
    warn_of_ranks: bool = True,
) -> Statistics:
    """The statistics of `kinds` over `windows`, in one pass that holds one block and its Grams.

    `skip_first_token` leaves the first token of each window out of the mean cosine: it attends to
    itself alone, is often an attention sink with a hidden state of its own size, and says nothing
    about text. The papers count it. `similarity_tokens` limits what the cosines are averaged over
    (whole windows); with `folder`, Grams go straight to disk there. Hidden states beyond
    `memory_bytes`, those on their way and those that are compared each, are in files in `work`.
    With both folders, which belong to this one computation, all of them are, and a call after one
    that was killed goes on behind the blocks that it has kept (`KeptPass`). On a CPU the blocks of
    a model of half precision compute in float32, one at a time. `warn_of_ranks` is for windows that
    are all there are: a shard's tell nothing by themselves.

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
    kept = KeptPass(None if folder is None or work is None else work / "pass")
    room: dict[str, Any] = {"memory_bytes": memory_bytes, "folder": kept.folder or work}
    stream = BlockStream(
        model, windows, batch_size=batch_size, dtype=cpu_precision(model),
        name=kept.name(STATES), **room,
    )  # fmt: skip
    num_compared = min(len(windows), -(-similarity_tokens // windows.shape[1]))
    boundaries = Boundaries(
        num_compared, len(stream.blocks) + 1, name=kept.name(BOUNDARIES), **room
    )
    if kept.position > 0:
        if "similarity" in kinds:
            boundaries.reopen(kept.position, windows.shape[1], stream.states.all.dtype)
        stream.resume(kept.position)
    grams: dict[GramKey, Tensor] = {}
    while stream.position < len(stream.blocks):
        block = stream.blocks[stream.position]
        if "similarity" in kinds:
            boundaries.add(stream.states)
        if "gram" in kinds:
            grams |= _summed(stream, kept, kept.folder or folder)
        else:
            stream.advance()
        release(tensors_of(block))
        trim()
        kept.checkpoint(stream.position)
        if progress is not None:
            progress("gather statistics", stream.position, len(stream.blocks))
    if warn_of_ranks:
        report_ranks(kept.ranks)
    similarity = None
    if "similarity" in kinds:
        boundaries.add(stream.states)
        device = next(model.parameters()).device  # where it computes
        similarity = boundaries.compare(skip_first_token=skip_first_token, device=device)
    if folder is not None:
        kept.show_grams(folder)
    return Statistics(
        num_blocks=len(stream.blocks),
        num_tokens=windows.numel(),
        similarity_sums=similarity,
        grams=grams if folder is None else GramFiles(folder, kept.input_sums),
        input_sums=kept.input_sums,
    )


def _summed(stream: BlockStream, kept: KeptPass, folder: Path | None) -> dict[GramKey, Tensor]:
    """Pass the block where `stream` is; its Grams, if they do not go to a file in `folder`."""
    position = stream.position
    block = stream.blocks[position]
    with summed_inputs(block, architecture_of(stream.model)) as sums:
        stream.advance()
    kept.input_sums |= {(position, reads): total for reads, total in sums.inputs.items()}
    bounds = rank_bounds(sums.grams, stream.windows.numel())
    kept.ranks |= {f"{reads} of block {position}": rank for reads, rank in bounds.items()}
    of_block = {reads: gram.cpu() for reads, gram in sums.grams.items()}
    if folder is None:
        return {(position, reads): gram for reads, gram in of_block.items()}
    save_grams(folder, position, of_block)
    return {}


def report_deficient_grams(statistics: Statistics) -> None:
    """Say which Grams cannot have full rank; reads all of them."""
    ranks: dict[str, int] = {}
    for (position, reads), gram in statistics.grams.items():
        bounds = rank_bounds({reads: gram}, statistics.num_tokens)
        ranks |= {f"{name} of block {position}": rank for name, rank in bounds.items()}
    report_ranks(ranks)
