"""Perplexity of every method's variants on one model and two texts, before and after recovery.

    python benchmarks/methods.py --model DIR --calibration FILE --test FILE --sparsity 0.2 0.4 \\
        [--measured_on linears|model] [--variant 'svd_llm update=closed_form' ...] \\
        [--recovery_steps 48 --seeds 0 1 2] [--results FILE.jsonl] [--json]

Protocol: see `held_out_loss`; --num_calibration windows from the start of the one text, --num_test
from the start of the other. --sampler svd_llm draws the calibration windows as that method's
released code does (its seed is 3). With --measured_on linears the sparsity is a fraction of the
linears inside the blocks, as in most papers, and is translated. With --recovery_steps every result,
and the dense model, then trains on the same further windows of the calibration text. "reference" is
a model, python-stdlib:train and python-stdlib:test are texts; --calibration self lets the model
write its own windows (self:0.8 at another temperature than 1). Without --variant every method runs
as it comes; --variant paper_forms adds those that switch our departures off.

Below the tables stand the differences of the variants' losses to the first variant's, paired by
window: name first what the others are to be compared with.

With --results every figure goes into that file as soon as it is known, a line of JSON each with all
settings that it depends on (not the code): interrupt at will, and the same command goes on, or
prints the tables again. Several processes may fill one file, each with sparsities of its own.
"""

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Iterator
from functools import cached_property
from statistics import stdev
from typing import Any

# Before whatever loads `statistics`, which the script of that name beside this one answers for.
from held_out_loss import (
    DATA,
    Bench,
    Figures,
    Key,
    Results,
    add_data_options,
    add_results_option,
    is_json,
    perplexity_of,
)
from tqdm import tqdm
from transformers import PreTrainedModel

from foldstack.compression.methods import METHODS
from foldstack.compression.methods.method import Method
from foldstack.compression.structure.size import size_of
from foldstack.compression.structure.surgery import cut

# Methods that make a model larger are not compared with those that make it smaller.
SHRINKING = tuple(name for name in METHODS if name != "flexigpt_extend")
# One departure switched off each; the last of a method switches off all.
PAPER_FORMS = (
    "svd_llm allocation=paper",
    "svd_llm dense_target=0",
    "svd_llm update=none",
    "svd_llm update=none allocation=v2",
    "svd_llm update=none allocation=paper",
    "basis_sharing pooling=equal_traces",
    "basis_sharing dense_target=0",
    "basis_sharing update=none",
    "basis_sharing update=none coefficients=paper",
    "basis_sharing update=none coefficients=paper allocation=paper",
    "modegpt allocation=uniform",
    "modegpt query_key_weight=1",
    "modegpt pair_score=sum",
    "modegpt value_subspace=values",
    "modegpt query_key_weight=1 pair_score=sum value_subspace=values",
    "replaceme fitted=map",
    "replaceme fitted=map weighting=equal",
    "llm_streamline replacement=none",
    "llm_streamline replacement=ffn",
    "llm_streamline replacement=layer loss=llm",
    "llm_streamline initial=paper learning_rate=2e-4",
)
# Those whose cut depends on the seed; of the others one cut serves every seed of the recovery.
SEEDED = ("foldgpt", "llm_streamline", "post_share", "slicegpt", "stack")
DENSE = "dense"


def settings_of(variant: str) -> tuple[str, dict[str, Any]]:
    """ "svd_llm update=none" as a name and its settings."""
    name, *pairs = variant.split()
    settings = dict(pair.split("=", 1) for pair in pairs)
    return name, {
        key: json.loads(text) if is_json(text) else text for key, text in settings.items()
    }


def variants_of(given: list[str] | None) -> list[str]:
    """The variants to run: those that were named, or every method as it comes."""
    named = [name for name in given or [] if name != "paper_forms"]
    forms = PAPER_FORMS if given and "paper_forms" in given else ()
    return [*(named or SHRINKING), *forms]


class Comparison:
    """Measures variants at sparsities and seeds, and keeps what is known."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results = Results(options, ("variant", "sparsity", "seed"), (*DATA, "measured_on"))
        self.bar: tqdm[Any] = tqdm(total=0, unit="result", file=sys.stderr, dynamic_ncols=True)
        self._last: tuple[Method, PreTrainedModel, float] | None = None

    @cached_property
    def bench(self) -> Bench:
        """Made when the first figure is missing: a table of known ones needs no model."""
        bench = Bench(self.options)
        bench.progress = self._tell
        return bench

    def run(self, keys: list[Key]) -> None:
        missing = [key for key in keys if key not in self.results.rows]
        self.bar.reset(total=len(missing))
        for key in missing:
            self.bar.set_description(" ".join(map(str, key)))
            try:
                self.results.add(key, self._measured(*key))
            except ValueError as error:  # a setting, or a sparsity out of reach
                self.results.add(key, {"error": " ".join(str(error).split())})
            except Exception as error:  # a fault: told, not kept, so that the next run tries again
                self.bar.write(traceback.format_exc(), file=sys.stderr)
                self.results.rows[key] = {"error": f"{type(error).__name__}: {error}", "fault": 1}
            self.bar.update()

    def _measured(self, variant: str, sparsity: float, seed: int) -> Figures:
        bench = self.bench
        if variant == DENSE:
            smaller, seconds = bench.model, 0.0
        else:
            name, settings = settings_of(variant)
            scale = 1.0
            if self.options.measured_on == "linears":
                scale = bench.dense.block_linear_parameters / bench.dense.parameters
            if name not in METHODS:
                raise ValueError(f"a variant starts with one of {', '.join(METHODS)}; got {name!r}")
            seed_of_cut = seed if name in SEEDED else 0
            method = METHODS[name](sparsity=sparsity * scale, seed=seed_of_cut, **settings)
            smaller, seconds = self._cut(method)
        size = size_of(smaller)
        linears = size.block_linear_parameters / bench.dense.block_linear_parameters
        losses = bench.losses(smaller)
        figures: Figures = {
            "sparsity": 1 - size.parameters / bench.dense.parameters,
            "linear_sparsity": 1 - linears,
            "kv_bytes": size.kv_bytes_per_token / bench.dense.kv_bytes_per_token,
            "perplexity": perplexity_of(losses),
            "losses": losses,
            "seconds": seconds,
        }
        if bench.steps:
            losses = bench.losses(bench.recovered(smaller, seed))
            figures |= {"recovered": perplexity_of(losses), "recovered_losses": losses}
        return figures

    def _cut(self, method: Method) -> tuple[PreTrainedModel, float]:
        if self._last is None or self._last[0] != method:
            evidence = self.bench.evidence_for(method)
            started = time.perf_counter()
            smaller = cut(self.bench.model, method.compress(self.bench.model, evidence))
            self._last = method, smaller, time.perf_counter() - started
        return self._last[1], self._last[2]

    def _tell(self, what: str, done: int, total: int) -> None:
        self.bar.set_postfix_str(f"{what} {done}/{total}")


def over_seeds(results: Results, keys: list[Key]) -> dict[tuple[str, float], Figures]:
    """Means over the seeds; "_range" is the largest less the smallest value."""
    seeds: dict[tuple[str, float], list[Figures]] = {}
    for key in keys:
        if key in results.rows:
            seeds.setdefault(key[:2], []).append(results.rows[key])
    return {key: _mean(runs) for key, runs in seeds.items()}


def _mean(runs: list[Figures]) -> Figures:
    failed = next((run for run in runs if "error" in run), None)
    if failed is not None:
        return failed
    figures: Figures = {}
    for key, value in runs[0].items():
        if isinstance(value, list):  # of every test window
            figures[key] = [
                math.fsum(v) / len(runs) for v in zip(*(r[key] for r in runs), strict=True)
            ]
        else:
            figures[key] = math.fsum(run[key] for run in runs) / len(runs)
    for key in {"perplexity", "recovered"} & figures.keys():
        values = [run[key] for run in runs]
        figures[f"{key}_range"] = max(values) - min(values)
    return {**figures, "seeds": len(runs)}


def table(figures: dict[tuple[str, float], Figures]) -> Iterator[str]:
    """Lines of a Markdown table, a row for each variant at each sparsity."""
    heads = ("sparsity", "linear_sparsity", "perplexity", "recovered", "seconds")
    yield "| variant | removed | of linears | perplexity | after recovery | seconds |"
    yield "|---|---|---|---|---|---|"
    for (variant, sparsity), row in figures.items():
        label = f"{variant} {sparsity:g}"
        if "error" in row:
            yield f"| {label} | {row['error']} | | | | |"
            continue
        yield f"| {label} | {' | '.join(_cell(row, head) for head in heads)} |"


def _cell(row: Figures, head: str) -> str:
    if head not in row:
        return ""
    spread = row.get(f"{head}_range")
    value = f"{row[head]:.1%}" if "sparsity" in head else f"{row[head]:.4g}"
    return value + (f" (range {spread:.2g})" if spread else "")


def side_by_side(figures: dict[tuple[str, float], Figures]) -> Iterator[str]:
    """Lines of a Markdown table, a row for each variant: removed, before -> after recovery."""
    sparsities = sorted({sparsity for _, sparsity in figures})
    yield f"| variant | {' | '.join(f'{s:g}' for s in sparsities)} |"
    yield "|---" * (len(sparsities) + 1) + "|"
    for variant in dict.fromkeys(variant for variant, _ in figures):
        cells = []
        for sparsity in sparsities:
            row = figures.get((variant, sparsity), {})
            parts = [_cell(row, head) for head in ("perplexity", "recovered") if head in row]
            share = f"{row['sparsity']:.1%}: " if "sparsity" in row else ""
            refusal = "failed" if "fault" in row else "refused"
            cells.append(refusal if "error" in row else share + " → ".join(parts))
        yield f"| {variant} | {' | '.join(cells)} |"


def paired(figures: dict[tuple[str, float], Figures]) -> Iterator[str]:
    """Lines of a Markdown table: per sparsity, by how many nats each variant's loss on the test
    windows is above that of the first one, after recovery if there was any, with the standard error
    of the differences by window."""
    shrunk = {key: row for key, row in figures.items() if key[0] != DENSE and "losses" in row}
    yield "| variant | less the first one's loss, nats per token | standard error |"
    yield "|---|---|---|"
    for sparsity in dict.fromkeys(share for _, share in shrunk):
        rows = [(name, row) for (name, share), row in shrunk.items() if share == sparsity]
        key = "recovered_losses" if "recovered_losses" in rows[0][1] else "losses"
        for name, row in rows[1:]:
            pairs = zip(row[key], rows[0][1][key], strict=True)
            differences = [theirs - first for theirs, first in pairs]
            error = stdev(differences) / math.sqrt(len(differences))
            mean = math.fsum(differences) / len(differences)
            yield f"| {name} {sparsity:g} - {rows[0][0]} | {mean:+.4f} | {error:.4f} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_options(parser)
    parser.add_argument("--sparsity", type=float, nargs="+", required=True)
    parser.add_argument("--measured_on", choices=("linears", "model"), default="model")
    parser.add_argument("--variant", action="append", help="method and settings; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    add_results_option(parser)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse()
    comparison = Comparison(options)
    keys: list[Key] = [(DENSE, 0.0, seed) for seed in options.seeds]
    keys += [
        (variant, sparsity, seed)
        for sparsity in options.sparsity
        for variant in variants_of(options.variant)
        for seed in options.seeds
    ]
    interrupted = False
    try:
        comparison.run(keys)
    except KeyboardInterrupt:
        interrupted = True
    comparison.bar.close()
    figures = over_seeds(comparison.results, keys)
    if options.json:
        print(json.dumps({f"{name} {share:g}": row for (name, share), row in figures.items()}))
    else:
        print("\n".join(["", *table(figures), "", *side_by_side(figures)]))
        if len(figures) > 2:
            print("\n".join(["", *paired(figures)]))
    if interrupted:
        raise SystemExit(130)
    if any("fault" in row for row in figures.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
