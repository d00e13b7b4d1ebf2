"""The plan: structure as data, whatever order it was changed in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from foldstack.compression.errors import InputError
from foldstack.compression.structure.block_plan import BlockPlan, LowRank, NarrowHeads
from foldstack.compression.structure.plan import Plan

NUM_BLOCKS = 6
Q, UP = "self_attn.q_proj", "mlp.up_proj"


def plan():
    return Plan.identity("llama", NUM_BLOCKS)


def with_shared_basis():
    """Blocks 1, 2 and 4 have a rank-3 query on the basis of block 1."""
    sites = [(position, Q) for position in (1, 2, 4)]
    return plan().factor(dict.fromkeys(sites, 3), dict.fromkeys(sites, 1))


def test_identity_is_native_and_removes_nothing():
    assert plan().is_native
    assert plan().removed_blocks == ()


def test_kept_positions_keep_their_source():
    kept = plan().keep([5, 0, 3])
    assert [block.source for block in kept.blocks] == [0, 3, 5]
    assert kept.removed_blocks == (1, 2, 4)
    assert kept.is_native


def test_a_plan_of_a_pruned_model_goes_on_from_its_base():
    """What a native plan makes counts its blocks from 0."""
    pruned = plan().keep([0, 2, 3, 5])
    again = Plan.identity("llama", 4)
    assert again.after(pruned) == pruned
    assert again.keep([0, 2, 3]).after(pruned) == plan().keep([0, 3, 5])
    shared = again.share(1, [2]).factor({(1, Q): 3})
    assert shared.after(pruned) == pruned.share(1, [2]).factor({(1, Q): 3})
    assert shared.after(shared) == shared  # it is what the next step started from, and says so


def test_a_plan_of_a_replaced_and_narrow_model_goes_on_from_its_base():
    first = plan().narrow(dict.fromkeys(range(6), 40)).keep([0, 1, 2, 3, 5])
    run = Plan.identity("llama", 5).replace(2, 5, "swiglu", 24).after(first)
    assert run.blocks[2].stands_for == (2, 3, 5)
    assert run.blocks[2].mlp_width is None
    assert [block.mlp_width for block in run.blocks[:2]] == [40, 40]
    layer = plan().replace(1, 4, "layer")
    kept = Plan.identity("llama", 4).keep([1, 2]).after(layer)
    assert [(block.kind, block.stands_for) for block in kept.blocks] == [
        ("layer", (1, 2, 3)),
        ("original", (4,)),
    ]


def test_positions_are_those_of_the_current_plan():
    assert [b.source for b in plan().keep([1, 3, 5]).keep([0, 2]).blocks] == [1, 5]


def test_first_of_a_group_stores_the_linears():
    shared = plan().share(3, [2, 4])
    assert [block.weights_of for block in shared.blocks] == [None, None, None, 2, 2, None]
    assert not shared.is_native
    assert shared.owner(4) == 2


def test_a_removed_owner_leaves_its_linears_to_the_next_borrower():
    shared = plan().factor({(1, Q): 4}).share(1, [2, 3]).keep([0, 2, 3, 5])
    assert shared.blocks[1].weights_of is None
    assert shared.blocks[1].linears == {Q: LowRank(rank=4)}
    assert shared.blocks[2].weights_of == 1


def test_a_removed_basis_passes_to_its_first_user():
    left = with_shared_basis().keep([0, 2, 4])
    assert left.blocks[1].linears[Q].basis_of is None
    assert left.blocks[2].linears[Q].basis_of == 1


def test_a_basis_passes_on_when_its_block_shares_is_replaced_or_factored_anew():
    for changed in (
        with_shared_basis().share(0, [1]),  # position 1 now uses the dense linears of 0
        with_shared_basis().borrow({1: 5}, {}),
        with_shared_basis().replace(1, 2, "layer"),
        with_shared_basis().replace(1, 2, "ffn", 16),
        with_shared_basis().factor({(1, Q): 3}),
    ):
        assert changed.blocks[2].linears[Q] == LowRank(rank=3)
        assert changed.blocks[4].linears[Q].basis_of == 2
    moved = with_shared_basis().share(1, [0])
    assert moved.blocks[0].linears[Q] == LowRank(rank=3)
    assert [moved.blocks[position].linears[Q].basis_of for position in (2, 4)] == [0, 0]
    turned = with_shared_basis().repeat([4, 3, 2, 1, 0, 5], {})
    assert [turned.blocks[position].linears[Q].basis_of for position in (0, 2, 3)] == [None, 0, 0]


def test_a_replacement_stands_for_its_run():
    replaced = plan().replace(2, 5, "layer")
    assert [block.stands_for for block in replaced.blocks] == [(0,), (1,), (2, 3, 4), (5,)]
    assert replaced.removed_blocks == ()
    assert replaced.is_native
    assert not plan().replace(2, 5, "ffn", 64).is_native


HEADS = NarrowHeads(qk_dim=6, v_dim=5, rotary_dim=6)


def test_narrow_blocks_are_native_only_with_one_mlp_width_and_whole_heads():
    assert plan().narrow(dict.fromkeys(range(NUM_BLOCKS), 40)).is_native
    assert not plan().narrow({0: 40}).is_native
    assert not plan().narrow(heads=dict.fromkeys(range(NUM_BLOCKS), HEADS)).is_native
    assert plan().narrow({0: 40}).keep([1, 2]).is_native


def test_widths_go_where_the_linears_go():
    shared = plan().narrow({1: 40, 3: 30}).share(3, [1])
    assert [block.mlp_width for block in shared.blocks] == [None, 30, None, None, None, None]
    assert shared.keep([2, 3]).blocks[1].mlp_width == 30
    layer = plan().narrow({2: 40}, {2: HEADS}).replace(2, 4, "layer").blocks[2]
    assert (layer.mlp_width, layer.narrow_heads) == (40, HEADS)
    assert plan().narrow({2: 40}).replace(2, 4, "ffn", 16).blocks[2].mlp_width is None


def test_a_plan_from_before_there_were_widths_still_loads():
    data = plan().model_dump(mode="json")
    for block in data["blocks"]:
        del block["mlp_width"], block["narrow_heads"]
    assert Plan.model_validate(data) == plan()


def test_a_run_that_others_borrow_from_is_not_replaced():
    with pytest.raises(ValueError, match="other blocks share"):
        plan().share(2, [4]).replace(2, 3, "layer")


def test_an_owner_may_come_after_its_borrowers():
    plan_ = plan().borrow({2: 4, 3: 4, 1: 5}, {Q: 2}, "normed")
    assert [block.weights_of for block in plan_.blocks] == [None, 5, 4, 4, None, None]
    assert plan_.blocks[2].adapters == {Q: 2}
    assert not plan_.is_native
    kept = plan_.keep([0, 3, 4])
    assert [block.weights_of for block in kept.blocks] == [None, 2, None]
    assert [block.outputs for block in kept.blocks] == ["plain", "normed", "plain"]


def test_an_owner_that_stays_is_not_replaced_by_an_earlier_borrower():
    kept = plan().factor({(4, Q): 3}).borrow({1: 4, 2: 4}, {}).keep([1, 2, 4, 5])
    assert [block.weights_of for block in kept.blocks] == [2, 2, None, None]
    left = kept.keep([0, 1, 3])
    assert [block.weights_of for block in left.blocks] == [None, 0, None]
    assert left.blocks[0].linears == {Q: LowRank(rank=3)}


def test_a_base_does_not_go_while_its_virtual_blocks_stay():
    virtual = plan().borrow({3: 5}, {Q: 2}, "normed")
    with pytest.raises(InputError, match="block 5 cannot go while block 3 stays"):
        virtual.keep([0, 1, 2, 3, 4])
    with pytest.raises(InputError, match="block 5 cannot go while block 3 stays"):
        virtual.replace(4, 6, "layer")
    with pytest.raises(ValueError, match="position 5 owns weights that other blocks share"):
        virtual.replace(5, 6, "layer")
    assert virtual.keep([0, 1, 2, 4]).is_native
    assert virtual.replace(2, 4, "layer").is_native
    assert virtual.factor({(5, UP): 3}).blocks[3].adapters == {Q: 2}
    with pytest.raises(ValueError, match="which owns no linears"):
        virtual.share(4, [5])
    with pytest.raises(ValueError, match="position 3 has no linears of its own"):
        virtual.share(2, [3])


def test_repeated_blocks_make_the_plan_longer_than_its_base():
    longer = plan().repeat([0, 1, 2, 1, 2, 3, 4, 5], {Q: 2}, "normed")
    assert [block.source for block in longer.blocks] == [0, 1, 2, 1, 2, 3, 4, 5]
    assert [block.weights_of for block in longer.blocks] == [None] * 3 + [1, 2] + [None] * 3
    assert longer.keep([0, 1, 2, 5, 6, 7]) == plan()
    with pytest.raises(ValueError, match="order names 5 of 6 positions"):
        plan().repeat([0, 1, 2, 3, 4], {})
    with pytest.raises(ValueError, match="position 2 has no linears of its own to repeat"):
        plan().share(1, [2]).repeat([0, 1, 2, 2, 3, 4, 5], {})
    shared = with_shared_basis().share(3, [5]).repeat([0, 0, 1, 2, 3, 4, 5], {})
    assert shared.blocks[3].linears[Q].basis_of == 2
    assert shared.blocks[6].weights_of == 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: p.keep([]), "keeps at least one block"),
        (lambda p: p.share(1, [2]).share(2, [3]), "position 2 has no linears of its own"),
        (lambda p: p.share(1, [2]).factor({(2, Q): 3}), "factor its owner's instead"),
        (lambda p: p.replace(4, 4, "layer"), "run 4..4 is not inside"),
        (lambda p: p.replace(1, 2, "original"), "a replacement is a layer"),
        (lambda p: p.replace(1, 2, "ffn"), "intermediate_size belongs to"),
        (lambda _: with_shared_basis().share(4, [0]), "the basis of self_attn.q_proj is stored at"),
        (lambda p: p.factor({(1, Q): 3, (2, Q): 2}, {(2, Q): 1}), "does not own one of rank 2"),
        (lambda p: p.share(1, [2]).narrow({2: 40}), "stores no linears to narrow"),
        (lambda p: p.factor({(1, UP): 3}).narrow({1: 40}), "narrow before that"),
        (lambda p: p.narrow(heads={1: HEADS}).share(0, [1]), "share before narrowing"),
        (lambda p: p.narrow(heads={1: HEADS}).borrow({0: 1}, {}), "borrow before"),
        (lambda p: p.borrow({1: 3}, {Q: 2}).narrow({3: 40}), "adapters of its widths"),
        (lambda p: p.borrow({1: 9}, {}), "refers to 9, the plan has 6 blocks"),
        (lambda p: p.borrow({1: 2, 2: 1}, {}), "which owns no linears"),
        (lambda p: p.borrow({1: 1}, {}), "which owns no linears"),
        (lambda p: p.borrow({1: 2}, {Q: 0}), "greater than or equal to 1"),
        (lambda p: p.replace(1, 3, "ffn", 8).borrow({2: 1}, {}), "which owns no linears"),
    ],
)
def test_impossible_changes_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        change(plan())


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ([{"source": 9, "stands_for": [9]}], "stands for base block 9, the base model has 6"),
        ([{"source": 1, "stands_for": [0]}], "stands_for must begin with source 1"),
        ([{"source": 0, "stands_for": [0], "weights_of": 0}], "owns no linears"),
        ([{"source": 0, "stands_for": [0], "adapters": {Q: 1}}], "on linears that it borrows"),
        ([{"source": 0, "stands_for": [0], "outputs": "loud"}], "'plain', 'normed' or 'scaled'"),
        ([{"source": 0, "stands_for": [0], "colour": "red"}], "Extra inputs are not permitted"),
        ([{"source": 0, "stands_for": [0], "linears": {Q: {"rank": 0}}}], "greater than or equal"),
        ([{"source": 0, "stands_for": [0], "mlp_width": -1}], "greater than or equal"),
        (
            [
                {
                    "source": 0,
                    "stands_for": [0],
                    "narrow_heads": {"qk_dim": 4, "v_dim": 4, "rotary_dim": 3},
                }
            ],
            "rotary_dim must be even and at most qk_dim 4, got 3",
        ),
    ],
)
def test_a_plan_from_a_file_is_validated(blocks, sentence):
    data = {"base_model_type": "llama", "base_num_blocks": NUM_BLOCKS, "blocks": blocks}
    with pytest.raises(ValidationError, match=sentence):
        Plan.model_validate(data)


def test_a_basis_of_another_rank_is_refused():
    wrong = BlockPlan(source=2, stands_for=(2,), linears={Q: LowRank(rank=2, basis_of=1)})
    blocks = list(with_shared_basis().blocks)
    blocks[2] = wrong
    with pytest.raises(ValidationError, match="does not own one of rank 2"):
        Plan(base_model_type="llama", base_num_blocks=NUM_BLOCKS, blocks=tuple(blocks))


def changed_plan(draw):
    """A plan after a few random changes, each legal where it was made."""
    changed = with_shared_basis() if draw(st.booleans()) else plan()
    for _ in range(draw(st.integers(0, 4))):
        positions = st.integers(0, len(changed.blocks) - 1)
        kind = draw(st.sampled_from(["keep", "share", "factor", "bases", "narrow", "borrow"]))
        try:
            if kind == "keep":
                changed = changed.keep(draw(st.sets(positions, min_size=1)))
            elif kind == "bases":
                sites = [
                    (position, UP) for position in sorted(draw(st.sets(positions, min_size=1)))
                ]
                bases = dict.fromkeys(sites, sites[0][0])
                changed = changed.factor(dict.fromkeys(sites, 5), bases)
            elif kind == "narrow":
                changed = changed.narrow({draw(positions): draw(st.integers(1, 9))})
            elif kind == "share":
                changed = changed.share(draw(positions), [draw(positions)])
            elif kind == "borrow":
                ranks = draw(st.sampled_from([{}, {Q: 2}]))
                changed = changed.borrow({draw(positions): draw(positions)}, ranks)
            else:
                changed = changed.factor({(draw(positions), UP): draw(st.integers(1, 9))})
        except ValueError:
            continue
    return changed


def basis(of, position, name):
    """The position that stores the first factor of a linear of `position`."""
    form = of.blocks[of.owner(position)].linears.get(name)
    return form and (of.owner(position) if form.basis_of is None else form.basis_of)


@given(st.data())
def test_any_removal_leaves_a_valid_plan_that_survives_json(data):
    changed = changed_plan(data.draw)
    positions = st.integers(0, len(changed.blocks) - 1)
    kept = sorted(data.draw(st.sets(positions, min_size=1)))
    try:
        left = changed.keep(kept)
    except InputError:
        adapted = [p for p in kept if changed.blocks[p].adapters]
        assert any(changed.owner(p) not in kept for p in adapted)
        return
    assert Plan.model_validate_json(left.model_dump_json()) == left
    # What a block uses does not change: the same linears, in the same form.
    for new, old in enumerate(kept):
        forms = left.blocks[left.owner(new)].linears
        before = changed.blocks[changed.owner(old)].linears
        assert {n: f.rank for n, f in forms.items()} == {n: f.rank for n, f in before.items()}
        width = changed.blocks[changed.owner(old)].mlp_width
        assert left.blocks[left.owner(new)].mlp_width == width
        assert left.blocks[new].adapters == changed.blocks[old].adapters
        for name in (Q, UP):
            own = basis(changed, old, name)
            same_basis = [o for o in kept if own is not None and basis(changed, o, name) == own]
            assert len({basis(left, kept.index(o), name) for o in same_basis}) <= 1
        same_owner = [o for o in kept if changed.owner(o) == changed.owner(old)]
        assert {left.owner(kept.index(o)) for o in same_owner} == {left.owner(new)}


def test_a_block_goes_after_those_with_adapters_on_its_linears():
    virtual = Plan.identity("llama", 6).borrow({1: 3, 2: 3}, {Q: 2}).share(4, [5])
    assert virtual.order_of_removal([3, 0, 2, 4, 1, 5]) == [0, 2, 4, 1, 3, 5]
    assert virtual.order_of_removal([3, 0, 1]) == [0, 1]
    assert virtual.can_go(3, {1, 2})
    assert not virtual.can_go(3, {2})
    for count in range(1, 6):
        gone = virtual.order_of_removal([3, 4, 1, 0, 2, 5])[:count]
        assert len(virtual.keep(set(range(6)) - set(gone)).blocks) == 6 - count
