"""Blocks compressed in order, each with a look at what the compressed ones before it produce.

A closed form is best on the inputs that it was given; behind blocks that were compressed already
the inputs are others. So two streams of hidden states go through the blocks side by side, the
compressed model's and the dense one's, and what is made of a block may be fitted to both
(`Streams.sums`, `refit`). One block at a time is in memory, and a killed run goes on at the block
where it was.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.refit import Refit, Sides, refitted_outputs
from foldstack.compression.statistics.grams import paired_inputs, summed_inputs
from foldstack.compression.statistics.hidden_states import MEMORY_BYTES
from foldstack.compression.statistics.kept_pass import KeptPass
from foldstack.compression.statistics.stream import BlockStream, cpu_precision, tensors_of
from foldstack.compression.storage.mapped_memory import release, trim
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.block_plan import LowRank
from foldstack.compression.structure.head_slices import HeadSlices
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import BlockByBlock, Cut, as_stored, plan_of

DEVIATED, DENSE = "deviated", "dense"
TOKENS_AT_ONCE = 1024
"""That pass a block beside the sums, which are most of what is in memory then."""


class Streams:
    """The compressed model's hidden states and, where they are asked for, the dense one's; kept
    where a killed run has left them."""

    def __init__(self, model: PreTrainedModel, evidence: Evidence, *, beside_dense: bool) -> None:
        kinds = (DEVIATED, DENSE) if beside_dense else (DEVIATED,)
        work = None if evidence.work is None else evidence.work / "streams"
        self.kept = KeptPass(work, kinds)
        open_stream = partial(
            BlockStream,
            model,
            evidence.calibration,
            batch_size=max(1, TOKENS_AT_ONCE // evidence.calibration.shape[1]),
            dtype=cpu_precision(model),
            memory_bytes=MEMORY_BYTES // len(kinds),
            folder=work,
        )
        self.architecture = architecture_of(model)
        self.deviated = open_stream(name=self.kept.name(DEVIATED))
        self.dense = open_stream(name=self.kept.name(DENSE)) if beside_dense else None

    @property
    def position(self) -> int:
        """The block of the dense model before which the compressed model's hidden states stand."""
        return self.deviated.position

    def resume(self, is_made: Callable[[int], bool]) -> None:
        """Stand where a killed run has stood, if what it made of the blocks before is there."""
        if not all(map(is_made, range(self.kept.position))):
            self.kept.begin_anew()
        for stream in (self.deviated, self.dense):
            if stream is not None and self.kept.position > 0:
                stream.resume(self.kept.position)

    def skip_to(self, position: int) -> None:
        """Stand before `position` when the blocks before it are gone."""
        self.deviated.put(self.deviated.batches(), position)
        self.dense_to(position)

    def dense_to(self, position: int) -> None:
        """Let the dense model's hidden states pass the blocks before `position`."""
        while self.dense is not None and self.dense.position < position:
            passed = self.dense.blocks[self.dense.position]
            self.dense.advance()
            release(tensors_of(passed))

    def sums(self, *, pass_on: bool) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """By what the linears of the dense block at hand read in the compressed model, x', and in
        the dense one, x: the sums of x' x'^T and, with a dense stream, those of (x - x') x'^T.

        With `pass_on` the dense stream passes the block meanwhile.
        """
        block = self.deviated.blocks[self.position]
        if self.dense is None:
            with summed_inputs(block, self.architecture) as seen:
                for _ in self.deviated.outputs(block):
                    pass
            return seen.grams, None
        with paired_inputs(block, self.architecture) as paired:
            if pass_on:
                self.dense.advance(block, beside=self.deviated)
            else:
                both = self.dense.outputs(block), self.deviated.outputs(block)
                for _ in zip(*both, strict=True):
                    pass
        return paired.grams, paired.shifts

    def advance(self, compressed: nn.Module, to: int) -> None:
        """Pass `compressed` and stand before block `to`; the dense stream, too."""
        self.deviated.advance(compressed, to=to)
        self.dense_to(to)
        self.kept.checkpoint(to)


TensorsOf = Callable[[int, Streams], Mapping[str, Tensor]]
"""What a method makes of the linears stored at a position, as a cut names it; the streams stand
before the first block that uses them."""


def compressed_in_order(
    model: PreTrainedModel,
    plan: Plan,
    tensors_of_block: TensorsOf,
    evidence: Evidence,
    what: str,
    *,
    inherits: Sequence[int] | None = None,
    refit: Refit = "none",
    beside_dense: bool = False,
) -> dict[str, Tensor]:
    """The tensors of a cut to `plan`, block by block in the order of execution.

    Args:
        tensors_of_block: called once for each position that stores linears, and not for those that
            a killed run has left.
        what: whose progress this is.
        inherits: the block of `model` that each position is made from, ascending; default: all.
        refit: what the linears that write into the residual stream are fitted to (`refit`) once the
            block has its tensors.
        beside_dense: whether there is a dense stream without a refit, too.
    """
    inherits = range(len(plan_of(model).blocks)) if inherits is None else inherits
    spool, blocks = evidence.spool(), BlockByBlock(model, plan, inherits)
    streams = Streams(model, evidence, beside_dense=beside_dense or refit != "none")
    owner_of = {source: plan.owner(position) for position, source in enumerate(inherits)}
    streams.resume(lambda p: p not in owner_of or spool.has(f"block-{owner_of[p]}"))
    if streams.position < inherits[0]:
        streams.skip_to(inherits[0])
    behind = [*inherits[1:], len(streams.deviated.blocks)]
    made: set[int] = set()
    for position, (source, to) in enumerate(zip(inherits, behind, strict=True)):
        owner = plan.owner(position)
        if owner not in made:
            make = partial(
                _made, model, plan, owner, tensors_of_block, streams, blocks, refit=refit, to=to
            )
            blocks.fill(owner, spool.part(f"block-{owner}", make))
            made.add(owner)
        block = blocks.blocks[position] if position == owner else blocks.fill(position, {})
        if streams.position == source:
            streams.advance(block, to)
        release(tensors_of(streams.deviated.blocks[source]))
        release(tensors_of(block))
        for done in range(position + 1):
            if not _is_used_behind(plan, done, position):
                blocks.empty(done)
        evidence.progress(what, position + 1, len(inherits))
    return spool.tensors


def refitted(model: PreTrainedModel, change: Cut, evidence: Evidence, refit: Refit) -> Cut:
    """`change` of `model`, a cut that keeps blocks or changes them in place, with its output
    projections fitted in order.

    Raises:
        InputError: some of its blocks are new.
    """
    inherits = [source for source in change.inherits if source is not None]
    if len(inherits) < len(change.inherits):
        raise InputError("a refit goes through blocks that the dense model has, too; some are new")

    def given(position: int, _streams: Streams) -> dict[str, Tensor]:
        start = f"blocks.{position}."
        return {name: t for name, t in change.tensors.items() if name.startswith(start)}

    tensors = compressed_in_order(
        model, change.plan, given, evidence, "refit", inherits=inherits, refit=refit
    )
    return replace(change, tensors=change.tensors | tensors)


def _made(
    model: PreTrainedModel,
    plan: Plan,
    owner: int,
    tensors_of_block: TensorsOf,
    streams: Streams,
    blocks: BlockByBlock,
    *,
    refit: Refit,
    to: int,
) -> dict[str, Tensor]:
    trim()  # after much that was large and is gone, and before the sums
    tensors = dict(tensors_of_block(owner, streams))
    if refit == "none" or streams.dense is None:
        return tensors
    sides = Sides(
        dense=streams.dense,
        deviated=streams.deviated,
        block=blocks.fill(owner, tensors),
        pass_dense=partial(streams.dense_to, to),
    )
    return tensors | as_stored(refitted_outputs(model, plan, owner, sides, refit), model)


def _is_used_behind(plan: Plan, position: int, so_far: int) -> bool:
    """Whether a block behind `so_far` computes with what is stored at `position`.

    Its own linears and those of a block whose weights it shares may both take a basis or slices of
    heads from there.
    """
    for user in range(so_far + 1, len(plan.blocks)):
        owner = plan.owner(user)
        forms = [*plan.blocks[user].linears.values(), *plan.blocks[owner].linears.values()]
        bases = {form.basis_of for form in forms if isinstance(form, LowRank)}
        slices = {
            origin[0]
            for form in forms
            if isinstance(form, HeadSlices)
            for origin in form.slices
            if origin is not None
        }
        if position in {user, owner} | bases | slices:
            return True
    return False
