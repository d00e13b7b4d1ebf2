"""The one pass against brute force (shortgpt_family.md, acceptance tests 1-3)."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foldstack.compression.errors import InputError
from foldstack.compression.statistics import grams
from foldstack.compression.statistics.gathering import Statistics, gather
from foldstack.compression.statistics.grams import report_ranks, summed_inputs
from foldstack.compression.statistics.similarity import summed_angles, summed_cosines
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.surgery import Cut, cut, plan_of


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (5, 24), generator=torch.Generator().manual_seed(0))


def boundaries_of(model: Any, windows: Tensor) -> list[Tensor]:
    """Every block's input and the last block's own output, by hooks on the blocks."""
    seen: list[Tensor] = []
    blocks = architecture_of(model).blocks(model)
    handles = [
        block.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for block in blocks
    ]
    handles.append(blocks[-1].register_forward_hook(lambda _m, _a, output: seen.append(output)))
    with torch.no_grad():
        model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return [hidden.double() for hidden in seen]


@pytest.mark.parametrize("skip_first_token", [True, False])
def test_similarity_is_the_brute_force_cosine(
    architecture: str, tiny_model: Any, windows: Tensor, skip_first_token: bool
) -> None:
    model = tiny_model(architecture)
    statistics = gather(
        model, windows, {"similarity"}, batch_size=2, skip_first_token=skip_first_token
    )
    boundaries = boundaries_of(model, windows)
    first = 1 if skip_first_token else 0
    for a, x in enumerate(boundaries):
        for b, y in enumerate(boundaries):
            cosine = torch.cosine_similarity(x, y, dim=-1)
            expected = cosine[:, first:].mean()
            torch.testing.assert_close(statistics.similarity[a, b], expected, rtol=0, atol=1e-6)
            angle = (cosine[:, -1].clamp(-1, 1).arccos() / torch.pi).mean()
            got = statistics.last_token_angle[a, b]
            torch.testing.assert_close(got, angle, rtol=0, atol=1e-4)
    assert statistics.last_token_angle.min() >= 0
    assert statistics.last_token_angle.max() <= 1


def test_the_last_boundary_is_before_the_final_norm(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    got = gather(model, windows, {"similarity"}, skip_first_token=False).similarity[-2, -1]
    with torch.no_grad():
        states = model(windows, output_hidden_states=True).hidden_states
    normed = torch.cosine_similarity(states[-2].double(), states[-1].double(), dim=-1).mean()
    assert abs(got - normed) > 1e-3


def test_a_gram_is_the_sum_over_all_tokens(
    architecture: str, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    statistics = gather(model, windows, {"gram"}, batch_size=2)
    family = architecture_of(model)
    for position, block in enumerate(family.blocks(model)):
        for site in family.linears:  # every linear, while the pass hooks one of each group
            seen: list[Tensor] = []
            handle = block.get_submodule(site.name).register_forward_pre_hook(
                lambda _m, args, seen=seen: seen.append(args[0])
            )
            with torch.no_grad():
                model(windows, use_cache=False)
            handle.remove()
            x = seen[0].double().flatten(0, 1) if seen[0].ndim == 3 else seen[0].double()
            expected = x.T @ x
            got = statistics.gram(position, site.reads)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
            total = statistics.input_sum(position, site.reads)
            torch.testing.assert_close(total, x.sum(0), rtol=1e-5, atol=1e-4)
    assert statistics.num_tokens == windows.numel()


def test_a_gram_wider_than_a_strip_is_whole(
    tiny_model: Any, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    expected = gather(model, windows, {"gram"})
    monkeypatch.setattr(grams, "STRIP_ROWS", 12)  # neither 32 nor 56 is a multiple
    in_strips = gather(model, windows, {"gram"})
    for key in expected.grams:
        torch.testing.assert_close(in_strips.gram(*key), expected.gram(*key), rtol=1e-5, atol=1e-5)


def test_hidden_states_in_files_give_the_same(
    tiny_model: Any, windows: Tensor, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    kinds = {"similarity", "gram"}
    in_memory = gather(model, windows, kinds, batch_size=2)
    in_files = gather(model, windows, kinds, batch_size=2, memory_bytes=0, work=tmp_path)
    assert not list(tmp_path.iterdir())  # they have no names, so that a killed run leaves none
    assert torch.equal(in_files.similarity, in_memory.similarity)
    assert torch.equal(in_files.last_token_angle, in_memory.last_token_angle)
    for key in in_memory.grams:
        assert torch.equal(in_files.gram(*key), in_memory.gram(*key))


@pytest.mark.parametrize("on_disk", [True, False])
def test_shards_add_up(tiny_model: Any, windows: Tensor, tmp_path: Path, on_disk: bool) -> None:
    model = tiny_model("llama")
    kinds = {"similarity", "gram"}
    whole = gather(model, windows, kinds)
    parts = gather(model, windows[:2], kinds) + gather(model, windows[2:], kinds)
    if on_disk:
        parts.save(tmp_path)
        parts = Statistics.load(tmp_path)
    assert parts.num_tokens == whole.num_tokens
    torch.testing.assert_close(parts.similarity, whole.similarity, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts.last_token_angle, whole.last_token_angle, rtol=0, atol=1e-6)
    for key in whole.grams:
        torch.testing.assert_close(parts.gram(*key), whole.gram(*key), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(parts.input_sum(*key), whole.input_sum(*key))


@pytest.mark.parametrize("while_gathering", [True, False])
def test_what_was_saved_is_what_comes_back(
    tiny_model: Any, windows: Tensor, tmp_path: Path, while_gathering: bool
) -> None:
    model = tiny_model("llama")
    kinds = {"similarity", "gram"}
    kept = gather(model, windows, kinds)
    written = gather(model, windows, kinds, folder=tmp_path) if while_gathering else kept
    written.save(tmp_path)
    loaded = Statistics.load(tmp_path)
    assert loaded.kinds == kinds
    assert (loaded.num_blocks, loaded.num_tokens) == (kept.num_blocks, kept.num_tokens)
    assert torch.equal(loaded.similarity, kept.similarity)
    assert torch.equal(loaded.last_token_angle, kept.last_token_angle)
    assert len(loaded.grams) == 4 * kept.num_blocks
    for key in kept.grams:
        assert torch.equal(loaded.gram(*key), kept.gram(*key))
        assert torch.equal(loaded.input_sum(*key), kept.input_sum(*key))


def test_grams_of_a_float64_block_stay_float64(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama").double()
    statistics = gather(model, windows, {"gram"})
    assert statistics.grams[0, "mlp_output"].dtype == torch.float64


def test_a_bfloat16_model_is_seen_in_float32(tiny_model: Any, windows: Tensor) -> None:
    """Also where a block runs with another's weights; afterwards the model is what it was."""
    dense = tiny_model("llama").bfloat16()
    model = cut(dense, Cut(plan_of(dense).share(0, [1]), (0, 0, 2, 3)))
    before = copy.deepcopy(model.state_dict())
    seen = gather(model, windows, {"gram", "similarity"})
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = gather(model.float(), windows, {"gram", "similarity"})
    torch.testing.assert_close(seen.similarity, expected.similarity, rtol=0, atol=1e-4)
    for key in expected.grams:
        scale = float(expected.gram(*key).diagonal().mean())
        torch.testing.assert_close(seen.gram(*key), expected.gram(*key), rtol=0, atol=2e-2 * scale)


def test_hooks_are_gone_afterwards(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    with summed_inputs(architecture_of(model).blocks(model)[0], architecture_of(model)):
        pass
    gather(model, windows, {"gram"})
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_only_so_many_tokens_are_compared(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    some = gather(model, windows, {"similarity"}, batch_size=4, similarity_tokens=50)
    first_three = gather(model, windows[:3], {"similarity"})
    torch.testing.assert_close(some.similarity, first_three.similarity, rtol=0, atol=1e-6)


def test_a_zero_vector_counts_as_half() -> None:
    zero, one = [0.0, 0.0], [1.0, 0.0]
    hidden = torch.tensor([[one, zero], [one, one], [zero, zero]], dtype=torch.float64)
    expected = torch.tensor([[1.5, 1.5, 1.0], [1.5, 2.0, 1.0], [1.0, 1.0, 1.0]]).double()
    torch.testing.assert_close(summed_cosines(hidden), expected)
    angles = summed_angles(hidden)
    assert angles[0, 1] == pytest.approx(0 + 1 / 3)  # arccos(0.5) = pi / 3


def test_hidden_states_that_are_not_finite_are_an_error(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(InputError, match="input of block 2"):
        gather(model, windows, {"similarity"})


def test_what_was_not_gathered_is_named(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    only_grams = gather(model, windows, {"gram"})
    with pytest.raises(InputError, match="similarity"):
        _ = only_grams.similarity
    with pytest.raises(InputError, match="no Gram of mlp_input at block 0"):
        gather(model, windows, {"similarity"}).gram(0, "mlp_input")
    with pytest.raises(InputError, match="no sum of mlp_input at block 0"):
        gather(model, windows, {"similarity"}).input_sum(0, "mlp_input")
    with pytest.raises(InputError, match="statistics are"):
        gather(model, windows, {"fisher"})
    with pytest.raises(InputError, match="same kinds"):
        _ = only_grams + gather(model, windows, {"similarity"})


def test_inputs_that_do_not_span_their_space_are_named(
    tiny_model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = 0
    windows = torch.randint(0, 90, (10, 16), generator=torch.Generator().manual_seed(0))
    caplog.set_level("INFO")
    gather(model, windows, {"gram"})
    assert "attention_input of block 1: 31" in caplog.text
    assert "block 0" not in caplog.text
    caplog.clear()
    gather(model, windows[:1, :8], {"gram"})  # fewer tokens than channels
    assert "mlp_output of block 0: 8" in caplog.text


def test_grams_of_deficient_rank_are_one_short_sentence(caplog: pytest.LogCaptureFixture) -> None:
    bounds = {f"blocks.{block}.mlp_output": 700 - block for block in range(17)}
    with caplog.at_level("INFO"):
        report_ranks(bounds)
    warning, numbers = caplog.records
    assert warning.levelname == "WARNING"
    assert len(warning.getMessage()) < 250
    assert "17 inputs" in warning.getMessage()
    assert "blocks.16.mlp_output, rank at most 684" in warning.getMessage()
    assert "blocks.3.mlp_output: 697" in numbers.getMessage()
