"""Linears that write into the residual stream, fitted again on what the compressed model computes.

They are the output projection of attention and the last linear of the MLP, dense or the second of
two factors. With h the residual stream of the dense model and h' that of the compressed one, the
target of what a sublayer adds is

    mlp_output:  what the dense model's sublayer adds
    residual:    h - h' besides, so that the stream behind the sublayer is the dense model's

and the weights move there by ridge regression (`output_refit`). Errors of a token count relative to
the size of its residual stream, which is how the norms behind see them: a token that all others
attend to, with a stream a thousand times the others', would else be all that counts.

Where a norm follows the linear (Gemma 2 and 3) `mlp_output` is fitted before it; for `residual`
the norm's scale of each token is held fixed, the step is taken only as far as the true error falls,
and the norm's gains are fitted as well, which is exact. Linears that several blocks use, or that
are put together from slices, stay, and so do those of blocks whose output is no plain sum (norms
behind the residual links, as in OPT-350M; scaled outputs; sliced residual streams).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.closed_forms.output_refit import (
    RIDGE,
    refit_change,
    refit_operations,
)
from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.statistics.grams import add_product, add_upper_product, mirrored
from foldstack.compression.statistics.stream import BlockStream
from foldstack.compression.structure.architectures import (
    Architecture,
    architecture_of,
    base_config_of,
)
from foldstack.compression.structure.modeling_foldstack import (
    LowRankLinear,
    is_linear,
    sublayer_ends,
)
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import linear_shapes

Refit = Literal["none", "mlp_output", "residual"]
OUTPUTS = ("attention_output", "mlp_output")
IN_ORDER = (
    "a refit goes through the blocks in order, as update {needed} does; got update {given}: "
    "use update {needed}, or refit none"
)
HALVINGS = 3
"""Of a step behind a norm that does not make the error smaller."""


@dataclass(frozen=True)
class Sides:
    """Both models before one block, and the block in its compressed form."""

    dense: BlockStream
    deviated: BlockStream
    block: nn.Module
    pass_dense: Callable[[], None]
    """Lets the dense model pass the block, and those behind it that are gone."""


@dataclass(frozen=True)
class Fit:
    """How a linear is fitted."""

    target: Literal["mlp_output", "residual"]
    ridge: float = RIDGE
    """Over the mean of the Gram's diagonal."""
    by_output: bool = False
    """Only a map of what the linear writes may change, W' = T W (ReplaceMe), not all of W."""
    relative: bool = True
    """Errors count over the size of the token's residual stream."""


@dataclass(frozen=True)
class _Rows:
    """Of some tokens: what the linear reads and writes, and what is missing where that goes."""

    read: Float[Tensor, "tokens in"]
    written: Float[Tensor, "tokens out"]
    error: Float[Tensor, "tokens out"]


@dataclass(frozen=True)
class _Seen:
    """What one pass has shown of a linear with a norm behind it."""

    error: float
    """Sum over tokens of the squared error."""
    energy: Float64[Tensor, " out"]
    """Of each coordinate of the normed output, before its gain."""
    crossed: Float64[Tensor, " out"]
    """Sum over tokens of normed output times error."""


def refitted_outputs(
    model: PreTrainedModel, plan: Plan, position: int, sides: Sides, refit: Refit
) -> dict[str, Tensor]:
    """What changes of the block at `position` of `plan`, as a cut names it; in `sides.block`, too.

    Attention first, whose output the MLP reads. Afterwards the dense model has passed the block, or
    stands where it stood if nothing was fitted.
    """
    if refit == "none" or not adds_plainly(model, plan, position):
        return {}
    tensors: dict[str, Tensor] = {}
    for reads in OUTPUTS:
        name = next(s.name for s in architecture_of(model).linears if s.reads == reads)
        fitted = _fitted_module(sides.block, name)
        if fitted is None or (position, name) in plan.lenders:
            continue
        site = _Site(model, sides, reads, fitted, Fit(refit))
        for inside, tensor in site.fit().items():
            tensors[f"blocks.{position}.{inside}"] = tensor
    return tensors


def refitted_mlp(
    model: PreTrainedModel, position: int, sides: Sides, how: Fit
) -> dict[str, Tensor]:
    """The last linear of one MLP, and a norm behind it, as a cut names them at `position`.

    The block adds plainly (`adds_plainly`), and its linear is not put together from slices.
    """
    reads = "mlp_output"
    name = next(s.name for s in architecture_of(model).linears if s.reads == reads)
    linear = _fitted_module(sides.block, name)
    assert linear is not None
    fitted = _Site(model, sides, reads, linear, how).fit()
    return {f"blocks.{position}.{inside}": tensor for inside, tensor in fitted.items()}


def adds_plainly(model: PreTrainedModel, plan: Plan, position: int) -> bool:
    """Whether the block is a sum of what enters it and what its sublayers add, from linears that no
    other block uses."""
    block = plan.blocks[position]
    users = sum(plan.owner(other) == position for other in range(len(plan.blocks)))
    norms_before = getattr(base_config_of(model.config), "do_layer_norm_before", True)
    is_plain = block.has_attention and block.outputs == "plain" and block.sliced is None
    return is_plain and users == 1 and bool(norms_before)


def refit_arithmetic(model: PreTrainedModel, plan: Plan, num_tokens: int) -> Arithmetic:
    """Of fitting the outputs of every block, and of passing the blocks of both models for it."""
    shapes, architecture = linear_shapes(model), architecture_of(model)
    products = operations = 0.0
    blocks = architecture.blocks(model)
    for position in range(len(plan.blocks)):
        for site in architecture.linears:
            if site.reads in OUTPUTS and (position, site.name) in shapes:
                rows, width = shapes[position, site.name]
                normed = _norm_behind(blocks[position], site.reads) is not None
                products += num_tokens * (width**2 + 2.0 * rows * width)
                operations += refit_operations(rows, width, normed=normed)
    # Attention is a third of a block: it passes in both models, then the block twice in the
    # compressed model and once in the dense one. A norm behind asks for a look at the error.
    passes = 3.7 if _norm_behind(blocks[0], OUTPUTS[0]) is None else 5.4
    return Arithmetic(float64=operations, products=products, passes=passes, streams=2)


class _Site:
    """One linear of one block, and both models around it."""

    def __init__(
        self, model: PreTrainedModel, sides: Sides, reads: str, linear: Any, how: Fit
    ) -> None:
        self.sides, self.reads, self.linear, self.how = sides, reads, linear, how
        self.architecture: Architecture = architecture_of(model)
        self.norm = _norm_behind(sides.block, reads) if how.target == "residual" else None
        self.has_bias = linear.bias is not None

    def fit(self) -> dict[str, Tensor]:
        """Change the linear, and the norm behind it; their tensors by name inside the block."""
        if self.reads == "mlp_output" and self.how.target == "residual":
            self.sides.pass_dense()
        gram, crossed, seen = self._sums()
        gains = None if self.norm is None else _gains(self.norm)
        change = refit_change(
            gram, crossed, ridge=self.how.ridge, has_bias=self.has_bias, gains=gains
        )
        if self.how.by_output:
            change = self._through_output(change)
        if seen is None:
            self._move(change, 1.0)
        else:
            self._fit_gains(self._moved_as_far_as_it_helps(change, seen))
        names = {id(module): name for name, module in self.sides.block.named_modules()}
        changed = [self.linear] if self.norm is None else [self.linear, self.norm]
        return {
            f"{names[id(module)]}.{attribute}": parameter.detach().clone()
            for module in changed
            for attribute, parameter in module.named_parameters(recurse=False)
        }

    def _through_output(self, change: Tensor) -> Tensor:
        """D of x where D of W x + b was found: T = I + D comes before all that the linear is."""
        weight = self.architecture.weight(self.linear).detach().double()
        if not self.has_bias:
            return change @ weight
        moved = torch.cat([weight, self.linear.bias.detach().double()[:, None]], dim=1)
        moved = change[:, :-1] @ moved
        moved[:, -1] += change[:, -1]
        return moved

    def _move(self, change: Tensor, share: float) -> None:
        weight = self.architecture.weight(self.linear).detach()
        moved = weight.double() + share * change[:, : weight.shape[1]]
        stored = self.architecture.stored_weight(self.linear, moved.to(weight.dtype))
        self.linear.weight.data = stored
        if self.has_bias:
            bias = self.linear.bias.detach()
            self.linear.bias.data = (bias.double() + share * change[:, -1]).to(bias.dtype)

    def _moved_as_far_as_it_helps(self, change: Tensor, before: _Seen) -> _Seen:
        """What is seen then. The norm's scale of a token was held fixed, which is not true far
        away."""
        weight = self.linear.weight.data
        for halving in range(HALVINGS):
            self._move(change, 0.5**halving)
            seen = _together(_seen(rows) for rows in self._rows())
            if seen.error < before.error:
                return seen
            self.linear.weight.data = weight
        return before

    def _fit_gains(self, seen: _Seen) -> None:
        """Least squares of what is missing on the normed outputs, each coordinate by itself."""
        norm: Any = self.norm
        floor = torch.finfo(seen.energy.dtype).tiny
        moved = _gains(norm) + seen.crossed / (seen.energy * (1 + RIDGE)).clamp_min(floor)
        norm.weight.data = (moved - 1).to(norm.weight.dtype)

    def _sums(self) -> tuple[Tensor, Tensor, _Seen | None]:
        """Of x x^T and x e^T; and what is seen meanwhile, where a norm follows."""
        gram = crossed = torch.zeros(0)
        seen: list[_Seen] = []
        for rows in self._rows():
            if not len(gram):
                there: Any = {"dtype": torch.float64, "device": rows.read.device}
                width, out = rows.read.shape[1], rows.error.shape[1]
                gram, crossed = torch.zeros(width, width, **there), torch.zeros(width, out, **there)
            add_upper_product(gram, rows.read)
            add_product(crossed, rows.read, rows.error)
            if self.norm is not None:
                seen.append(_seen(rows))
        return mirrored(gram), crossed, _together(seen) if seen else None

    def _rows(self) -> Iterator[_Rows]:
        """Batch after batch, as the fit reads them: in float32 at least, a one for the bias, over
        the size of a token's output where a norm follows, and of its residual stream."""
        with _seen_by(self.linear) as seen:
            for error, stream in self._errors():
                read, written = (t.flatten(0, -2) for t in seen)
                precision = torch.promote_types(read.dtype, torch.float32)
                written = written.to(precision)
                read = written if self.how.by_output else read.to(precision)
                if self.has_bias:
                    read = nn.functional.pad(read, (0, 1), value=1.0)
                if self.norm is not None:
                    size = _size(written, _epsilon(self.norm))
                    read, written = read / size, written / size
                error = error.flatten(0, -2)
                if stream is not None and self.how.relative:
                    size = _size(stream.flatten(0, -2).to(precision))
                    read, written, error = read / size, written / size, error / size
                yield _Rows(read, written, error)

    def _errors(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What is missing, batch after batch, and the stream that it is missing from."""
        sides, device = self.sides, self.linear.weight.device
        if self.how.target == "residual" and self.reads == "mlp_output":
            both = sides.dense.batches(), sides.deviated.outputs(sides.block)
            for target, output in zip(*both, strict=True):
                target = target.to(device)
                yield _wide(target) - _wide(output), target
            return
        dense_block = sides.deviated.blocks[sides.deviated.position]
        if self.how.target == "mlp_output":
            name = next(s.name for s in self.architecture.linears if s.reads == self.reads)
            ends = [block.get_submodule(name) for block in (dense_block, sides.block)]
        else:
            ends = [sublayer_ends(block)[0] for block in (dense_block, sides.block)]
        added = (
            sides.dense.outputs(dense_block, until=ends[0]),
            sides.deviated.outputs(sides.block, until=ends[1]),
        )
        if self.how.target == "mlp_output":
            for target, output in zip(*added, strict=True):
                yield _wide(target) - _wide(output), None
            return
        entering = sides.dense.batches(), sides.deviated.batches()
        for target, output, before, now in zip(*added, *entering, strict=True):
            stream = _wide(before.to(device)) + _wide(target)
            yield stream - _wide(now.to(device)) - _wide(output), stream


def _seen(rows: _Rows) -> _Seen:
    normed, error = rows.written.double(), rows.error.double()
    return _Seen(float(error.square().sum()), normed.square().sum(0), (normed * error).sum(0))


def _together(parts: Iterable[_Seen]) -> _Seen:
    errors, energies, crossed = zip(*((p.error, p.energy, p.crossed) for p in parts), strict=True)
    return _Seen(math.fsum(errors), torch.stack(energies).sum(0), torch.stack(crossed).sum(0))


def _fitted_module(block: nn.Module, name: str) -> nn.Module | None:
    """What of a linear is fitted: all of it, or its second factor; nothing of one from slices."""
    linear = block.get_submodule(name)
    if isinstance(linear, LowRankLinear):
        return linear.second
    return linear if is_linear(linear) else None


def _norm_behind(block: nn.Module, reads: str) -> nn.Module | None:
    """The norm between what a sublayer computes and the residual stream (Gemma 2 and 3)."""
    if not hasattr(block, "post_feedforward_layernorm"):
        return None
    return sublayer_ends(block)[OUTPUTS.index(reads)]


def _gains(norm: nn.Module) -> Tensor:
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return 1 + weight.detach().double()  # as Gemma's norms have it


def _epsilon(norm: Any) -> float:
    return float(norm.eps)


def _size(rows: Float[Tensor, "tokens width"], epsilon: float = 1e-12) -> Tensor:
    return (rows.square().mean(1, keepdim=True) + epsilon).sqrt()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def _seen_by(linear: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the list holds what the linear has read and written last."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = args[0].detach(), output.detach()

    handle = linear.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
