"""Closed-form starts of a block that is to do the work of a run, from the run's X and Y.

A ridge regression stands for the first steps of the training (ReplaceMe, arXiv 2505.02819, does
the same with one matrix): cheap, with nothing to tune, and no worse than where it begins.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from foldstack.compression.statistics.run_states import States
from foldstack.compression.structure.architectures import Architecture

Pairs = Callable[[], Iterable[tuple[States, States]]]
"""What enters and what leaves the run, batch by batch; may be asked for more than once."""


def least_squares_map(
    pairs: Iterable[tuple[States, States]], *, ridge: float = 1e-6
) -> tuple[Float64[Tensor, "hidden hidden"], Float64[Tensor, " hidden"]]:
    """The matrix and bias that map inputs to targets with the least squared error, in float64.

    (X^T X + lambda I)^-1 X^T Y on centred X and Y, with lambda the share `ridge` of the mean of the
    diagonal: the closed-form baseline of a replacement, and a start for one.
    """
    num_rows, x_sum, y_sum, gram, crossed = 0, *[torch.zeros((), dtype=torch.float64)] * 4
    for inputs, targets in pairs:
        x, y = (states.double().flatten(0, -2) for states in (inputs, targets))
        num_rows += len(x)
        x_sum, y_sum = x_sum + x.sum(0), y_sum + y.sum(0)
        gram, crossed = gram + x.T @ x, crossed + x.T @ y
    x_mean, y_mean = x_sum / num_rows, y_sum / num_rows
    gram = gram - num_rows * torch.outer(x_mean, x_mean)
    crossed = crossed - num_rows * torch.outer(x_mean, y_mean)
    _add_floor(gram, ridge)
    matrix = torch.linalg.solve(gram, crossed).T
    return matrix, y_mean - matrix @ x_mean


def start_as_linear_map(student: nn.Module, pairs: Pairs) -> None:
    """Make an ffn student the least-squares map x -> matrix x + bias: 2d of its 4d units hold it
    exactly (x = relu(x) - relu(-x)), the others start silent but trainable."""
    matrix, bias = least_squares_map(pairs())
    up, down = student.get_submodule("ffn.up"), student.get_submodule("ffn.down")
    assert isinstance(up, nn.Linear)
    assert isinstance(down, nn.Linear)
    size = len(bias)
    with torch.no_grad():
        identity = torch.eye(size)
        up.weight[: 2 * size] = torch.cat([identity, -identity])
        up.bias[: 2 * size] = 0
        down.weight.zero_()
        down.weight[:, : 2 * size] = torch.cat([matrix, -matrix], dim=1)
        down.bias.copy_(bias)


def refit_outputs(
    architecture: Architecture,
    linears: Sequence[nn.Module],
    through: Callable[[States], States],
    pairs: Pairs,
    *,
    ridge: float = 1e-3,
) -> None:
    """Change the output projections of a block for the least squared error of what leaves it.

    With F the inputs of `linears`, whose outputs are summed into the block's output h(X), their
    weights move by (F^T F + lambda I)^-1 F^T (Y - h(X)), so that the ridge holds them near where
    they are. All of them at once; then, as the first change what the last one reads, that one
    alone. A projection whose output is not added as it is (a norm comes after it) stays.
    """
    for group in [linears, linears[-1:]] if len(linears) > 1 else [linears]:
        if any(not _adds_plainly(linear, through, pairs) for linear in group[-1:]):
            return
        _refit(architecture, group, through, pairs, ridge)


def _refit(
    architecture: Architecture,
    linears: Sequence[nn.Module],
    through: Callable[[States], States],
    pairs: Pairs,
    ridge: float,
) -> None:
    gram, crossed = [torch.zeros((), dtype=torch.float64)] * 2
    with torch.no_grad(), _inputs_of(linears) as seen:
        for inputs, targets in pairs():
            error = _error(through, inputs, targets)
            read = torch.cat([_with_one(linear, seen[linear]) for linear in linears], dim=-1)
            gram, crossed = gram + read.T @ read, crossed + read.T @ error
        _add_floor(gram, ridge)
        change = torch.linalg.solve(gram, crossed)
        widths = [architecture.weight(linear).shape[1] + _has_bias(linear) for linear in linears]
        for linear, part in zip(linears, change.split(widths), strict=True):
            weight = architecture.weight(linear)
            weight += part[: weight.shape[1]].T
            if _has_bias(linear):
                linear.bias += part[-1]


def _error(
    through: Callable[[States], States], inputs: States, targets: States
) -> Float64[Tensor, "rows hidden"]:
    output = through(inputs.float())
    return (targets.to(output.device).double() - output.double()).flatten(0, -2)


def _adds_plainly(linear: nn.Module, through: Callable[[States], States], pairs: Pairs) -> bool:
    """Whether the block's output is the linear's plus something that does not depend on it."""
    inputs = next(iter(pairs()))[0][:1].float()
    outputs: list[Tensor] = []

    def silence(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        outputs.append(output)
        return torch.zeros_like(output)

    with torch.no_grad():
        whole = through(inputs)
        handle = linear.register_forward_hook(silence)
        try:
            rest = through(inputs)
        finally:
            handle.remove()
    return torch.allclose(whole, rest + outputs[0].view_as(rest), rtol=1e-3, atol=1e-4)


@contextmanager
def _inputs_of(linears: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Inside, the dictionary holds what each linear read last, as float64 rows."""
    seen: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[module] = args[0].double().flatten(0, -2)

    handles = [linear.register_forward_pre_hook(keep) for linear in linears]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _has_bias(linear: nn.Module) -> bool:
    return getattr(linear, "bias", None) is not None


def _with_one(linear: nn.Module, read: Tensor) -> Tensor:
    return nn.functional.pad(read, (0, 1), value=1.0) if _has_bias(linear) else read


def _add_floor(gram: Float64[Tensor, "n n"], ridge: float) -> None:
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny))
