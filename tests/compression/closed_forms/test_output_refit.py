"""The refit of output projections against least squares over the tokens themselves."""

import pytest
import torch
from torch import Tensor

from foldstack.compression.closed_forms.output_refit import refit_change
from foldstack.compression.errors import InputError

RIDGE = 0.03


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


X, E = normal(60, 5, seed=0) @ normal(5, 5, seed=1), normal(60, 3, seed=2)


def ridge_rows(gram: Tensor, width: int) -> Tensor:
    """Rows that add the ridge to a least squares problem."""
    shift = RIDGE * gram.diagonal()[:width].mean()
    return shift.sqrt() * torch.eye(len(gram), dtype=torch.float64)[:width]


@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_ridge_regression_with_a_free_bias(has_bias: bool) -> None:
    read = torch.nn.functional.pad(X, (0, 1), value=1.0) if has_bias else X
    got = refit_change(read.T @ read, read.T @ E, ridge=RIDGE, has_bias=has_bias)
    rows = torch.cat([read, ridge_rows(read.T @ read, 5)])
    targets = torch.cat([E, torch.zeros(5, 3, dtype=torch.float64)])
    torch.testing.assert_close(got.T, torch.linalg.lstsq(rows, targets).solution)


def test_behind_gains_each_output_has_its_own() -> None:
    gains = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    got = refit_change(X.T @ X, X.T @ E, ridge=RIDGE, gains=gains)
    scale = gains.square().mean().sqrt()
    for change, gain, error in zip(got, gains, E.T, strict=True):
        rows = torch.cat([gain * X, scale * ridge_rows(X.T @ X, 5)])
        targets = torch.cat([error, torch.zeros(5, dtype=torch.float64)])
        torch.testing.assert_close(change, torch.linalg.lstsq(rows, targets).solution)


@pytest.mark.parametrize("gains", [None, torch.zeros(3)])
def test_what_cannot_help_does_not_move(gains: Tensor | None) -> None:
    """Inputs that are always zero, and outputs that the norm silences."""
    read = X.clone()
    read[:, 2] = 0
    change = refit_change(read.T @ read, read.T @ E, gains=gains)
    assert change[:, 2].abs().max() < 1e-12
    assert torch.isfinite(change).all()
    assert (gains is None) == bool(change.abs().max() > 1e-3)
    nothing = torch.zeros(5, 5), torch.zeros(5, 3)
    assert refit_change(*nothing, gains=gains).abs().max() == 0


def test_a_gram_that_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match="must be finite"):
        refit_change(torch.full((5, 5), torch.inf), X.T @ E)
