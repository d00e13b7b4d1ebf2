"""Where the blocks and their linears sit in each supported model family."""

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foldstack.compression.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

READS = ("attention_input", "attention_output", "mlp_input", "mlp_output")


@dataclass(frozen=True)
class LinearSite:
    """A linear of every block: its name inside the block, and which activation it reads.

    Linears with the same `reads` see the same input, so one Gram matrix serves them all.
    """

    name: str
    reads: str


@dataclass(frozen=True)
class Architecture:
    """One family of decoders: paths into its stock model."""

    model_type: str
    blocks_path: str
    final_norm_path: str
    linears: tuple[LinearSite, ...]
    mlp_width_entry: str = "intermediate_size"
    """The config's entry for the inner width of all MLPs."""

    def blocks(self, model: "nn.Module") -> "nn.ModuleList":
        """The executed blocks of a stock model or of a FoldstackForCausalLM."""
        blocks: nn.ModuleList = stock_of(model).get_submodule(self.blocks_path)  # type: ignore[assignment]
        return blocks

    def final_norm(self, model: "nn.Module") -> "nn.Module":
        return stock_of(model).get_submodule(self.final_norm_path)

    def weight(self, module: "nn.Module") -> "Tensor":
        """The weight as (out, in), also for a Conv1D."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        # A linear put together from slices has a weight like those that it is put together from.
        is_transposed = getattr(module, "is_conv1d", type(module).__name__ == "Conv1D")
        return weight.T if is_transposed else weight

    def stored_weight(self, module: "nn.Module", weight: "Tensor") -> "Tensor":
        """An (out, in) weight as `module` stores it."""
        return weight.T.contiguous() if type(module).__name__ == "Conv1D" else weight


def _sites(
    attention: tuple[str, ...], output: str, mlp: tuple[str, ...], down: str
) -> tuple[LinearSite, ...]:
    names = (
        *((name, "attention_input") for name in attention),
        (output, "attention_output"),
        *((name, "mlp_input") for name in mlp),
        (down, "mlp_output"),
    )
    return tuple(LinearSite(name, reads) for name, reads in names)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = _sites(_QKV, "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_PHI3 = _sites(("self_attn.qkv_proj",), "self_attn.o_proj", ("mlp.gate_up_proj",), "mlp.down_proj")
_OPT = _sites(_QKV, "self_attn.out_proj", ("fc1",), "fc2")
_GPT2 = _sites(("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj")

_GATED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")

ARCHITECTURES: dict[str, Architecture] = {
    **{name: Architecture(name, "model.layers", "model.norm", _GATED) for name in _GATED_FAMILIES},
    "phi3": Architecture("phi3", "model.layers", "model.norm", _PHI3),
    "opt": Architecture(
        "opt", "model.decoder.layers", "model.decoder.final_layer_norm", _OPT, "ffn_dim"
    ),
    "gpt2": Architecture("gpt2", "transformer.h", "transformer.ln_f", _GPT2, "n_inner"),
}

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def stock_of(model: "nn.Module") -> "nn.Module":
    """The stock model inside a FoldstackForCausalLM, or the model itself."""
    is_foldstack = getattr(getattr(model, "config", None), "model_type", "") == "foldstack"
    inner: nn.Module = model.model if is_foldstack else model  # type: ignore[assignment]
    return inner


def base_config_of(config: Any) -> Any:
    """The stock config inside a FoldstackConfig, or the config itself."""
    return config.base_config if config.model_type == "foldstack" else config


def architecture_of(model_or_config: Any) -> Architecture:
    """The family that a model or a config belongs to.

    Raises:
        InputError: it is a mixture of experts, an encoder-decoder, or a family we do not know.
    """
    config = base_config_of(getattr(model_or_config, "config", model_or_config))
    model_type = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"foldstack compresses decoder-only models; {model_type} is an encoder-decoder"
        )
    experts = [name for name in _EXPERT_COUNTS if (getattr(config, name, None) or 0) > 1]
    if experts:
        raise InputError(
            f"mixture-of-experts models are not supported; {model_type} has "
            f"{experts[0]} = {getattr(config, experts[0])}"
        )
    if model_type not in ARCHITECTURES:
        near = difflib.get_close_matches(model_type, ARCHITECTURES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(
            f"model type {model_type!r} is not supported{hint}; "
            f"supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise InputError(
            "a GPT-2 with scale_attn_by_inverse_layer_idx cannot lose blocks: its "
            "attention scales depend on depth"
        )
    return ARCHITECTURES[model_type]
