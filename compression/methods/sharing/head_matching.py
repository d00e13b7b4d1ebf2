"""Which attention heads of a model are alike, and which are to give their weights to which.

The unit is a group: one key and value head with the query heads that read it, and the columns of
the output projection that read those. Without grouped queries that is a head.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.structure.head_slices import Slice
from foldstack.compression.structure.heads import Heads, HeadSizes, head_sizes, heads_of

Match = Literal["qk", "q", "k", "v", "qkv", "product", "random"]

Gram = Float64[Tensor, "groups groups"]


def cosines(model: PreTrainedModel, positions: Sequence[int], match: Match, seed: int = 0) -> Gram:
    """How alike all groups of the blocks at `positions` are, position by position, in float64.

    qk, q, k, v, qkv: the cosine of the projections themselves, vec[Wq; Wk] and so on (arXiv
    2402.11819; `find_match.py` of its code). product: the mean of two cosines, of what the logits
    depend on and of Wo Wv, which no rotation inside a head changes. random: numbers in [0, 1).
    """
    sizes = head_sizes(model)
    if match == "random":
        count = len(positions) * sizes.kv_heads
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(count, count, generator=generator, dtype=torch.float64)
    blocks = [heads_of(model, position, sizes) for position in positions]
    if match == "product":
        return (_cosines(blocks, sizes, "logits") + _cosines(blocks, sizes, "outputs")) / 2
    return _cosines(blocks, sizes, match)


def _cosines(blocks: Sequence[Heads], sizes: HeadSizes, what: str) -> Gram:
    """The Gram of unit vectors: one matrix product per pair of blocks, no loop over heads."""

    def inner(a: Heads, b: Heads) -> Gram:
        if what == "logits":
            return _inner_of_logits(a, b, sizes)
        return _inner_of_outputs(a, b, sizes) if what == "outputs" else _inner(a, b, what)

    count = len(blocks)
    groups = sizes.kv_heads
    gram = torch.zeros(count * groups, count * groups, dtype=torch.float64)
    for i, a in enumerate(blocks):
        for j, b in enumerate(blocks[: i + 1]):
            part = inner(a, b).cpu()
            gram[i * groups : (i + 1) * groups, j * groups : (j + 1) * groups] = part
            gram[j * groups : (j + 1) * groups, i * groups : (i + 1) * groups] = part.T
    norms = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    return gram / norms[:, None] / norms


def _inner(a: Heads, b: Heads, letters: str) -> Tensor:
    """Sum over the named projections of <W, W'>, [groups, groups]."""
    projections = {"q": (a.query, b.query), "k": (a.key, b.key), "v": (a.value, b.value)}
    groups = len(a.key)
    total = a.key.new_zeros(groups, groups)
    for letter in letters:
        mine, theirs = projections[letter]
        total += mine.reshape(groups, -1) @ theirs.reshape(groups, -1).T
    return total


def _inner_of_outputs(a: Heads, b: Heads, sizes: HeadSizes) -> Tensor:
    """Sum over a group's heads of <Wo Wv, Wo' Wv'>, from h x h products alone."""
    values = torch.einsum("gvx,hwx->ghvw", a.value, b.value)
    total = values.new_zeros(values.shape[:2])
    mine, theirs = (heads.output.unflatten(0, (-1, sizes.group)) for heads in (a, b))
    for head in range(sizes.group):
        outputs = torch.einsum("gxv,hxw->ghvw", mine[:, head], theirs[:, head])
        total += (outputs * values).sum((-1, -2))
    return total


def _inner_of_logits(a: Heads, b: Heads, sizes: HeadSizes) -> Tensor:
    """Sum over a group's heads of the inner product of the bilinear forms in query and key inputs.

    Coordinates that do not rotate give one form, Wq^T Wk. A pair (i, i + half) that rotates by an
    angle which grows with the distance gives two, of its cosine and its sine: the real and the
    imaginary part of conj(q)^T k with q, k the pair's rows as complex numbers.
    """
    rotary = sizes.rotary_dim
    mine, theirs = (heads.query.unflatten(0, (-1, sizes.group)) for heads in (a, b))
    total = a.key.new_zeros(len(a.key), len(b.key))
    still_keys = torch.einsum("gix,hjx->ghij", a.key[:, rotary:], b.key[:, rotary:])
    # One number per pair of coordinates: <k', k>, with the conjugate on the second.
    turning_keys = torch.einsum(
        "gpx,hpx->ghp", _complex(a.key, rotary), _complex(b.key, rotary).conj()
    )
    for head in range(sizes.group):
        q, other = mine[:, head], theirs[:, head]
        still = torch.einsum("gix,hjx->ghij", q[:, rotary:], other[:, rotary:])
        turning = torch.einsum("gpx,hpx->ghp", _complex(q, rotary), _complex(other, rotary).conj())
        total += (still * still_keys).sum((-1, -2)) + (turning * turning_keys.conj()).real.sum(-1)
    return total


def _complex(rows: Tensor, rotary: int) -> Tensor:
    """The rotating rows [groups, rotary, hidden] in pairs, [groups, rotary / 2, hidden]."""
    first, second = rows[:, :rotary].contiguous().chunk(2, dim=1)
    return torch.complex(first, second)


def choose_donors(
    cosine: Gram, slices: Sequence[Slice], count: int, *, lending: Iterable[Slice] = ()
) -> dict[Slice, Slice]:
    """`count` groups and the donor of each, an earlier block's group that is itself kept.

    In order of decreasing cosine a pair is taken unless one of the two is replaced already or the
    first is a donor. Of the blocks after the first no more groups become donors than may stay, so
    that `count` is reached: the first block can always give.

    Args:
        cosine: of the groups in the order of `slices`, which is by position.
        lending: groups that are donors already.
    """
    first = slices[0][0]
    positions = torch.tensor([position for position, _ in slices])
    mine, theirs = torch.nonzero(positions[:, None] > positions, as_tuple=True)
    order = torch.sort(cosine[mine, theirs], descending=True, stable=True).indices
    donors: dict[Slice, Slice] = {}
    lent = set(lending)
    free = sum(s[0] != first and s not in lent for s in slices) - count
    assert free >= 0, "the count was checked against the groups that there are"
    for a, b in zip(mine[order].tolist(), theirs[order].tolist(), strict=True):
        if len(donors) == count:
            break
        replaced, donor = slices[a], slices[b]
        if replaced in donors or replaced in lent or donor in donors:
            continue
        if donor[0] != first and donor not in lent:
            if free == 0:
                continue
            free -= 1
        lent.add(donor)
        donors[replaced] = donor
    return donors
