"""What runs a model folder, with the command for each program: the table of its card."""

from collections.abc import Sequence

from foldstack.compression.checkpoints.model_card import Program
from foldstack.compression.export.forms import (
    GGUF_ARCHITECTURES,
    MLX_FAMILIES,
    Form,
    why_no_stock,
)
from foldstack.compression.structure.plan import Plan

UNCHECKED = "unchecked; `foldstack export {name} --to {target}` compares"


def programs_of(plan: Plan) -> tuple[Program, ...]:
    """Who runs a folder that was compressed to `plan` and loaded by a fresh process."""
    flag = "" if plan.is_native else " --trust-remote-code"
    code = "" if plan.is_native else ", trust_remote_code=True"
    load = f'`AutoModelForCausalLM.from_pretrained("{{name}}"{code})`'
    return (
        Program("transformers", load, "checked: the same logits in a fresh process"),
        Program("vLLM", f"`vllm serve {{name}}{flag}`", UNCHECKED.replace("{target}", "vllm")),
        Program(
            "SGLang", f"`python -m sglang.launch_server --model-path {{name}}{flag}`", "unchecked"
        ),
        _by_export(
            plan, "llama.cpp", "gguf", GGUF_ARCHITECTURES, "llama-cli -m exports/.../{name}.gguf"
        ),
        _by_export(
            plan, "mlx-lm", "mlx", MLX_FAMILIES, "mlx_lm.generate --model exports/{name}-mlx"
        ),
    )


def _by_export(
    plan: Plan, program: str, target: str, families: Sequence[str] | dict[str, str], run: str
) -> Program:
    family = plan.base_model_type
    reason = why_no_stock(plan)
    if family not in families:
        reason = f"{program} has no {family}, or none is written for it"
    if reason is not None:
        return Program(program, "", f"no: {reason}")
    what = Form.of(target).why_not_kept(plan)
    state = "unchecked; the export compares"
    if what is not None:
        state += f"; larger there, since {what} are multiplied out"
    return Program(program, f"`foldstack export {{name}} --to {target}`, `{run}`", state)
