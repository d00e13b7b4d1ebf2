"""Time of each closed form against its matrix products alone, and against the plain alternative.

Random Grams of a Llama-shaped block (hidden size d, MLP width 2.7 d). The floor counts the float64
operations that a form cannot do without, at the rate of a square product of that size; the plain
alternative is what the papers' code does: whitening by an inverted Cholesky factor, and a
pseudo-inverse for the refit. `float32_loss` says what float32 would cost in accuracy: the loss of
the rank-d/2 factors, relative to the optimum, on a Gram of condition 1e8.

`--block`: all closed forms of SVD-LLM and of Basis Sharing (a pair of blocks, counted per block) of
one such block with grouped keys at a quarter less, in seconds of computing: as they are, all in
float64 (what they were before 2026-11-30), and what their operations take at the rates of a product
in float32 and float64; `loss_change` is the largest that float32 makes in what an update minimises,
and `in_float32` the share of the matrices that took it. `--channels`: energy of the largest channel
over the smallest.

    python benchmarks/decomposition.py [--json] [--hidden-size 512] [--repeats 3] [--device cpu]
    python benchmarks/decomposition.py --block --hidden-size 2048 [--method basis_sharing]
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from foldstack.compression.closed_forms.inner_pairs import leverage_scores, refitted
from foldstack.compression.closed_forms.low_rank import (
    pooled_gram,
    shared_factors,
    truncate,
    uniform_ranks,
    updated_directions,
    updated_directions_operations,
    whitened_svd,
    whitened_svd_operations,
)

CONDITION = 1e8
"""Largest eigenvalue of a Gram over its smallest: of activations with outlier channels."""

TARGET = 0.4
"""Share of the dense model's outputs in what the update fits: SVD-LLM's default."""


def gram_of(size: int, device: str) -> Tensor:
    """Symmetric, with eigenvalues that fall geometrically, rounded to float32 as gathered sums."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, device=device))
    values = torch.logspace(0, -np.log10(CONDITION), size, dtype=torch.float64, device=device)
    gram = (basis * values) @ basis.T
    return ((gram + gram.T) / 2).float()


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(1 + repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def inverse_whitened(weight: Tensor, gram: Tensor) -> tuple[Tensor, ...]:
    """As SVD-LLM's released code: W S, its SVD, and S^-1; the ridge is its fallback."""
    gram = gram.double() + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    factor = torch.linalg.cholesky(gram)
    left, values, right = torch.linalg.svd(weight.double() @ factor, full_matrices=False)
    return left, values, right @ torch.linalg.inv(factor)


def pinv_refitted(down: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """W C_:J pinv(C_JJ)."""
    gram = gram.double()
    return down.double() @ gram[:, kept] @ torch.linalg.pinv(gram[kept][:, kept], hermitian=True)


def inverse_leverage(gram: Tensor, ridge: float) -> Tensor:
    """diag(C (C + lambda I)^-1) by an inverse and a product."""
    gram = gram.double()
    shifted = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    return (gram @ torch.linalg.inv(shifted)).diagonal()


def loss(weight: Tensor, gram: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    first, second = (factor.double() for factor in factors)
    error = weight.double() - second @ first
    return float(((error @ gram.double()) * error).sum())


def measure(d: int, repeats: int, device: str) -> dict[str, float]:
    torch.manual_seed(0)
    n = round(2.7 * d)
    narrow, wide = gram_of(d, device), gram_of(n, device)
    square, up = (torch.randn(rows, d, device=device) for rows in (d, n))
    down, kept = torch.randn(d, n, device=device), torch.arange(round(0.7 * n), device=device)
    k = len(kept)
    a = torch.randn(d, d, dtype=torch.float64, device=device)
    rate = 2 * d**3 / median_seconds(lambda: a @ a, repeats)
    # An eigendecomposition of size d with its vectors is counted as 9 d^3 (Golub and Van Loan).
    forms: dict[str, tuple[float, Callable[[], Any], Callable[[], Any]]] = {
        "leverage": (
            n**3, lambda: leverage_scores(wide, 0.01), lambda: inverse_leverage(wide, 0.01)
        ),
        "refit": (
            k**3 / 3 + 2 * k * k * d + 2 * k * (n - k) * d,
            lambda: refitted(down, wide, kept), lambda: pinv_refitted(down, wide, kept),
        ),
        "svd_square": (
            15 * d**3,
            lambda: whitened_svd(square, narrow), lambda: inverse_whitened(square, narrow),
        ),
        "svd_up": (
            15 * d**3 + 8 * n * d * d,
            lambda: whitened_svd(up, narrow), lambda: inverse_whitened(up, narrow),
        ),
        "svd_down": (
            11 * d**3 + 4 * n * d * d + 2 * n * n * d,
            lambda: whitened_svd(down, wide), lambda: inverse_whitened(down, wide),
        ),
    }  # fmt: skip
    figures = {"hidden_size": float(d), "float64_gflops": rate / 1e9}
    for name, (operations, form, plain) in forms.items():
        took = median_seconds(form, repeats)
        figures[f"{name}_seconds"] = took
        figures[f"{name}_over_floor"] = took / (operations / rate)
        figures[f"{name}_plain_over_ours"] = median_seconds(plain, repeats) / took
    best = loss(square, narrow, truncate(whitened_svd(square, narrow), d // 2))
    figures["float32_loss"] = loss(square, narrow, float32_factors(square, narrow, d // 2)) / best
    return figures


def float32_factors(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors of W G W^T in float32."""
    _, vectors = torch.linalg.eigh(weight @ gram @ weight.T)
    left = vectors[:, -rank:]
    return left.T @ weight, left


class Linear(NamedTuple):
    """A linear of the block: its shape, what it reads, and whether pairs of blocks share it."""

    name: str
    rows: int
    columns: int
    reads: str
    is_shared: bool


@dataclass
class Took:
    """Of all linears of a block."""

    seconds: float = 0.0
    float64_seconds: float = 0.0
    operations: float = 0.0
    loss_change: float = 0.0
    in_float32: int = 0
    matrices: int = 0


def linears_of(d: int) -> list[Linear]:
    """TinyLlama's proportions: 2048 wide, 256 of keys and values, 5632 in the MLP."""
    kv, mlp = d // 8, d * 11 // 4
    return [
        Linear("q", d, d, "attention_input", True),
        Linear("k", kv, d, "attention_input", False),
        Linear("v", kv, d, "attention_input", False),
        Linear("o", d, d, "attention_output", False),
        Linear("gate", mlp, d, "mlp_input", True),
        Linear("up", mlp, d, "mlp_input", True),
        Linear("down", d, mlp, "mlp_output", False),
    ]


def correlated_gram(size: int, channels: float, seed: int, device: str) -> Tensor:
    """Of inputs with 64 directions in common, and channels whose energies span `channels`."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(size, 64, generator=generator)
    scales = torch.logspace(0, -np.log10(channels) / 2, size)
    scales = scales[torch.randperm(size, generator=generator)]
    gram = scales[:, None] * (common @ common.T / 8 + torch.eye(size)) * scales
    return (8192 * gram).to(device)


def objective(weight: Tensor, gram: Tensor, noise: Tensor, pair: tuple[Tensor, Tensor]) -> float:
    """What the update minimises: of inputs x' = x + e with Gram `gram`, e with Gram `noise`, the
    loss against the outputs on x' - 0.4 e."""
    weight, (first, second) = weight.double(), (factor.double() for factor in pair)
    error = weight - second @ first
    return float(
        ((error @ gram) * error).sum()
        - 2 * TARGET * ((weight @ noise) * error).sum()
        + TARGET**2 * ((weight @ noise) * weight).sum()
    )


def computing_seconds(device: str) -> float:
    """Of this process on a CPU, which other processes do not change much; else of the clock."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def factored(
    method: str, weights: Sequence[Tensor], grams: Sequence[Tensor], rank: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The closed forms of one linear (of one in each block of a pair) before the update."""
    if method == "svd_llm":
        yield truncate(whitened_svd(weights[0], grams[0], (rank,)), rank)
        return
    basis, parts = shared_factors(weights, pooled_gram(grams, equal_traces=False), rank)
    for weight, own, gram in zip(weights, parts, grams, strict=True):
        yield basis, updated_directions(weight, basis, own, gram) if len(weights) > 1 else own


def measure_block(
    d: int, method: str, channels: float, device: str, *, compare: bool
) -> dict[str, float]:
    """All figures of `--block`."""
    torch.manual_seed(0)
    rates = []
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(d, d, dtype=dtype, device=device)
        torch.linalg.eigh(a[:64, :64])  # libraries load at their first call
        started = computing_seconds(device)
        for _ in range(3):
            a @ a
        rates.append(6 * d**3 / (computing_seconds(device) - started))
    members = 2 if method == "basis_sharing" else 1
    total = Took()
    by_linear: dict[str, Took] = defaultdict(Took)
    for linear in linears_of(d):
        count = members if linear.is_shared else 1
        shape = (linear.rows, linear.columns)
        rank = uniform_ranks({0: (count * linear.rows, linear.columns)}, 0.25)[0]
        weights = [torch.randn(shape, device=device) / d**0.5 for _ in range(count)]
        grams = [correlated_gram(shape[1], channels, seed, device) for seed in range(count)]
        noise = 0.1 * correlated_gram(shape[1], channels, 9, device).double()
        seen, shift = grams[0] + noise, -TARGET * noise
        took = by_linear[linear.name]
        losses = []
        for precision in (torch.float32, torch.float64) if compare else (torch.float32,):
            cast = [weight.to(precision) for weight in weights]
            started = computing_seconds(device)
            pairs = [
                (
                    first,
                    updated_directions(weight, first.float().to(precision), second, seen, shift),
                )
                for weight, (first, second) in zip(
                    cast, factored(method, cast, grams, rank), strict=True
                )
            ]
            seconds = (computing_seconds(device) - started) / count
            if compare:
                losses.append(
                    [
                        objective(w, seen, noise, pair)
                        for w, pair in zip(weights, pairs, strict=True)
                    ]
                )
            if precision == torch.float64:
                took.float64_seconds = seconds
                took.loss_change = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
                continue
            took.seconds, took.matrices = seconds, 2
            took.in_float32 = sum(t.dtype == torch.float32 for t in pairs[0])
            update = updated_directions_operations(*shape, rank, shifted=True)
            again = updated_directions_operations(*shape, rank, shifted=False)
            took.operations = update + (again if count > 1 else 0.0)
            took.operations += whitened_svd_operations(count * shape[0], shape[1], rank) / count
        for field in vars(total):
            worse = max if field == "loss_change" else float.__add__
            setattr(total, field, worse(float(getattr(total, field)), float(getattr(took, field))))
    figures = {f"{name}_seconds": took.seconds for name, took in by_linear.items()}
    figures |= {"float32_gflops": rates[0] / 1e9, "float64_gflops": rates[1] / 1e9}
    floor = total.operations / min(rates[1], rates[0] / 2)
    figures |= {f"{method}_seconds": total.seconds, f"{method}_floor_seconds": floor}
    figures[f"{method}_in_float32"] = total.in_float32 / total.matrices
    if compare:
        figures[f"{method}_float64_seconds"] = total.float64_seconds
        figures[f"{method}_loss_change"] = total.loss_change
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--block", action="store_true", help="a whole block instead of each form")
    parser.add_argument("--method", default="svd_llm", choices=("svd_llm", "basis_sharing"))
    parser.add_argument("--channels", type=float, default=1e4)
    parser.add_argument("--no-compare", action="store_true", help="without the same in float64")
    arguments = parser.parse_args()
    if arguments.block:
        figures = measure_block(
            arguments.hidden_size,
            arguments.method,
            arguments.channels,
            arguments.device,
            compare=not arguments.no_compare,
        )
    else:
        figures = measure(arguments.hidden_size, arguments.repeats, arguments.device)
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        print(f"{name:<28} {value:12.4g}")


if __name__ == "__main__":
    main()
