"""UIDL (shortgpt_family.md, acceptance tests 2, 3, 6, 9)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.removal.uidl import Uidl
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.size import count_parameters
from foldstack.compression.structure.surgery import Cut, build_on_meta, cut, plan_of


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, {"similarity"})
    return Evidence(windows, statistics, rank_blocks(statistics))


def share_of_blocks(model: Any, count: int) -> float:
    block = architecture_of(model).blocks(model)[0]
    return count * count_parameters(block) / count_parameters(model)


def silence(model: Any, positions: tuple[int, ...]) -> None:
    family = architecture_of(model)
    with torch.no_grad():
        for position in positions:
            for parameter in family.blocks(model)[position].parameters():
                if parameter.ndim > 1:
                    parameter.zero_()
            for name, parameter in family.blocks(model)[position].named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()


def test_a_run_that_does_nothing_goes_and_nothing_is_lost(
    architecture: str, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    silence(model, (1, 2))
    change = Uidl(sparsity=share_of_blocks(model, 2)).compress(model, evidence_of(model, windows))
    assert change.plan.removed_blocks == (1, 2)
    smaller = cut(model, change)
    assert type(smaller) is type(model)  # a native checkpoint
    with torch.no_grad():
        torch.testing.assert_close(
            smaller(windows).logits, model(windows).logits, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_exactly_the_run_of_least_angle_is_removed(
    tiny_model: Any, windows: Tensor, length: int
) -> None:
    """Brute force: the last token's hidden states, before the final norm."""
    model = tiny_model("llama", num_hidden_layers=6)
    boundaries: list[Tensor] = [model.model.embed_tokens(windows).detach()]
    for block in model.model.layers:
        block.register_forward_hook(lambda _m, _a, output: boundaries.append(output))
    with torch.no_grad():
        model(windows, use_cache=False)
    last = [hidden[:, -1].double() for hidden in boundaries[:7]]

    def distance(start: int) -> float:
        cosine = torch.cosine_similarity(last[start], last[start + length], dim=-1)
        return float((cosine.arccos() / math.pi).mean())

    starts = range(6 - length)  # the last block is protected
    expected = min(starts, key=distance)
    evidence = evidence_of(model, windows)
    assert evidence.ranking.run_angle(length)[expected] == pytest.approx(distance(expected))
    plan = Uidl(sparsity=share_of_blocks(model, length)).compress(model, evidence).plan
    assert plan.removed_blocks == tuple(range(expected, expected + length))


def test_the_last_block_goes_only_when_asked(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    silence(model, (3,))
    evidence = evidence_of(model, windows)
    one = share_of_blocks(model, 1)
    assert 3 not in Uidl(sparsity=one).compress(model, evidence).plan.removed_blocks
    unprotected = Uidl(sparsity=one, protect_last=0)
    assert unprotected.compress(model, evidence).plan.removed_blocks == (3,)


def test_the_deepest_run_is_the_outline_and_needs_no_data(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("qwen2", num_hidden_layers=6)
    silence(model, (1, 2))
    method = Uidl(sparsity=share_of_blocks(model, 2), run="deepest")
    change = method.compress(model, evidence_of(model, windows))
    assert change.plan == method.outline(build_on_meta(model.config))
    assert change.plan.removed_blocks == (3, 4)
    smaller = cut(model, change)
    for new, old in enumerate(change.inherits):
        assert old is not None
        for name, tensor in model.model.layers[old].state_dict().items():
            assert torch.equal(smaller.model.layers[new].state_dict()[name], tensor)


def test_protecting_everything_is_refused(tiny_model: Any) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="protect_first 2 and protect_last 2 for 4 blocks"):
        Uidl(sparsity=0.2, protect_first=2, protect_last=2).outline(model)
    with pytest.raises(InputError, match="2 of 4 blocks"):
        Uidl(sparsity=0.6, protect_first=1).outline(model)


def test_a_run_of_small_blocks_is_passed_over(tiny_model: Any, windows: Tensor) -> None:
    """Blocks 1 and 2 share their linears: to remove one of them saves next to nothing."""
    model = tiny_model("llama", num_hidden_layers=5)
    plan = plan_of(model).share(1, [2])
    shared = cut(model, Cut(plan, tuple(range(5))))
    with torch.no_grad():
        for parameter in shared.model.model.layers[1].parameters():
            if parameter.ndim > 1:
                parameter.zero_()  # so that both shared blocks do nothing
    method = Uidl(sparsity=share_of_blocks(model, 1))
    change = method.compress(shared, evidence_of(shared, windows))
    removed = 1 - count_parameters(cut(shared, change)) / count_parameters(shared)
    assert removed >= method.sparsity - 0.005


def test_seven_and_five_blocks_of_llama_3_8b() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = build_on_meta(config)
    assert len(Uidl(sparsity=0.19).outline(model).blocks) == 25
    assert len(Uidl(sparsity=0.136).outline(model).blocks) == 27
