"""Streaming block by block is the model's own forward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foldstack.compression.errors import InputError
from foldstack.compression.statistics.stream import BlockStream, skipping, starting_at
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.surgery import Cut, cut, plan_of


@pytest.fixture
def windows() -> Tensor:
    # Longer than the sliding windows of 16, and a last batch that is smaller than the others.
    return torch.randint(97, (5, 24), generator=torch.Generator().manual_seed(0)).int()


def head_of(model: nn.Module, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Logits from the last block's output, by the model's own tail."""
    blocks = architecture_of(model).blocks(model)
    handle = blocks[-1].register_forward_hook(lambda *_: hidden)
    with torch.no_grad():
        logits = model(tokens.long(), use_cache=False).logits
    handle.remove()
    return logits


def test_streaming_every_block_gives_the_models_logits(
    architecture: str, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    stream = BlockStream(model, windows, batch_size=2)
    while stream.position < len(stream.blocks):
        stream.advance()
    with torch.no_grad():
        expected = model(windows.long(), use_cache=False).logits
    got = torch.cat(
        [head_of(model, h, t) for h, t in zip(stream.hidden, windows.split(2), strict=True)]
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_a_block_gets_its_own_attention_type(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("gemma3_text")
    stream = BlockStream(model, windows, batch_size=5)
    hidden = stream.hidden[0]
    sliding = stream.call(stream.blocks[0], hidden, position=0)
    full = stream.call(stream.blocks[0], hidden, position=1)
    assert (sliding - full).abs().max() > 1e-3


class TupleBlock(nn.Module):
    """A block of the older kind, which wraps its output in a tuple and takes its input by name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        return (self.inner(hidden_states, **kwargs),)


class OldStyle(nn.Module):
    """The stack of a Llama model, called the older way."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model.model, model.config
        self.lm_head = model.lm_head
        self.model.layers = nn.ModuleList(TupleBlock(block) for block in self.model.layers)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.model.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        rotary = self.model.rotary_emb(hidden, positions)
        for block in self.model.layers:
            hidden = block(hidden_states=hidden, position_embeddings=rotary)[0]
        return self.lm_head(self.model.norm(hidden))


def test_blocks_that_return_tuples_and_take_keywords_stream_too(
    tiny_model: Any, windows: Tensor
) -> None:
    expected = tiny_model("llama")(windows.long()).logits.detach()
    model = OldStyle(tiny_model("llama")).eval()
    stream = BlockStream(model, windows, batch_size=2)
    while stream.position < len(stream.blocks):
        stream.advance()
    with torch.no_grad():
        got = model.lm_head(model.model.norm(torch.cat(stream.hidden)))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_another_block_may_stand_in(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    stream = BlockStream(model, windows, batch_size=2)
    before = torch.cat(stream.hidden)
    stream.advance(_Double())
    torch.testing.assert_close(torch.cat(stream.hidden), 2 * before)


class _Double(nn.Module):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * hidden_states


def test_the_model_is_as_before(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("gemma2")
    expected = model(windows.long()).logits
    BlockStream(model, windows).advance()
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(not module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model(windows.long()).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("position", [0, 2])
def test_starting_at_a_block_gives_the_same_logits(
    architecture: str, tiny_model: Any, windows: Tensor, position: int
) -> None:
    model = tiny_model(architecture)
    stream = BlockStream(model, windows, batch_size=5)
    while stream.position < position:
        stream.advance()
    expected = model(windows.long(), use_cache=False).logits
    with starting_at(model, position, lambda: stream.hidden[0]):
        got = model(windows.long(), use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
def test_no_windows_is_a_clear_mistake(tiny_model: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="at least one window"):
        BlockStream(tiny_model("llama"), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_windows_longer_than_the_model_are_refused(tiny_model: Any, architecture: str) -> None:
    with pytest.raises(InputError, match="128"):
        BlockStream(tiny_model(architecture), torch.zeros(2, 129, dtype=torch.long))


@pytest.mark.parametrize("gone", [(1,), (0, 1, 3)])
def test_skipped_blocks_are_as_good_as_removed(
    architecture: str, tiny_model: Any, windows: Tensor, gone: tuple[int, ...]
) -> None:
    model = tiny_model(architecture)
    survivors = tuple(position for position in range(4) if position not in gone)
    removed = cut(model, Cut(plan_of(model).keep(survivors), survivors))
    with torch.no_grad():
        before = model(windows.long(), use_cache=False).logits
        with skipping(model, gone[:1]), skipping(model, gone):
            got = model(windows.long(), use_cache=False).logits
        after = model(windows.long(), use_cache=False).logits
        torch.testing.assert_close(got, removed(windows.long(), use_cache=False).logits)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all("forward" not in vars(module) for module in model.modules())


def test_skipping_and_starting_at_nest(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("gemma3_text")
    stream = BlockStream(model, windows)
    stream.advance()
    stream.advance()
    with torch.no_grad():
        with skipping(model, [2]):
            expected = model(windows.long(), use_cache=False).logits
        with skipping(model, [2]), starting_at(model, 2, lambda: stream.hidden[0]):
            got = model(windows.long(), use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
