"""A model as a folder for mlx-lm: of its own class of the family, or with code of ours."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.export.block_configs import (
    both_ropes,
    mlp_widths,
    why_not_openelm,
    write_folder,
    write_openelm,
)
from foldstack.compression.export.forms import (
    MLX_CODE,
    MLX_FAMILIES,
    OPENELM_FAMILIES,
    why_multiplied_out,
    why_no_stock,
)
from foldstack.compression.export.multiplied_out import multiplied_out
from foldstack.compression.structure.architectures import architecture_of, base_config_of, stock_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters
from foldstack.compression.structure.surgery import plan_of

_ACTIVATIONS = ("silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh")
"""Those that the code of ours computes."""


def write_mlx(model: PreTrainedModel, folder: Path, out: Path) -> tuple[str, int]:
    """Write the model for mlx-lm; returns the class that it loads and its parameters.

    It is mlx-lm's own class of the family where that expresses the structure and no larger, or
    OpenELM's where MLPs have widths of their own. Else the folder brings a file of ours, which
    mlx-lm runs where it is told to trust it, and keeps the structure as it is.

    Raises:
        InputError: neither mlx-lm nor the file of ours computes what the model does.
    """
    plan = plan_of(model)
    is_smaller = (why_no_stock(plan) or why_multiplied_out(plan)) is not None
    if plan.base_model_type in MLX_FAMILIES and not is_smaller:
        written = _of_a_class_of_theirs(model, plan, folder, out)
        if written is not None:
            return written
    return _with_code(model, plan, folder, out)


def _of_a_class_of_theirs(
    model: PreTrainedModel, plan: Plan, folder: Path, out: Path
) -> tuple[str, int] | None:
    """Written for a class of mlx-lm's; None where it has none that stores as little.

    Rotary settings are written in both spellings: mlx-lm reads the older one for most families, and
    takes its own base where it finds none.
    """
    if _differs_in_theirs(base_config_of(model.config)):
        return None
    stock = multiplied_out(model)
    config: Any = stock.config
    full = getattr(config, architecture_of(config).mlp_width_entry) or 4 * config.hidden_size
    if len(widths := set(mlp_widths(plan, full))) > 1:
        fits = plan.base_model_type in OPENELM_FAMILIES and why_not_openelm(stock) is None
        return write_openelm(model, folder, out) if fits and 0 not in widths else None
    if count_parameters(stock) > count_parameters(model):
        return None
    entries = config.to_dict() | {"architectures": [type(stock).__name__]} | _ropes(config)
    tensors = stock.state_dict()
    if plan.base_model_type == "gpt2":  # read as it is on the hub
        entries["n_ctx"] = config.n_positions
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return type(stock).__name__, write_folder(stock, tensors, entries, folder, out)


def _differs_in_theirs(config: Any) -> bool:
    """Whether mlx-lm's class of a family would compute something else, without a word."""
    family, rope = config.model_type, getattr(config, "rope_parameters", None) or {}
    if family == "gpt2":
        is_wide = config.n_inner not in (None, 4 * config.n_embd)
        return is_wide or config.activation_function != "gelu_new"
    kinds = getattr(config, "layer_types", None)
    has_windows = "sliding_attention" in kinds if kinds else bool(_window(config))
    if family == "gemma3_text":  # the one with windows; it counts which blocks have them
        return _pattern(list(kinds or ())) is None or bool(config.final_logit_softcapping)
    is_gemma = family.startswith("gemma")
    activation = config.hidden_activation if family == "gemma2" else config.hidden_act
    return (
        (has_windows and _window(config) < config.max_position_embeddings)
        or activation not in (("gelu_pytorch_tanh",) if is_gemma else ("silu", "swish"))
        or rope.get("rope_type") == "longrope"  # theirs has the frequencies of long texts alone
    )


def _window(config: Any) -> int:
    """The tokens of a sliding window; 0 without."""
    return getattr(config, "sliding_window", None) or 0


def _ropes(config: Any) -> dict[str, Any]:
    """The rotary settings under the names that mlx-lm's classes read."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" not in rope:
        partial = {n: rope[n] for n in ("partial_rotary_factor",) if n in rope}
        return both_ropes(config) | partial if rope else {}
    full = dict(rope["full_attention"])
    return {
        "rope_theta": full.pop("rope_theta"),
        "rope_scaling": None if full.get("rope_type", "default") == "default" else full,
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "sliding_window_pattern": _pattern(list(config.layer_types)),
    }


def _pattern(kinds: list[str]) -> int | None:
    """Every how many blocks of a Gemma 3 one attends to everything, which is what mlx-lm counts by;
    None where blocks were removed and they no longer lie so."""
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    counted = [
        "sliding_attention" if (place + 1) % every else "full_attention"
        for place in range(len(kinds))
    ]
    return every if kinds == counted else None


def _with_code(model: PreTrainedModel, plan: Plan, folder: Path, out: Path) -> tuple[str, int]:
    config: Any = base_config_of(model.config)
    if (reason := _why_not_code(config, plan)) is not None:
        raise InputError(f"mlx-lm has no class for this model, and {MLX_CODE} none: {reason}")
    entries = config.to_dict() | {
        "architectures": ["Model"],
        "model_type": "foldstack",
        "model_file": MLX_CODE,
        "base_model_type": plan.base_model_type,
        "blocks_path": architecture_of(model).blocks_path,
        "plan": plan.model_dump(mode="json"),
        "rotary": _rotary(stock_of(model), config),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }
    parameters = write_folder(model, _tensors(model, config), entries, folder, out)
    shutil.copyfile(Path(__file__).with_name(MLX_CODE), out / MLX_CODE)
    return f"Model of {MLX_CODE}", parameters


def _why_not_code(config: Any, plan: Plan) -> str | None:
    """What of a model the file of ours does not compute, in words."""
    names = ("hidden_activation", "hidden_act", "activation_function")
    activation = next(a for name in names if (a := getattr(config, name, None)) is not None)
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [ropes, *(entry for entry in ropes.values() if isinstance(entry, dict))]
    is_opt = plan.base_model_type == "opt"
    reasons = {
        f"its activation is {activation}": activation not in _ACTIVATIONS,
        "its rotary frequencies change with the length of the text": any(
            kind.get("rope_type") == "dynamic" for kind in kinds
        ),
        "its attention looks ahead": bool(getattr(config, "use_bidirectional_attention", False)),
        "an OPT's norms come first and its embeddings are as wide as its blocks": is_opt
        and not (
            config.do_layer_norm_before
            and config.layer_norm_elementwise_affine
            and not config._remove_final_layer_norm
            and config.word_embed_proj_dim == config.hidden_size
        ),
        "none of its blocks attends, and its positions are counted by their caches": (
            not ropes and not any(_attends(plan, position) for position in range(len(plan.blocks)))
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _attends(plan: Plan, position: int) -> bool:
    heads = plan.blocks[plan.owner(position)].narrow_heads
    return plan.blocks[position].has_attention and (heads is None or heads.attends)


def _rotary(stock: nn.Module, config: Any) -> dict[str, Any]:
    """The frequencies of a stock model's rotary positions, by kind of attention; made anew, since
    the model's own may be those of a long text."""
    rotary = [m for name, m in stock.named_modules() if name.endswith("rotary_emb")]
    if not rotary:
        return {}
    made: Any = type(rotary[0])(config)
    kinds = getattr(made, "layer_types", None)
    if kinds is None:
        return {"full_attention": _frequencies(made, "", made.rope_type)}
    return {kind: _frequencies(made, f"{kind}_", made.rope_type[kind]) for kind in kinds}


def _frequencies(rotary: Any, prefix: str, rope_type: str) -> dict[str, Any]:
    found = {
        "frequencies": getattr(rotary, f"{prefix}inv_freq").tolist(),
        "scale": float(getattr(rotary, f"{prefix}attention_scaling")),
    }
    if rope_type == "longrope":
        # Past the length that it was made for, a model has other frequencies.
        last = rotary.config.rope_parameters["original_max_position_embeddings"]
        rotary(torch.zeros(1), torch.tensor([[last]]))
        found["beyond"] = {"tokens": last, "frequencies": rotary.inv_freq.tolist()}
    return found


def _tensors(model: PreTrainedModel, config: Any) -> dict[str, torch.Tensor]:
    """What a portable folder stores, with weights of (out, in) alone, and none that are empty."""
    conv1d = {f"{name}.weight" for name, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    prefix = "" if model.config.model_type == "foldstack" else "model."
    tensors = {
        f"{prefix}{name}": tensor.T if name in conv1d else tensor
        for name, tensor in model.state_dict().items()
        if tensor.numel()
    }
    if config.tie_word_embeddings:
        tensors.pop("model.lm_head.weight", None)
    return tensors
