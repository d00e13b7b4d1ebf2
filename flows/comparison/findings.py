"""What a sweep found, in words: the sentences that end a run, and that begin its page.

Every "±" is one standard error of paired differences. Two models "cannot be told apart" when their
difference on the same windows is within 1.96 of them.
"""

from collections.abc import Sequence
from math import floor, log10

from foldstack.compression.evaluation.paired import STANDARD_ERRORS
from foldstack.flows.comparison.result import QUALITY, Comparison, Row
from foldstack.flows.comparison.tables import benchmarks_in

AS_FAST = 0.03
"""Speeds that differ by less than this fraction are called the same."""
SCORES_TOLD = 3
GROUPS_TOLD = 3


def findings(comparison: Comparison) -> list[str]:
    """One sentence for each sparsity, from little to much removed; one for each variant of which
    its method expected something; then what is missing."""
    told = [finding_at(comparison, sparsity) for sparsity in comparison.by_sparsity()]
    told = [*_of_verdicts(comparison), *told]
    finished = [row for row in comparison.rows if row.state == "done" and not row.is_dense]
    if finished and not told:
        told.append("No bits per byte were measured, so none of the variants is called the best.")
    told += [sentence for row in comparison.rows if (sentence := forecast_of(row))]
    if comparison.failed:
        names = enumeration([row.label for row in comparison.failed])
        told.append(f"{len(comparison.failed)} of {len(comparison.rows)} models failed: {names}.")
    return told


def _of_verdicts(comparison: Comparison) -> list[str]:
    """Which models still match the dense one, which do not, and of which it is not known."""
    groups: dict[str, list[str]] = {"matching": [], "not matching": [], "open": []}
    for row in comparison.rows:
        if row.state == "done" and row.verdict is not None and row.verdict.verdict is not None:
            groups[row.verdict.verdict].append(row.label)
    if not any(groups.values()):
        return []
    told = [
        f"{verdict}: {enumeration(names) if len(names) <= GROUPS_TOLD else f'{len(names)} models'}"
        for verdict, names in groups.items()
        if names
    ]
    return [f"Beside dense, {'; '.join(told)}."]


def finding_at(comparison: Comparison, sparsity: float) -> str:
    """What was found at one sparsity: which is best, which fastest, and which are level."""
    rows = comparison.by_sparsity()[sparsity]
    best = comparison.best()[sparsity]
    parts = [_of_best(comparison, best, rows), *_scores(best)]
    parts += _of_fastest(best, rows)
    parts += [f"{enumeration(names)} cannot be told apart" for names in ties(comparison, rows)]
    return f"At {100 * sparsity:.3g} % " + "; ".join(parts) + "."


def _of_best(comparison: Comparison, best: Row, rows: Sequence[Row]) -> str:
    """Which is the best, why, how far it is from dense, and whether it decodes faster."""
    is_alone = "is best" if len(rows) > 1 else "is the only variant"
    why = {
        "quality": "",
        "speed_at_quality": ", the fastest of those near the lowest in bits per byte",
        "size_at_quality": ", the smallest of those near the lowest in bits per byte",
    }[comparison.best_by]
    speed = best.number("decode_speedup", "speed")
    pace = "" if speed is None else f", {_pace(speed)}"
    verdict = ""
    if best.verdict is not None and best.verdict.verdict is not None:
        verdict = f", {best.verdict.verdict} ({best.verdict.because})"
    return f"{best.name} {is_alone}{why}{verdict}: {beside_dense(comparison, best)}{pace}"


def beside_dense(comparison: Comparison, row: Row) -> str:
    """How far a variant is from the dense model: "0.039 ± 0.003 bits per byte above dense"."""
    difference = row.number(f"{QUALITY}_difference", "beside_dense")
    error = row.number(f"{QUALITY}_difference_stderr", "beside_dense")
    dense = comparison.dense.number(QUALITY) if comparison.dense else None
    if difference is None or error is None:
        return f"{row.number(QUALITY) or 0:.3f} bits per byte"
    share = f" ({100 * difference / dense:+.1f} %)" if dense else ""
    if abs(difference) <= STANDARD_ERRORS * error:
        size = with_error(difference, error, sign="+")
        return f"this text cannot tell it from dense ({size} bits per byte)"
    side = "above" if difference > 0 else "below"
    return f"{with_error(abs(difference), error)} bits per byte {side} dense{share}"


def _pace(speed: float) -> str:
    """How fast a model decodes, as words that a slower one cannot hide behind."""
    if abs(speed - 1) < AS_FAST:
        return "decoding as fast as dense"
    return f"decoding {speed:.2f} times as fast" if speed > 1 else (
        f"decoding slower than dense ({speed:.2f} times as fast)"
    )  # fmt: skip


def _scores(best: Row) -> list[str]:
    """How the best one's benchmark scores changed, in points of a hundred."""
    told = []
    for benchmark, metric in benchmarks_in({f"quality/{name}" for name in best.final}).items():
        score = f"{benchmark}/{metric}"
        change = best.number(f"{score}_difference", "beside_dense")
        error = best.number(f"{score}_difference_stderr", "beside_dense")
        if change is None or error is None:
            continue
        points = f"{benchmark} {100 * change:+.1f} ± {100 * error:.1f} points"
        is_change = abs(change) > STANDARD_ERRORS * error
        told.append(points if is_change else f"{points}, which may be no change")
    return told if len(told) <= SCORES_TOLD else []


def _of_fastest(best: Row, rows: Sequence[Row]) -> list[str]:
    """Which one decodes fastest, if that is another one than the best and faster than dense."""
    speeds = {row.label: row.number("decode_speedup", "speed") or 0.0 for row in rows}
    fastest = max(rows, key=lambda row: speeds[row.label])
    speed, of_best = speeds[fastest.label], speeds[best.label]
    if not speed or len(rows) < 2:
        return []
    if speed < 1 + AS_FAST:
        return ["none decodes faster than dense"]
    if fastest == best or speed <= of_best * (1 + AS_FAST):
        return ["none is faster"]
    difference = fastest.number(f"{QUALITY}_difference", "beside_dense")
    error = fastest.number(f"{QUALITY}_difference_stderr", "beside_dense")
    at = "" if difference is None or error is None else (
        f" ({with_error(difference, error, sign='+')} bits per byte)"
    )  # fmt: skip
    return [f"{fastest.name} decodes {speed:.2f} times as fast as dense{at}"]


def forecast_of(row: Row) -> str:
    """What a method expected of a variant beside what was measured of it; empty where it said
    nothing."""
    if row.state != "done":
        return ""
    contest = row.structure.get("contest")
    parts = [*_rise(row), *_times(row), *([str(contest)] if contest else [])]
    return f"{row.label}: {'; '.join(parts)}." if parts else ""


def _rise(row: Row) -> list[str]:
    """Of the loss. KL is what the loss rises by on text that the dense model would write."""
    added, kl = row.number("kl_added", "forecast"), row.number("kl", "forecast")
    rise, error = row.number("loss_rise", "forecast"), row.number("loss_rise_stderr", "forecast")
    if added is None or rise is None or error is None:
        return []
    expected = f"its changes cost {added:.3f} nats per token when each is made alone"
    if kl is not None:
        of_kl = row.number("kl_stderr", "forecast") or 0.0
        expected += f", {with_error(kl, of_kl)} together"
    when = " before recovery" if row.after else ""
    return [f"{expected}; the loss rose by {with_error(rise, error)}{when}"]


_TIMED = {"prefill_seconds": ("reading", "prefill"), "decode_seconds": ("writing", "decode")}


def _times(row: Row) -> list[str]:
    """Of reading and writing, as shares of the dense model's time."""
    told = []
    for name, (what, part) in _TIMED.items():
        expected = row.number(name, "forecast")
        measured = row.number(f"{part}_speedup", "speed")
        if expected is None:
            continue
        took = "" if not measured else f" and takes {1 / measured:.2f}"
        told.append(f"{what} was to take {expected:.2f} of the dense model's time{took}")
    return told


def ties(comparison: Comparison, rows: Sequence[Row]) -> list[list[str]]:
    """Names of variants of one sparsity that the text does not tell apart, the lowest first.

    Each group is as large as it can be with every two of it level; being level is not transitive,
    so that groups may overlap. Of many groups the first ones, which are nearest to the best.
    """
    level = {frozenset((pair.row, pair.lower)) for pair in comparison.rivals if pair.is_level}
    groups: list[tuple[int, int]] = []
    for first in range(len(rows)):
        end = first + 1
        while end < len(rows) and all(
            frozenset((row.label, rows[end].label)) in level for row in rows[first:end]
        ):
            end += 1
        if end - first > 1 and (not groups or end > groups[-1][1]):
            groups.append((first, end))
    return [[row.name for row in rows[first:end]] for first, end in groups[:GROUPS_TOLD]]


def with_error(value: float, error: float, sign: str = "") -> str:
    """A figure with its standard error, with decimals enough to show the error."""
    digits = 3 if error <= 0 else min(max(3, -floor(log10(error))), 6)
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"


def enumeration(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"
