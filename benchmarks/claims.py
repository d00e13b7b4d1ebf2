"""Whether what the papers claim of their methods holds on one model, with the figures.

    python benchmarks/claims.py [--claim foldgpt flexigpt streamline] [--seeds 0 1 2] [--json]

By default on the reference model and held-out modules of the standard library; for --model,
--calibration, --test and the windows see `methods.py`. Perplexities are those of the test windows.

foldgpt: without the blocks whose trained gates are lowest the perplexity is at most that without
    the blocks of least block influence, for each number of blocks (gates: one training's; best of
    its sets: the method as it comes), and blocks that do nothing get the lowest gates.
flexigpt: virtual blocks start at most 1.02 times the perplexity of the model without them, and end,
    after --recovery_steps, below ShortGPT of the same stored size after the same.
streamline: a trained layer in place of a run of blocks is better than nothing in its place, and
    than ShortGPT of the same size; beside it the other replacements.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from held_out_loss import Bench, add_data_options
from transformers import PreTrainedModel

from foldstack.compression.architectures import architecture_of
from foldstack.compression.gates import GateTraining, train_gates
from foldstack.compression.methods import METHODS
from foldstack.compression.size import count_parameters
from foldstack.compression.surgery import Cut, cut, plan_of

START_BOUND = 1.02  # of FlexiGPT's perplexity over the pruned model's
REPLACEMENTS = (
    {"replacement": "layer"},
    {"replacement": "layer", "loss": "llm"},
    {"replacement": "swiglu"},
    {"replacement": "ffn"},
)


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


def without(model: PreTrainedModel, gone: frozenset[int]) -> PreTrainedModel:
    """A copy without these blocks."""
    plan = plan_of(model)
    kept = tuple(p for p in range(len(plan.blocks)) if p not in gone)
    return cut(model, Cut(plan.keep(kept), kept))


def removed_share(bench: Bench, count: int) -> float:
    """The sparsity that removing `count` blocks is."""
    smaller = without(bench.model, frozenset(range(count)))
    return 1 - count_parameters(smaller) / bench.dense.parameters


def compressed(bench: Bench, name: str, sparsity: float, seed: int, **settings: object) -> Cut:
    """What a method decides."""
    method = METHODS[name](sparsity=sparsity, seed=seed, **settings)
    return method.compress(bench.model, bench.evidence)


def foldgpt(bench: Bench, options: argparse.Namespace) -> Iterator[Finding]:
    """Gates against block influence, and planted blocks that do nothing."""
    num_blocks = len(plan_of(bench.model).blocks)
    for count in options.removed:
        influence = frozenset(bench.evidence.ranking.order()[:count])
        bound = bench.perplexity(without(bench.model, influence))
        for seed in options.seeds:
            gates = train_gates(
                bench.model, bench.calibration, num_blocks - count, GateTraining(), seed=seed
            )
            found = bench.perplexity(without(bench.model, frozenset(gates.order()[:count])))
            yield Finding("foldgpt", f"gates, {count} blocks gone, seed {seed}", found, bound)
            change = compressed(
                bench, "foldgpt", removed_share(bench, count), seed, removal_portion=1
            )
            found = bench.perplexity(cut(bench.model, change))
            yield Finding("foldgpt", f"method, {count} blocks gone, seed {seed}", found, bound)
    planted = (num_blocks // 3, 2 * num_blocks // 3)
    model = idle_at(bench.model, planted)
    for seed in options.seeds:
        gates = train_gates(
            model, bench.calibration, num_blocks - len(planted), GateTraining(), seed=seed
        )
        missed = len(set(planted) - set(gates.order()[: len(planted)]))
        what = f"planted idle blocks that are not the lowest {len(planted)}, seed {seed}"
        yield Finding("foldgpt", what, missed, 0)


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


def flexigpt(bench: Bench, options: argparse.Namespace) -> Iterator[Finding]:
    """Virtual blocks against removal: at the start, and after the same recovery."""
    for count in options.removed:
        sparsity = removed_share(bench, count)
        change = compressed(bench, "flexigpt", sparsity, 0)
        virtual = frozenset(p for p, b in enumerate(change.plan.blocks) if b.is_virtual)
        pruned = bench.perplexity(without(bench.model, virtual))
        start = cut(bench.model, change)
        what = f"start, {len(virtual)} virtual blocks, over removal of them"
        yield Finding("flexigpt", what, bench.perplexity(start) / pruned, START_BOUND)
        shortgpt = cut(bench.model, compressed(bench, "shortgpt", sparsity, 0))
        for seed in options.seeds:
            healed, bound = (bench.perplexity(bench.recovered(m, seed)) for m in (start, shortgpt))
            size = 1 - count_parameters(start) / bench.dense.parameters
            what = f"healed, {size:.1%} removed, seed {seed}"
            yield Finding("flexigpt", what, healed, bound)


def streamline(bench: Bench, options: argparse.Namespace) -> Iterator[Finding]:
    """A trained block in place of a run against nothing in its place."""
    for count in options.removed:
        sparsity = removed_share(bench, count)
        shorter = bench.perplexity(cut(bench.model, compressed(bench, "shortgpt", sparsity, 0)))
        for settings in REPLACEMENTS:
            for seed in options.seeds:
                change = compressed(bench, "llm_streamline", sparsity, seed, **settings)
                run = next(b.stands_for for b in change.plan.blocks if b.kind != "original")
                found = bench.perplexity(cut(bench.model, change))
                told = " ".join(map(str, settings.values()))
                what = f"{told} for blocks {run[0]} to {run[-1]}, seed {seed}"
                bound = bench.perplexity(without(bench.model, frozenset(run)))
                yield Finding("streamline", f"{what}, against nothing", found, bound)
                yield Finding("streamline", f"{what}, against shortgpt", found, shorter)


CLAIMS: dict[str, Callable[[Bench, argparse.Namespace], Iterator[Finding]]] = {
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
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse()
    bench = Bench(options)
    findings = []
    for claim in options.claim:
        for finding in CLAIMS[claim](bench, options):
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
