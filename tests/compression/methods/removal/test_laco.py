"""LaCo (shortgpt_family.md, acceptance tests 5, 7, 8)."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.removal import laco
from foldstack.compression.methods.removal.laco import Laco
from foldstack.compression.methods.removal.merging import merged, untouched
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.size import count_parameters
from foldstack.compression.structure.surgery import Cut, cut, plan_of


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (4, 20), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, {"similarity"})
    return Evidence(windows, statistics, rank_blocks(statistics))


def share_of_blocks(model: Any, count: int) -> float:
    block = architecture_of(model).blocks(model)[0]
    return count * count_parameters(block) / count_parameters(model)


def one_merge(model: Any, windows: Tensor, **settings: Any) -> Cut:
    """All blocks but the last in one merge, whatever it does to the model."""
    count = len(plan_of(model).blocks) - 2
    method = Laco(
        sparsity=share_of_blocks(model, count), blocks_per_merge=count + 1, threshold=-1, **settings
    )
    return method.compress(model, evidence_of(model, windows))


def linears_of(model: Any, position: int) -> dict[str, Tensor]:
    family = architecture_of(model)
    block = family.blocks(model)[position]
    return {
        f"{site.name}.{name}": parameter.detach()
        for site in family.linears
        for name, parameter in block.get_submodule(site.name).named_parameters()
    }


def test_two_blocks_give_the_second_one_with_the_norms_of_the_first(
    architecture: str, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    method = Laco(sparsity=share_of_blocks(model, 1), blocks_per_merge=2, threshold=-1)
    change = method.compress(model, evidence_of(model, windows))
    assert change.inherits == (0, 1, 3)
    smaller = cut(model, change)
    assert type(smaller) is type(model)
    family = architecture_of(model)
    got = dict(family.blocks(smaller)[1].named_parameters())
    second = linears_of(model, 2)
    for name, first in family.blocks(model)[1].named_parameters():
        assert torch.equal(got[name], second.get(name, first)), name


def test_three_blocks_give_the_sum_of_differences(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("qwen2")
    smaller = cut(model, one_merge(model, windows))
    got, theta = linears_of(smaller, 0), [linears_of(model, position) for position in range(3)]
    for name, tensor in got.items():
        torch.testing.assert_close(
            tensor, theta[1][name] + theta[2][name] - theta[0][name], rtol=0, atol=1e-6
        )
        assert (tensor - theta[2][name]).abs().max() > 0.05
    last = linears_of(smaller, 1)
    assert all(torch.equal(last[name], tensor) for name, tensor in linears_of(model, 3).items())


def test_the_released_merge_is_the_last_block(tiny_model: Any, windows: Tensor) -> None:
    """Its loop, with the base updated between the differences, against ours."""
    model = tiny_model("llama")
    smaller = cut(model, one_merge(model, windows, merge="released"))
    for name, base in linears_of(model, 0).items():
        updated = base.clone()
        for position in (1, 2):
            updated += linears_of(model, position)[name] - updated
        torch.testing.assert_close(linears_of(smaller, 0)[name], updated, rtol=0, atol=1e-6)
        assert torch.equal(linears_of(smaller, 0)[name], linears_of(model, 2)[name])


def test_equal_blocks_give_back_their_weights(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("gpt2")
    for block in model.transformer.h[1:]:
        block.load_state_dict(model.transformer.h[0].state_dict())
    smaller = cut(model, one_merge(model, windows))
    for name, tensor in linears_of(smaller, 0).items():
        torch.testing.assert_close(tensor, linears_of(model, 0)[name], rtol=0, atol=1e-7)


def test_merging_again_adds_up_over_the_input_blocks() -> None:
    a, b, c, d = untouched(range(4))
    first = merged([b, c], [0.0, 1.0])
    assert first.parts == ((2, 1.0),)
    assert (first.first, first.is_untouched) == (1, False)
    again = merged([a, first, d], [-1.0, 1.0, 1.0])
    assert (again.first, again.parts) == (0, ((0, -1.0), (2, 1.0), (3, 1.0)))


def test_a_threshold_of_1_accepts_nothing(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    method = Laco(sparsity=share_of_blocks(model, 1), threshold=1)
    with pytest.raises(InputError, match=r"threshold 1.* merges 0 blocks away, .* needs 1; lower"):
        method.compress(model, evidence_of(model, windows))


@pytest.mark.parametrize(("blocks_per_merge", "interval"), [(2, 1), (3, 2), (4, 1), (5, 4)])
def test_a_threshold_of_minus_1_collapses_everything(
    tiny_model: Any, windows: Tensor, blocks_per_merge: int, interval: int
) -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    method = Laco(
        sparsity=share_of_blocks(model, 5), threshold=-1, protect_first=1,
        blocks_per_merge=blocks_per_merge, interval=interval,
    )  # fmt: skip
    change = method.compress(model, evidence_of(model, windows))
    assert change.inherits == (0, 1, 7)


def test_blocks_that_add_nothing_are_merged_at_the_highest_threshold(
    tiny_model: Any, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    with torch.no_grad():
        for position in (1, 2):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                model.model.layers[position].get_submodule(name).weight.zero_()
    monkeypatch.setattr(laco, "_THRESHOLDS", (0.999, -math.inf))
    method = Laco(sparsity=share_of_blocks(model, 1))
    change = method.compress(model, evidence_of(model, windows))
    assert change.inherits == (0, 1, 3, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(
            cut(model, change)(windows).logits, model(windows).logits, rtol=0, atol=1e-5
        )


def test_similarity_is_that_of_the_cut_model(tiny_model: Any, windows: Tensor) -> None:
    """Also after other candidates were looked at: nothing of them is left over."""
    model = tiny_model("gemma3_text")
    judge = laco._Judge(model, windows, 0)
    blocks = untouched(range(4))
    wide = [merged(blocks[:3], [-1.0, 1.0, 1.0]), blocks[3]]
    narrow = [blocks[0], merged(blocks[1:3], [0.0, 1.0]), blocks[3]]
    judge.similarity(wide)
    got = judge.similarity(narrow)
    smaller = cut(model, judge.trial.cut_to(narrow))
    with torch.no_grad():
        ours, dense = (
            m.model(windows).last_hidden_state.double().flatten(1) for m in (smaller, model)
        )
    expected = torch.cosine_similarity(ours, dense).mean()
    assert got == pytest.approx(float(expected), abs=1e-6)
    assert judge.similarity(blocks) == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda plan: plan.share(1, [2]), "block 1 shares its linears"),
        (
            lambda plan: plan.factor({(1, "mlp.up_proj"): 4}),
            "block 1 has factored or narrow linears",
        ),
        (lambda plan: plan.replace(1, 2, "ffn", 8), "block 1 is an ffn replacement"),
    ],
)
def test_blocks_of_another_form_are_refused(tiny_model: Any, change: Any, reason: str) -> None:
    from foldstack.compression.structure.surgery import build_on_meta, config_for

    config = tiny_model("llama").config
    model = build_on_meta(config_for(config, change(plan_of(config))))
    with pytest.raises(InputError, match=f"laco merges .* {reason}; use .*shortgpt"):
        Laco(sparsity=0.2).outline(model)


def test_blocks_that_take_no_part_may_have_any_form(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    shared = cut(model, Cut(plan_of(model).share(0, [1]), tuple(range(5))))
    method = Laco(sparsity=share_of_blocks(shared, 1) * 0.9, protect_first=2)
    change = method.compress(shared, evidence_of(shared, windows))
    assert change.inherits in {(0, 1, 2, 4), (0, 1, 3, 4)}
    assert change.plan.blocks[1].weights_of == 0


def test_settings_that_cannot_collapse_everything_are_refused() -> None:
    with pytest.raises(ValidationError, match="interval must be below blocks_per_merge 4, got 4"):
        Laco(sparsity=0.2, interval=4)


def test_smaller_merges_are_tried_before_the_threshold_falls(
    tiny_model: Any, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    judged: list[tuple[float, int]] = []
    search = Laco._search

    def recorded(self: Laco, judge: Any, num_blocks: int, target: int, *how: Any) -> Any:
        judged.append(how)
        return search(self, judge, num_blocks, target, *how)

    monkeypatch.setattr(Laco, "_search", recorded)
    method = Laco(sparsity=share_of_blocks(model, 2))
    change = method.compress(model, evidence_of(model, windows))
    assert judged[:4] == [(0.95, 4), (0.95, 3), (0.95, 2), (0.9, 4)]
    assert len(change.inherits) == 4
