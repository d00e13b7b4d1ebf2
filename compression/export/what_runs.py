"""What runs a model folder, with the command for each program: the table of its card."""

from foldstack.compression.checkpoints.model_card import Program
from foldstack.compression.export.forms import (
    MLX_CODE,
    Form,
    why_multiplied_out,
    why_no_gguf,
    why_no_stock,
)
from foldstack.compression.structure.plan import Plan

UNCHECKED = "unchecked; `foldstack export {name} --to {target}` compares"
BY_EXPORT = "unchecked; the export compares"


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
        _in_llama_cpp(plan),
        _in_mlx(plan),
    )


def _in_llama_cpp(plan: Plan) -> Program:
    if (reason := why_no_gguf(plan)) is not None:
        return Program("llama.cpp", "", f"no: {reason}")
    what = Form.of("gguf").why_not_kept(plan)
    state = BY_EXPORT
    if why_no_stock(plan) is not None:
        state += f"; larger there, where several layers stand for {what}"
    elif what is not None:
        state += f"; larger there, since {what} are multiplied out"
    command = "`foldstack export {name} --to gguf`, `llama-cli -m exports/.../{name}.gguf`"
    return Program("llama.cpp", command, state)


def _in_mlx(plan: Plan) -> Program:
    is_theirs = why_no_stock(plan) is None and why_multiplied_out(plan) is None
    flag = "" if is_theirs else " --trust-remote-code"
    state = BY_EXPORT if is_theirs else f"{BY_EXPORT}; it runs a file of ours, {MLX_CODE}"
    run = f"mlx_lm.generate --model exports/{{name}}-mlx{flag}"
    return Program("mlx-lm", f"`foldstack export {{name}} --to mlx`, `{run}`", state)
