"""What stays in memory while blocks are compressed in order."""

from typing import Any

import pytest

from foldstack.compression.methods.in_order import _is_used_behind
from foldstack.compression.structure.surgery import plan_of

Q = "self_attn.q_proj"


@pytest.mark.parametrize(("so_far", "used"), [(0, True), (1, True), (2, False)])
def test_a_basis_is_used_by_those_who_share_the_linear_that_reads_it(
    so_far: int, used: bool, tiny_model: Any
) -> None:
    """Position 2 runs the linears of 1, whose basis is stored at 0: given back too early, 2 would
    compute with whatever is in memory."""
    plan = plan_of(tiny_model("llama", num_hidden_layers=4))
    plan = plan.factor({(0, Q): 8, (1, Q): 8}, {(1, Q): 0}).share(1, [2])
    assert _is_used_behind(plan, 0, so_far) is used


def test_linears_are_used_by_those_who_share_them(tiny_model: Any) -> None:
    plan = plan_of(tiny_model("llama", num_hidden_layers=4)).share(0, [2])
    assert [_is_used_behind(plan, 0, so_far) for so_far in range(4)] == [True, True, False, False]
    assert not _is_used_behind(plan, 1, 1)
