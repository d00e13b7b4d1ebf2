"""Sums over tokens of what enters a block's linears: the Gram matrix X^T X, and X itself."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from foldstack.compression.structure.architectures import Architecture

logger = logging.getLogger(__name__)

# A Gram is symmetric: it is summed in strips of so many rows, each from the diagonal on, which
# costs little more than half of the whole product.
STRIP_ROWS = 512


@dataclass
class InputSums:
    """Sums by what a linear reads; one entry serves all linears that read the same."""

    grams: dict[str, Float[Tensor, "n n"]] = field(default_factory=dict)
    """Rounded at the end to the precision in which the products were taken."""
    inputs: dict[str, Float64[Tensor, " n"]] = field(default_factory=dict)
    """Sum of x, which outputs with a bias need."""


@dataclass
class PairedSums:
    """Sums over tokens of what a linear reads of the same token in two models, x and x'."""

    grams: dict[str, Float64[Tensor, "n n"]] = field(default_factory=dict)
    """Sum of x' x'^T."""
    shifts: dict[str, Float64[Tensor, "n n"]] = field(default_factory=dict)
    """Sum of (x - x') x'^T, from the differences themselves: those of two sums would drown small
    ones."""


def rank_bounds(grams: Mapping[str, Float[Tensor, "n n"]], num_tokens: int) -> dict[str, int]:
    """The Grams that cannot have full rank, and the rank that they have at most.

    A sum over t tokens has rank t at most, and a channel that was always zero adds none.
    """
    bounds = {
        reads: min(num_tokens, int((gram.diagonal() > 0).sum())) for reads, gram in grams.items()
    }
    return {reads: rank for reads, rank in bounds.items() if rank < len(grams[reads])}


def report_ranks(bounds: Mapping[str, int]) -> None:
    """One warning about all Grams of deficient rank; their names and ranks are for the log."""
    if bounds:
        least = min(bounds, key=bounds.__getitem__)
        logger.warning(
            "%d inputs of linears do not span their space, for want of tokens or because channels "
            "are always zero: what is fitted to them is no better than that (the least is %s, rank "
            "at most %d)",
            len(bounds), least, bounds[least],
        )  # fmt: skip
        logger.info("rank at most: %s", ", ".join(f"{n}: {rank}" for n, rank in bounds.items()))


@contextmanager
def summed_inputs(block: nn.Module, architecture: Architecture) -> Iterator[InputSums]:
    """Inside, every call of `block` adds its inputs to what is yielded, which is whole afterwards.

    A product is taken in float32 (or the block's own precision, if higher) per batch, and the
    batches add up in float64; at the end they are rounded to the precision of the products, so that
    sums kept in memory and sums read from disk are equal.
    """
    sums = InputSums()
    precision = torch.float32

    def add(reads: str, rows: Float[Tensor, "tokens n"]) -> None:
        nonlocal precision
        precision = torch.promote_types(rows.dtype, torch.float32)
        if not _multiplies_exactly(rows):
            rows = rows.to(precision)
        if reads not in sums.grams:
            size, device = rows.shape[1], rows.device
            sums.grams[reads] = torch.zeros(size, size, dtype=torch.float64, device=device)
            sums.inputs[reads] = torch.zeros(size, dtype=torch.float64, device=device)
        add_upper_product(sums.grams[reads], rows)
        sums.inputs[reads] += rows.sum(0, dtype=torch.float64)

    try:
        with _input_hooks(block, architecture, add):
            yield sums
    finally:
        for reads, upper in sums.grams.items():
            sums.grams[reads] = mirrored(upper.to(precision))
            # Only now: on a GPU each look from the host waits for all that is on its way.
            sums.inputs[reads] = sums.inputs[reads].cpu()


@contextmanager
def paired_inputs(block: nn.Module, architecture: Architecture) -> Iterator[PairedSums]:
    """Inside, `block` is called on hidden states of two models in turn, batch by batch, and what is
    yielded adds what the second's inputs x' are and how far the first's are from them.

    Precision as in `summed_inputs`; the sums stay in float64.
    """
    sums = PairedSums()
    first: dict[str, Float[Tensor, "tokens n"]] = {}

    def add(reads: str, rows: Float[Tensor, "tokens n"]) -> None:
        if not _multiplies_exactly(rows):
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if reads not in first:
            first[reads] = rows
            return
        if reads not in sums.grams:
            for total in (sums.grams, sums.shifts):
                size = rows.shape[1], rows.shape[1]
                total[reads] = torch.zeros(size, dtype=torch.float64, device=rows.device)
        add_upper_product(sums.grams[reads], rows)
        add_product(sums.shifts[reads], first.pop(reads) - rows, rows)

    try:
        with _input_hooks(block, architecture, add):
            yield sums
    finally:
        for reads, upper in sums.grams.items():
            sums.grams[reads] = mirrored(upper)


def add_upper_product(total: Float64[Tensor, "n n"], rows: Float[Tensor, "tokens n"]) -> None:
    """Add X^T X to `total`, above the diagonal and in the square on it of every strip."""
    for start in range(0, len(total), STRIP_ROWS):
        strip = slice(start, start + STRIP_ROWS)
        total[strip, start:] += _product(rows[:, strip].T, rows[:, start:])


def add_product(
    total: Float64[Tensor, "n m"], left: Float[Tensor, "tokens n"], rows: Float[Tensor, "tokens m"]
) -> None:
    """Add L^T X to `total`, a strip at a time: the whole product would be half of it again."""
    for start in range(0, len(total), STRIP_ROWS):
        strip = slice(start, start + STRIP_ROWS)
        total[strip] += _product(left[:, strip].T, rows)


def _product(left: Float[Tensor, "n t"], right: Float[Tensor, "t m"]) -> Float[Tensor, "n m"]:
    if _multiplies_exactly(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def _multiplies_exactly(rows: Tensor) -> bool:
    """True where tensor cores sum products of half precision, which are exact, in float32: the
    same result many times faster."""
    return rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)


def mirrored(upper: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    for start in range(0, len(upper), STRIP_ROWS):
        stop = start + STRIP_ROWS
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return upper


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
        see(reads, args[0].detach().flatten(0, -2))

    handles = [
        module.register_forward_pre_hook(partial(hook, reads=reads))
        for reads, module in readers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
