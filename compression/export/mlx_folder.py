"""A model as a folder that mlx-lm loads with its own class of the family."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.export.block_configs import (
    both_ropes,
    mlp_widths,
    why_not_openelm,
    write_folder,
    write_openelm,
)
from foldstack.compression.export.forms import MLX_FAMILIES, OPENELM_FAMILIES
from foldstack.compression.export.multiplied_out import multiplied_out
from foldstack.compression.structure.surgery import plan_of


def write_mlx(model: PreTrainedModel, folder: Path, out: Path) -> tuple[str, int]:
    """Write the model for mlx-lm; returns the class that it loads and its parameters.

    Where MLPs have widths of their own it is OpenELM's, if that has what the family has; else the
    family's own, multiplied out. Rotary settings are written in both spellings: mlx-lm reads the
    older one for most families, and takes its own base where it finds none.

    Raises:
        InputError: mlx-lm has no such family, or the structure has no stock form.
    """
    plan = plan_of(model)
    if plan.base_model_type not in MLX_FAMILIES:
        raise InputError(f"mlx-lm has no class for {plan.base_model_type}")
    stock = multiplied_out(model)
    config: Any = stock.config
    if plan.base_model_type in OPENELM_FAMILIES and why_not_openelm(stock) is None:
        full = config.intermediate_size
        if len(set(mlp_widths(plan, full))) > 1:
            return write_openelm(model, folder, out)
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = both_ropes(config) if "rope_theta" in rope else {}
    if "full_attention" in rope:
        ropes = _by_kind(config)
    entries = config.to_dict() | {"architectures": [type(stock).__name__]} | ropes
    tensors = dict(stock.state_dict())
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return type(stock).__name__, write_folder(stock, tensors, entries, folder, out)


def _by_kind(config: Any) -> dict[str, Any]:
    """Gemma 3's rotary settings, and which blocks attend to everything: mlx-lm counts them."""
    kinds, rope = list(config.layer_types), config.rope_parameters
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    counted = [
        "sliding_attention" if (place + 1) % every else "full_attention"
        for place in range(len(kinds))
    ]
    if kinds != counted:
        raise InputError(
            "mlx-lm takes every so many blocks of a Gemma 3 for those that attend to everything, "
            "and where blocks were removed they no longer are"
        )
    return {
        "rope_theta": rope["full_attention"]["rope_theta"],
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "sliding_window_pattern": every,
    }
