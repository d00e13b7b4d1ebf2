"""MKA (mka.md, acceptance tests 1, 2, 5-8)."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.removal import mka
from foldstack.compression.methods.removal.manifold import similarity_of_layers
from foldstack.compression.methods.removal.merging import Trial, untouched
from foldstack.compression.methods.removal.mka import Mka, block_outputs, released_share
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.statistics.stream import BlockStream
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.size import count_parameters
from foldstack.compression.structure.surgery import Cut, build_on_meta, cut, plan_of


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (14, 12), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, {"similarity"})
    return Evidence(windows, statistics, rank_blocks(statistics))


def share_of_blocks(model: Any, count: int) -> float:
    block = architecture_of(model).blocks(model)[0]
    return count * count_parameters(block) / count_parameters(model)


def loss(model: Any, windows: Tensor) -> float:
    with torch.no_grad():
        return float(model(windows, labels=windows).loss)


def without(model: Any, gone: int) -> Any:
    survivors = tuple(p for p in range(len(plan_of(model).blocks)) if p != gone)
    return cut(model, Cut(plan_of(model).keep(survivors), survivors))


def merge_one(model: Any, windows: Tensor, **settings: Any) -> Cut:
    """Of four blocks only 1 and 2 may merge."""
    method = Mka(sparsity=share_of_blocks(model, 1), **settings)
    return method.compress(model, evidence_of(model, windows))


def test_every_parameter_of_the_kept_block_is_the_weighted_mean(
    architecture: str, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    change = merge_one(model, windows, weight=0.7)
    assert change.inherits == (0, 1, 3)
    family = architecture_of(model)
    smaller = cut(model, change)
    assert type(smaller) is type(model)
    first, second = (dict(family.blocks(model)[p].named_parameters()) for p in (1, 2))
    for name, got in family.blocks(smaller)[1].named_parameters():
        torch.testing.assert_close(got, 0.7 * first[name] + 0.3 * second[name], rtol=0, atol=1e-6)
        assert not torch.equal(got, first[name])  # the released code fails this
        assert not torch.equal(got, second[name])
    for new, old in ((0, 0), (2, 3)):
        kept = dict(family.blocks(model)[old].named_parameters())
        for name, got in family.blocks(smaller)[new].named_parameters():
            assert torch.equal(got, kept[name])


def test_shares_of_1_and_0_delete_one_of_the_two(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("qwen3")
    for share, gone in ((1.0, 2), (0.0, 1)):
        smaller = cut(model, merge_one(model, windows, weight=share))
        with torch.no_grad():
            torch.testing.assert_close(
                smaller(windows).logits, without(model, gone)(windows).logits, rtol=0, atol=0
            )


@pytest.mark.parametrize("weight", ["line_search", "similarity", "released", 0.3])
def test_equal_blocks_merge_to_their_weights(
    tiny_model: Any, windows: Tensor, weight: str | float
) -> None:
    model = tiny_model("llama")
    model.model.layers[2].load_state_dict(model.model.layers[1].state_dict())
    smaller = cut(model, merge_one(model, windows, weight=weight))
    for name, tensor in model.model.layers[1].state_dict().items():
        torch.testing.assert_close(smaller.model.layers[1].state_dict()[name], tensor)


def test_two_blocks_that_add_nothing_are_merged_for_free(
    architecture: str, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    family = architecture_of(model)
    with torch.no_grad():
        for position in (1, 2):
            for site in family.linears:
                for p in family.blocks(model)[position].get_submodule(site.name).parameters():
                    p.zero_()
    smaller = cut(model, merge_one(model, windows, weight="similarity"))
    with torch.no_grad():
        torch.testing.assert_close(
            smaller(windows).logits, model(windows).logits, rtol=0, atol=1e-5
        )


def test_the_line_search_is_never_worse_than_the_better_deletion(
    tiny_model: Any, windows: Tensor
) -> None:
    for seed in range(3):
        model = tiny_model("llama", seed=seed)
        found = loss(cut(model, merge_one(model, windows)), windows)
        on_the_line = [
            loss(cut(model, merge_one(model, windows, weight=share)), windows)
            for share in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        assert found == pytest.approx(min(on_the_line), abs=1e-6)
        deletions = [loss(without(model, gone), windows) for gone in (1, 2)]
        assert found <= min(deletions) + 1e-6


def test_the_released_share_is_constant_for_layers_alike() -> None:
    similarity = torch.full((4, 4), 0.4, dtype=torch.float64)
    assert released_share(similarity, 1) == pytest.approx(0.6225, abs=5e-5)


def test_the_share_of_the_paper_is_the_similarity(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    names = [name for name, _ in model.model.layers[0].named_parameters()]
    outputs = block_outputs(Trial(model, names), untouched(range(4)), windows)
    share = float(similarity_of_layers(outputs, 2, 5)[1, 2])
    got = cut(model, merge_one(model, windows, weight="similarity"))
    expected = cut(model, merge_one(model, windows, weight=share))
    for a, b in zip(got.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_outputs_are_those_of_the_merged_model(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("gemma2", num_hidden_layers=5, layer_types=None)
    names = [name for name, _ in model.model.layers[0].named_parameters()]
    trial = Trial(model, names)
    blocks = untouched(range(5))
    blocks = [*blocks[:1], mka.merged(blocks[1:3], [0.5, 0.5]), *blocks[3:]]
    got = block_outputs(trial, blocks, windows)
    stream = BlockStream(cut(model, trial.cut_to(blocks)), windows)
    for position in range(4):
        stream.advance()
        expected = torch.cat(stream.hidden)[:, 1:].double().mean(1)
        torch.testing.assert_close(got[position], expected, rtol=0, atol=1e-5)


def test_pairs_are_neighbours_of_highest_similarity_chosen_anew(
    tiny_model: Any, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", num_hidden_layers=7)
    seen: list[tuple[int, int]] = []

    def planted(outputs: Tensor, dimensions: int, neighbours: int) -> Tensor:
        """The pair of ends is the most similar one, then (4, 5), then the pair at (2, 3)."""
        size = len(outputs)
        similarity = torch.zeros(size, size, dtype=torch.float64)
        best = {7: 4, 6: 2, 5: 1}[size]
        for at, value in ((0, 1.0), (size - 2, 0.9), (best, 0.8)):
            similarity[at, at + 1] = similarity[at + 1, at] = value
        seen.append((size, best))
        return similarity

    monkeypatch.setattr(mka, "similarity_of_layers", planted)
    method = Mka(sparsity=share_of_blocks(model, 3), weight=0.5)
    change = method.compress(model, evidence_of(model, windows))
    assert seen == [(7, 4), (6, 2), (5, 1)]
    assert change.inherits == (0, 1, 4, 6)  # 4 and 5; then 2 and 3; then 1 with those two
    for name, p in model.model.layers[1].named_parameters():
        two, three = (dict(model.model.layers[block].named_parameters())[name] for block in (2, 3))
        torch.testing.assert_close(
            change.tensors[f"blocks.1.{name}"], 0.5 * p + 0.25 * (two + three), rtol=0, atol=1e-6
        )


def test_too_few_windows_and_too_few_blocks_are_refused(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="at least 11 calibration windows, got 10"):
        merge_one(model, windows[:10])
    with pytest.raises(InputError, match="1 merges among 4 blocks"):
        Mka(sparsity=0.5).outline(model)
    shared = cut(model, Cut(plan_of(model).share(1, [2]), tuple(range(4))))
    with pytest.raises(InputError, match=r"mka merges blocks .* shares its linears"):
        Mka(sparsity=0.1).outline(shared)
    with pytest.raises(ValidationError, match="weight"):
        Mka(sparsity=0.2, weight=1.5)


def test_fourteen_merges_of_llama_3_8b() -> None:
    """43.75 % of the layers are 38.0 % of the parameters."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = build_on_meta(config)
    assert len(Mka(sparsity=0.38).outline(model).blocks) == 18
    assert share_of_blocks(model, 14) == pytest.approx(0.380, abs=5e-4)
