"""Seconds of a stage of which no earlier run is known, from its shapes and this machine's rates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from foldstack.compression.text.calibration import WindowSpec
from foldstack.flows.planning.machine_rates import Rates, characters_per_second, measure_rates
from foldstack.flows.planning.needs import (
    TOKENS_PER_ITEM,
    Need,
    autocast_of,
    has_gpus,
    stored_dtype,
)
from foldstack.flows.running.branches import DECIDING_WINDOWS, Branch, Layout
from foldstack.tasks.benchmark_speed import TimeVariants
from foldstack.tasks.collect_calibration import CollectCalibration
from foldstack.tasks.evaluate_track import EvaluateTrack
from foldstack.tasks.recover_model import ChooseFinalist, RecoverModel
from foldstack.tasks.score_variants import ScoreVariants
from foldstack.tasks.stage import Stage
from foldstack.tasks.write_samples import WriteSamples
from foldstack.tasks.write_windows import WriteWindows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from foldstack.compression.structure.plan import Plan

TRAINING_FACTOR = 3
"""A forward and a backward pass over a forward pass."""
GRAM_FACTOR = 1.2
"""Of the upper triangle of a Gram over its multiplications, and of adding it up."""
WRITE_RATE = 5e8
"""Bytes per second that go to disk."""
LITTLE_SECONDS = 1.5
"""Of a stage without a model: scores into a picture."""
OPENING_SECONDS = 0.5
"""Of a model, a tokenizer and a text."""
CHARACTERS_PER_TOKEN = 3
CHARACTERS_PER_SECOND = 2e6
"""Of text into tokens, where there is no tokenizer to measure."""
WHOLE_BENCHMARK = 1000
"""Items, by a guess."""


@dataclass(frozen=True)
class StageArithmetic:
    """Times of the stages of one run.

    Args:
        needs: of every stage, by its fingerprint.
        flops: per token of every model, by its label.
        described: the rates of another machine for a model; without it, this one's are measured.
    """

    layout: Layout
    needs: Mapping[str, Need]
    flops: Mapping[str, float]
    described: Callable[["PreTrainedModel", Layout], Rates] | None = None

    def seconds(self, stage: Stage) -> float:
        """Expected, with the libraries loaded already."""
        config, rates, branch = self.layout.config, self._rates, self._owners.get(stage.fingerprint)
        match stage.stage:
            case "collect_calibration":
                assert isinstance(stage, CollectCalibration)
                return OPENING_SECONDS + self._tokenising(stage)
            case "write_windows":
                assert isinstance(stage, WriteWindows)
                return OPENING_SECONDS + self._writing(stage.windows)
            case "gather_statistics":
                disk = self.needs[stage.fingerprint].disk_bytes
                tokens = self._calibration / config.statistics.shards
                products = GRAM_FACTOR * disk / 4 * tokens / rates.float32
                passing = tokens * self._streamed_token
                return OPENING_SECONDS + passing + products + disk / WRITE_RATE
            case "score_variants":
                assert isinstance(stage, ScoreVariants)
                return OPENING_SECONDS + self._scoring(stage)
            case "time_variants":
                assert isinstance(stage, TimeVariants)
                return OPENING_SECONDS + self._timing_variants(stage)
            case "compress_model":
                return OPENING_SECONDS + self._checking(branch) + self._of_method(branch)
            case "recover_model":
                assert isinstance(stage, RecoverModel)
                schedule = config.recovery
                tokens = stage.settings.steps * schedule.batch_size * schedule.gradient_accumulation
                tokens *= schedule.windows.window_tokens
                student = TRAINING_FACTOR * self._trained(tokens, branch)
                windows = schedule.windows
                if stage.processes == 1 and schedule.keeps_teacher(windows.num_windows):
                    tokens = windows.num_windows * windows.window_tokens
                teacher = self._passing(tokens) if schedule.needs_teacher else 0.0
                # Processes on a CPU share its cores.
                shares = stage.processes if has_gpus(self.layout) else 1
                training = (student + teacher) / shares
                return OPENING_SECONDS + self._checking(branch) + training
            case "choose_finalist":
                assert isinstance(stage, ChooseFinalist)
                tokens = DECIDING_WINDOWS * config.recovery.windows.window_tokens
                models = 2 * len(stage.finalists)
                return models * (OPENING_SECONDS + self._passing(tokens, branch))
            case "evaluate_model":
                return OPENING_SECONDS + self._passing(self._evaluated_tokens, branch)
            case "evaluate_track":
                assert isinstance(stage, EvaluateTrack)
                return OPENING_SECONDS + self._passing(self._track_tokens(stage), branch)
            case "write_samples":
                assert isinstance(stage, WriteSamples)
                spec = stage.spec
                return OPENING_SECONDS + self._decoding(spec.count * spec.new_tokens, branch)
            case "export_model":
                engine = rates.fresh_seconds + OPENING_SECONDS if stage.engines else 0.0  # type: ignore[attr-defined]
                return OPENING_SECONDS + self._checking(branch) + engine
            case "benchmark_engine":
                return rates.fresh_seconds + self._timing(branch)
            case "benchmark_speed":
                return rates.fresh_seconds + self._timing(branch)
            case _:
                return LITTLE_SECONDS

    def _tokenising(self, stage: CollectCalibration) -> float:
        """All of a text, of which windows are drawn."""
        from foldstack.compression.checkpoints.checkpoint import load_tokenizer
        from foldstack.compression.text.corpus import documents

        texts = documents(stage.source)
        if self.layout.on_paper:
            return sum(map(len, texts)) / CHARACTERS_PER_SECOND
        rate = characters_per_second(load_tokenizer(stage.model.open()), texts)
        return sum(map(len, texts)) / rate

    def _writing(self, spec: WindowSpec) -> float:
        """Of windows that the dense model writes, a token of each of a batch at a time."""
        from foldstack.compression.text.self_written import WRITING_BATCH

        batches = -(-spec.num_windows // WRITING_BATCH)
        tokens = spec.num_windows * spec.window_tokens
        return self._passing(tokens) + self._decoding(batches * spec.window_tokens)

    def _scoring(self, stage: ScoreVariants) -> float:
        """Of every variant of a family from its block to the head, and of its tensors."""
        from foldstack.compression.methods.search.scoring import scoring_arithmetic

        tokens = min(stage.tokens, self._calibration)
        work = scoring_arithmetic(self._meta, stage.family, self._calibration)
        passing = tokens * (work.passes * self._token + work.heads * self._rates.head_seconds)
        products = GRAM_FACTOR * work.products / self._rates.float32
        return (passing + work.float64 / self._rates.float64 + products) / stage.shard.count

    def _timing_variants(self, stage: TimeVariants) -> float:
        """Of turns of models that are no slower than the dense one, each beside it."""
        from foldstack.compression.methods.search.library import Library
        from foldstack.compression.methods.search.seconds import measured_choices

        spec, models = stage.spec, len(measured_choices(Library(self._meta), stage.family))
        turns = 2 * models * (spec.warmup + spec.repeats) * spec.batch_sizes[0]
        request = self._passing(spec.prompt_tokens) + self._decoding(spec.new_tokens)
        return turns * request

    def _passing(self, tokens: float, branch: Branch | None = None) -> float:
        """Of tokens through the dense model or that of a branch, with its head, forward: less
        arithmetic takes that much less time."""
        blocks = self._token * self._flops(branch) / self._flops()
        return tokens * (self._rates.head_seconds + blocks)

    def _trained(self, tokens: float, branch: Branch | None) -> float:
        """Of tokens forward in the precision that recovery trains in."""
        if autocast_of(self.layout) is not None:
            return self._passing(tokens, branch)
        head = self._head_flops / self._rates.float32
        return tokens * (head + self._streamed_token * self._flops(branch) / self._flops())

    def _decoding(self, tokens: float, branch: Branch | None = None) -> float:
        """Of tokens that follow one another, each through the model by itself."""
        blocks = len(self._plan.blocks) * self._rates.lone_seconds
        return tokens * blocks * self._flops(branch) / (self._flops() - self._head_flops)

    @property
    def _head_flops(self) -> int:
        """Per token, from the hidden state to the logits."""
        text = self._meta.config.get_text_config(decoder=True)
        return 2 * int(text.hidden_size) * int(text.vocab_size)

    def _flops(self, branch: Branch | None = None) -> float:
        """Per token of the model of a branch, or of the dense one."""
        return self.flops[(branch or self.layout.branches[0]).label]

    def _timing(self, branch: Branch | None) -> float:
        """Of a model's turns beside the dense model's, one of each in a process that measures
        memory, where nothing is repeated."""
        spec = self.layout.config.speed
        turns = (spec.warmup + spec.repeats) * sum(spec.batch_sizes) + max(spec.batch_sizes)
        read, written = turns * spec.prompt_tokens, turns * spec.new_tokens
        assert branch is not None
        models = (branch,) if branch.variant is None else (None, branch)
        loading = OPENING_SECONDS * len(models) * (spec.load_repeats + 1)
        return loading + sum(self._passing(read, m) + self._decoding(written, m) for m in models)

    def _checking(self, branch: Branch | None) -> float:
        """Of what was saved, in a process of its own."""
        from foldstack.compression.checkpoints.checkpoint import PROBE_TOKENS
        from foldstack.compression.checkpoints.reload_check import GREEDY_TOKENS

        decoded = PROBE_TOKENS / 2 + GREEDY_TOKENS
        return self._rates.fresh_seconds + OPENING_SECONDS + self._decoding(decoded, branch)

    def _of_method(self, branch: Branch | None) -> float:
        """Of a method's own work: closed forms, sums, and passes over the calibration windows."""
        assert branch is not None
        assert branch.variant is not None
        work = branch.variant.method.arithmetic(self._meta, self._calibration)
        blocks = self._streamed_token if work.streams else self._token
        token = work.passes * blocks + work.heads * self._rates.head_seconds
        products = GRAM_FACTOR * work.products / self._rates.float32
        return work.float64 / self._rates.float64 + products + token * self._calibration

    @property
    def hidden_size(self) -> int:
        """Of the dense model."""
        return int(self._meta.config.get_text_config(decoder=True).hidden_size)

    def streams_of(self, stage: Stage) -> int:
        """Models whose hidden states a stage takes from block to block."""
        branch = self._owners.get(stage.fingerprint)
        if stage.stage != "compress_model" or branch is None or branch.variant is None:
            return 1
        return branch.variant.method.arithmetic(self._meta, self._calibration).streams

    @cached_property
    def _calibration(self) -> int:
        """Tokens."""
        chosen = self.layout.config.calibration
        return chosen.num_windows * chosen.window_tokens

    @cached_property
    def _evaluated_tokens(self) -> int:
        """Of the perplexity and, by a guess, of the benchmarks."""
        from foldstack.compression.text.corpus import documents

        evaluation = self.layout.config.evaluation
        tokens = evaluation.perplexity.protocol.max_tokens
        if (written := self.layout.evaluation_windows) is not None:
            tokens = written.windows.num_windows * written.windows.window_tokens
        elif not tokens:
            texts = documents(evaluation.perplexity.source)
            tokens = sum(map(len, texts)) // CHARACTERS_PER_TOKEN
        return tokens + _tokens_of_items(evaluation.limits)

    def _track_tokens(self, stage: EvaluateTrack) -> int:
        """Of all texts and items, however early a verdict may be known."""
        from foldstack.compression.text.corpus import documents

        tokens = _tokens_of_items(stage.track.limits) * len(stage.track.seeds)
        for text in stage.track.texts.values():
            length = sum(map(len, documents(text.source))) // CHARACTERS_PER_TOKEN
            tokens += text.protocol.max_tokens or length
        return tokens

    @cached_property
    def _owners(self) -> dict[str, Branch]:
        return {s.fingerprint: b for b in self.layout.branches for s in b.stages.values()}

    @property
    def _token(self) -> float:
        """Seconds of a token in all blocks of the dense model."""
        return len(self._plan.blocks) * self._rates.block_seconds

    @property
    def _streamed_token(self) -> float:
        """The same, streamed."""
        return len(self._plan.blocks) * self._rates.stream_block_seconds

    @cached_property
    def _plan(self) -> "Plan":
        from foldstack.compression.structure.surgery import plan_of

        return plan_of(self._meta)

    @cached_property
    def _meta(self) -> "PreTrainedModel":
        from foldstack.compression.structure.surgery import build_on_meta

        return build_on_meta(self.layout.model_config())

    @cached_property
    def _rates(self) -> Rates:
        if self.described is not None:
            return self.described(self._meta, self.layout)
        from foldstack.tasks.environment.execution import torch_dtype

        dtype = torch_dtype(self.layout.config.model.dtype) or stored_dtype(self._meta)
        threads = self.layout.shards[0].execution.threads
        tokens = self.layout.config.calibration.window_tokens
        return measure_rates(self._meta.config, dtype, tokens, threads)


def _tokens_of_items(limits: Mapping[str, int | None]) -> int:
    return TOKENS_PER_ITEM * sum(WHOLE_BENCHMARK if n is None else n for n in limits.values())
