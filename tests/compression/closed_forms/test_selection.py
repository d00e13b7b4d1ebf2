"""The binary program against brute force and against the Lagrangian."""

import ctypes
import itertools
import math
from random import Random
from typing import Any

import pytest

from foldstack.compression.closed_forms import selection
from foldstack.compression.closed_forms.selection import (
    Option,
    OutOfReach,
    on_lower_hull,
    select,
    spread,
)


def convex_curves(random: Random, num_slots: int, num_levels: int) -> list[Option]:
    """Every slot as it is, or at levels that save equally much more at ever higher a price."""
    options = []
    for slot in range(num_slots):
        loss, price = 0.0, random.random()
        options.append(Option((slot, 0), frozenset([slot]), 0.0))
        for level in range(1, num_levels + 1):
            price += random.random()
            loss += price
            saved = {"parameters": 10.0 * level, "kv_bytes": random.randint(0, 3) * float(level)}
            options.append(Option((slot, level), frozenset([slot]), loss, saved))
    return options


def brute_force(options: list[Option], needs: dict[str, float]) -> float:
    """The least loss of a choice of one option per slot that saves what is needed."""
    slots = sorted({slot for o in options for slot in o.slots})  # type: ignore[type-var]
    by_slot = [[o for o in options if slot in o.slots] for slot in slots]
    return min(
        (
            math.fsum(o.loss for o in chosen)
            for chosen in itertools.product(*by_slot)
            if all(
                sum(o.saved.get(name, 0.0) for o in chosen) >= need for name, need in needs.items()
            )
        ),
        default=math.inf,
    )


@pytest.mark.parametrize("seed", range(4))
def test_two_budgets_are_kept_at_the_loss_of_brute_force(seed: int) -> None:
    random = Random(seed)
    options = convex_curves(random, 4, 4)
    needs = {"parameters": 70.0, "kv_bytes": 6.0}
    chosen = select(options, needs)
    assert math.fsum(o.loss for o in chosen) == pytest.approx(brute_force(options, needs), rel=1e-3)
    for name, need in needs.items():
        assert sum(o.saved.get(name, 0.0) for o in chosen) >= need - 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_one_budget_on_convex_curves_is_the_lagrangian_within_a_step(seed: int) -> None:
    options = convex_curves(Random(seed), 8, 6)
    need = 190.0
    curves = {
        slot: [(o.saved.get("parameters", 0.0), o.loss) for o in options if slot in o.slots]
        for slot in range(8)
    }
    exact = spread(curves, need)
    assert sum(exact.values()) == pytest.approx(need)
    chosen = {next(iter(o.slots)): o for o in select(options, {"parameters": need})}
    for slot, saved in exact.items():
        assert abs(chosen[slot].saved.get("parameters", 0.0) - saved) <= 10.0


def test_what_decides_about_several_slots_excludes_what_it_covers() -> None:
    """A run of two is cheaper than both alone, and never stands beside one of them."""
    alone = [Option(f"{s}", frozenset([s]), 1.0, {"parameters": 1.0}) for s in range(3)]
    whole = [Option(f"whole {s}", frozenset([s]), 0.0) for s in range(3)]
    run = Option("run", frozenset([1, 2]), 1.5, {"parameters": 2.0})
    chosen = {o.key for o in select([*alone, *whole, run], {"parameters": 2.0})}
    assert chosen == {"whole 0", "run"}
    chosen = {o.key for o in select([*alone, *whole, run], {"parameters": 2.0}, [chosen])}
    assert chosen in ({"0", "1", "whole 2"}, {"0", "2", "whole 1"}, {"1", "2", "whole 0"})
    assert {o.key for o in select([*alone, *whole, run], {"parameters": 3.0})} == {"0", "run"}


def test_options_of_a_class_agree() -> None:
    """One width for all: the cheap one of the first slot is dear in the second."""
    losses = {(0, "a"): 0.1, (1, "a"): 5.0, (0, "b"): 1.0, (1, "b"): 1.0}
    options = [
        Option((slot, width), frozenset([slot]), loss, {"parameters": 1.0}, of_class=width)
        for (slot, width), loss in losses.items()
    ]
    assert {o.of_class for o in select(options, {"parameters": 2.0})} == {"b"}


def test_what_is_out_of_reach_says_how_far_it_goes() -> None:
    options = convex_curves(Random(0), 3, 2)
    with pytest.raises(OutOfReach, match=r"parameters: 60 of 61") as refusal:
        select(options, {"parameters": 61.0})
    assert refusal.value.reach == {"parameters": 60.0}
    exclusive = [
        Option("small", frozenset([0]), 0.0, {"parameters": 1.0}),
        Option("short", frozenset([0]), 0.0, {"kv_bytes": 1.0}),
    ]
    with pytest.raises(OutOfReach, match="but not all of them together"):
        select(exclusive, {"parameters": 1.0, "kv_bytes": 1.0})


def test_an_option_that_breaks_the_model_is_never_chosen() -> None:
    options = [
        Option("broken", frozenset([0]), math.inf, {"parameters": 9.0}),
        Option("fine", frozenset([0]), 2.0, {"parameters": 5.0}),
    ]
    assert [o.key for o in select(options, {"parameters": 4.0})] == ["fine"]


def test_the_lower_hull_leaves_out_what_lies_above_a_line() -> None:
    assert on_lower_hull([(0.0, 0.0), (1.0, 3.0), (2.0, 2.0), (3.0, 9.0)]) == [
        (0.0, 0.0),
        (2.0, 2.0),
        (3.0, 9.0),
    ]
    with pytest.raises(OutOfReach):
        spread({"only": [(0.0, 0.0), (3.0, 1.0)]}, 4.0)


def test_what_may_be_saved_has_a_limit() -> None:
    """Without it a search may take the attention of every block, and no cache counts tokens."""
    options = [Option((), frozenset([slot]), 0.0) for slot in range(3)]
    options += [
        Option((slot, "gone"), frozenset([slot]), 1.0 + slot, {"size": 1.0, "gone": 1.0})
        for slot in range(3)
    ]
    options.append(Option("run", frozenset([0, 1]), 0.5, {"size": 2.0, "gone": 2.0}))
    assert {o.key for o in select(options, {"size": 2.0})} == {"run", ()}
    kept = select(options, {"size": 1.0}, limits={"gone": 1.0})
    assert {o.key for o in kept} == {(0, "gone"), ()}
    with pytest.raises(OutOfReach, match="size: 1 of 2"):
        select(options, {"size": 2.0}, limits={"gone": 1.0})


def test_the_solver_prints_nothing_and_what_others_print_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """HiGHS has a `printf` of its own; `foldstack --json` must print JSON alone."""
    solve = selection.milp

    def chatting(*args: Any, **kwargs: Any) -> Any:
        libc = ctypes.CDLL(None)
        libc.puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();")
        libc.puts(b"another thread")
        return solve(*args, **kwargs)

    monkeypatch.setattr(selection, "milp", chatting)
    select([Option((), frozenset([0]), 0.0)], {})
    assert capfd.readouterr().out == "another thread\n"
