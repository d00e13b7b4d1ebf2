"""The columns that people look at, and tables of them: of texts, and of rounded numbers.

Everything is made from a frame (`Comparison.frame()`, or that of many sweeps). Which columns there
are depends on what was measured: what no row has is no column.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.tracks.result import BENCHMARKS_TRACK, TEXT_TRACK
from foldstack.flows.config.config_errors import did_you_mean

if TYPE_CHECKING:
    import pandas

SHOWN_METRICS = ("acc", "exact_match", "acc_norm", "f1")
"""A benchmark's column shows the first of these that it has."""
Record = Mapping[str, Any]
BITS = "bits_per_byte"
MEASURED_ANYWAY = {TEXT_TRACK, BENCHMARKS_TRACK}


@dataclass(frozen=True)
class Column:
    """One column of a table for people."""

    name: str
    """What it is called on the command line."""
    heading: str
    source: str
    """The column of the frame that it shows."""
    form: Callable[[Any], str]
    rank: int
    """The lower, the earlier it gets room: in the order of what a person decides by."""
    error: str = ""
    """The column of the frame with its standard error, which is told after it."""
    own_error: str = ""
    """The same of a row that has an error of its own score and no difference: the dense one."""
    is_text: bool = False
    meaning: str = ""

    def text(self, record: Record) -> str:
        """What stands in the table for a row."""
        value, error = record.get(self.source), record.get(self.error)
        if value is None:
            own = record.get(self.own_error)
            return "" if own is None else f"±{own:.3f}"
        return self.form(value) + ("" if error is None else f" ±{error:.{_digits(error)}f}")

    def number(self, record: Record) -> Any:
        """The same as a number, with as many digits as mean something."""
        value = record.get(self.source)
        return float(f"{value:.6g}") if isinstance(value, float) else value


def columns(frame: "pandas.DataFrame") -> list[Column]:
    """The columns that some row has something for, in the order in which they are read."""
    present = {str(name) for name in frame.columns if frame[name].notna().any()}
    benchmarks = [
        column
        for place, found in enumerate(benchmarks_in(present).items())
        for column in _of_benchmark(*found, place)
    ]
    sweeps = [SWEEP] if frame["sweep"].nunique() > 1 else []
    engines = [column for form in exported_in(present) for column in _of_export(form)]
    tracks = [_of_track(track) for track in tracks_in(present)]
    order = [MODEL, VERDICT, *sweeps, *tracks, *TEXT_QUALITY, SPEED, *engines, *benchmarks, *COSTS]
    if not tracks:
        order = [column for column in order if not column.source.startswith("track/")]
    return [column for column in order if column.source in present]


def arranged(frame: "pandas.DataFrame") -> "pandas.DataFrame":
    """The rows as they are read: sweep by sweep, dense first, then by size, the best ones first,
    what failed last.
    """
    keys = frame.assign(
        _sweep=frame.groupby("sweep", sort=False).ngroup(),
        _asked=frame["sparsity"].fillna(-1.0),
        _failed=frame["state"] == "failed",
        _quality=frame.get(f"quality/{BITS}", 0.0),
    )
    return frame.loc[
        keys.sort_values(["_sweep", "_asked", "_failed", "_quality"], kind="stable").index
    ]


def benchmarks_in(names: "set[str]") -> dict[str, str]:
    """The metric that is shown of each benchmark that a frame with these columns has."""
    shown: dict[str, str] = {}
    for name in sorted(names):
        benchmark, slash, metric = name.removeprefix("quality/").rpartition("/")
        if not name.startswith("quality/") or not slash or metric not in SHOWN_METRICS:
            continue
        rank = SHOWN_METRICS.index
        if benchmark not in shown or rank(metric) < rank(shown[benchmark]):
            shown[benchmark] = metric
    return shown


def tracks_in(names: "set[str]") -> list[str]:
    """The tracks that a frame with these columns has scores of; none where there are only those of
    what is measured anyway, which has columns of its own."""
    errors = (name for name in names if name.startswith("track/") and name.endswith("_stderr"))
    found = sorted(
        name.removeprefix("track/").removesuffix("_stderr")
        for name in errors
        if not name.endswith("_retained_stderr")
    )
    return found if set(found) - MEASURED_ANYWAY else []


def exported_in(names: "set[str]") -> list[str]:
    """The forms that models of a frame with these columns were exported to."""
    parts = [name.split("/") for name in sorted(names) if name.startswith("engines/")]
    return list(dict.fromkeys(form for _, form, *_ in parts))


def chosen(frame: "pandas.DataFrame", names: Sequence[str]) -> list[Column]:
    """The columns of these names: short ones, or those of the frame itself.

    Raises:
        InputError: there is none of a name.
    """
    short = {column.name: column for column in [*columns(frame), SWEEP]}
    return [short.get(name) or _of_frame(frame, name, short) for name in names]


def short_names(frame: "pandas.DataFrame") -> dict[str, str]:
    """Columns of the frame by the short names of the table's."""
    return {column.name: column.source for column in [*columns(frame), SWEEP]}


def _of_frame(frame: "pandas.DataFrame", name: str, short: Mapping[str, Column]) -> Column:
    if name not in frame.columns:
        hint = did_you_mean(name, [*short, *map(str, frame.columns)])
        raise InputError(
            f"there is no column {name} in these sweeps; short names are {', '.join(short)}{hint}"
        )
    is_number = frame[name].dtype.kind in "iuf"
    return Column(name, name, name, general if is_number else str, 0, is_text=not is_number)


def markdown(frame: "pandas.DataFrame", shown: Sequence[Column] | None = None) -> str:
    """The table for a page that renders Markdown."""
    from foldstack.flows.comparison.frame import plain_records

    shown = columns(frame) if shown is None else shown
    lines = [[column.heading for column in shown]]
    lines += [["---" if column.is_text else "---:" for column in shown]]
    lines += [[cell.replace("|", "\\|") for cell in texts(record, shown)]
              for record in plain_records(frame)]  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def texts(record: Record, shown: Sequence[Column]) -> list[str]:
    """One row of the table. Of a model that failed it says which one, and that: what was measured
    of it before is no result.
    """
    if record.get("state") != "failed":
        return [column.text(record) for column in shown]
    cells = [column.text(record) if column.is_text else "" for column in shown]
    places = [i for i, column in enumerate(shown) if not column.is_text] or [len(cells) - 1]
    cells[places[0]] = "failed"
    return cells


def records(frame: "pandas.DataFrame") -> list[dict[str, Any]]:
    """One mapping of heading to number or text per row, for tables that sort by themselves."""
    from foldstack.flows.comparison.frame import plain_records

    shown, rows = columns(frame), []
    for record in plain_records(frame):
        row: dict[str, Any] = {}
        for column in shown:
            row[column.heading] = column.number(record)
            if column.error:
                error = record.get(column.error)
                row[f"± {column.heading}"] = None if error is None else float(f"{error:.3g}")
        if record["state"] == "failed":
            row["failed"] = record["cause"]
        rows.append(row)
    return rows


def count(value: float) -> str:
    """A number of things in three digits or four: "3.955 M", "8.03 B"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:,.0f}"


def general(value: float) -> str:
    """A number of any kind."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def fixed(digits: int, before: str = "", after: str = "") -> Callable[[Any], str]:
    """A form of numbers: with so many decimals, between two texts."""
    return lambda value: f"{before}{value:,.{digits}f}{after}"


def difference(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.3f}"


def per_cent(value: float) -> str:
    """A share of one in per cent."""
    return f"{100 * value:.1f} %"


def minutes(seconds: float) -> str:
    """A time as a person says it: "48 s", "3.1 min", "2.4 h"."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def mebibytes(value: float) -> str:
    """Bytes in MiB."""
    return f"{value / 2**20:,.4g} MiB"


def _digits(error: float) -> int:
    """Decimals that show an error: three, or more where it is small."""
    digits = 3
    while error and digits < 6 and round(error, digits) < 10.0**-digits:
        digits += 1
    return digits


SWEEP = Column("sweep", "sweep", "title", str, 1, is_text=True, meaning="which sweep it is of")
MODEL = Column("model", "model", "label", str, 0, is_text=True, meaning="method and sparsity asked")
VERDICT = Column(
    "verdict", "verdict", "verdict", str, 1, is_text=True,
    meaning="whether every task is within the margin of dense: matching, not matching, or open",
)  # fmt: skip
TEXT_QUALITY = (
    Column("size", "size", "size/parameters", count, 2, meaning="stored parameters"),
    Column("removed", "removed", "size/realised_sparsity", per_cent, 7,
           meaning="share of the dense model's parameters that is gone"),
    Column("before", "bits/byte before", f"before_recovery/{BITS}", fixed(3), 8,
           meaning="bits per byte of text before recovery"),
    Column("quality", "bits/byte", f"quality/{BITS}", fixed(3), 3,
           meaning="bits per byte of text of the finished model; lower is better"),
    Column("difference", "over dense", f"beside_dense/{BITS}_difference", difference, 4,
           f"beside_dense/{BITS}_difference_stderr",
           meaning="difference from dense on the same windows, with its standard error"),
)  # fmt: skip
SPEED = Column(
    "speed", "x dense", "speed/decode_speedup", fixed(2), 5,
    meaning="decoded tokens per second over the dense model's of the same minutes",
)  # fmt: skip
COSTS = (
    Column("tokens", "decode tok/s", "speed/decode_tokens_per_second", fixed(0), 9,
           meaning="decoded tokens per second, batch 1"),
    # Of the same minutes: between the rates of two rows the machine may have changed its pace.
    Column("dense_tokens", "dense beside", "speed/dense_decode_tokens_per_second", fixed(0), 15,
           meaning="what the dense model decoded in the same minutes"),
    Column("prefill", "prefill x dense", "speed/prefill_speedup", fixed(2), 12,
           meaning="tokens read per second over the dense model's"),
    Column("flops", "FLOPs/token", "size/flops_per_token", count, 20,
           meaning="of linears and the head, per token"),
    Column("kv", "KV/token", "size/kv_bytes_per_token", count, 21,
           meaning="bytes of the KV cache per token"),
    Column("memory", "memory", "speed/peak_memory_bytes", mebibytes, 13,
           meaning="most memory that loading and running took"),
    Column("load", "load", "speed/load_seconds", minutes, 16, meaning="time to load the model"),
    Column("compress", "compress", "time/compress_seconds", minutes, 14,
           meaning="time that the method took, after the statistics"),
    Column("recover", "recover", "time/recover_seconds", minutes, 17,
           meaning="time that recovery took"),
    Column("footprint", "footprint", "track/footprint", fixed(2), 20,
           meaning="over dense: mean of parameters, bytes, FLOPs, KV cache and memory"),
    Column("speed_score", "speed x dense", "track/speed", fixed(2), 21,
           meaning="mean of reading and writing speed over dense"),
    Column("effort", "effort", "track/effort", fixed(1, after="x"), 22,
           meaning="time to compress and heal over that of the cheapest variant"),
    Column("grade", "grade", "size/grade", str, 11, is_text=True,
           meaning="native: a stock checkpoint; portable: with one modelling file of ours"),
)  # fmt: skip


def _of_track(track: str) -> Column:
    return Column(
        f"track_{track}", f"{track} left", f"track/{track}", fixed(3), 3, f"track/{track}_stderr",
        meaning="geometric mean of what is left of its tasks above chance; 1 is as good as dense",
    )  # fmt: skip


def _of_benchmark(benchmark: str, metric: str, place: int) -> list[Column]:
    """The columns of a benchmark; of several the first ones get room before the others."""
    score, told = f"{benchmark}/{metric}", f"{benchmark} {metric}"
    rank = 6 if place == 0 else 10
    return [
        Column(f"{benchmark}_before", f"{told} before", f"before_recovery/{score}", fixed(3), 18),
        Column(benchmark, told, f"quality/{score}", fixed(3), rank, meaning="score of the finished "
               "model; higher is better"),
        Column(f"{benchmark}_difference", f"{told} over dense", f"beside_dense/{score}_difference",
               difference, rank, f"beside_dense/{score}_difference_stderr",
               f"quality/{score}_stderr", meaning="difference from dense on the same items"),
        Column(f"{benchmark}_stability", f"{benchmark} stability",
               f"beside_dense/{benchmark}/stability", fixed(3), 19, meaning="weighted share of the "
               "items still answered as dense does (LLM-Streamline, arXiv 2403.19135, eq. 6)"),
    ]  # fmt: skip


def _of_export(form: str) -> list[Column]:
    """The columns of a form that models were exported to."""
    source = f"engines/{form}"
    return [
        Column(f"{form}_speed", f"{form} x dense", f"{source}/decode_speedup", fixed(2), 5,
               meaning="decoded tokens per second in its engine over the dense model's there"),
        Column(f"{form}_tokens", f"{form} tok/s", f"{source}/decode_tokens_per_second", fixed(0),
               9, meaning="decoded tokens per second in its engine"),
        Column(f"{form}_bytes", f"{form} file", f"{source}/bytes", mebibytes, 11,
               meaning="weights that the engine loads"),
        Column(f"{form}_checked", f"{form} checked", f"{source}/checked_with", str, 18,
               is_text=True, meaning="the engine that computes the same as transformers"),
        Column(f"{form}_refused", f"{form} refused", f"{source}/refused", str, 17, is_text=True,
               meaning="why the model has no such form"),
    ]  # fmt: skip
