"""Channels between two matrices that go one after the other, each the one whose absence costs the
output least: closed forms, tensors in and out.

Exact greedy output approximation (the second-moment criterion of arXiv 2407.19126, with the
interactions it leaves out; Optimal Brain Surgeon on channels). With C the Gram of the channels and
W the matrix that reads them, fitted again on what is left after every removal, the squared error of
the output rises by

    ||w_i||^2 / [C^-1]_ii

when channel i goes: the w_i of the fitted W, C of the channels that are left. A score that is
computed once, as leverage is, sees neither: of two copies of one channel both seem useless, or
both needed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from foldstack.compression.closed_forms.inner_pairs import REFIT_RIDGE, cholesky
from foldstack.compression.closed_forms.low_rank import symmetric

REMOVED_AT_ONCE = 128
"""After so many removals the matrices become smaller; their choice does not depend on it."""


@dataclass(frozen=True)
class Removals:
    """Channels in the order in which they go: any number of them from the start is a choice."""

    order: Int[Tensor, " removed"]
    rise: Float64[Tensor, " removed"]
    """By how much each raises the squared error of the output, sum over tokens and outputs; what is
    left is fitted again."""

    def kept(self, width: int, size: int) -> Int[Tensor, " width"]:
        """The `width` of `size` channels that stay when the others have gone, ascending."""
        assert size - width <= len(self.order)
        stays = torch.ones(size, dtype=torch.bool, device=self.order.device)
        stays[self.order[: size - width]] = False
        return stays.nonzero()[:, 0]


def removals(
    down: Float[Tensor, "out n"],
    gram: Float[Tensor, "n n"],
    count: int,
    *,
    at_once: int = REMOVED_AT_ONCE,
) -> Removals:
    """The first `count` channels that go, in float64.

    The inverse Gram and the inner products of the columns of W are down-dated, a block of
    `at_once` removals by one matrix product; inside a block only the columns that are asked for
    are. Channels that never occurred go first.

    Args:
        down: what reads the channels.
        gram: sum over tokens of a a^T, a the channels; centred (`centred`) where `down` has a bias.

    Raises:
        InputError: the Gram has an entry that is not finite.
    """
    assert 0 <= count < len(gram)
    gram = symmetric(gram)
    energy = gram.diagonal().clamp_min(0)
    root = energy.sqrt()
    scale = torch.where(root > 0, root.reciprocal(), torch.zeros_like(root))
    gram *= scale[:, None]
    gram *= scale
    gram.diagonal()[scale == 0] = 1
    inverse = torch.cholesky_inverse(cholesky(gram, REFIT_RIDGE))
    del gram
    scaled = down.double() * root
    left = _Left(torch.arange(len(root), device=root.device), inverse, scaled.T @ scaled)
    del inverse
    orders, rises = [], []
    for start in range(0, count, at_once):
        order, rise, left = _block(left, min(at_once, count - start))
        orders.append(order)
        rises.append(rise)
    if not orders:
        return Removals(torch.arange(0, device=root.device), root.new_zeros(0))
    return Removals(torch.cat(orders), torch.cat(rises))


def centred(
    gram: Float[Tensor, "n n"], input_sum: Float[Tensor, " n"], num_tokens: int
) -> Float64[Tensor, "n n"]:
    """The Gram of the inputs less their mean: what counts where a bias takes up the mean."""
    total = input_sum.double()
    return gram.double() - torch.outer(total, total) / num_tokens


def refitted_bias(
    bias: Float[Tensor, " out"],
    down: Float[Tensor, "out n"],
    narrower: Float[Tensor, "out k"],
    mean: Float[Tensor, " n"],
    kept: Int[Tensor, " k"],
) -> Float64[Tensor, " out"]:
    """The bias with which `narrower` on the kept channels has the mean output that `down` has on
    all of them; best together with weights fitted on the centred Gram.

    Args:
        mean: of the inputs, over the tokens.
    """
    mean = mean.double()
    fitted: Tensor = bias.double() + down.double() @ mean - narrower.double() @ mean[kept]
    return fitted


def removal_operations(rows: int, width: int, kept: int) -> float:
    """Float64 operations of `removals` of a matrix (rows, width) down to `kept` channels."""
    return 2.5 * width**3 + 2.0 * rows * width**2 + 2.0 * (width**3 - kept**3)


def refitting_operations(rows: int, width: int, kept: int) -> float:
    """Float64 operations of fitting what is left then (`inner_pairs.refitted`)."""
    return 1.9 * (kept**3 / 3 + 2.0 * kept * width * rows)


@dataclass(frozen=True)
class _Left:
    """The channels that are left, by their unit energy."""

    ids: Int[Tensor, " left"]
    inverse: Float64[Tensor, "left left"]
    """Of their Gram."""
    products: Float64[Tensor, "left left"]
    """W^T W of the fitted W."""


def _block(left: _Left, count: int) -> tuple[Tensor, Tensor, _Left]:
    """Remove `count` channels: their ids, what each raises the error by, and what is left then.

    With u the column of the running inverse at the removed channel p, c = u / u_p, v the column of
    the running W^T W and g = v_p:

        inverse <- inverse - c u^T,   w_i <- w_i - w_p c_i,   W^T W <- W^T W - c z^T - z c^T

    where z = v - g c / 2.
    """
    size = len(left.ids)
    curvature, energy = left.inverse.diagonal().clone(), left.products.diagonal().clone()
    shares, columns, shifts = (left.inverse.new_empty(size, count) for _ in range(3))
    is_left = torch.ones(size, dtype=torch.bool, device=left.ids.device)
    order, rises = [], []
    for done in range(count):
        cost = torch.where(is_left, energy.clamp_min(0) / curvature, torch.inf)
        gone = cost.argmin()
        c, u, z = (kept[:, :done] for kept in (shares, columns, shifts))
        column = left.inverse[:, gone] - c @ u[gone]
        product = left.products[:, gone] - c @ z[gone] - z @ c[gone]
        share = column / column[gone]
        order.append(gone)
        rises.append(cost[gone])
        is_left[gone] = False
        energy = energy - share * (2 * product - product[gone] * share)
        curvature = curvature - share * column
        shares[:, done], columns[:, done] = share, column
        shifts[:, done] = product - product[gone] / 2 * share
    stays = is_left.nonzero()[:, 0]
    c, u, z = (kept[stays] for kept in (shares, columns, shifts))
    inverse = left.inverse[stays][:, stays].sub_(c @ u.T)
    products = left.products[stays][:, stays].sub_(c @ z.T).sub_(z @ c.T)
    chosen = torch.stack(order)
    return left.ids[chosen], torch.stack(rises), _Left(left.ids[stays], inverse, products)
