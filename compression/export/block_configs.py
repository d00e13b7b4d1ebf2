"""Folders whose blocks have widths and heads of their own: `DeciLMForCausalLM` and OpenELM's.

Both describe each block in config.json. `deci` (model type nemotron-nas) is a Llama block or one
without attention, and vLLM, SGLang, mlx-lm and llama.cpp's converter load it; its widths are
multiples of 256. `openelm` has norms on queries and keys and takes any width: mlx-lm loads it, and
llama.cpp (`gguf_file`).
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.checkpoints.tokenizer_files import tokenizer_files
from foldstack.compression.errors import InputError
from foldstack.compression.export import configuration_nemotron_nas
from foldstack.compression.export.forms import DECI_FAMILIES, OPENELM_FAMILIES
from foldstack.compression.export.multiplied_out import multiplied_out
from foldstack.compression.structure.heads import head_sizes
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import plan_of

DECI_STEP = 256
"""Every reader of block_configs rounds widths up to a multiple of it."""


def mlp_widths(plan: Plan, full: int, *, absent: int = 0) -> list[int]:
    """The width of each position's MLP; `full` is the stock one, and an absent one is of `absent`
    channels of zeros, where a reader takes no width of none."""
    owners = [plan.blocks[plan.owner(position)] for position in range(len(plan.blocks))]
    widths = (full if block.mlp_width is None else block.mlp_width for block in owners)
    return [width or absent for width in widths]


def kv_head_counts(plan: Plan, stock: PreTrainedModel, *, absent: bool = True) -> list[int]:
    """Key and value heads of each position; 0 where there is no attention, if a reader takes
    `absent` ones: none does in the first block.

    Args:
        stock: the model multiplied out, where each head stands as often as it is read.
    """
    full = head_sizes(stock).kv_heads
    counts = []
    for position in range(len(plan.blocks)):
        heads = plan.blocks[plan.owner(position)].narrow_heads
        output: Any = stock.get_submodule(f"model.layers.{position}.self_attn.o_proj")
        if heads is not None and not heads.attends and not output.weight.any():
            counts.append(0 if absent and position else 1)
        else:
            counts.append(full if heads is None else heads.kv_heads or full)
    return counts


def write_deci(model: PreTrainedModel, folder: Path, out: Path) -> tuple[str, int]:
    """Write the model as a folder with block_configs; returns the class and its parameters.

    Factored and shared weights are multiplied out, widths rounded up by channels of zeros.

    Raises:
        InputError: the family's blocks are not Llama's, or the structure has no stock form.
    """
    stock = _llama_shaped(model, DECI_FAMILIES, "block_configs (deci)")
    config: Any = stock.config
    heads = config.num_attention_heads
    if (width := head_width(config)) * heads != config.hidden_size:
        raise InputError(
            f"the heads of block_configs (deci) are hidden size / heads wide, and here they are "
            f"{width} and not {config.hidden_size / heads:g}"
        )
    widths = mlp_widths(plan_of(model), config.intermediate_size, absent=1)
    widths = [-(-width // DECI_STEP) * DECI_STEP for width in widths]
    kv_heads = kv_head_counts(plan_of(model), stock)
    blocks = [
        {
            "attention": {
                "no_op": not count, "replace_with_linear": False,
                "n_heads_in_group": heads // count if count else None,
            },
            "ffn": {
                "no_op": False, "replace_with_linear": False,
                "ffn_mult": 1.5 * width / config.hidden_size,
            },
        }
        for width, count in zip(widths, kv_heads, strict=True)
    ]  # fmt: skip
    has_bias = any(name.endswith("q_proj.bias") for name in stock.state_dict())
    entries = config.to_dict() | both_ropes(config) | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_nemotron_nas.NemotronNasConfig"},
        "block_configs": blocks,
        "attention_bias": has_bias,
        "qkv_bias": has_bias,
        "intermediate_size": max(widths),
    }  # fmt: skip
    tensors = dict(of_blocks(stock, widths, kv_heads))
    if has_bias:
        tensors |= _output_biases(tensors)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(configuration_nemotron_nas.__file__, out)
    return "DeciLMForCausalLM", write_folder(stock, tensors, entries, folder, out)


def write_openelm(model: PreTrainedModel, folder: Path, out: Path) -> tuple[str, int]:
    """Write the model as an OpenELM folder for mlx-lm; returns the class and its parameters.

    Raises:
        InputError: the family has biases or scaled rotary frequencies, which OpenELM has not, or
            the structure has no stock form.
    """
    stock = _llama_shaped(model, OPENELM_FAMILIES, "openelm")
    config: Any = stock.config
    if (reason := why_not_openelm(stock)) is not None:
        raise InputError(reason)
    widths = mlp_widths(plan_of(model), config.intermediate_size, absent=1)
    kv_heads = kv_head_counts(plan_of(model), stock, absent=False)
    blocks = len(widths)
    entries = {
        "architectures": ["OpenELMForCausalLM"],
        "model_type": "openelm",
        "head_dim": head_width(config),
        "num_transformer_layers": blocks,
        "model_dim": config.hidden_size,
        "vocab_size": config.vocab_size,
        "ffn_dim_divisor": 1,
        "num_query_heads": [config.num_attention_heads] * blocks,
        "num_kv_heads": kv_heads,
        "ffn_multipliers": [width / config.hidden_size for width in widths],
        "ffn_with_glu": True,
        "normalize_qk_projections": config.model_type == "qwen3",
        "share_input_output_layers": bool(config.tie_word_embeddings),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_freq_constant": config.rope_parameters["rope_theta"],
        "max_context_length": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    tensors = dict(openelm_tensors(stock, widths, kv_heads))
    out.mkdir(parents=True, exist_ok=True)
    return "OpenELMForCausalLM", write_folder(stock, tensors, entries, folder, out)


def why_not_openelm(stock: PreTrainedModel) -> str | None:
    """What a stock model has that OpenELM has not, in words; None where there is nothing."""
    if stock.config.rope_parameters.get("rope_type", "default") != "default":
        return "openelm has no scaled rotary frequencies, and this model's are"
    if any(name.endswith(".bias") for name in stock.state_dict()):
        return "openelm's linears have no biases, and this model's have"
    return None


def openelm_tensors(
    stock: PreTrainedModel, widths: list[int], kv_heads: list[int]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under OpenELM's name: queries, keys and values in one, gate and up in one."""
    state = dict(of_blocks(stock, widths, kv_heads))
    yield "transformer.token_embeddings.weight", state["model.embed_tokens.weight"]
    yield "transformer.norm.weight", state["model.norm.weight"]
    if not stock.config.tie_word_embeddings:
        yield "lm_head.weight", state["lm_head.weight"]
    for position in range(len(widths)):
        theirs, ours = f"transformer.layers.{position}", f"model.layers.{position}"
        qkv = [state[f"{ours}.self_attn.{name}_proj.weight"] for name in "qkv"]
        both = [state[f"{ours}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        yield f"{theirs}.attn.qkv_proj.weight", torch.cat(qkv)
        yield f"{theirs}.ffn.proj_1.weight", torch.cat(both)
        for name, their_name in (
            ("self_attn.o_proj", "attn.out_proj"),
            ("self_attn.q_norm", "attn.q_norm"),
            ("self_attn.k_norm", "attn.k_norm"),
            ("mlp.down_proj", "ffn.proj_2"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            if (tensor := state.get(f"{ours}.{name}.weight")) is not None:
                yield f"{theirs}.{their_name}.weight", tensor


def head_width(config: Any) -> int:
    """Coordinates of a head, which not every family's config has an entry for."""
    width: int | None = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads


def both_ropes(config: Any) -> dict[str, Any]:
    """The rotary settings as they were written before transformers 5, which most engines read."""
    rope = dict(config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope}


def write_folder(
    stock: PreTrainedModel,
    tensors: dict[str, Tensor],
    entries: dict[str, Any],
    tokenizer_from: Path,
    out: Path,
) -> int:
    """Write weights, config.json and the tokenizer; returns the number of parameters."""
    from huggingface_hub import save_torch_state_dict

    out.mkdir(parents=True, exist_ok=True)
    # Copies: a view of rows has its storage written whole, or is refused.
    plain = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    save_torch_state_dict(plain, out)
    (out / "config.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    if stock.generation_config is not None:
        stock.generation_config.save_pretrained(out)
    for file in tokenizer_files(tokenizer_from):
        target = out / file.relative_to(tokenizer_from)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return sum(tensor.numel() for tensor in plain.values() if tensor.is_floating_point())


def _llama_shaped(model: PreTrainedModel, families: tuple[str, ...], what: str) -> PreTrainedModel:
    family = plan_of(model).base_model_type
    if family not in families:
        raise InputError(f"{what} is for {', '.join(families)}, and not for {family}")
    stock = multiplied_out(model)
    config: Any = stock.config
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        raise InputError(f"{what} has no sliding windows, and this model's are of {window} tokens")
    if config.hidden_act not in ("silu", "swish"):
        raise InputError(f"{what} computes silu, and this model {config.hidden_act}")
    return stock


def of_blocks(
    stock: PreTrainedModel, widths: list[int], kv_heads: list[int]
) -> Iterator[tuple[str, Tensor]]:
    """Stock tensors, each MLP cut or filled with zeros to its width, and of each key and value head
    the first of those that stand for it."""
    full = head_sizes(stock).kv_heads
    for name, tensor in stock.state_dict().items():
        if name == "lm_head.weight" and stock.config.tie_word_embeddings:
            continue
        parts = name.split(".")
        if parts[:2] != ["model", "layers"]:
            yield name, tensor
            continue
        width, count = widths[int(parts[2])], kv_heads[int(parts[2])]
        if not count and parts[3] in ("self_attn", "input_layernorm"):
            continue
        dim = 1 if "down_proj" in parts else 0
        if parts[3] == "mlp" and dim < tensor.ndim:
            yield name, _as_wide(tensor, dim, width)
        elif parts[-2] in ("k_proj", "v_proj"):
            heads = tensor.unflatten(0, (full, -1))
            yield name, heads[:: full // count].flatten(0, 1)
        else:
            yield name, tensor


def _as_wide(tensor: Tensor, dim: int, width: int) -> Tensor:
    missing = width - tensor.shape[dim]
    if missing <= 0:
        return tensor.narrow(dim, 0, width)
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _output_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where queries have a bias, readers of block_configs want one of the output too."""
    return {
        name.removesuffix("weight") + "bias": tensor.new_zeros(tensor.shape[0])
        for name, tensor in tensors.items()
        if name.endswith("self_attn.o_proj.weight")
    }
