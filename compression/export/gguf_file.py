"""A model as a GGUF file for llama.cpp, written with the `gguf` package.

Structures are multiplied out (`multiplied_out`); where MLPs have widths of their own, the file is
of an architecture that keeps them: `deci` where the family is Llama-shaped, `openelm` where it is
Qwen3-shaped and tied. What has no stock form is a `deci` of more layers (`mapped_stream`).
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFWriter
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.errors import InputError
from foldstack.compression.export.block_configs import (
    head_width,
    kv_head_counts,
    mlp_widths,
    of_blocks,
    openelm_tensors,
    why_not_openelm,
)
from foldstack.compression.export.deci_layers import ROWS
from foldstack.compression.export.forms import (
    DECI_FAMILIES,
    GGUF_ARCHITECTURES,
    why_no_gguf,
    why_no_stock,
)
from foldstack.compression.export.gguf_tokenizer import read_vocabulary, write_vocabulary
from foldstack.compression.export.mapped_stream import mapped_stream
from foldstack.compression.export.multiplied_out import multiplied_out
from foldstack.compression.structure.architectures import architecture_of, base_config_of
from foldstack.compression.structure.heads import head_sizes
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import plan_of

DECI, OPENELM = "deci", "openelm"
WIDTH_PER_BLOCK = (DECI, OPENELM)
ROTATED_IN_PAIRS = ("llama", DECI)
"""They rotate neighbouring coordinates, where transformers rotates i with i + half."""
GEMMA = ("gemma", "gemma2", "gemma3")


@dataclass(frozen=True)
class GgufFile:
    """What was written: the architecture's name, and the tensors that are not to be quantised."""

    architecture: str
    precise: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Contents:
    """What a file holds: head counts and MLP widths are of each block."""

    architecture: str
    config: Any
    heads: list[int]
    kv_heads: list[int]
    widths: list[int]
    tensors: Iterator[tuple[str, Tensor]]


def write_gguf(
    model: PreTrainedModel,
    tokenizer_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    name: str,
) -> GgufFile:
    """Write the model as a GGUF file of its own precision.

    Raises:
        InputError: llama.cpp has no such architecture or tokenizer, or none that computes the
            structure.
    """
    if (reason := why_no_gguf(plan_of(model))) is not None:
        raise InputError(reason)
    vocabulary = read_vocabulary(tokenizer_folder, model.config.vocab_size)
    is_stock = why_no_stock(plan_of(model)) is None
    contents = _of_stock(model) if is_stock else _of_mapped_stream(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(file, contents.architecture)
    writer.add_name(name)
    _write_settings(writer, contents)
    write_vocabulary(writer, vocabulary, tokenizer)
    for tensor_name, tensor in contents.tensors:
        _add(writer, tensor_name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    precise = [
        f"blk.{position}.attn_output.weight"
        for position, (heads, kv_heads) in enumerate(
            zip(contents.heads, contents.kv_heads, strict=True)
        )
        if heads and not kv_heads
    ]
    return GgufFile(contents.architecture, tuple(precise))


def _of_stock(model: PreTrainedModel) -> _Contents:
    stock = multiplied_out(model)
    config: Any = stock.config
    full = _full_width(config)
    plan = plan_of(model)
    widths = mlp_widths(plan, full, absent=min(ROWS, full))
    arch = _architecture(plan, stock, widths)
    if arch in WIDTH_PER_BLOCK:
        kv_heads = kv_head_counts(plan, stock, absent=arch == DECI)
    else:
        widths, kv_heads = [full] * len(widths), [head_sizes(stock).kv_heads] * len(widths)
    heads = [config.num_attention_heads if count else 0 for count in kv_heads]
    tensors = _openelm if arch == OPENELM else _tensors
    return _Contents(arch, config, heads, kv_heads, widths, tensors(stock, arch, widths, kv_heads))


def _of_mapped_stream(model: PreTrainedModel) -> _Contents:
    stream = mapped_stream(model)
    config = copy.deepcopy(base_config_of(model.config))
    config.head_dim = head_width(config)
    config.hidden_size, config.rms_norm_eps = stream.hidden_size, stream.eps
    config.num_hidden_layers = len(stream.layers)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from stream.others.items()
        for position, layer in enumerate(stream.layers):
            for name, tensor in layer.tensors.items():
                heads = {"attn_q": layer.heads, "attn_k": layer.kv_heads}
                rotated = heads.get(name.partition(".")[0])
                paired = tensor if rotated is None else _in_pairs(tensor, rotated)
                yield f"blk.{position}.{name}", paired
        yield from _rotary_factors(config)

    return _Contents(
        DECI,
        config,
        [layer.heads for layer in stream.layers],
        [layer.kv_heads for layer in stream.layers],
        [layer.mlp_width for layer in stream.layers],
        tensors(),
    )


def _full_width(config: Any) -> int:
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return width or 4 * config.hidden_size


def _architecture(plan: Plan, stock: PreTrainedModel, widths: list[int]) -> str:
    """One that keeps what blocks have of their own, if there is one and they have."""
    family = str(stock.config.model_type)
    stock_heads = {head_sizes(stock).kv_heads}

    def differs(absent: bool) -> bool:
        return (
            len(set(widths)) > 1 or set(kv_head_counts(plan, stock, absent=absent)) != stock_heads
        )

    if family in DECI_FAMILIES and differs(absent=True):
        return DECI
    is_tied = stock.get_output_embeddings().weight is stock.get_input_embeddings().weight
    is_openelm = family == "qwen3" and is_tied and why_not_openelm(stock) is None
    return OPENELM if is_openelm and differs(absent=False) else GGUF_ARCHITECTURES[family]


def elements_in(file: Path) -> int:
    """Stored weights of a GGUF file."""
    return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(file).tensors)


def _add(writer: GGUFWriter, name: str, tensor: Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.ndim == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.numpy())
    else:
        raw = tensor.bfloat16().view(torch.int16).numpy().view("uint8")
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _write_settings(writer: GGUFWriter, contents: _Contents) -> None:
    config, arch = contents.config, contents.architecture
    head_dim = head_width(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    is_own = arch in WIDTH_PER_BLOCK
    writer.add_feed_forward_length(contents.widths if is_own else contents.widths[0])
    writer.add_head_count(contents.heads if is_own else contents.heads[0])
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(contents.kv_heads if is_own else contents.kv_heads[0])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * getattr(config, "partial_rotary_factor", 1)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _write_rotary(writer, config)
    if arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
        # What was pruned in depth no longer alternates as the family does.
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        writer.add_sliding_window_pattern(slides)
    elif getattr(config, "sliding_window", None) and _slides(config):
        raise InputError(
            f"llama.cpp's {arch} has no sliding windows: its text beyond {config.sliding_window} "
            "tokens would be read otherwise"
        )
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _slides(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    within = config.max_position_embeddings <= config.sliding_window
    return not within and (types is None or "sliding_attention" in types)


def _write_rotary(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    if "full_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):
        raise InputError(f"rotary settings of the kind {kind!r} are not written to GGUF files yet")


def _tensors(
    stock: PreTrainedModel, arch: str, widths: list[int], kv_heads: list[int]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under llama.cpp's name, as llama.cpp computes with it."""
    config: Any = stock.config
    architecture = architecture_of(stock)
    (kind,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    is_tied = stock.get_output_embeddings().weight is stock.get_input_embeddings().weight
    own = of_blocks(stock, widths, kv_heads) if arch == DECI else stock.state_dict().items()
    for name, stored in own:
        if is_tied and name == "lm_head.weight":
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"llama.cpp's {arch} has no place for {name}")
        tensor = stored
        if name.startswith(f"{architecture.blocks_path}."):
            position, inside = name.removeprefix(f"{architecture.blocks_path}.").split(".", 1)
            tensor = _as_computed(tensor, inside, kv_heads[int(position)], arch, config)
        if arch in GEMMA and name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        if arch in ("gemma2", "gemma3"):
            tensor = _scaled_queries(tensor, name, arch, config)
        yield found, tensor
    yield from _rotary_factors(config)


def _openelm(
    stock: PreTrainedModel, arch: str, widths: list[int], kv_heads: list[int]
) -> Iterator[tuple[str, Tensor]]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.OPENELM, len(widths))
    for name, tensor in openelm_tensors(stock, widths, kv_heads):
        if name.endswith("ffn.proj_1.weight"):
            block = f"blk.{name.split('.')[2]}"
            gate, up = tensor.chunk(2)
            yield f"{block}.ffn_gate.weight", gate
            yield f"{block}.ffn_up.weight", up
            continue
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        yield found, tensor


def _as_computed(tensor: Tensor, inside: str, kv_heads: int, arch: str, config: Any) -> Tensor:
    linear = inside.rpartition(".")[0]
    if arch == "gpt2":  # its linears are stored transposed
        return tensor.T if tensor.ndim > 1 else tensor
    if arch in ROTATED_IN_PAIRS and linear in ("self_attn.q_proj", "self_attn.k_proj"):
        is_query = linear.endswith("q_proj")
        return _in_pairs(tensor, config.num_attention_heads if is_query else kv_heads)
    return tensor


def _in_pairs(tensor: Tensor, heads: int) -> Tensor:
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _scaled_queries(tensor: Tensor, name: str, arch: str, config: Any) -> Tensor:
    """llama.cpp divides scores by sqrt(head_dim); these families by sqrt(query_pre_attn_scalar)."""
    scale = math.sqrt(config.head_dim / config.query_pre_attn_scalar)
    last = ".self_attn.q_proj.weight" if arch == "gemma2" else ".self_attn.q_norm.weight"
    return tensor * scale if name.endswith(last) and scale != 1 else tensor


def _rotary_factors(config: Any) -> Iterator[tuple[str, Tensor]]:
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(config)


def _llama3_factors(config: Any) -> Tensor:
    """By what each rotary frequency is divided (transformers' `_compute_llama3_parameters`)."""
    rope = config.rope_parameters
    head_dim = head_width(config)
    powers = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelength = 2 * math.pi * rope["rope_theta"] ** powers
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    old = rope["original_max_position_embeddings"]
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()
