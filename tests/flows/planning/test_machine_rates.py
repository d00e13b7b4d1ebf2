"""What the machine's rates are measured by."""

import time

from foldstack.flows.planning.machine_rates import _seconds_of


def test_other_programs_of_a_busy_machine_do_not_count() -> None:
    """A plan that was made beside other work told several times what a run took."""

    def work() -> None:
        time.sleep(0.02)
        sum(range(20_000))

    assert 0 < _seconds_of(work) < 0.01
