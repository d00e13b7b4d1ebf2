"""A residual stream in other bases: exact while nothing is cut, and as narrow as the plan says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.narrowing.modegpt import MoDeGpt
from foldstack.compression.methods.narrowing.residual_slicing import (
    check_sliceable,
    principal_basis,
    second_moments,
    sliced_tensors,
)
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.block_plan import Sliced
from foldstack.compression.structure.modeling_foldstack import RootMeanSquareNorm
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of, size_of_plan
from foldstack.compression.structure.surgery import Cut, build_on_meta, cut, plan_of
from foldstack.compression.training.adapters import Adapters

HIDDEN, BLOCKS, POST_NORMED = 32, 4, ("gemma2", "gemma3_text")
WIDTHS = [24, 17, 20, 9, 16, 30, 21, 11]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 97, (4, 30), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def sliceable(architecture: str) -> str:
    if architecture in POST_NORMED:
        pytest.skip("its post-norms do not commute with a change of basis")
    return architecture


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def random_basis(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def plan_with(model: Any, widths: list[int]) -> Plan:
    ends = [*widths, HIDDEN]
    return plan_of(model).slice(
        [
            Sliced(entering=ends[2 * i], middle=ends[2 * i + 1], leaving=ends[2 * i + 2])
            for i in range(BLOCKS)
        ]
    )


def sliced(model: Any, ids: Tensor, widths: list[int], **options: Any) -> Any:
    """The model in random bases of these widths, one for every link but the last."""
    tensors = sliced_tensors(
        model, ids, lambda link, _: random_basis(HIDDEN, link)[:, : widths[link]], **options
    )
    return cut(model, Cut(plan_with(model, widths), tuple(range(BLOCKS)), tensors))


def test_fused_norms_change_nothing(sliceable: str, tiny_model: Any, ids: Tensor) -> None:
    """The released code centres the embeddings of RMSNorm models too, which does."""
    model = tiny_model(sliceable)
    tensors = sliced_tensors(model, ids, lambda *_: torch.eye(HIDDEN, dtype=torch.float64))
    fused = cut(model, Cut(plan_with(model, [HIDDEN] * 2 * BLOCKS), (0, 1, 2, 3), tensors))
    torch.testing.assert_close(logits(fused, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["opt", "gpt2", "qwen2"])
def test_blocks_that_were_narrowed_before_are_fused_too(
    family: str, tiny_model: Any, ids: Tensor
) -> None:
    """OPT's narrow heads have their values' bias in the output projection."""
    model = tiny_model(family)
    statistics = gather(model, ids, {"gram", "similarity"})
    evidence = Evidence(ids, statistics, rank_blocks(statistics))
    narrowed = cut(model, MoDeGpt(sparsity=0.2).compress(model, evidence))
    assert any(block.narrow_heads for block in plan_of(narrowed).blocks)
    rotated = sliced(narrowed, ids, [HIDDEN] * 2 * BLOCKS)
    torch.testing.assert_close(logits(rotated, ids), logits(narrowed, ids), rtol=1e-4, atol=1e-4)


def test_another_basis_at_every_link_changes_nothing(
    sliceable: str, tiny_model: Any, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny_model(sliceable)
    rotated = sliced(model, ids, [HIDDEN] * 2 * BLOCKS)
    torch.testing.assert_close(logits(rotated, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    norms = [module for module in rotated.modules() if isinstance(module, RootMeanSquareNorm)]
    assert len(norms) == 2 * BLOCKS
    assert not any(list(norm.parameters()) for norm in norms)


def test_gemma_has_gains_around_one(ids: Tensor) -> None:
    config = GemmaConfig(
        vocab_size=97, hidden_size=HIDDEN, intermediate_size=56, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(std=0.2)
    rotated = sliced(model, ids, [HIDDEN] * 2 * BLOCKS)
    torch.testing.assert_close(logits(rotated, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_a_narrow_stream_decodes_reloads_and_has_the_size_of_its_plan(
    sliceable: str, tiny_model: Any, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny_model(sliceable)
    narrow = sliced(model, ids, WIDTHS)
    got = logits(narrow, ids)
    cache, steps = None, []
    with torch.inference_mode():
        for tokens in (ids[:, :25], ids[:, 25:26], ids[:, 26:]):
            out = narrow(tokens, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), got, rtol=1e-4, atol=1e-4)

    narrow.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), got)
    assert again.dtype == model.dtype
    assert size_of(narrow) == size_of(again) == size_of_plan(model.config, plan_of(narrow))
    assert size_of(narrow).kv_bytes_per_token == size_of(model).kv_bytes_per_token
    assert narrow.get_input_embeddings().weight.shape[1] == WIDTHS[0]
    # The head keeps its width, so it is no longer the embeddings'.
    assert narrow.get_output_embeddings().weight.shape[1] == narrow.config.hidden_size == HIDDEN


def test_a_sliced_model_trains_with_adapters(tiny_model: Any, ids: Tensor) -> None:
    narrow = sliced(tiny_model("llama_tied"), ids, WIDTHS)
    before, size = logits(narrow, ids), count_parameters(narrow)
    adapters = Adapters(narrow, rank=2, alpha=2, dropout=0.0, train_vectors=True, in_float32=False)
    optimizer = torch.optim.SGD(adapters.trainable.values(), lr=0.1)
    narrow(ids, labels=ids).loss.backward()
    assert any("attention_shortcut" in name for name in adapters.trainable)
    optimizer.step()
    adapters.merge()
    assert count_parameters(narrow) == size
    assert not torch.equal(logits(narrow, ids), before)


def test_the_norm_divides_by_the_full_width() -> None:
    x = torch.randn(5, HIDDEN, dtype=torch.float64)
    basis = random_basis(HIDDEN, 0)
    norm = RootMeanSquareNorm(HIDDEN, 1e-6)
    torch.testing.assert_close(norm(x @ basis) @ basis.T, norm(x))
    kept = x[:, :20]
    expected = kept / (kept.square().sum(-1, keepdim=True) / HIDDEN + 1e-6).sqrt()
    torch.testing.assert_close(norm(kept), expected)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (HIDDEN,), eps=1e-6))


def test_the_principal_basis_keeps_the_most_energy() -> None:
    mixing = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)).double()
    states = torch.randn(6, 9, HIDDEN, generator=torch.Generator().manual_seed(1)).double() @ mixing
    moments = second_moments([states])
    torch.testing.assert_close(moments, second_moments(states.split(4)))
    energies, directions = principal_basis(moments)
    identity = torch.eye(HIDDEN, dtype=torch.float64)
    assert (directions.T @ directions - identity).abs().max() < 1e-10

    def kept(basis: Tensor) -> float:
        return float((states @ basis[:, :8]).square().sum())

    assert kept(directions) == pytest.approx(float(energies[:8].sum()))
    assert all(kept(random_basis(HIDDEN, seed)) < kept(directions) for seed in range(20))
    torch.testing.assert_close(
        second_moments([states], skip_first_token=True), second_moments([states[:, 1:]])
    )


@pytest.mark.parametrize("dense_signal", [False, True])
def test_a_link_sees_what_the_links_before_it_have_left(
    dense_signal: bool, tiny_model: Any, ids: Tensor
) -> None:
    """Slicing link 4 changes the moments of the links behind it, and of no link before."""

    def seen(width: int) -> list[Tensor]:
        moments: list[Tensor] = []

        def choose(link: int, found: Tensor) -> Tensor:
            moments.append(found)
            return principal_basis(found)[1][:, : width if link == 4 else HIDDEN]

        sliced_tensors(tiny_model("llama"), ids, choose, dense_signal=dense_signal)
        return moments

    changed = [
        not torch.allclose(whole, cut_at_4, rtol=1e-3)
        for whole, cut_at_4 in zip(seen(HIDDEN), seen(8), strict=True)
    ]
    assert changed == [False] * 8 if dense_signal else [False] * 5 + [True] * 3


def test_what_a_sliced_model_cannot_do_any_more_is_refused(tiny_model: Any, ids: Tensor) -> None:
    narrow = sliced(tiny_model("llama"), ids, WIDTHS)
    plan = plan_of(narrow)
    for change in (
        lambda: plan.keep([0, 1, 2]),
        lambda: plan.share(0, [1]),
        lambda: plan.borrow({1: 0}, {}),
        lambda: plan.repeat([0, 1, 2, 3, 3], {}),
        lambda: plan.replace(1, 3, "layer"),
        lambda: plan.slice([Sliced(entering=8, middle=8, leaving=8)] * BLOCKS),
    ):
        with pytest.raises(InputError, match="before slicing"):
            change()
    assert plan.keep(range(BLOCKS)) == plan
    assert not plan.is_native
    with pytest.raises(InputError, match="before slicing"):
        gather(narrow, ids, ["similarity"])
    assert gather(narrow, ids, ["gram"]).grams[1, "attention_input"].shape == (WIDTHS[2],) * 2


def test_widths_of_neighbours_meet() -> None:
    plan = Plan.identity("llama", 2)
    fitting = Sliced(entering=8, middle=6, leaving=5), Sliced(entering=5, middle=7, leaving=9)
    assert Plan.model_validate_json(plan.slice(fitting).model_dump_json()) == plan.slice(fitting)
    with pytest.raises(ValueError, match="position 1 is entered by 8 coordinates, 5 leave"):
        plan.slice(fitting[:1] * 2)
    blocks = plan.slice(fitting).blocks[0], plan.blocks[1]
    with pytest.raises(ValueError, match="all blocks of a plan are sliced or none"):
        Plan(base_model_type="llama", base_num_blocks=2, blocks=blocks)


def test_shared_or_factored_blocks_are_not_sliced() -> None:
    widths = [Sliced(entering=8, middle=8, leaving=8)] * 2
    plan = Plan.identity("llama", 2)
    with pytest.raises(InputError, match=r"position 1 cannot be sliced.*before sharing"):
        plan.share(0, [1]).slice(widths)
    with pytest.raises(InputError, match=r"position 0 has factored linears .* slice before that"):
        plan.factor({(0, "self_attn.q_proj"): 3}).slice(widths)


@pytest.mark.parametrize("family", POST_NORMED)
def test_post_norms_are_refused(family: str, tiny_model: Any) -> None:
    with pytest.raises(InputError, match=f"{family} model cannot be sliced: it norms what"):
        check_sliceable(build_on_meta(tiny_model(family).config))


def test_an_opt_that_norms_behind_its_links_is_refused(tiny_model: Any) -> None:
    with pytest.raises(InputError, match="norms behind the residual links"):
        check_sliceable(tiny_model("opt", do_layer_norm_before=False))


def test_a_change_may_bring_tensors_for_places_outside_the_blocks(tiny_model: Any) -> None:
    model = tiny_model("llama")
    norm = torch.full((HIDDEN,), 3.0)
    changed = cut(model, Cut(plan_of(model), (0, 1, 2, 3), {"model.norm.weight": norm}))
    assert torch.equal(changed.model.norm.weight, norm)
    with pytest.raises(ValueError, match=r"no place for model\.nrom\.weight"):
        cut(model, Cut(plan_of(model), (0, 1, 2, 3), {"model.nrom.weight": norm}))
