"""Several methods one after the other, budgeted to one sparsity."""

import importlib
import logging
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from transformers import PreTrainedModel

from foldstack.compression.checkpoints.checkpoint import load_model, load_plan, save_model
from foldstack.compression.errors import InputError
from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.methods.method import TOLERANCE, Evidence, Method, unreachable
from foldstack.compression.methods.search.scoring import scored
from foldstack.compression.statistics.block_residency import run_blocks_in_turn
from foldstack.compression.statistics.gathering import KINDS
from foldstack.compression.statistics.sensitivity import Family
from foldstack.compression.storage.durable import sync_files, sync_folder
from foldstack.compression.structure.architectures import architecture_of, stock_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import (
    Cut,
    build_on_meta,
    config_for,
    cut,
    plan_of,
    storage_of,
)

logger = logging.getLogger(__name__)

# How finely the reachable sparsity is searched for, to name it in a refusal.
_REACH_STEP = 0.01


class Step(BaseModel):
    """One method of a stack: its name, its own settings, and its share of what is removed."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str
    """Of the method; the settings of that method may stand beside it."""
    portion: float | None = Field(default=None, gt=0, lt=1)
    """Fraction of the removed parameters that go in this step; what the others leave, in equal
    parts, where it is not given."""

    @model_validator(mode="after")
    def _is_a_method(self) -> "Step":
        methods = _registered()
        if self.name not in methods or self.name == "stack":
            known = ", ".join(sorted(methods.keys() - {"stack"}))
            raise ValueError(f"a step is one of {known}; got {self.name!r}")
        settings = self.model_extra or {}
        if taken := {"sparsity", "seed"} & settings.keys():
            raise ValueError(f"{min(taken)} belongs to the whole stack, not to step {self.name}")
        if methods[self.name].grows:
            raise ValueError(f"a step removes parameters, and {self.name} adds some: use it alone")
        self.method(sparsity=0.5, seed=0)
        return self

    def __repr__(self) -> str:
        settings = self.model_dump(exclude={"name"}, exclude_none=True)
        return " ".join([self.name, *(f"{key}={value}" for key, value in settings.items())])

    def method(self, sparsity: float, seed: int) -> Method:
        """The method of this step for one sparsity, relative to the model that it is given."""
        settings = self.model_extra or {}
        made: Method = _registered()[self.name](sparsity=sparsity, seed=seed, **settings)
        return made


class Stack(Method):
    """Apply several methods in turn, each to what the one before it left.

    The order prune, then share is FoldGPT's (Liu et al. 2024, arXiv 2407.00928); prune then factor
    and share then factor follow the same pattern. With s the sparsity of the whole and p_i the
    portion of step i, the model is to keep 1 - s (p_1 + ... + p_i) of its parameters after step i.
    A step that removes whole blocks overshoots its part; the next one aims at the same total, so
    the last step lands on s as exactly as its method can. The statistics of every step but the
    first are gathered anew on the calibration windows, from the model that the step is given. What
    a step has made lies on disk, so that the next one holds no more of it in memory than it uses.

    Departs from the paper: nothing trains between the steps; recovery comes after the last.
    """

    needs: ClassVar[frozenset[str]] = KINDS

    steps_of: ClassVar[str] = "those of its methods"
    name: Literal["stack"] = "stack"
    steps: tuple[Step, ...] = Field(
        default_factory=lambda: (Step(name="shortgpt"), Step(name="svd_llm")), min_length=2
    )
    """The methods in their order, each with its own settings and, if wanted, its portion."""

    @model_validator(mode="after")
    def _slicing_ends_it(self) -> "Stack":
        for step, following in pairwise(self.steps):
            if step.name == "slicegpt":
                raise ValueError(
                    f"slicegpt must be the last step, {following.name} follows it: the blocks of a "
                    "sliced model work in bases of their own"
                )
        return self

    @model_validator(mode="after")
    def _portions_fit(self) -> "Stack":
        given = [step.portion for step in self.steps if step.portion is not None]
        everything = len(given) == len(self.steps)
        if sum(given) > 1 + 1e-9 or (everything and abs(sum(given) - 1) > 1e-9):
            raise ValueError(f"the portions of a stack add up to 1, got {given}")
        if not everything and sum(given) > 1 - 1e-9:
            raise ValueError(f"portions {given} leave nothing for the other steps")
        return self

    @property
    def scores(self) -> frozenset[Family]:
        return self.steps[0].method(self.sparsity, self.seed).scores

    @property
    def title(self) -> str:
        return "+".join(step.name for step in self.steps)

    def modules(self) -> tuple[str, ...]:
        of_steps = {module for step in self.steps for module in step.method(0.5, 0).modules()}
        return (*super().modules(), *sorted(of_steps))

    @property
    def goes_in_turn(self) -> bool:
        return all(step.method(0.5, 0).goes_in_turn for step in self.steps)

    def arithmetic(self, model: PreTrainedModel, num_tokens: int) -> Arithmetic:
        # What one step leaves for the next would need its outline: as if each did its part alone.
        part = self.sparsity / len(self.steps)
        steps = (step.method(part, self.seed) for step in self.steps)
        return sum((step.arithmetic(model, num_tokens) for step in steps), Arithmetic())

    def outline(self, model: PreTrainedModel) -> Plan:
        try:
            return self._outline(model)
        except InputError as error:
            farthest = self._farthest(model)
            if farthest >= self.sparsity - TOLERANCE:
                raise
            raise InputError(unreachable(self, farthest, f"{self.title}: {error}")) from error

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        current, dense = model, count_parameters(model)
        whole = base = plan_of(model)
        for number in range(len(self.steps)):
            method = self._method(number, dense, count_parameters(current))
            if method is None:
                name, before = self.steps[number].name, self.steps[number - 1].name
                logger.warning("step %s is left out: %s removed enough already", name, before)
                continue
            work = None if evidence.work is None else evidence.work / f"step-{number}"
            step = replace(evidence, work=work)
            current, plan = _smaller(current, method, step, is_first=current is model)
            whole = plan.after(base)
            base = whole if whole.is_native else base
        return _as_cut(current, whole)

    def _outline(self, model: PreTrainedModel) -> Plan:
        current, dense = model, count_parameters(model)
        whole = base = plan_of(model)
        for number in range(len(self.steps)):
            method = self._method(number, dense, count_parameters(current))
            if method is None:
                continue
            plan = method.outline(current)
            current = build_on_meta(config_for(current.config, plan))
            whole = plan.after(base)
            base = whole if whole.is_native else base
        return whole

    def _method(self, number: int, dense: int, left: int) -> Method | None:
        """The method of a step for what is `left` of `dense` parameters; None if it is enough."""
        sparsity = 1 - dense * (1 - self.sparsity * self._done_after(number)) / left
        # Below the tolerance a step would change its structure for nothing that counts.
        if sparsity <= TOLERANCE and number > 0:
            return None
        return self.steps[number].method(sparsity, self.seed)

    def _done_after(self, number: int) -> float:
        """Fraction of all that is removed which is gone after a step."""
        if number == len(self.steps) - 1:
            return 1.0
        given = [step.portion for step in self.steps if step.portion is not None]
        rest = (1 - sum(given)) / max(1, len(self.steps) - len(given))
        done = [rest if step.portion is None else step.portion for step in self.steps]
        return sum(done[: number + 1])

    def _farthest(self, model: PreTrainedModel) -> float:
        """The largest sparsity, to a hundredth, whose outline exists."""
        reachable = [0.0]
        low, high = 0, round(self.sparsity / _REACH_STEP)
        while low + 1 < high:  # from a sparsity on that is out of reach, all larger ones are
            middle = (low + high) // 2
            try:
                plan = self.model_copy(update={"sparsity": middle * _REACH_STEP})._outline(model)
            except InputError:
                high = middle
            else:
                low = middle
                after = size_of_plan(model.config, plan).parameters
                reachable.append(1 - after / count_parameters(model))
        return min(max(reachable), low * _REACH_STEP)


def _registered() -> dict[str, type[Method]]:
    # Not as an import statement: the code that a result depends on is found by reading those, and
    # a stack depends on its own steps' files, not on every method there is.
    methods: dict[str, type[Method]] = importlib.import_module(
        "foldstack.compression.methods"
    ).METHODS
    return methods


def _smaller(
    model: PreTrainedModel, method: Method, evidence: Evidence, *, is_first: bool
) -> tuple[PreTrainedModel, Plan]:
    """What a step makes of `model`, and by which plan; in `evidence.work`, if there is one, where a
    killed run finds it, and out of memory."""

    def compress() -> Cut:
        seen = evidence if is_first else evidence.of(model, KINDS)
        return method.compress(model, scored(seen, model, method.scores))

    if evidence.work is None:
        change = compress()
        return _placed_like(model, cut(model, change)), change.plan
    folder, unfinished = evidence.work / "model", evidence.work / "unfinished"
    found = _left_in(folder, model)
    if found is None:
        change = compress()
        smaller = cut(model, change, share_memory=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        save_model(smaller, unfinished, tokenizer_from=unfinished, plan=change.plan)
        sync_files(unfinished)
        unfinished.rename(folder)
        sync_folder(evidence.work)
        found = load_model(folder, dtype=model.dtype), change.plan
    for leftover in evidence.work.iterdir():
        if leftover != folder:
            shutil.rmtree(leftover)
    return _placed_like(model, found[0]), found[1]


def _left_in(folder: Path, model: PreTrainedModel) -> tuple[PreTrainedModel, Plan] | None:
    """What an earlier run has made of `model`; None where it has not, or its files are torn."""
    if not folder.is_dir():
        return None
    try:
        return load_model(folder, dtype=model.dtype), load_plan(folder)
    except (OSError, ValueError, SafetensorError) as error:
        logger.warning("%s, left by an earlier run, cannot be read (%s): made anew", folder, error)
        shutil.rmtree(folder)
        return None


def _placed_like(model: PreTrainedModel, made: PreTrainedModel) -> PreTrainedModel:
    """`made`, computing where `model` does, with its blocks there or coming in turn."""
    if storage_of(model) == model.device:
        return made.to(model.device)  # type: ignore[arg-type]
    run_blocks_in_turn(made, model.device)
    return made


def _as_cut(model: PreTrainedModel, plan: Plan) -> Cut:
    """The cut that makes this very model, whose structure is `plan`, from any model of its base."""
    path = f"{architecture_of(model).blocks_path}."
    state = stock_of(model).state_dict()
    tensors = {
        f"blocks.{name.removeprefix(path)}" if name.startswith(path) else name: tensor
        for name, tensor in state.items()
    }
    return Cut(plan, (None,) * len(plan.blocks), tensors)
