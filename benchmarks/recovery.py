"""Speed of recovery, with and without a teacher, against what its arithmetic alone would take.

The floor: a trained token costs 6 FLOPs per weight of the student (2 forward, 4 backward) and 2 per
weight of the teacher, at the rate that this machine multiplies matrices of the model's own shapes.
Weights are those that multiply: linears of the blocks and the output projection.

    python benchmarks/recovery.py [--json] [--model FOLDER] [--repeats 3]
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


def random_model() -> PreTrainedModel:
    """The reference model's structure with random weights: 12 blocks, 4 M parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=344,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
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
    student: PreTrainedModel, teacher: PreTrainedModel, precision: str, distillation: float
) -> float:
    """Time of a trained token, after one run to warm up."""
    settings = Recovery(
        steps=STEPS,
        batch_size=BATCH_SIZE,
        precision=precision,
        distillation=distillation,
        learning_rate=1e-5,
        norm_learning_rate=1e-5,
    )
    vocab_size = student.config.vocab_size
    windows = torch.randint(0, vocab_size, (BATCH_SIZE * STEPS, WINDOW_TOKENS))
    result = recover(copy.deepcopy(student), windows, settings, teacher=teacher)
    return result.seconds / result.tokens


def measure(teacher: PreTrainedModel, repeats: int) -> dict[str, float | str]:
    student = without_quarter(teacher)
    student_weights, teacher_weights = map(multiplying_weights, (student, teacher))
    figures: dict[str, float | str] = {
        "student_weights": student_weights,
        "teacher_weights": teacher_weights,
        "auto": str(autocast_dtype("auto", next(teacher.parameters()).device) or torch.float32),
    }
    cases = [(p, d) for p in ("float32", "bfloat16") for d in (0.0, 0.5)]
    seconds: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    rates: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for repeat in range(repeats + 1):  # the first warms up; cases take turns, so load hits all
        for precision, rate in rates.items():
            rate.append(matmul_rate(student, getattr(torch, precision)))
        for case in cases:
            took = seconds_per_token(student, teacher, *case)
            if repeat:
                seconds[case].append(took)
    for (precision, distillation), times in seconds.items():
        name = f"{precision}_{'distilled' if distillation else 'plain'}"
        flops = 6 * student_weights + (2 * teacher_weights if distillation else 0)
        rate = statistics.median(rates[precision])
        figures[f"{precision}_matmul_gflops"] = rate / 1e9
        figures[f"{name}_tokens_per_second"] = 1 / statistics.median(times)
        figures[f"{name}_spread"] = (max(times) - min(times)) / statistics.median(times)
        figures[f"{name}_time_over_floor"] = statistics.median(times) / (flops / rate)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--model", type=Path, help="a model folder; a random model without it")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("foldstack").setLevel(logging.ERROR)  # random tokens teach nothing
    teacher = load_model(arguments.model) if arguments.model else random_model()
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
