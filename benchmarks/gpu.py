"""Llama-2-shaped random models on one GPU: statistics, closed forms, throughput once compressed.

One command for a machine that is there for minutes: every figure is printed and written to a JSON
file as soon as it is known, a phase that fails is recorded and the next one begins, and no phase
begins after `--seconds`. Statistics of every kind that methods need and MoDeGPT run as a user's
would, with the weights of the blocks in host memory and one block at a time on the GPU. Times stand
beside their floors: the arithmetic alone at the rate of a large matrix product in that precision.

    python benchmarks/gpu.py [--shape 7b|13b|tiny] [--seconds 420] [--out gpu.json] [--json]
    python benchmarks/gpu.py --dry-run   # all but throughput, tiny and on the CPU
"""

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from foldstack.compression.closed_forms.inner_pairs import leverage_scores, refitted
from foldstack.compression.closed_forms.low_rank import whitened_svd
from foldstack.compression.evaluation.generation import generate_greedily
from foldstack.compression.methods import METHODS
from foldstack.compression.methods.factoring.svd_llm import SvdLlm
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.narrowing.modegpt import MoDeGpt
from foldstack.compression.statistics.block_residency import run_blocks_in_turn
from foldstack.compression.statistics.gathering import KINDS, Statistics, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.size import count_parameters, size_of, sparsity_between
from foldstack.compression.structure.surgery import build_on_meta, config_for, cut

SIZES = {
    "tiny": (128, 344, 4, 4, 512),
    "7b": (4096, 11008, 32, 32, 32_000),
    "13b": (5120, 13824, 40, 40, 32_000),
}
"""Hidden size, MLP width, blocks, heads, vocabulary."""
SPARSITY = 0.3
NEW_TOKENS, REPEATS = 24, 2
HOST_BYTES = 48 << 30
"""What hidden states may take of host memory."""
WIDTHS = {
    "modegpt": ("mlp_multiple", "head_multiple"),
    "svd_llm": ("rank_multiple",),
    "basis_sharing": ("rank_multiple",),
    "shortgpt": (),
}
"""The settings of a method that keep widths good ones."""


class Report:
    """Figures by name, printed and written as they come."""

    def __init__(self, out: Path, device: torch.device, seconds: float, quiet: bool) -> None:
        self.out, self.device, self.quiet = out, device, quiet
        self.figures: dict[str, Any] = {}
        self._stop = time.perf_counter() + seconds

    def add(self, name: str, value: Any) -> None:
        self.figures[name] = value
        if not self.quiet:
            shown = f"{value:,.4g}" if isinstance(value, float) else value
            print(f"{name:<52} {shown}", flush=True)
        self.out.write_text(json.dumps(self.figures, indent=1) + "\n")

    @property
    def is_late(self) -> bool:
        return time.perf_counter() > self._stop

    def phase(self, name: str, run: Callable[[], None]) -> None:
        """Run unless it is late; a failure becomes a figure."""
        if self.is_late:
            self.add(f"{name}.skipped", "no time left")
            return
        started = now(self.device)
        try:
            run()
        except Exception as error:  # the others shall still run
            traceback.print_exc()
            self.add(f"{name}.error", f"{type(error).__name__}: {str(error)[:300]}")
        self.add(f"{name}.phase_seconds", now(self.device) - started)

    @property
    def failed(self) -> bool:
        return any(name.endswith(".error") for name in self.figures)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Median after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        started = now(device)
        call()
        times.append(now(device) - started)
    return statistics.median(times)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def llama(shape: str) -> LlamaConfig:
    hidden, inner, blocks, heads, vocabulary = SIZES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )


def random_model(config: Any, device: torch.device | str, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, drawn where they are to be."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def rates(report: Report) -> None:
    """FLOPs per second of large matrix products, and bytes per second of copies."""
    device = report.device
    is_gpu = device.type == "cuda"
    for dtype, n in ((torch.bfloat16, 8192), (torch.float32, 8192), (torch.float64, 8192)):
        n = n if is_gpu else 256
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        took = seconds_of(lambda a=a, b=b: a @ b, device)
        report.add(f"rate.{str(dtype)[6:]}_tflops", 2 * n**3 / took / 1e12)
    block = torch.randn(1 << (26 if is_gpu else 16))
    report.add("rate.to_device_gb_per_second", block.nbytes / 1e9
               / seconds_of(lambda: block.to(device, copy=True), device))  # fmt: skip


def correctness(report: Report) -> None:
    """float32 on the CPU against the device with blocks in turn: statistics, and what comes of
    them."""
    config = llama("tiny")
    config.num_key_value_heads = 2
    on_cpu = random_model(config, "cpu", torch.float32)
    on_device = random_model(config, "cpu", torch.float32)
    on_device.load_state_dict(on_cpu.state_dict())
    run_blocks_in_turn(on_device, report.device)
    windows = torch.randint(config.vocab_size, (16, 64), generator=torch.Generator().manual_seed(1))
    found = [gather(model, windows, KINDS) for model in (on_cpu, on_device)]
    worst = max(
        float((found[1].gram(*key) - found[0].gram(*key)).norm() / found[0].gram(*key).norm())
        for key in found[0].grams
    )
    report.add("correct.gram_relative_difference", worst)
    apart = float((found[1].similarity - found[0].similarity).abs().max())
    report.add("correct.similarity_difference", apart)
    for method in (MoDeGpt(sparsity=SPARSITY), SvdLlm(sparsity=SPARSITY)):
        logits = []
        for model, sums in zip((on_cpu, on_device), found, strict=True):
            evidence = Evidence(windows, sums, rank_blocks(sums))
            smaller = cut(model, method.compress(model, evidence)).to(report.device)
            logits.append(smaller(windows[:2].to(report.device)).logits.cpu())
        name = f"correct.{method.name}_logits_relative_difference"
        report.add(name, float((logits[1] - logits[0]).norm() / logits[0].norm()))
    assert worst < 1e-4, "statistics differ"
    assert apart < 1e-4, "similarities differ"


class Compression:
    """Statistics of all kinds and MoDeGPT on a model whose blocks are in host memory."""

    def __init__(self, report: Report, shape: str, num_windows: int, window_tokens: int) -> None:
        self.report, self.device = report, report.device
        self.config = llama(shape)
        generator = torch.Generator().manual_seed(2)
        self.windows = torch.randint(
            self.config.vocab_size, (num_windows, window_tokens), generator=generator
        )
        self.statistics: Statistics | None = None

    def rate(self, dtype: str) -> float:
        return float(self.report.figures[f"rate.{dtype}_tflops"]) * 1e12

    def build(self) -> None:
        started = now(self.device)
        # A CPU computes in float32 whatever a model is stored in.
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = random_model(self.config, self.device, dtype)
        run_blocks_in_turn(self.model, self.device)
        reset_peak(self.device)
        self.report.add("model.parameters", count_parameters(self.model))
        self.report.add("model.build_seconds", now(self.device) - started)

    def gather(self) -> None:
        reset_peak(self.device)
        started = now(self.device)
        passed: list[float] = []

        def progress(_what: str, done: int, total: int) -> None:
            passed.append(now(self.device) - started)
            if done % 4 == 0 or done == total:
                print(f"  block {done} of {total} after {passed[-1]:.1f} s", flush=True)

        quiet = (
            (lambda *_: passed.append(now(self.device) - started)) if self.report.quiet else None
        )
        self.statistics = gather(
            self.model, self.windows, KINDS,
            batch_size=8, progress=quiet or progress, memory_bytes=HOST_BYTES,
        )  # fmt: skip
        took, floors = now(self.device) - started, self.floors()
        self.report.add("statistics.tokens", self.windows.numel())
        self.report.add("statistics.blocks_seconds", passed[-1])
        self.report.add("statistics.similarity_seconds", took - passed[-1])
        self.report.add("statistics.seconds", took)
        for name, floor in floors.items():
            self.report.add(f"statistics.floor_{name}_seconds", floor)
        self.report.add("statistics.over_floor", took / sum(floors.values()))
        self.report.add("statistics.peak_device_gib", peak_gib(self.device))
        self._check_gram()

    def _check_gram(self) -> None:
        """A diagonal block of the first Gram against float64 sums over the same inputs."""
        assert self.statistics is not None
        model, total = self.model, 0.0
        layer = model.model.layers[0]
        for tokens in self.windows.split(8):
            embedded = model.model.embed_tokens(tokens.to(self.device))
            norm = layer.input_layernorm.weight.to(self.device)
            x = (
                torch.nn.functional.rms_norm(
                    embedded.float(), norm.shape, eps=self.config.rms_norm_eps
                ).to(embedded.dtype)
                * norm
            )
            rows = x.flatten(0, 1)[:, :256].double()
            total = total + rows.T @ rows
        found = self.statistics.gram(0, "attention_input")[:256, :256].to(self.device)
        apart = float((found - total).norm() / total.norm())
        self.report.add("correct.gram_bfloat16_relative_difference", apart)
        assert apart < 1e-4, "Grams of bfloat16 inputs differ"

    def floors(self) -> dict[str, float]:
        """Seconds of the arithmetic of a pass in bfloat16: forward, and Grams (a triangle).

        Scores of causal attention are counted; norms, activations and sums are not.
        """
        config, tokens = self.config, self.windows.numel()
        hidden, inner = config.hidden_size, config.intermediate_size
        weights = 4 * hidden**2 + 3 * hidden * inner
        scores = 2 * hidden * self.windows.shape[1]
        blocks = config.num_hidden_layers
        grams = tokens * (3 * hidden**2 + inner**2) * blocks
        forward = tokens * (2 * weights + scores) * blocks
        return {
            "forward": forward / self.rate("bfloat16"),
            "grams": grams / self.rate("bfloat16"),
        }

    def compress(self) -> None:
        assert self.statistics is not None, "there are no statistics"
        reset_peak(self.device)
        started = now(self.device)
        evidence = Evidence(self.windows, self.statistics, rank_blocks(self.statistics))
        decided = MoDeGpt(sparsity=SPARSITY).compress(self.model, evidence)
        closed_forms = now(self.device) - started
        smaller = cut(self.model, decided)
        took = now(self.device) - started
        realised = sparsity_between(size_of(self.model), size_of(smaller))
        floor = self.compress_floor()
        self.report.add("modegpt.realised_sparsity", realised)
        self.report.add("modegpt.closed_forms_seconds", closed_forms)
        self.report.add("modegpt.seconds", took)
        self.report.add("modegpt.floor_seconds", floor)
        self.report.add("modegpt.over_floor", took / floor)
        self.report.add("modegpt.peak_device_gib", peak_gib(self.device))
        total = took + float(self.report.figures["statistics.seconds"])
        self.report.add("modegpt.with_statistics_minutes", total / 60)

    def compress_floor(self) -> float:
        """Seconds of the float64 arithmetic that the closed forms cannot do without.

        A Cholesky factor and its inverse's diagonal of the MLP's Gram (n^3), the factor and the
        solution of the fit on the kept channels, and the energies W G W^T of queries and keys.
        """
        n, d = self.config.intermediate_size, self.config.hidden_size
        k = (1 - SPARSITY) * n
        of_block = n**3 + k**3 / 3 + 2 * k**2 * d + 2 * k * (n - k) * d + 4 * d**3
        return self.config.num_hidden_layers * of_block / self.rate("float64")

    def decompose(self) -> None:
        """Seconds of single closed forms on the first block, and of what they consist of."""
        assert self.statistics is not None, "there are no statistics"
        mlp = self.model.model.layers[0].mlp
        square = self.model.model.layers[0].self_attn.q_proj.weight.to(self.device)
        up, down = (m.weight.to(self.device) for m in (mlp.up_proj, mlp.down_proj))
        narrow, wide = (
            self.statistics.gram(0, reads).to(self.device) for reads in ("mlp_input", "mlp_output")
        )
        kept = torch.arange(round(len(wide) * (1 - SPARSITY)), device=self.device)
        sides = {"square": (square, narrow), "up": (up, narrow), "down": (down, wide)}
        forms: dict[str, Callable[[], Any]] = {
            "leverage_scores": lambda: leverage_scores(wide, 0.01),
            "refitted": lambda: refitted(down, wide, kept),
            "cholesky_float64": lambda: torch.linalg.cholesky_ex(wide + wide.trace() / len(wide)
                * torch.eye(len(wide), device=wide.device, dtype=wide.dtype)),
            **{
                f"whitened_svd_{name}_{kind}": lambda w=w, gram=gram, ranks=ranks: (
                    whitened_svd(w, gram, ranks)
                )
                for name, (w, gram) in sides.items()
                for kind, ranks in (("whole", ()), ("cut", (len(narrow) // 3,)))
            },
            "eigh_float64": lambda: torch.linalg.eigh(narrow),
            "eigh_float32": lambda: torch.linalg.eigh(narrow.float()),
        }  # fmt: skip
        for name, form in forms.items():
            self.report.add(f"decomposition.{name}_seconds", seconds_of(form, self.device, 1))


def kernels(report: Report) -> None:
    """What widths do to single products and to attention."""
    device, is_gpu = report.device, report.device.type == "cuda"
    tokens, hidden = (16_384, 4096) if is_gpu else (64, 64)
    for rank in (1433, 1434, 1436, 1440, 1408, 1472):
        x = torch.randn(tokens, rank, device=device, dtype=torch.bfloat16)
        weight = torch.randn(hidden, rank, device=device, dtype=torch.bfloat16)
        took = seconds_of(lambda x=x, weight=weight: x @ weight.T, device)
        report.add(f"kernels.rank_{rank}_tflops", 2 * tokens * rank * hidden / took / 1e12)
    shape = (1, 32, 2048) if is_gpu else (1, 2, 32)
    for qk, v in ((128, 128), (96, 96), (110, 110), (110, 90), (112, 88)):
        q, k, values = (
            torch.randn(*shape, width, device=device, dtype=torch.bfloat16) for width in (qk, qk, v)
        )
        wide = pad(values, (0, qk - v))
        for name, value in (("as_is", values), ("one_width", wide)):
            took = seconds_of(
                lambda q=q, k=k, value=value: scaled_dot_product_attention(
                    q, k, value, is_causal=True
                ),
                device,
            )
            report.add(f"kernels.attention_{qk}_{v}_{name}_ms", took * 1e3)


def variants(config: LlamaConfig) -> Iterator[tuple[str, Any]]:
    """Names and configs of the structures that the methods choose, most telling ones first."""
    meta = build_on_meta(config)
    yield "dense", config
    for sparsity in (0.3, 0.5):
        for multiple in (64, 1):
            for name, settings in WIDTHS.items():
                if multiple > 1 and not settings:
                    continue
                steps = {s: 16 if s == "head_multiple" else multiple for s in settings}
                method = METHODS[name](
                    sparsity=sparsity, **(steps if multiple > 1 else dict.fromkeys(settings, 1))
                )
                suffix = f"_x{multiple}" if settings else ""
                yield f"{name}_{sparsity}{suffix}", config_for(config, method.outline(meta))


def throughput(report: Report, config: LlamaConfig) -> None:
    """Tokens per second of structures with random weights, and what a step of decoding consists
    of."""
    for name, structure in variants(config):
        if report.is_late:
            report.add(f"throughput.{name}.skipped", "no time left")
            continue
        reset_peak(report.device)
        model = random_model(structure, report.device, torch.bfloat16)
        report.add(f"throughput.{name}.parameters", count_parameters(model))
        for batch_size, prompt_tokens in ((1, 2048), (32, 512)):
            if report.device.type == "cpu":
                prompt_tokens = 32
            prompt = torch.randint(
                config.vocab_size, (batch_size, prompt_tokens), device=report.device
            )
            place = f"throughput.{name}.batch_{batch_size}"
            eager(report, place, model, prompt)
            report.phase(
                f"{place}.graph", lambda m=model, p=prompt, at=place: graph(report, at, m, p)
            )
        report.add(f"throughput.{name}.peak_gib", peak_gib(report.device))
        del model


def eager(report: Report, place: str, model: PreTrainedModel, prompt: Tensor) -> None:
    """As `generate` runs it: one launch after another from Python."""
    turns = [generate_greedily(model, prompt, NEW_TOKENS) for _ in range(1 + REPEATS)][1:]
    prefill = statistics.median(turn.prefill for turn in turns)
    decode = statistics.median(turn.decode for turn in turns)
    report.add(f"{place}.prefill_tokens_per_second", prompt.numel() / prefill)
    rate = len(prompt) * (NEW_TOKENS - 1) / decode
    report.add(f"{place}.decode_tokens_per_second", rate)


@torch.inference_mode()
def graph(report: Report, place: str, model: PreTrainedModel, prompt: Tensor) -> None:
    """One step of decoding as a graph on a static cache: the device's own time, without launches
    from Python; and how many kernels it is."""
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + 4 * NEW_TOKENS)
    output = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)

    def step() -> None:
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))

    step()
    captures = not any(name.endswith(".graph.error") for name in report.figures)
    if report.device.type != "cuda" or not captures:
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    launched = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    report.add(f"{place}.decode_kernels", len(launched))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    took = seconds_of(captured.replay, report.device, NEW_TOKENS)
    report.add(f"{place}.graph_decode_tokens_per_second", len(prompt) / took)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SIZES), default="7b")
    parser.add_argument("--seconds", type=float, default=420, help="no phase begins after these")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--window-tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--no-throughput", action="store_true")
    parser.add_argument(
        "--dry-run", action="store_true", help="all but throughput, tiny and on the CPU"
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.dry_run:
        device, arguments.shape = torch.device("cpu"), "tiny"
        arguments.windows, arguments.window_tokens, arguments.no_throughput = 16, 64, True
    report = Report(arguments.out, device, arguments.seconds, arguments.json)
    report.add("torch", torch.__version__)
    report.add("transformers", transformers.__version__)
    report.add("device", torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    report.add("shape", arguments.shape)
    work = Compression(report, arguments.shape, arguments.windows, arguments.window_tokens)
    report.phase("rate", lambda: rates(report))
    with torch.no_grad():
        report.phase("correct", lambda: correctness(report))
        report.phase("model", work.build)
        report.phase("statistics", work.gather)
        report.phase("modegpt", work.compress)
        report.phase("kernels", lambda: kernels(report))
        report.phase("decomposition", work.decompose)
        del work
        if not arguments.no_throughput:
            report.phase("throughput", lambda: throughput(report, llama(arguments.shape)))
    if arguments.json:
        print(json.dumps(report.figures, indent=1))
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())
