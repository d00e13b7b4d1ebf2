"""How alike two layers place the same inputs: diffusion maps, and the information between them.

MKA (arXiv 2406.16330) compares layers by low-dimensional maps of their activations. Its released
code takes the square root of the distance for the kernel, weighs no coordinate by its eigenvalue,
and estimates entropies with 50 neighbours among 57 points; here is the standard diffusion map
(Coifman and Lafon 2006) and one estimator for information and entropy (Kraskov et al. 2004,
equation 8), with which the ratio lies in [0, 1] by construction.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from foldstack.compression.errors import InputError


def distances(points: Float64[Tensor, "n d"]) -> Float64[Tensor, "n n"]:
    """Euclidean, exactly symmetric and 0 on the diagonal."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def gaussian_kernel(points: Float64[Tensor, "n d"]) -> Float64[Tensor, "n n"]:
    """exp(-D^2 / (2 sigma^2)) with sigma the median distance of two different points."""
    apart = distances(points)
    off_diagonal = ~torch.eye(len(points), dtype=torch.bool)
    sigma = apart[off_diagonal].median().clamp_min(torch.finfo(apart.dtype).tiny ** 0.25)
    return torch.exp(-0.5 * (apart / sigma).square())


def diffusion_map(
    points: Float64[Tensor, "n d"], dimensions: int, alpha: float = 0.5
) -> Float64[Tensor, "n dimensions"]:
    """The coordinates lambda_i psi_i / psi_0 of the leading directions of a diffusion.

    With K the kernel and p = K 1, K' = K / (p p^T)^alpha and v = sqrt(K' 1), they are eigenvectors
    of the symmetric A = K' / (v v^T), whose first one is v. Moving, turning or reordering the
    points changes nothing but the signs.
    """
    kernel = gaussian_kernel(points)
    density = kernel.sum(0)
    kernel = kernel / torch.outer(density, density) ** alpha
    v = kernel.sum(0).sqrt()
    first = v / v.norm()
    # The first direction is taken out: points far from all others have eigenvalues of 1, too.
    symmetric = kernel / torch.outer(v, v) - torch.outer(first, first)
    eigenvalues, vectors = torch.linalg.eigh(symmetric)
    leading = range(-1, -1 - dimensions, -1)  # they come in ascending order
    return torch.stack([eigenvalues[i] * vectors[:, i] / first for i in leading], dim=1)


def similarity_of_layers(
    layers: Float64[Tensor, "layers n d"], dimensions: int, neighbours: int
) -> Float64[Tensor, "layers layers"]:
    """S_lm = I(l; m) / sqrt(I(l; l) I(m; m)) of the layers' diffusion maps, in [0, 1].

    I is the mutual information of the maps, at most I(l; l) = digamma(n) - digamma(neighbours),
    which stands for the entropy: it is what the same estimator finds in a map about itself.

    Raises:
        InputError: there are too few points for the neighbours and dimensions.
    """
    num_points = layers.shape[1]
    least = max(2 * neighbours, dimensions + 1) + 1
    if num_points < least:
        raise InputError(
            f"the similarity of layers with {neighbours} neighbours in {dimensions} dimensions "
            f"needs at least {least} calibration windows, got {num_points}"
        )
    maps = [diffusion_map(layer, dimensions) for layer in layers]
    # Of one size, so that the joint distance is not that of the larger map alone.
    apart = [distances(m / m.square().sum(1).mean().sqrt().clamp_min(1e-150)) for m in maps]
    size = len(apart)
    information = torch.eye(size, dtype=torch.float64)
    n, k = torch.tensor(float(num_points)), torch.tensor(float(neighbours))
    most = float(torch.digamma(n.double()) - torch.digamma(k.double()))
    for a in range(size):
        for b in range(a):
            found = mutual_information(apart[a], apart[b], neighbours) / most
            information[a, b] = information[b, a] = min(max(found, 0.0), 1.0)
    return information


def mutual_information(
    x: Float64[Tensor, "n n"], y: Float64[Tensor, "n n"], neighbours: int
) -> float:
    """Kraskov's first estimator, in nats, from the distances of the points in two spaces."""
    own = torch.eye(len(x), dtype=torch.bool)
    x, y = x.masked_fill(own, torch.inf), y.masked_fill(own, torch.inf)
    radius = torch.maximum(x, y).kthvalue(neighbours, dim=1, keepdim=True).values
    closer = torch.stack([(x < radius).sum(1), (y < radius).sum(1)]).double()
    constants = torch.tensor([float(neighbours), float(len(x))], dtype=torch.float64)
    return float(constants.digamma().sum() - torch.digamma(closer + 1).sum(0).mean())
