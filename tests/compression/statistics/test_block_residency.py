"""Blocks that are on the device in their turn. The "device" here is memory of its own."""

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from foldstack.compression.statistics.block_residency import run_blocks_in_turn
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.stream import BlockStream
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.surgery import Cut, cut, plan_of

TinyModel = Callable[..., PreTrainedModel]


def places(model: PreTrainedModel) -> list[int]:
    """Where the first tensor of each block is."""
    blocks = architecture_of(model).blocks(model)
    return [next(block.parameters()).data_ptr() for block in blocks]


def test_a_model_computes_the_same_with_one_block_away_from_home(
    tiny_model: TinyModel, architecture: str
) -> None:
    model = tiny_model(architecture)
    tokens = torch.arange(48).view(2, 24)
    with torch.no_grad():
        expected = model(tokens).logits
        run_blocks_in_turn(model, "cpu")
        at_home = places(model)
        for _ in range(2):
            assert torch.equal(model(tokens).logits, expected)
            assert [a == b for a, b in zip(places(model), at_home, strict=True)] == [
                *[True] * (len(at_home) - 1),
                False,
            ]


def test_a_pass_in_another_precision_leaves_no_block_in_it(tiny_model: TinyModel) -> None:
    """On a CPU half precision computes in float32, block by block: a block that came as a copy in
    float32 went home as one, and the head met hidden states of another precision than its own."""
    model = tiny_model("llama").bfloat16()
    tokens = torch.arange(48).view(2, 24)
    with torch.no_grad():
        expected = model(tokens).logits
        run_blocks_in_turn(model, "cpu")
        model(tokens)  # the last block is there, the others come in float32
        at_home = places(model)
        stream = BlockStream(model, tokens, batch_size=2, dtype=torch.float32)
        for _ in range(2):
            stream.advance()
        assert places(model)[0] == at_home[0]
        assert torch.equal(model(tokens).logits, expected)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_shared_weights_come_with_their_borrower(tiny_model: TinyModel) -> None:
    dense = tiny_model("llama")
    shared = cut(dense, Cut(plan_of(dense).share(1, [2, 3]), (0, 1, 2, 3)))
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        expected = shared(tokens).logits
        run_blocks_in_turn(shared, "cpu")
        assert torch.equal(shared(tokens).logits, expected)
        # Block 3 ran last, and what it borrows of block 1 is where it ran.
        owner, borrower = (architecture_of(shared).blocks(shared)[p] for p in (1, 3))
        home = owner.mlp.up_proj.weight.data_ptr()
        assert borrower.mlp.up_proj.weight.data_ptr() == home
        shared.model.model.layers[0](torch.randn(1, 4, 32), position_embeddings=_still(4))
        assert owner.mlp.up_proj.weight.data_ptr() != home


def _still(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables that rotate nothing, for heads of 8."""
    return torch.ones(1, tokens, 8), torch.zeros(1, tokens, 8)


def test_what_is_written_away_from_home_comes_home(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    tokens = torch.arange(24)[None]
    run_blocks_in_turn(model, "cpu")
    with torch.no_grad():
        model(tokens)
        last = architecture_of(model).blocks(model)[-1]
        last.mlp.down_proj.weight.zero_()
        model(tokens)  # the last block goes when the first one comes, and comes again
        assert not last.mlp.down_proj.weight.any()


def test_a_copied_block_runs_with_its_own_weights(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    tokens = torch.arange(24)[None]
    run_blocks_in_turn(model, "cpu")
    with torch.no_grad():
        before = model(tokens).logits
        copied = copy.deepcopy(model)
        for parameter in architecture_of(copied).blocks(copied).parameters():
            parameter.zero_()
        assert not torch.equal(copied(tokens).logits, before)
        assert torch.equal(model(tokens).logits, before)


def test_statistics_are_the_same(tiny_model: TinyModel) -> None:
    model = tiny_model("qwen3")
    windows = torch.randint(0, 90, (5, 16), generator=torch.Generator().manual_seed(0))
    plain = gather(model, windows, {"gram", "similarity"}, batch_size=2)
    run_blocks_in_turn(model, "cpu")
    in_turn = gather(model, windows, {"gram", "similarity"}, batch_size=2)
    assert torch.equal(plain.similarity, in_turn.similarity)
    for key in plain.grams:
        assert torch.equal(plain.gram(*key), in_turn.gram(*key))
