"""Whether what the papers claim of their methods holds on one model, with the figures.

    python benchmarks/claims.py [--claim foldgpt flexigpt streamline] [--removed 2 4]
        [--seeds 0 1 2] [--results FILE.jsonl] [--json]

By default on the reference model and held-out modules of the standard library; for --model,
--calibration, --test and the windows see `methods.py`. Perplexities are those of the test windows.
With --results every figure goes into that file as soon as it is known; the same command goes on.

foldgpt: without the blocks whose trained gates are lowest the perplexity is at most that without
    the blocks of least block influence, for each number of blocks (sampled and relaxed: gates of
    one training; method: the set that the method as it comes chooses), and blocks that do nothing
    get the lowest gates.
flexigpt: virtual blocks start at most 1.02 times the perplexity of the model without them, and end,
    after --recovery_steps, below ShortGPT of the same stored size after the same, and below the
    model without them after the same, which is the paper's comparison and stores less.
streamline: a trained layer in place of a run of blocks is better than nothing in its place, and
    than ShortGPT of the same size; beside it the other replacements.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from held_out_loss import DATA, Bench, Figures, Results, add_data_options, add_results_option
from transformers import PreTrainedModel

from foldstack.compression.methods import METHODS
from foldstack.compression.methods.sharing.foldgpt import FoldGpt
from foldstack.compression.methods.sharing.gate_training import train_gates
from foldstack.compression.methods.sharing.gates import GateTraining
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.size import count_parameters
from foldstack.compression.structure.surgery import Cut, cut, plan_of

START_BOUND = 1.02  # of FlexiGPT's perplexity over the pruned model's
REPLACEMENTS: tuple[tuple[dict[str, Any], int | None], ...] = (
    ({"replacement": "layer"}, None),
    ({"replacement": "layer", "loss": "llm"}, 1),
    ({"replacement": "swiglu"}, 1),
    ({"replacement": "ffn"}, 1),
)
"""Settings, and how many of the seeds; None: all."""


@dataclass(frozen=True)
class Finding:
    """One comparison: the claim is that `figure` is at most `bound`."""

    claim: str
    what: str
    figure: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.figure <= self.bound


class Known:
    """Figures by what they are of: measured when they are first asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results = Results(options, ("what",), DATA)

    @cached_property
    def bench(self) -> Bench:
        """Made when the first figure is missing: a table of known ones needs no model."""
        return Bench(self.options)

    def figures(self, what: str, measure: Callable[[Bench], Figures]) -> Figures:
        if (what,) not in self.results.rows:
            self.results.add((what,), measure(self.bench))
        return self.results.rows[what,]


def without(model: PreTrainedModel, gone: frozenset[int]) -> PreTrainedModel:
    """A copy without these blocks."""
    plan = plan_of(model)
    kept = tuple(p for p in range(len(plan.blocks)) if p not in gone)
    return cut(model, Cut(plan.keep(kept), kept))


def removed_share(bench: Bench, count: int) -> float:
    """The sparsity that removing `count` blocks is."""
    smaller = without(bench.model, frozenset(range(count)))
    return 1 - count_parameters(smaller) / bench.dense.parameters


def foldgpt(known: Known, options: argparse.Namespace) -> Iterator[Finding]:
    """Gates against block influence, and planted blocks that do nothing."""
    for count in options.removed:
        bound = known.figures(f"without {count} of least influence", partial(influence, count))
        for seed in options.seeds:
            what = f"{count} blocks gone, seed {seed}"
            found = known.figures(f"gates, {what}", partial(gates, count, seed))
            for which in ("sampled", "relaxed", "method"):
                yield Finding("foldgpt", f"{which}, {what}", found[which], bound["perplexity"])
    for seed in options.seeds:
        what = f"planted idle blocks that are not the lowest, seed {seed}"
        missed = known.figures(what, partial(missed_idle, seed))["missed"]
        yield Finding("foldgpt", what, missed, 0)


def influence(count: int, bench: Bench) -> Figures:
    """The perplexity without the `count` blocks of least block influence."""
    gone = frozenset(bench.evidence.ranking.order()[:count])
    return {"perplexity": bench.perplexity(without(bench.model, gone)), "blocks": sorted(gone)}


def gates(count: int, seed: int, bench: Bench) -> Figures:
    """Perplexities without what each training of the method closes, and what it chooses."""
    share = removed_share(bench, count)
    method = METHODS["foldgpt"](sparsity=share, seed=seed, removal_portion=1)
    assert isinstance(method, FoldGpt)
    num_kept = len(plan_of(bench.model).blocks) - count
    found: Figures = {}
    with TemporaryDirectory() as folder:  # the method goes on from the trainings that it finds
        evidence = replace(bench.evidence, work=Path(folder))
        for run in range(method.gate_runs):
            form = method.training(run).form
            trained = method.train(bench.model, evidence, num_kept, run)
            closed = frozenset(trained.order()[:count])
            found[form] = bench.perplexity(without(bench.model, closed))
            found[f"closed by {form}"] = sorted(closed)
        change = method.compress(bench.model, evidence)
    chosen = {"chosen": list(change.plan.removed_blocks)}
    return {**found, "method": bench.perplexity(cut(bench.model, change)), **chosen}


def missed_idle(seed: int, bench: Bench) -> Figures:
    """How many of two planted idle blocks do not have the two lowest gates."""
    num_blocks = len(plan_of(bench.model).blocks)
    planted = (num_blocks // 3, 2 * num_blocks // 3)
    model, num_kept = idle_at(bench.model, planted), num_blocks - len(planted)
    trained = train_gates(model, bench.calibration, num_kept, GateTraining(), seed=seed)
    missed = set(planted) - set(trained.order()[: len(planted)])
    return {"missed": len(missed), "gates": list(trained.values)}


def idle_at(model: PreTrainedModel, positions: tuple[int, ...]) -> PreTrainedModel:
    """A copy in which these blocks pass on what enters them."""
    idle, architecture = copy.deepcopy(model), architecture_of(model)
    for position in positions:
        block = architecture.blocks(idle)[position]
        for site in architecture.linears:
            if site.reads.endswith("_output"):
                for parameter in block.get_submodule(site.name).parameters():
                    parameter.data.zero_()
    return idle


def flexigpt(known: Known, options: argparse.Namespace) -> Iterator[Finding]:
    """Virtual blocks against removal: at the start, and after the same recovery."""
    for count in options.removed:
        start = known.figures(f"flexigpt for {count} blocks", partial(virtual_start, count))
        what = f"start, {start['virtual']} virtual blocks, over removal of them"
        yield Finding("flexigpt", what, start["perplexity"] / start["pruned"], START_BOUND)
        for seed in options.seeds:
            ends = {
                name: known.figures(
                    f"{name} for {count} blocks, healed, seed {seed}",
                    partial(healed, make, count, seed),
                )
                for name, make in HEALED.items()
            }
            for name, told in (
                ("shortgpt", "of the same size"),
                ("pruned", f"without the {start['virtual']} blocks"),
            ):
                what = f"healed, {start['removed']:.1%} removed, against {name} {told}, seed {seed}"
                found, bound = (ends[each]["perplexity"] for each in ("flexigpt", name))
                yield Finding("flexigpt", what, found, bound)


@lru_cache(maxsize=1)
def virtual_model(bench: Bench, count: int) -> PreTrainedModel:
    """FlexiGPT of the size of the model without `count` blocks."""
    return bench.compressed("flexigpt", removed_share(bench, count))[0]


def pruned_model(bench: Bench, count: int) -> PreTrainedModel:
    """The model without the blocks that are virtual in that."""
    return without(bench.model, virtual_blocks(virtual_model(bench, count)))


def shorter_model(bench: Bench, count: int) -> PreTrainedModel:
    """ShortGPT without `count` blocks."""
    return bench.compressed("shortgpt", removed_share(bench, count))[0]


HEALED = {"flexigpt": virtual_model, "shortgpt": shorter_model, "pruned": pruned_model}


def virtual_start(count: int, bench: Bench) -> Figures:
    """Perplexities before recovery, and what was removed."""
    start = virtual_model(bench, count)
    return {
        "perplexity": bench.perplexity(start),
        "pruned": bench.perplexity(pruned_model(bench, count)),
        "removed": 1 - count_parameters(start) / bench.dense.parameters,
        "virtual": len(virtual_blocks(start)),
    }


def healed(
    make: Callable[[Bench, int], PreTrainedModel], count: int, seed: int, bench: Bench
) -> Figures:
    """The perplexity after recovery."""
    return {"perplexity": bench.perplexity(bench.recovered(make(bench, count), seed))}


def virtual_blocks(model: PreTrainedModel) -> frozenset[int]:
    return frozenset(p for p, block in enumerate(plan_of(model).blocks) if block.is_virtual)


def streamline(known: Known, options: argparse.Namespace) -> Iterator[Finding]:
    """A trained block in place of a run against nothing in its place; all seeds for the method as
    it comes, the first for the other replacements."""
    for count in options.removed:
        for settings, seeds in REPLACEMENTS:
            told = " ".join(map(str, settings.values()))
            for seed in options.seeds[:seeds]:
                what = f"{told} for {count} blocks, seed {seed}"
                row = known.figures(what, partial(replaced, count, settings, seed))
                for bound in ("nothing", "shortgpt"):
                    found = row["perplexity"]
                    yield Finding("streamline", f"{what}, against {bound}", found, row[bound])


def replaced(count: int, settings: Mapping[str, Any], seed: int, bench: Bench) -> Figures:
    """Perplexities with a trained block, with nothing in its place, and with ShortGPT."""
    share = removed_share(bench, count)
    model, plan = bench.compressed("llm_streamline", share, seed, **settings)
    run = next(block.stands_for for block in plan.blocks if block.kind != "original")
    return {
        "perplexity": bench.perplexity(model),
        "nothing": bench.perplexity(without(bench.model, frozenset(run))),
        "shortgpt": bench.perplexity(shorter_model(bench, count)),
        "run": list(run),
    }


CLAIMS: dict[str, Callable[[Known, argparse.Namespace], Iterator[Finding]]] = {
    "foldgpt": foldgpt,
    "flexigpt": flexigpt,
    "streamline": streamline,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_options(
        parser,
        model="reference",
        calibration="python-stdlib:train",
        test="python-stdlib:test",
        num_calibration=64,
        num_test=64,
        recovery_steps=48,
    )
    parser.add_argument("--claim", nargs="+", choices=tuple(CLAIMS), default=tuple(CLAIMS))
    parser.add_argument("--removed", type=int, nargs="+", default=[2, 4], help="blocks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_results_option(parser)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse()
    known = Known(options)
    findings = []
    for claim in options.claim:
        for finding in CLAIMS[claim](known, options):
            findings.append(finding)
            told = f"{finding.figure:.4g} | {finding.bound:.4g} | {finding.holds}"
            print(f"| {claim} | {finding.what} | {told} |", file=sys.stderr, flush=True)
    rows = [{**asdict(finding), "holds": finding.holds} for finding in findings]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| claim | what | figure | at most | holds |\n|---|---|---|---|---|")
    for row in rows:
        told = f"{row['figure']:.4g} | {row['bound']:.4g} | {'yes' if row['holds'] else 'no'}"
        print(f"| {row['claim']} | {row['what']} | {told} |")


if __name__ == "__main__":
    main()
