"""Healed losses decide, by pairs of windows; what they cannot tell apart is decided by speed."""

from foldstack.compression.training.finalists import Finalist, told, winner


def finalist(name: str, before: float, healed: tuple[float, ...], flops: int) -> Finalist:
    return Finalist(name, (before,) * len(healed), healed, flops)


def test_the_healed_loss_decides_and_not_the_one_before() -> None:
    wide = finalist("8 blocks", 2.0, (1.50, 1.70, 1.90), 100)
    deep = finalist("6 blocks", 2.4, (1.41, 1.60, 1.80), 120)
    assert winner([wide, deep]) == 1
    assert told([wide, deep], 1, 16) == (
        "of 2 finalists the one with 6 blocks is kept after 16 steps each: 1.6033 nats per token "
        "(8 blocks 1.7000); before them 8 blocks was ahead"
    )


def test_what_windows_cannot_tell_apart_goes_to_the_faster_one() -> None:
    """Windows differ by more than the mean of the differences: chance alone chose the lowest."""
    slow = finalist("8 blocks", 2.0, (1.50, 1.70, 1.90), 120)
    fast = finalist("6 blocks", 2.1, (1.60, 1.65, 1.88), 100)
    clear = finalist("5 blocks", 2.1, (1.70, 1.90, 2.10), 50)
    assert winner([slow, fast, clear]) == 1
    assert winner([slow, clear]) == 0
