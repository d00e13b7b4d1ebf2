"""Time of each closed form against its matrix products alone, and against the plain alternative.

Random Grams of a Llama-shaped block (hidden size d, MLP width 2.7 d). The floor counts the float64
operations that a form cannot do without, at the rate of a square product of that size; the plain
alternative is what the papers' code does: whitening by an inverted Cholesky factor, and a
pseudo-inverse for the refit. `float32_loss` says what float32 would cost in accuracy: the loss of
the rank-d/2 factors, relative to the optimum, on a Gram of condition 1e8.

    python benchmarks/decomposition.py [--json] [--hidden-size 512] [--repeats 3] [--device cpu]
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foldstack.compression.closed_forms.inner_pairs import leverage_scores, refitted
from foldstack.compression.closed_forms.low_rank import truncate, whitened_svd

CONDITION = 1e8
"""Largest eigenvalue of a Gram over its smallest: of activations with outlier channels."""


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    figures = measure(arguments.hidden_size, arguments.repeats, arguments.device)
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        print(f"{name:<28} {value:12.4g}")


if __name__ == "__main__":
    main()
