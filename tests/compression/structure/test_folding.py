"""Factors that no longer pay are multiplied out, and others stay."""

from typing import Any

import torch

from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.folding import fold, unpaid_factors
from foldstack.compression.structure.size import count_parameters, linear_shapes
from foldstack.compression.structure.surgery import Cut, cut, plan_of


def test_a_basis_left_to_one_block_is_multiplied_out(architecture: str, tiny_model: Any) -> None:
    model = tiny_model(architecture)
    (_, name), (rows, columns) = next(iter(linear_shapes(model).items()))
    alone = rows * columns // (rows + columns) + 1
    shared = _on_one_basis(model, name, alone, (1, 2))
    assert unpaid_factors(shared) == ()
    assert fold(shared)[0] is shared
    kept = cut(shared, Cut(plan_of(shared).keep([0, 1, 3]), (0, 1, 3)))
    assert unpaid_factors(kept) == ((1, name),)
    folded, plan = fold(kept)
    assert plan.blocks[1].linears == {}
    assert unpaid_factors(folded) == ()
    assert count_parameters(folded) < count_parameters(kept)
    ids = torch.randint(2, 97, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(folded(ids).logits, kept(ids).logits, rtol=1e-5, atol=1e-5)


def _on_one_basis(model: Any, name: str, rank: int, positions: tuple[int, ...]) -> Any:
    """`model` with the linears of that name at these positions on one random basis."""
    rows, columns = linear_shapes(model)[positions[0], name]
    sites = dict.fromkeys([(position, name) for position in positions], rank)
    basis_of = {site: positions[0] for site in sites if site[0] != positions[0]}
    draw = torch.Generator().manual_seed(0)
    at = f"blocks.{positions[0]}.{name}"
    tensors = {f"{at}.first.weight": torch.randn(rank, columns, generator=draw) / columns**0.5}
    for position in positions:
        second = torch.randn(rows, rank, generator=draw) / rank**0.5
        tensors[f"blocks.{position}.{name}.second.weight"] = second
        if architecture_of(model).blocks(model)[position].get_submodule(name).bias is not None:
            tensors[f"blocks.{position}.{name}.second.bias"] = torch.randn(rows, generator=draw)
    plan = plan_of(model).factor(sites, basis_of)
    return cut(model, Cut(plan, tuple(range(len(plan.blocks))), tensors))
