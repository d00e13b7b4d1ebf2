"""SliceGPT: what its spec says that has to hold."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import TOLERANCE, Evidence
from foldstack.compression.methods.narrowing.slicegpt import SliceGpt
from foldstack.compression.methods.stack import Stack
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.block_plan import Sliced
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of, size_of_plan
from foldstack.compression.structure.surgery import build_on_meta, cut, plan_of

HIDDEN, BLOCKS = 32, 4


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(2, 97, (6, 20), generator=torch.Generator().manual_seed(0))


def evidence(model: Any, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, KINDS)
    return Evidence(windows, statistics, rank_blocks(statistics))


def logits(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(windows, use_cache=False).logits


def sliced(model: Any, windows: Tensor, **settings: Any) -> Any:
    method = SliceGpt(**({"sparsity": 0.25} | settings))
    return cut(model, method.compress(model, evidence(model, windows)))


def widths_of(model: Any) -> list[int]:
    """Entering and middle widths, link by link."""
    return [
        w for b in plan_of(model).blocks if b.sliced for w in (b.sliced.entering, b.sliced.middle)
    ]


def confine(model: Any, size: int) -> None:
    """Let only the first `size` directions of a random basis occur on the residual stream."""
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0][:, :size]
    if model.config.model_type in ("opt", "gpt2"):  # inside the centred signals
        centred = torch.randn(HIDDEN, size, generator=generator)
        basis = torch.linalg.qr(centred - centred.mean(0))[0]
    projection = basis @ basis.T
    architecture = architecture_of(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.copy_(module.weight @ projection)
        for block in architecture.blocks(model):
            for site in architecture.linears:
                if site.reads not in ("attention_output", "mlp_output"):
                    continue
                linear = block.get_submodule(site.name)
                weight = projection @ architecture.weight(linear)
                linear.weight.copy_(architecture.stored_weight(linear, weight))
                if linear.bias is not None:
                    linear.bias.copy_(projection @ linear.bias)


@pytest.mark.parametrize("orientation", ["random", "pca"])
def test_a_stream_that_lives_in_few_directions_loses_nothing(
    architecture: str, orientation: str, tiny_model: Any, windows: Tensor
) -> None:
    if architecture in ("gemma2", "gemma3_text"):
        pytest.skip("refused")
    model = tiny_model(architecture)
    # Of what is embedded; the final norm and a tied head read more directions.
    confine(model, 16)
    smaller = sliced(model, windows, sparsity=0.3, round_interval=16, orientation=orientation)
    assert set(widths_of(smaller)) == {16}
    torch.testing.assert_close(
        logits(smaller, windows), logits(model, windows), rtol=1e-3, atol=1e-3
    )


def test_orientations_compute_the_same(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("qwen2")
    random, pca = (sliced(model, windows, orientation=kind) for kind in ("random", "pca"))
    torch.testing.assert_close(logits(random, windows), logits(pca, windows), rtol=1e-4, atol=1e-4)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.allclose(random.model.state_dict()[name], pca.model.state_dict()[name])


def test_slicing_costs_less_than_dropping_coordinates(tiny_model: Any, windows: Tensor) -> None:
    """The leading directions keep more of a model than as many random ones."""
    model = tiny_model("llama")
    confine(model, 12)
    # A trace of the other directions, or there would be nothing to lose.
    with torch.no_grad():
        noise = torch.randn(97, HIDDEN, generator=torch.Generator().manual_seed(1))
        model.get_input_embeddings().weight.add_(0.02 * noise)
    wanted = logits(model, windows)
    change = SliceGpt(sparsity=0.25).compress(model, evidence(model, windows))
    turned = copy.copy(change.tensors)
    turned["model.embed_tokens.weight"] = turned["model.embed_tokens.weight"].flip(1)
    ours, other = cut(model, change), cut(model, type(change)(change.plan, change.inherits, turned))
    error, worse = ((logits(m, windows) - wanted).square().mean() for m in (ours, other))
    assert error < 0.1 * worse


def formula(config: Any, s: int) -> int:
    """The spec's count (2401.15024 with the released code), and the final norm's gain, which stays
    apart from the head."""
    big, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    k = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    per_block = 2 * big * s + 2 * k * s + 3 * f * s + 2 * s * s
    ends = (big - s) * f + s * (big - s) + v * s + v * big
    return config.num_hidden_layers * per_block + ends + big


def uniform(config: Any, s: int) -> Plan:
    blocks = config.num_hidden_layers
    inner = Sliced(entering=s, middle=s, leaving=s)
    last = Sliced(entering=s, middle=s, leaving=config.hidden_size)
    return Plan.identity("llama", blocks).slice([*[inner] * (blocks - 1), last])


def test_counts_follow_the_formula() -> None:
    tiny = LlamaConfig(
        vocab_size=257, hidden_size=128, intermediate_size=352, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    assert formula(tiny, 96) == 1_325_280 + 128
    counts = [size_of_plan(tiny, uniform(tiny, s)).parameters for s in range(8, 128, 8)]
    assert counts == [formula(tiny, s) for s in range(8, 128, 8)] == sorted(counts)


def test_llama_2_7b_removes_what_the_table_says() -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    )  # fmt: skip
    dense = 6_738_415_616
    for ratio, removed in ((0.1, -0.030), (0.2, 0.094), (0.25, 0.153), (0.3, 0.215), (0.5, 0.446)):
        s = int((1 - ratio) * 4096) // 8 * 8
        parameters = size_of_plan(config, uniform(config, s)).parameters
        assert parameters == formula(config, s)
        assert 1 - parameters / dense == pytest.approx(removed, abs=6e-4)
    model = build_on_meta(config)
    for settings, farthest in (({"widths": "one"}, TOLERANCE), ({}, 2e-5)):
        plan = SliceGpt(sparsity=0.25, **settings).outline(model)
        widths = [w for b in plan.blocks if b.sliced for w in (b.sliced.entering, b.sliced.middle)]
        assert widths[0] - widths[-1] in ((0,) if settings else (0, 8))
        assert widths == sorted(widths, reverse=True)
        assert all(width % 8 == 0 for width in widths)
        removed = 1 - size_of_plan(config, plan).parameters / dense
        assert removed == pytest.approx(0.25, abs=farthest)


def test_what_would_enlarge_a_model_is_refused(tiny_model: Any) -> None:
    """Untied embeddings and the added matrices outweigh what one interval of the width removes."""
    model = tiny_model("llama_tied", vocab_size=8000)
    with pytest.raises(InputError, match="cannot make this model smaller"):
        SliceGpt(sparsity=0.1).outline(build_on_meta(model.config))


@pytest.mark.parametrize("choice", ["even", "one", "explained_variance"])
def test_widths_are_multiples_and_the_sparsity_is_reached(
    choice: str, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model("llama")
    for interval in (1, 4):
        smaller = sliced(model, windows, round_interval=interval, widths=choice)
        widths = widths_of(smaller)
        assert all(width % interval == 0 for width in widths)
        spread = max(widths) - min(widths)
        assert spread in {"one": (0,), "even": (0, interval)}.get(choice, range(1, HIDDEN))
        removed = 1 - count_parameters(smaller) / count_parameters(model)
        assert removed >= 0.25 - TOLERANCE
        assert plan_of(smaller).blocks[-1].sliced.leaving == HIDDEN
    assert size_of(smaller).kv_bytes_per_token == size_of(model).kv_bytes_per_token


def test_explained_variance_gives_links_with_few_directions_a_smaller_width(
    tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0][:, :6]
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.copy_(table @ basis @ basis.T)
    widths = widths_of(sliced(model, windows, widths="explained_variance", round_interval=1))
    assert widths[0] <= 6 < min(widths[1:])


def test_options_change_what_is_kept(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    results = [
        logits(sliced(model, windows, **settings), windows)
        for settings in ({}, {"calibration_signal": "dense"}, {"skip_first_token": True})
    ]
    assert not torch.allclose(results[0], results[1], atol=1e-3)
    assert not torch.allclose(results[0], results[2], atol=1e-3)


def test_the_batch_size_of_windows_does_not_matter(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(1))
    first, second = sliced(model, windows), sliced(model, windows[order])
    torch.testing.assert_close(
        logits(first, windows), logits(second, windows), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("before", ["shortgpt", "modegpt"])
def test_it_ends_a_stack(before: str, family: str, tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model(family)
    steps = [{"name": before}, {"name": "slicegpt", "round_interval": 1}]
    stack = Stack(sparsity=0.4, steps=steps)
    smaller = cut(model, stack.compress(model, evidence(model, windows)))
    assert plan_of(smaller).is_sliced
    assert 1 - count_parameters(smaller) / count_parameters(model) >= 0.4 - TOLERANCE
    assert torch.isfinite(logits(smaller, windows)).all()
