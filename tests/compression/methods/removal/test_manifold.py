"""Diffusion maps and the information between them (mka.md, acceptance tests 3 and 4)."""

import math

import pytest
import torch
from torch import Tensor

from foldstack.compression.errors import InputError
from foldstack.compression.methods.removal.manifold import (
    diffusion_map,
    distances,
    gaussian_kernel,
    mutual_information,
    similarity_of_layers,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_kernel_is_symmetric_with_ones_on_the_diagonal() -> None:
    kernel = gaussian_kernel(noise(30, 5))
    assert torch.equal(kernel, kernel.T)
    assert torch.equal(kernel.diagonal(), torch.ones(30, dtype=torch.float64))
    # At the median distance the exponent is -1/2.
    of_pairs = kernel[~torch.eye(30, dtype=torch.bool)]
    assert float(of_pairs.median()) == pytest.approx(math.exp(-0.5), rel=0.02)


def test_moving_turning_and_reordering_the_points_changes_nothing_but_signs() -> None:
    points = noise(40, 6)
    turn, _ = torch.linalg.qr(noise(6, 6, seed=1))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    expected = diffusion_map(points, 2)
    got = diffusion_map((points @ turn + 3)[order], 2)
    signs = (got * expected[order]).sum(0).sign()
    torch.testing.assert_close(got * signs, expected[order], rtol=0, atol=1e-9)


def test_the_map_solves_the_random_walk() -> None:
    """Its coordinates are right eigenvectors of the row-normalised kernel, times eigenvalues."""
    points = noise(25, 4)
    kernel = gaussian_kernel(points)
    density = kernel.sum(0)
    walk = kernel / torch.outer(density, density).sqrt()
    walk = walk / walk.sum(1, keepdim=True)
    eigenvalues = torch.linalg.eigvals(walk).real.sort(descending=True).values
    found = diffusion_map(points, 2)
    for i in range(2):
        torch.testing.assert_close(
            walk @ found[:, i], eigenvalues[i + 1] * found[:, i], rtol=0, atol=1e-9
        )


def test_the_map_separates_two_far_clusters() -> None:
    """Their kernel has two eigenvalues of 1, of which one is the constant direction."""
    points = noise(20, 3)
    points[15:] += 1e4
    coordinate = diffusion_map(points, 1)[:, 0]
    assert coordinate[:15].std() < 1e-6 * (coordinate[:15].mean() - coordinate[15:].mean()).abs()


def test_information_between_correlated_normals() -> None:
    """-log(1 - rho^2) / 2 for correlation rho."""
    x, other = noise(600, 1), noise(600, 1, seed=1)
    for rho in (0.0, 0.6, 0.9):
        y = rho * x + math.sqrt(1 - rho**2) * other
        expected = -math.log(1 - rho**2) / 2
        assert mutual_information(distances(x), distances(y), 5) == pytest.approx(expected, abs=0.1)


def test_similarity_is_finite_symmetric_and_between_0_and_1() -> None:
    layers = torch.stack([noise(40, 6), noise(40, 6), noise(40, 6, seed=1), torch.zeros(40, 6)])
    layers[2, 7] *= 1e6  # a massive activation
    similarity = similarity_of_layers(layers, 2, 5)
    assert torch.isfinite(similarity).all()
    assert torch.equal(similarity, similarity.T)
    assert similarity.min() >= 0
    assert similarity.max() <= 1
    assert torch.equal(similarity, similarity_of_layers(layers, 2, 5))
    assert similarity[0, 1] == 1  # a layer and its copy
    assert similarity[0, 2] < 0.3


def test_the_more_noise_the_less_alike() -> None:
    base = noise(80, 6)
    layers = [base + scale * noise(80, 6, seed=1) for scale in (0.0, 0.05, 0.3, 3.0)]
    row = similarity_of_layers(torch.stack(layers), 2, 5)[0].tolist()
    assert row == sorted(row, reverse=True)
    assert row[1] > 0.5 > row[3]


def test_every_point_matters() -> None:
    base = noise(2, 24, 6)
    base[1] = base[0] + 0.3 * base[1]  # alike, so that nothing is clipped to 0
    before = similarity_of_layers(base, 2, 3)[0, 1]
    changed = 0
    for point in range(24):
        other = base.clone()
        other[:, point] = noise(2, 6, seed=point + 1) * 2
        changed += bool(similarity_of_layers(other, 2, 3)[0, 1] != before)
    assert changed == 24


def test_too_few_points_are_refused() -> None:
    with pytest.raises(InputError, match="needs at least 11 calibration windows, got 10"):
        similarity_of_layers(noise(2, 10, 6), 2, 5)
