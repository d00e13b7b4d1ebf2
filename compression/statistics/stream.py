"""Run a model's blocks one after another over all windows, each block once for the whole data.

Between blocks only the hidden states live, on the CPU or in a file: whoever needs activations of
every block (Grams, a sequential compression) holds one block's at a time, whatever the depth. The
arguments that a block takes besides the hidden states (its attention mask, position embeddings,
position ids) are what the model itself passes, recorded, so nothing here knows an architecture.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.statistics.hidden_states import MEMORY_BYTES, HiddenStates, file_name
from foldstack.compression.structure.architectures import (
    architecture_of,
    base_config_of,
    stock_of,
)
from foldstack.compression.structure.modeling_foldstack import Borrowed, SlicedLinear
from foldstack.compression.structure.surgery import plan_of

logger = logging.getLogger(__name__)

BATCH_SIZE = 8
"""Windows that pass a block at once."""

Hidden = Float[Tensor, "batch tokens hidden"]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _PrefixDone(Exception):
    """Ends a forward pass once the blocks have received their arguments."""


class _Reached(Exception):
    """Ends a block's forward pass behind the module that was asked for."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


class BlockStream:
    """All windows, standing before block `position`.

    Windows have one length and no padding, so the blocks' arguments depend on the batch's size
    alone and are recorded once per size.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Int[Tensor, "windows tokens"],
        *,
        batch_size: int = BATCH_SIZE,
        dtype: torch.dtype | None = None,
        memory_bytes: int = MEMORY_BYTES,
        folder: Path | None = None,
        name: str | None = None,
    ) -> None:
        """Embed all windows.

        Args:
            dtype: precision of the hidden states and, while it runs, of each block; default: the
                model's own.
            memory_bytes: what the hidden states before and behind a block may take of memory
                together; beyond that they are in files.
            folder: where those are; by default where the system keeps temporary files.
            name: the hidden states are in files in `folder` that stay and start with it, so that
                another process can `resume` from those that enter a block.

        Raises:
            InputError: there are no windows, or they are longer than the model's positions.
        """
        if 0 in windows.shape:
            raise InputError(f"calibration needs at least one window, got {tuple(windows.shape)}")
        longest = getattr(base_config_of(model.config), "max_position_embeddings", None)
        if longest is not None and windows.shape[1] > longest:
            raise InputError(
                f"windows must fit the model's {longest} positions, got {windows.shape[1]} tokens; "
                "use shorter windows"
            )
        assert not model.training, (
            "statistics and targets are those of inference: call model.eval()"
        )
        self.model = model
        self.blocks = architecture_of(model).blocks(model)
        self.windows = windows
        self.batch_size = batch_size
        self.position = 0
        self._dtype = dtype
        self._memory_bytes = memory_bytes // 2
        self._folder = folder or Path(tempfile.gettempdir())
        self._name = name
        self._returns_tuple = _returns_tuple(model, self.blocks, windows)
        self._arguments: dict[int, list[Arguments]] = {}
        self.states = self._kept(map(self._embedded, torch.split(windows, batch_size)), 0)
        """The input of block `position`."""

    @property
    def hidden(self) -> list[Hidden]:
        """The input of block `position`, per batch, on the CPU."""
        return list(torch.split(self.states.all, self.batch_size))

    def batches(self) -> Iterator[Hidden]:
        """`hidden` one after the other, of which those in a file leave memory again."""
        for hidden in self.hidden:
            yield hidden
            self.states.let_go()

    def call(
        self, block: nn.Module, hidden: Hidden, position: int | None = None
    ) -> Float[Tensor, "batch tokens leaving"]:
        """`block` on some windows' hidden states with the model's own arguments for `position`.

        Any number of windows works, also one that no batch has.
        """
        position = self.position if position is None else position
        args, kwargs = self._arguments_for(len(hidden))[position]
        device = _device_of(self.model)
        args, kwargs = _match_dtype((args, kwargs), hidden.dtype)
        output = block(hidden.to(device), *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def outputs(
        self, block: nn.Module | None = None, *, until: nn.Module | None = None
    ) -> Iterator[Hidden]:
        """The block's output for every batch in turn; the stream stays where it is.

        With `until`, a module inside the block, it is that module's output, and what comes behind
        it is not computed.
        """
        block = self.blocks[self.position] if block is None else block
        with _computing_in(block, self._dtype), _ending_at(until):
            for hidden in self.batches():
                with torch.no_grad():
                    try:
                        output = self.call(block, hidden)
                    except _Reached as reached:
                        output = reached.output
                yield output

    def advance(
        self,
        block: nn.Module | None = None,
        *,
        beside: "BlockStream | None" = None,
        to: int | None = None,
    ) -> None:
        """Pass the block at `position`, or `block` in its place, and stand before the next one, or
        before block `to` where those between are gone.

        `beside`, another stream of the same windows that stands before the same block, runs each
        batch through it right after this one has, and stays where it is.
        """
        outputs = self.outputs(block)
        if beside is not None:
            outputs = (out for out, _ in zip(outputs, beside.outputs(block), strict=True))
        to = self.position + 1 if to is None else to
        self.states = self._kept(outputs, to)
        self.position = to

    def put(self, batches: Iterable[Hidden], position: int = 0) -> None:
        """Stand before block `position` with these hidden states, in the order of the windows."""
        self.states = self._kept(batches, position)
        self.position = position

    def resume(self, position: int) -> None:
        """Stand before block `position`, with the hidden states that another process has left."""
        assert self._name is not None
        num_windows, num_tokens = self.windows.shape
        file, dtype = self._folder / file_name(self._name, position), self.states.all.dtype
        self.states = HiddenStates.reopened(file, (num_windows, num_tokens), dtype)
        self.position = position

    def _kept(self, batches: Iterable[Hidden], position: int) -> HiddenStates:
        states, start = None, 0
        for batch in batches:
            if states is None:
                states = HiddenStates(
                    (len(self.windows), *batch.shape[1:]),
                    self._dtype or batch.dtype,
                    memory_bytes=self._memory_bytes,
                    folder=self._folder,
                    name=None if self._name is None else file_name(self._name, position),
                )
            states.all[start : start + len(batch)] = batch
            states.let_go()
            start += len(batch)
        assert states is not None
        return states

    def _embedded(self, tokens: Int[Tensor, "batch tokens"]) -> Hidden:
        if len(tokens) in self._arguments:
            return _first_input(self.model, self.blocks, tokens)
        self._arguments[len(tokens)], hidden = _recorded_arguments(
            self.model, self.blocks, tokens, self._returns_tuple
        )
        return hidden

    def _arguments_for(self, num_windows: int) -> list[Arguments]:
        if num_windows not in self._arguments:
            tokens = self.windows[:1].expand(num_windows, -1)
            recorded, _ = _recorded_arguments(self.model, self.blocks, tokens, self._returns_tuple)
            self._arguments[num_windows] = recorded
        return self._arguments[num_windows]


def cpu_precision(model: PreTrainedModel) -> torch.dtype | None:
    """float32 for a model of half precision on a CPU, most of which multiply in it at a tenth of
    the speed; None, the model's own precision, for all others."""
    is_half = model.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if is_half and model.device.type == "cpu" else None


def tensors_of(block: nn.Module) -> Iterator[Tensor]:
    """What a block computes with: its own parameters and buffers, and those that it borrows."""
    for module in block.modules():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        if isinstance(module, Borrowed):
            yield from tensors_of(module.target)
        elif isinstance(module, SlicedLinear):
            for lender in module.lenders:
                yield from tensors_of(lender.target)


@contextmanager
def _computing_in(block: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the tensors of `block` are copies in `dtype`, one block's worth of memory."""
    tensors = {id(t): t for t in tensors_of(block) if t.is_floating_point()}
    stored = {key: t.data for key, t in tensors.items() if dtype not in (None, t.dtype)}
    for key, data in stored.items():
        tensors[key].data = data.to(dtype)
    try:
        yield
    finally:
        for key, data in stored.items():
            tensors[key].data = data


@contextmanager
def _ending_at(module: nn.Module | None) -> Iterator[None]:
    """Inside, a pass through `module` ends behind it."""
    if module is None:
        yield
        return

    def end(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(end)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def starting_at(
    model: nn.Module, position: int, hidden_states: Callable[[], Tensor]
) -> Iterator[None]:
    """Inside, `model(tokens)` skips blocks 0 ... position - 1: `hidden_states()` enters block
    `position`.

    What comes after the blocks (final norm, head, soft caps) stays the model's own business.
    """
    blocks = architecture_of(model).blocks(model)
    probe = torch.zeros(1, 2, dtype=torch.long)
    returns_tuple = _returns_tuple(model, blocks, probe)

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        given, args, kwargs = _take_hidden(args, kwargs)
        return (hidden_states().to(given.device, given.dtype), *args), kwargs

    handle = blocks[position].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with _replaced_forwards(blocks[:position], _passing_through(returns_tuple)):
            yield
    finally:
        handle.remove()


@contextmanager
def skipping(model: nn.Module, positions: Iterable[int]) -> Iterator[None]:
    """Inside, the blocks at `positions` pass on what enters them, as if they were removed.

    Uses nest, also with `starting_at`. Not for decoding from a cache, which would miss their keys.
    """
    positions = sorted(set(positions))
    blocks = architecture_of(model).blocks(model)
    returns_tuple = _returns_tuple(model, blocks, torch.zeros(1, 2, dtype=torch.long))
    skipped = [blocks[position] for position in positions]
    flags = [returns_tuple[position] for position in positions]
    with _replaced_forwards(skipped, _passing_through(flags)):
        yield


@contextmanager
def replacing(model: nn.Module, others: Mapping[int, nn.Module]) -> Iterator[None]:
    """Inside, the block at each of these positions is run by another one, which returns what such a
    block returns.

    Uses nest, also with `starting_at` and `skipping`. Not for decoding from a cache.
    """
    blocks = architecture_of(model).blocks(model)
    positions = sorted(others)
    with _replaced_forwards(
        [blocks[position] for position in positions],
        lambda index: others[positions[index]].__call__,
    ):
        yield


def _passing_through(returns_tuple: Sequence[bool]) -> Callable[[int], Callable[..., Any]]:
    def forward_of(position: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, _, _ = _take_hidden(args, kwargs)
            return (hidden,) if returns_tuple[position] else hidden

        return forward

    return forward_of


@contextmanager
def _replaced_forwards(
    blocks: Sequence[nn.Module] | nn.ModuleList, forward_of: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    # The instance attribute shadows the class's forward: the module keeps every attribute that the
    # model may read from its blocks, and nothing in the module tree moves.
    before = [vars(block).get("forward") for block in blocks]
    for position, block in enumerate(blocks):
        block.forward = forward_of(position)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _recorded_arguments(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: Int[Tensor, "batch tokens"],
    returns_tuple: Sequence[bool],
) -> tuple[list[Arguments], Hidden]:
    """What the model passes to each block for such a batch, and the input of the first."""
    recorded: list[Arguments] = []
    first: list[Tensor] = []

    def forward_of(position: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _take_hidden(args, kwargs)
            first.append(hidden)
            recorded.append((args, kwargs))
            if position == len(blocks) - 1:
                raise _PrefixDone  # before the head, which is the dearest part of a small model
            return (hidden,) if returns_tuple[position] else hidden

        return forward

    with _replaced_forwards(blocks, forward_of):
        _run_until_done(model, tokens)
    return recorded, first[0]


def _first_input(
    model: nn.Module, blocks: nn.ModuleList, tokens: Int[Tensor, "batch tokens"]
) -> Hidden:
    caught: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(_take_hidden(args, kwargs)[0])
        raise _PrefixDone

    handle = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        _run_until_done(model, tokens)
    finally:
        handle.remove()
    return caught[0]


_SEEN: dict[tuple[type[nn.Module], type[nn.Module]], bool] = {}


def _returns_tuple(
    model: nn.Module, blocks: nn.ModuleList, windows: Int[Tensor, "windows tokens"]
) -> list[bool]:
    """Per block, whether its forward returns a tuple; seen on two tokens of one window.

    One block of each class is run and says it for all, in this model and in others of its class, so
    that the weights of the others are not read. In a sliced model, whose hidden states change their
    width, all are.
    """
    kinds = [(type(stock_of(model)), type(block)) for block in blocks]
    if all(kind in _SEEN for kind in kinds):
        return [_SEEN[kind] for kind in kinds]
    run_all = plan_of(model).is_sliced
    forwards = [block.forward for block in blocks]

    def forward_of(position: int) -> Callable[..., Any]:
        kind = kinds[position]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if run_all or kind not in _SEEN:
                output = forwards[position](*args, **kwargs)
                _SEEN[kind] = isinstance(output, tuple)
            else:
                hidden, _, _ = _take_hidden(args, kwargs)
                output = (hidden,) if _SEEN[kind] else hidden
            if position == len(blocks) - 1:
                raise _PrefixDone
            return output

        return forward

    with _replaced_forwards(blocks, forward_of):
        _run_until_done(model, windows[:1, :2])
    return [_SEEN[kind] for kind in kinds]


def _run_until_done(model: nn.Module, tokens: Int[Tensor, "batch tokens"]) -> None:
    try:
        with torch.no_grad():
            model(tokens.to(_device_of(model), torch.long), use_cache=False)
    except _PrefixDone:
        return
    raise AssertionError("the model did not call its blocks in order")


def _take_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), args, kwargs


def _match_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors among a block's arguments in `dtype`: a block trained in float32 inside a
    bfloat16 model needs its mask and rotary tables in float32."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != dtype else value
    if isinstance(value, tuple):
        return tuple(_match_dtype(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _match_dtype(item, dtype) for key, item in value.items()}
    return value


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
