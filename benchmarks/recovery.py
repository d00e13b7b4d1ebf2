"""Speed of recovery, with and without a teacher, against what its arithmetic alone would take.

The floor: a trained token costs 6 FLOPs per weight of the student (2 forward, 4 backward) and 2 per
weight of the teacher, at the rate that this machine multiplies matrices of the model's own shapes.
Weights are those that multiply: linears of the blocks and the output projection. The products of
attention count too, each query with half of the keys; what is left over both is norms, activations,
rotary embeddings, softmax, adapters and the optimizer. `kept_teacher_saves`: share of the time that
the teacher's kept hidden states save where windows come again, four times here.

    python benchmarks/recovery.py [--json] [--model FOLDER] [--width 192] [--repeats 3]
"""

import argparse
import copy
import json
import logging
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from foldstack.compression.checkpoints.checkpoint import load_model
from foldstack.compression.structure.surgery import Cut, cut, plan_of
from foldstack.compression.training.adapters import linear_names
from foldstack.compression.training.recovery import Recovery, autocast_dtype, recover

BATCH_SIZE, WINDOW_TOKENS, STEPS = 8, 256, 3
RATE_SECONDS = 0.5
REFERENCE_WIDTH = 192


def random_model(width: int) -> PreTrainedModel:
    """The reference model's structure with random weights: 12 blocks, 4 M parameters; wider ones
    have 4 blocks and larger heads."""
    torch.manual_seed(0)
    is_reference = width == REFERENCE_WIDTH
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=344 if is_reference else width * 11 // 4,
        num_hidden_layers=12 if is_reference else 4,
        num_attention_heads=6 if is_reference else width // 64,
        num_key_value_heads=2 if is_reference else width // 128,
        head_dim=32 if is_reference else 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def without_quarter(model: PreTrainedModel) -> PreTrainedModel:
    """The model without a quarter of its blocks, from the middle."""
    plan = plan_of(model)
    num_blocks = len(plan.blocks)
    start = num_blocks // 2
    kept = [p for p in range(num_blocks) if not start <= p < start + num_blocks // 4]
    return cut(model, Cut(plan.keep(kept), tuple(kept)))


def multiplying_weights(model: PreTrainedModel) -> int:
    """Weights that a token is multiplied with on its way through `model`."""
    modules = [model.get_submodule(name) for name in linear_names(model)]
    modules.append(model.get_output_embeddings())
    return sum(module.weight.numel() for module in modules)


def attention_flops(model: PreTrainedModel) -> int:
    """Of a token forward: with half of the window's keys, and as many values."""
    config = model.config
    return (
        2 * config.num_hidden_layers * WINDOW_TOKENS * config.num_attention_heads * head_dim(model)
    )


def head_dim(model: PreTrainedModel) -> int:
    """Coordinates of a head."""
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def matmul_rate(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """FLOPs per second over the shapes of one block's linears, a batch of tokens at a time."""
    device = next(model.parameters()).device
    names = linear_names(model)
    weights = [model.get_submodule(n).weight.detach().to(dtype) for n in names[: len(names) // 2]]
    tokens = BATCH_SIZE * WINDOW_TOKENS
    inputs = [
        torch.randn(tokens, weight.shape[1], dtype=dtype, device=device) for weight in weights
    ]
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < RATE_SECONDS:
        for x, weight in zip(inputs, weights, strict=True):
            torch.nn.functional.linear(x, weight)
            done += 2 * tokens * weight.numel()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return done / elapsed


def seconds_per_token(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    precision: str,
    distillation: float,
    *,
    turns: int = 1,
    keep: bool = True,
) -> float:
    """Time of a trained token, of windows that come `turns` times."""
    settings = Recovery(
        steps=STEPS * turns,
        cache_teacher=keep,
        validation_fraction=0,
        batch_size=BATCH_SIZE,
        precision=precision,
        distillation=distillation,
        learning_rate=1e-5,
        norm_learning_rate=1e-5,
    )
    vocab_size = student.config.vocab_size
    windows = torch.randint(0, vocab_size, (BATCH_SIZE * STEPS, WINDOW_TOKENS))
    model = copy.deepcopy(student)
    started = time.perf_counter()
    result = recover(model, windows, settings, teacher=teacher)
    # What is done once, the teacher's pass among it, counts where windows come again.
    seconds = result.seconds if turns == 1 else time.perf_counter() - started
    return seconds / result.tokens


def measure(teacher: PreTrainedModel, repeats: int) -> dict[str, float | str]:
    student = without_quarter(teacher)
    student_weights, teacher_weights = map(multiplying_weights, (student, teacher))
    figures: dict[str, float | str] = {
        "student_weights": student_weights,
        "teacher_weights": teacher_weights,
        "auto": str(autocast_dtype("auto", next(teacher.parameters()).device) or torch.float32),
    }
    precisions = ["float32"]
    if figures["auto"] == str(torch.bfloat16):  # elsewhere it is many times slower, and never taken
        precisions.append("bfloat16")
    cases = [(p, d) for p in precisions for d in (0.0, 0.5)]
    seconds: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    rates: dict[str, list[float]] = {precision: [] for precision in precisions}
    for repeat in range(repeats + 1):  # the first warms up; cases take turns, so load hits all
        for precision, rate in rates.items():
            rate.append(matmul_rate(student, getattr(torch, precision)))
        for case in cases:
            took = seconds_per_token(student, teacher, *case)
            if repeat:
                seconds[case].append(took)
    for (precision, distillation), times in seconds.items():
        name = f"{precision}_{'distilled' if distillation else 'plain'}"
        flops = 6 * student_weights + 3 * attention_flops(student)
        if distillation:
            flops += 2 * teacher_weights + attention_flops(teacher)
        rate = statistics.median(rates[precision])
        figures[f"{precision}_matmul_gflops"] = rate / 1e9
        figures[f"{name}_tokens_per_second"] = 1 / statistics.median(times)
        figures[f"{name}_spread"] = (max(times) - min(times)) / statistics.median(times)
        figures[f"{name}_time_over_floor"] = statistics.median(times) / (flops / rate)
    anew, kept = (
        seconds_per_token(student, teacher, "float32", 0.5, turns=4, keep=keep)
        for keep in (False, True)
    )
    figures["kept_teacher_saves"] = 1 - kept / anew
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--model", type=Path, help="a model folder; a random model without it")
    parser.add_argument("--width", type=int, default=REFERENCE_WIDTH, help="of the random model")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("foldstack").setLevel(logging.ERROR)  # random tokens teach nothing
    teacher = load_model(arguments.model) if arguments.model else random_model(arguments.width)
    if torch.cuda.is_available():
        teacher.to("cuda")
    figures = measure(teacher, arguments.repeats)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        print(f"{name:40s} {value if isinstance(value, str) else f'{value:,.3f}'}")


if __name__ == "__main__":
    main()
