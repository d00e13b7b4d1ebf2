"""Grams of a model's blocks in files, one file per block, read one matrix at a time."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GramKey = tuple[int, str]
"""Position of the block, and what its linears read."""


def gram_file(folder: Path, position: int) -> Path:
    """Where the Grams of a block are."""
    return folder / f"grams-{position:03d}.safetensors"


def save_grams(folder: Path, position: int, grams: Mapping[str, Tensor]) -> None:
    """Write the Grams of a block, by what is read."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(grams), gram_file(folder, position))


class GramFiles(Mapping[GramKey, Tensor]):
    """Grams on disk, read one at a time: all of an 8B model's are tens of gigabytes."""

    def __init__(self, folder: Path, keys: Iterable[GramKey]) -> None:
        self.folder = folder
        self._keys = dict.fromkeys(keys)

    def __getitem__(self, key: GramKey) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        position, reads = key
        with safe_open(gram_file(self.folder, position), framework="pt") as file:
            gram: Tensor = file.get_tensor(reads)
            return gram

    def __iter__(self) -> Iterator[GramKey]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class AddedGrams(Mapping[GramKey, Tensor]):
    """Grams of two shards of the data, added one at a time."""

    def __init__(self, one: Mapping[GramKey, Tensor], other: Mapping[GramKey, Tensor]) -> None:
        self._one, self._other = one, other

    def __getitem__(self, key: GramKey) -> Tensor:
        one = self._one[key]
        return one.double().add_(self._other[key]).to(one.dtype)

    def __iter__(self) -> Iterator[GramKey]:
        return iter(self._one)

    def __len__(self) -> int:
        return len(self._one)
