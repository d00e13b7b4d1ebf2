"""ShortGPT (shortgpt_family.md, acceptance tests 2, 6, 9)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.removal.shortgpt import ShortGpt
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.size import size_of, sparsity_between
from foldstack.compression.structure.surgery import cut, plan_of


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, {"similarity"})
    return Evidence(windows, statistics, rank_blocks(statistics))


def share_of_blocks(model: Any, count: int) -> float:
    """The fraction of the parameters that `count` blocks hold."""
    block = architecture_of(model).blocks(model)[0]
    size = sum(parameter.numel() for parameter in block.parameters())
    return count * size / size_of(model).parameters


def silence(model: Any, positions: tuple[int, ...]) -> None:
    """Make these blocks add nothing to the residual stream."""
    family = architecture_of(model)
    with torch.no_grad():
        for position in positions:
            for site in family.linears:
                for parameter in (
                    family.blocks(model)[position].get_submodule(site.name).parameters()
                ):
                    parameter.zero_()


def test_blocks_that_do_nothing_go_first_and_nothing_is_lost(
    architecture: str, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    silence(model, (0, 2))  # not next to each other
    method = ShortGpt(sparsity=share_of_blocks(model, 2))
    change = method.compress(model, evidence_of(model, windows))
    assert change.plan.removed_blocks == (0, 2)
    smaller = cut(model, change)
    with torch.no_grad():
        torch.testing.assert_close(
            smaller(windows).logits, model(windows).logits, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(("share", "expected"), [(1.0, 1), (1.01, 2), (0.2, 1), (2.5, 3)])
def test_as_few_blocks_as_the_sparsity_needs(
    tiny_model: Any, windows: Tensor, share: float, expected: int
) -> None:
    model = tiny_model("llama")
    one = share_of_blocks(model, 1)
    # 1.01 blocks are within half a percent of the model of 1 block when a block is 20 % of it.
    expected = 1 if share == 1.01 else expected
    plan = ShortGpt(sparsity=share * one).compress(model, evidence_of(model, windows)).plan
    assert len(plan.removed_blocks) == expected


def test_survivors_are_the_same_bytes(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("qwen2")
    method = ShortGpt(sparsity=share_of_blocks(model, 1))
    change = method.compress(model, evidence_of(model, windows))
    assert change.tensors == {}
    smaller = cut(model, change)
    for new, old in enumerate(change.inherits):
        assert old is not None
        for name, tensor in model.model.layers[old].state_dict().items():
            assert torch.equal(smaller.model.layers[new].state_dict()[name], tensor)


def test_protected_blocks_stay(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    silence(model, (0, 3))
    evidence = evidence_of(model, windows)
    method = ShortGpt(sparsity=share_of_blocks(model, 2), protect_first=1, protect_last=1)
    assert method.compress(model, evidence).plan.removed_blocks == (1, 2)
    with pytest.raises(InputError, match="2 of 4 blocks"):
        ShortGpt(sparsity=0.6, protect_first=1, protect_last=1).outline(model)
    with pytest.raises(InputError, match="protect_first 2 and protect_last 2"):
        ShortGpt(sparsity=0.2, protect_first=2, protect_last=2).outline(model)


def test_a_ranking_of_another_model_is_refused(tiny_model: Any, windows: Tensor) -> None:
    evidence = evidence_of(tiny_model("llama", num_hidden_layers=3), windows)
    with pytest.raises(InputError, match="4 blocks; got one of 3"):
        ShortGpt(sparsity=0.2).compress(tiny_model("llama"), evidence)


def test_a_cut_model_can_be_cut_again(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("gemma3_text")
    one = share_of_blocks(model, 1)
    once = cut(model, ShortGpt(sparsity=one).compress(model, evidence_of(model, windows)))
    again = ShortGpt(sparsity=share_of_blocks(once, 1))
    twice = cut(once, again.compress(once, evidence_of(once, windows)))
    assert len(plan_of(twice).blocks) == 2
    assert sparsity_between(size_of(model), size_of(twice)) == pytest.approx(2 * one)


def test_nine_blocks_of_llama_2_7b() -> None:
    from transformers import LlamaConfig

    from foldstack.compression.structure.surgery import build_on_meta

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = build_on_meta(config)
    assert len(ShortGpt(sparsity=0.2703).outline(model).blocks) == 23
    assert len(ShortGpt(sparsity=0.28).outline(model).blocks) == 22
