"""DirectShare: which heads are alike, who gives to whom, and that a duplicate costs nothing."""

import copy

import pytest
import torch

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.sharing.direct_share import DirectShare
from foldstack.compression.methods.sharing.head_matching import choose_donors, cosines
from foldstack.compression.methods.sharing.head_sharing import groups_of_heads, head_cuts
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.block_plan import NarrowHeads
from foldstack.compression.structure.heads import head_sizes, heads_of, stored_heads
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import Cut, cut, plan_of

MATCHES = ("qk", "q", "k", "v", "qkv", "product")
PLANTED, DONOR = (2, 1), (1, 0)


@pytest.fixture
def ids():
    return torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(3))


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def set_heads(model, position, heads):
    block = architecture_of(model).blocks(model)[position]
    parameters = dict(block.named_parameters())
    with torch.no_grad():
        for name, tensor in stored_heads(model, position, heads).items():
            parameters[name.removeprefix(f"blocks.{position}.")].copy_(tensor)


def with_duplicate(model, turn=None):
    """A copy in which group PLANTED is DONOR: its value coordinates turned by `turn`, if any."""
    model, sizes = copy.deepcopy(model), head_sizes(model)
    (position, index), (giver, theirs) = PLANTED, DONOR
    mine, lent = heads_of(model, position, sizes), heads_of(model, giver, sizes)
    turn = torch.eye(sizes.head_dim).double() if turn is None else turn
    for name in ("query", "key", "value", "output", "query_bias", "key_bias", "value_bias"):
        ours, others = getattr(mine, name), getattr(lent, name)
        if ours is None:
            continue
        per_group = len(ours) // sizes.kv_heads
        given = others[theirs * per_group : (theirs + 1) * per_group]
        if name in ("value", "value_bias"):
            given = torch.einsum("vw,gw...->gv...", turn, given)
        if name == "output":
            given = given @ turn.T
        ours[index * per_group : (index + 1) * per_group] = given
    set_heads(model, position, mine)
    return model


def evidence(model, ids):
    statistics = gather(model, ids, {"similarity"})
    return Evidence(ids, statistics, rank_blocks(statistics))


def rotation(size):
    generator = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q


def one_group(model):
    """The sparsity that one replaced group reaches."""
    plan = plan_of(model).share_slices(head_cuts(model), {PLANTED: DONOR})
    return 1 - size_of_plan(model.config, plan).parameters / count_parameters(model)


@pytest.mark.parametrize("match", ["qk", "product"])
def test_a_planted_duplicate_is_found_first_and_costs_nothing(match, architecture, tiny_model, ids):
    model = with_duplicate(tiny_model(architecture))
    method = DirectShare(sparsity=one_group(model), match=match)
    assert method.donors(model) == {PLANTED: DONOR}
    smaller = cut(model, method.compress(model, evidence(model, ids)))
    torch.testing.assert_close(logits(smaller, ids), logits(model, ids), rtol=1e-6, atol=1e-5)
    assert len(groups_of_heads(smaller)) == len(groups_of_heads(model)) - 1


def test_one_gram_equals_the_triple_loop(architecture, tiny_model):
    model = tiny_model(architecture)
    sizes = head_sizes(model)
    vectors = []
    for position in range(4):
        heads = heads_of(model, position, sizes)
        queries = heads.query.unflatten(0, (sizes.kv_heads, -1))
        for index in range(sizes.kv_heads):
            vectors.append(torch.cat([queries[index].flatten(), heads.key[index].flatten()]))
    got = cosines(model, range(4), "qk")
    for i, first in enumerate(vectors):
        for j, second in enumerate(vectors):
            expected = torch.cosine_similarity(first, second, dim=0)
            assert float(got[i, j]) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_product_match_compares_the_forms_themselves(family, tiny_model):
    """Against the d x d matrices that it never makes; with rotary positions at many distances."""
    model = tiny_model(family)
    sizes = head_sizes(model)
    logit_forms, output_forms = [], []
    for position in range(4):
        heads = heads_of(model, position, sizes)
        for index in range(sizes.kv_heads):
            group = range(index * sizes.group, (index + 1) * sizes.group)
            key, value = heads.key[index], heads.value[index]
            logit_forms.append(torch.stack([bilinear(heads.query[i], key, sizes) for i in group]))
            output_forms.append(torch.stack([heads.output[i] @ value for i in group]))
    expected = (cosine_matrix(logit_forms) + cosine_matrix(output_forms)) / 2
    torch.testing.assert_close(cosines(model, range(4), "product"), expected)


def bilinear(query, key, sizes):
    """Of the logit's coefficients: of what stays, and of each pair's cosine and sine."""
    half = sizes.rotary_dim // 2
    q, k = query[: 2 * half].chunk(2), key[: 2 * half].chunk(2)
    still = query[2 * half :].T @ key[2 * half :]
    cosine = torch.einsum("px,py->pxy", q[0], k[0]) + torch.einsum("px,py->pxy", q[1], k[1])
    sine = torch.einsum("px,py->pxy", q[0], k[1]) - torch.einsum("px,py->pxy", q[1], k[0])
    return torch.cat([still[None], cosine, sine])


def cosine_matrix(vectors):
    rows = torch.stack([vector.flatten() for vector in vectors])
    rows = rows / rows.norm(dim=1, keepdim=True)
    return rows @ rows.T


def test_a_turned_head_is_the_same_to_the_product_match_alone(architecture, tiny_model, ids):
    model = tiny_model(architecture)
    turned = with_duplicate(model, rotation(head_sizes(model).head_dim))
    straight = with_duplicate(model)
    torch.testing.assert_close(logits(turned, ids), logits(straight, ids), rtol=1e-4, atol=1e-4)
    same, other = (cosines(m, range(4), "product") for m in (straight, turned))
    torch.testing.assert_close(other, same, rtol=0, atol=1e-6)
    same, other = (cosines(m, range(4), "v") for m in (straight, turned))
    assert (other - same).abs().max() > 0.1
    smaller = cut(
        turned,
        DirectShare(sparsity=one_group(model), match="product").compress(
            turned, evidence(turned, ids)
        ),
    )
    assert {position for position, _ in plan_of(smaller).lenders} == {DONOR[0]}
    torch.testing.assert_close(logits(smaller, ids), logits(turned, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("match", [*MATCHES, "random"])
def test_every_count_is_reached_without_chains(match, tiny_model):
    model = tiny_model("llama")
    groups = groups_of_heads(model)
    cosine = cosines(model, range(4), match)
    dense = count_parameters(model)
    sizes = [dense]
    for count in range(1, len(groups) - 1):
        donors = choose_donors(cosine, groups, count)
        assert len(donors) == count
        assert donors == choose_donors(cosine, groups, count)
        assert all(donor[0] < replaced[0] for replaced, donor in donors.items())
        assert not donors.keys() & set(donors.values())
        plan = plan_of(model).share_slices(head_cuts(model), donors)
        sizes.append(size_of_plan(model.config, plan).parameters)
    per_group = (16 + 8 + 8 + 16) * 32  # rows of q, k, v and columns of o
    assert sizes == [dense - count * per_group for count in range(len(sizes))]


def test_ties_go_to_the_first():
    groups = [(position, index) for position in range(3) for index in range(2)]
    donors = choose_donors(torch.ones(6, 6).double(), groups, 3)
    assert donors == {(1, 0): (0, 0), (1, 1): (0, 0), (2, 0): (0, 0)}


def test_a_replaced_head_takes_the_best_donor_that_is_kept():
    """Group 2 is most like 1, which is replaced by 0: it takes 0 as well, and no chain comes up."""
    cosine = torch.eye(3).double()
    for i, j, value in ((1, 0, 0.9), (2, 1, 0.8), (2, 0, 0.3)):
        cosine[i, j] = cosine[j, i] = value
    groups = [(0, 0), (1, 0), (2, 0)]
    assert choose_donors(cosine, groups, 2) == {(1, 0): (0, 0), (2, 0): (0, 0)}
    cosine[1, 0] = 0.7
    assert choose_donors(cosine, groups, 1) == {(2, 0): (1, 0)}
    assert choose_donors(cosine, groups, 2) == {(1, 0): (0, 0), (2, 0): (0, 0)}


def test_sharing_again_keeps_what_is_shared(tiny_model, ids):
    model = tiny_model("gpt2")
    once = cut(model, DirectShare(sparsity=0.1).compress(model, evidence(model, ids)))
    twice = cut(once, DirectShare(sparsity=0.1).compress(once, evidence(once, ids)))
    before, after = plan_of(once), plan_of(twice)
    for position, block in enumerate(before.blocks):
        for name, form in block.linears.items():
            now = after.blocks[position].linears[name].slices
            assert all(o is None or o == n for o, n in zip(form.slices, now, strict=True))
    assert count_parameters(twice) < count_parameters(once)


def test_a_model_without_whole_heads_is_refused(tiny_model):
    model = tiny_model("llama")
    heads = NarrowHeads(qk_dim=6, v_dim=5, rotary_dim=6)
    plan = Plan.identity("llama", 4).narrow(heads=dict.fromkeys(range(4), heads))
    shapes = {"q_proj": (24, 32), "k_proj": (12, 32), "v_proj": (10, 32), "o_proj": (32, 20)}
    tensors = {
        f"blocks.{position}.self_attn.{name}.weight": torch.zeros(shape)
        for position in range(4)
        for name, shape in shapes.items()
    }
    tensors |= {
        f"blocks.{position}.self_attn.rotary_pairs": torch.arange(3).repeat(2, 1)
        for position in range(4)
    }
    narrow = cut(model, Cut(plan, (0, 1, 2, 3), tensors))
    with pytest.raises(InputError, match="share heads before you factor or narrow them"):
        DirectShare(sparsity=0.1).outline(narrow)
