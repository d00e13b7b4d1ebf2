"""Linears of which other positions hold slices: in the plan, in the model, and when it changes."""

import copy

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from foldstack.compression.errors import InputError
from foldstack.compression.methods import METHODS
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.sharing.head_sharing import head_cuts
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.block_plan import NarrowHeads
from foldstack.compression.structure.head_slices import HeadSlices
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import (
    count_parameters,
    linear_shapes,
    size_of,
    size_of_plan,
)
from foldstack.compression.structure.surgery import Cut, cut, plan_of
from foldstack.compression.training.recovery import Recovery, recover

Q, O = "self_attn.q_proj", "self_attn.o_proj"  # noqa: E741
TWO = {
    Q: HeadSlices(axis="out", slices=(None, None)),
    O: HeadSlices(axis="in", slices=(None, None)),
}
DONORS = {(1, 0): (0, 1), (2, 0): (0, 1), (2, 1): (1, 1), (3, 0): (1, 1), (3, 1): (0, 0)}


def plan():
    return Plan.identity("llama", 4)


def shared():
    return plan().share_slices(TWO, DONORS)


@pytest.fixture
def ids():
    return torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(3))


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def shared_model(model, donors=DONORS):
    """The donors above, wherever the model has at least two groups of heads per block."""
    change = plan_of(model).share_slices(head_cuts(model), donors)
    return cut(model, Cut(change, tuple(range(4))))


def by_hand(model, donors=DONORS):
    """The stock model with the donors' weights copied into every place that uses them."""
    same = copy.deepcopy(model)
    architecture = architecture_of(same)
    blocks = architecture.blocks(same)
    originals = copy.deepcopy(blocks)
    for name, form in head_cuts(same).items():
        for (position, index), (donor, theirs) in donors.items():
            mine, lent = blocks[position].get_submodule(name), originals[donor].get_submodule(name)
            rows = form.axis == "out"
            for to, of in index_pairs(form, architecture.weight(mine).shape, index, theirs):
                with torch.no_grad():
                    mine_weight, weight = architecture.weight(mine), architecture.weight(lent)
                    if rows:
                        mine_weight[to] = weight[of]
                        if mine.bias is not None:
                            mine.bias[to] = lent.bias[of]
                    else:
                        mine_weight[:, to] = weight[:, of]
    return same


def index_pairs(form, shape, index, theirs):
    """Ranges of one slice and of another, part by part."""
    width, start = shape[0 if form.axis == "out" else 1], 0
    for part in form.parts or (width,):
        size = part // len(form.slices)
        places = [slice(start + i * size, start + (i + 1) * size) for i in (index, theirs)]
        yield tuple(places)
        start += part


def test_a_model_with_shared_slices_computes_what_copies_would(
    architecture, tiny_model, ids, tmp_path
):
    model = tiny_model(architecture)
    smaller = shared_model(model)
    expected = logits(by_hand(model), ids)
    assert (expected - logits(model, ids)).abs().max() > 1e-3
    torch.testing.assert_close(logits(smaller, ids), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        first = smaller(ids[:, :25], use_cache=True)
        second = smaller(ids[:, 25:], past_key_values=first.past_key_values)
    cached = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-5)
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(smaller, ids))


def test_size_counts_what_is_stored_and_what_is_executed(architecture, tiny_model):
    model = tiny_model(architecture)
    dense, smaller = size_of(model), shared_model(model)
    size = size_of(smaller)
    slices = 0
    for name, form in head_cuts(model).items():
        module = architecture_of(model).blocks(model)[0].get_submodule(name)
        travels = module.bias is not None and form.axis == "out"
        slices += (module.weight.numel() + (module.bias.numel() if travels else 0)) // len(
            form.slices
        )
    assert dense.parameters - size.parameters == len(DONORS) * slices
    assert size == size_of_plan(model.config, plan_of(smaller))
    assert size.flops_per_token == dense.flops_per_token
    assert size.kv_bytes_per_token == dense.kv_bytes_per_token


def test_a_block_may_store_no_head_at_all(tiny_model, ids, tmp_path):
    model = tiny_model("qwen2")
    smaller = shared_model(model)
    block = architecture_of(smaller).blocks(smaller)[2]
    assert block.self_attn.q_proj.stored is block.self_attn.o_proj.stored is None
    assert torch.isfinite(logits(smaller, ids)).all()


def test_the_first_user_of_a_lost_slice_stores_it(architecture, tiny_model, ids):
    """Whatever blocks go, those that stay compute what they did."""
    model = tiny_model(architecture)
    smaller, same = shared_model(model), by_hand(model)
    for kept in ([1, 2, 3], [2, 3], [0, 2, 3], [3], [0, 1]):
        inherits = tuple(kept)
        left = cut(smaller, Cut(plan_of(smaller).keep(kept), inherits))
        expected = cut(same, Cut(plan_of(same).keep(kept), inherits))
        torch.testing.assert_close(logits(left, ids), logits(expected, ids), rtol=1e-5, atol=1e-5)
        assert count_parameters(left) <= count_parameters(expected)
        again = cut(left, Cut(plan_of(left), tuple(range(len(kept)))))
        assert torch.equal(logits(again, ids), logits(left, ids))


def test_two_slices_of_one_lost_donor_become_one_of_their_own_block(architecture, tiny_model, ids):
    donors = {(2, 0): (1, 1), (2, 1): (1, 1), (3, 1): (1, 1)}
    model = tiny_model(architecture)
    smaller, same = shared_model(model, donors), by_hand(model, donors)
    for kept in ([0, 2, 3], [2], [3]):
        left = cut(smaller, Cut(plan_of(smaller).keep(kept), tuple(kept)))
        expected = cut(same, Cut(plan_of(same).keep(kept), tuple(kept)))
        torch.testing.assert_close(logits(left, ids), logits(expected, ids), rtol=1e-5, atol=1e-5)
        assert not plan_of(left).lenders or kept == [0, 2, 3]
        assert size_of_plan(left.config, plan_of(left)).parameters == count_parameters(left)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_recovery_trains_stored_slices_and_merges_exactly(family, tiny_model, ids):
    smaller = shared_model(tiny_model(family))
    before = {name: p.detach().clone() for name, p in smaller.named_parameters()}
    settings = Recovery(steps=3, batch_size=2, precision="float32")
    result = recover(smaller, ids, settings, validation=ids)
    assert result.validation_after < result.validation_before
    after = dict(smaller.named_parameters())
    assert after.keys() == before.keys()
    stored = [n for n, p in after.items() if ".stored.weight" in n and p.numel()]
    assert stored
    assert all(not torch.equal(after[name], before[name]) for name in stored)
    # The loss measured with adapters is that of the merged weights: borrowers saw the adapters.
    with torch.no_grad():
        merged = smaller(ids, labels=ids).loss
    assert float(merged) == pytest.approx(result.validation_after, rel=1e-5)


def test_forms_of_a_plan():
    forms = [block.linears.get(Q) for block in shared().blocks]
    assert forms[0] is None
    assert [form and form.slices for form in forms] == [
        None,
        ((0, 1), None),
        ((0, 1), (1, 1)),
        ((1, 1), (0, 0)),
    ]
    assert shared().lenders == {(p, name) for p in (0, 1) for name in (Q, O)}
    assert not shared().is_native
    assert Plan.model_validate_json(shared().model_dump_json()) == shared()


def test_lost_slices_pass_to_their_first_users_and_lone_ones_are_dense_again():
    left = shared().keep([2, 3])
    assert left.blocks[0].linears == {}
    assert left.blocks[1].linears[O].slices == ((0, 1), None)
    assert shared().keep([0, 3]).blocks[1].linears[Q].slices == (None, (0, 0))
    assert shared().keep([3]).is_native


def test_slices_follow_their_owner_when_others_borrow_all_of_it_or_the_order_changes():
    borrowed = plan().share(0, [1]).share_slices(TWO, {(2, 0): (0, 1), (3, 1): (0, 1)})
    left = borrowed.keep([1, 2, 3])
    assert left.blocks[0].weights_of is None
    assert [block.linears[Q].slices for block in left.blocks[1:]] == [
        ((0, 1), None),
        (None, (0, 1)),
    ]
    longer = shared().repeat([0, 0, 1, 2, 3], {})
    assert longer.blocks[3].linears[Q].slices == ((0, 1), (2, 1))
    assert longer.keep([0, 2, 3, 4]) == shared()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: p.share(0, [1]), "block 0 cannot share its linears as a whole"),
        (lambda p: p.borrow({1: 3}, {}), "block 1 cannot give up its linears"),
        (lambda p: p.factor({(0, Q): 3}), f"block 0 cannot factor {Q}"),
        (lambda p: p.narrow(heads={0: NarrowHeads(qk_dim=2, v_dim=2)}), "have narrower heads"),
        (lambda p: p.replace(1, 3, "layer"), "block 1 cannot be replaced"),
    ],
)
def test_a_lender_is_left_as_it_is(change, sentence):
    with pytest.raises(InputError, match=sentence):
        change(shared())


def test_what_does_not_touch_a_lender_is_allowed():
    assert shared().replace(2, 4, "ffn", 8).blocks[1].linears[Q].slices == ((0, 1), None)
    assert shared().factor({(0, "mlp.up_proj"): 3}).blocks[0].linears["mlp.up_proj"].rank == 3
    assert shared().borrow({3: 2}, {Q: 2}).blocks[3].linears == {}


@pytest.mark.parametrize(
    ("donors", "sentence"),
    [
        ({(1, 0): (0, 0), (2, 0): (1, 0)}, "position 2 uses slice 0 of .* of position 1"),
        ({(1, 0): (0, 2)}, "does not store one like that"),
        ({(1, 0): (1, 0)}, "does not store one like that"),
        ({(1, 0): (9, 1)}, "refers to 9, the plan has 4 blocks"),
    ],
)
def test_a_donor_stores_what_it_gives(donors, sentence):
    with pytest.raises(ValidationError, match=sentence):
        plan().share_slices(TWO, donors)


def test_slices_of_linears_in_other_forms_are_refused():
    with pytest.raises(ValueError, match=f"no dense {Q} of its own to slice"):
        plan().factor({(1, Q): 3}).share_slices(TWO, {(1, 0): (0, 0)})
    with pytest.raises(ValueError, match=f"no dense {Q} of its own to slice"):
        plan().share(0, [1]).share_slices(TWO, {(1, 0): (2, 0)})
    narrow = plan().narrow(heads={1: NarrowHeads(qk_dim=2, v_dim=2)})
    with pytest.raises(ValueError, match="narrow heads and slices"):
        narrow.share_slices(TWO, {(1, 0): (0, 0)})


STACKED = [
    (name, family) for name in ("shortgpt", "svd_llm", "sleb") for family in ("llama", "gpt2")
]


def test_blocks_that_lend_heads_share_with_nobody_as_a_whole(tiny_model, ids):
    donors = {(2, 0): (1, 1), (3, 1): (1, 0)}
    smaller = shared_model(tiny_model("llama"), donors)
    method = METHODS["block_sharing"](sparsity=0.1, keep_head=0, keep_tail=0)
    assert method.stretches(smaller) == [range(1), range(2, 3), range(3, 4)]


@pytest.mark.parametrize(("name", "family"), [*STACKED, ("direct_share", "gpt2")])
def test_other_methods_stack_on_shared_heads(name, family, tiny_model, ids):
    smaller = shared_model(tiny_model(family))
    assert not {(0, n) for n in head_cuts(smaller)} & linear_shapes(smaller).keys()
    sparsity = 0.05 if name == "direct_share" else 0.15
    method = METHODS[name](sparsity=sparsity)
    statistics = gather(smaller, ids, KINDS)
    evidence = Evidence(ids, statistics, rank_blocks(statistics))
    again = cut(smaller, method.compress(smaller, evidence))
    assert 1 - count_parameters(again) / count_parameters(smaller) >= sparsity - 0.005
    assert torch.isfinite(logits(again, ids)).all()
