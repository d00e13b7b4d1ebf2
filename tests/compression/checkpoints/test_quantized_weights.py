"""Quantised weights made plain: a GGUF file against the weights in it, schemes, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.checkpoints.checkpoint import load_config, load_model, load_tokenizer
from foldstack.compression.checkpoints.model_folder import check_folder, gguf_of, quantization_of
from foldstack.compression.checkpoints.quantized_weights import dequantize, quantized_digest
from foldstack.compression.errors import InputError

FolderFactory = Callable[..., Path]
Q8 = GGMLQuantizationType.Q8_0
BLOCK_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Of a Llama block's tensors, in transformers and in llama.cpp."""
SIZES = {"intermediate_size": 64}
"""Quantised rows come in blocks of 32."""


def gguf_name(name: str) -> str:
    """llama.cpp's name of a weight of transformers' Llama."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in outer:
        return f"{outer[stem]}.weight"
    _, _, number, inner = stem.split(".", 3)
    return f"blk.{number}.{BLOCK_NAMES[inner]}.weight"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in llama.cpp's order: the two halves of a head take turns."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **extra: int
) -> dict[str, torch.Tensor]:
    """A Llama as llama.cpp would have it, matrices in Q8_0; gives what the file's numbers are."""
    config: Any = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    state = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if name == tokenizer.bos_token else 1 for name in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(int(tokenizer.bos_token_id))
    writer.add_eos_token_id(int(tokenizer.eos_token_id))
    for key, value in extra.items():
        writer.add_uint16(key.replace("_", "."), value)
    stands_for: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if weight.ndim == 1:
            writer.add_tensor(gguf_name(name), weight.numpy())
            stands_for[name] = weight
            continue
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        kind = name.split(".")[-2].partition("_proj")[0]
        stored = interleaved(weight, heads[kind]) if kind in heads else weight
        blocks = gguf_quantize(stored.numpy(), Q8)
        writer.add_tensor(gguf_name(name), blocks, raw_dtype=Q8)
        stands_for[name] = torch.from_numpy(gguf_dequantize(gguf_quantize(weight.numpy(), Q8), Q8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands_for


@pytest.fixture
def make_gguf(
    tmp_path: Path,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[..., tuple[Path, PreTrainedModel, dict[str, torch.Tensor]]]:
    def make(**extra: int) -> tuple[Path, PreTrainedModel, dict[str, torch.Tensor]]:
        model = tiny_model("llama", vocab_size=len(tokenizer), **SIZES)
        file = tmp_path / "tiny" / "tiny-q8.gguf"
        file.parent.mkdir()
        return file, model, write_gguf(file, model, tokenizer, **extra)

    return make


def test_gguf_file_becomes_the_weights_that_its_blocks_stand_for(
    make_gguf: Callable[..., Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file, model, stands_for = make_gguf()
    facts = dequantize(file, tmp_path / "plain")
    assert facts["dtype"] == "float32"
    assert (
        "tiny-q8.gguf is dequantised, from GGUF (30 tensors Q8_0, 9 tensors F32) to float32"
        in (facts["sentence"])
    )
    plain = load_model(tmp_path / "plain")
    assert plain.state_dict().keys() == stands_for.keys()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, stands_for[name]), name
    text = "def item_7(value):\n    return value * 7"
    ours = load_tokenizer(tmp_path / "plain")
    ids = tokenizer(text)["input_ids"]
    assert ours(text, add_special_tokens=False)["input_ids"] == ids
    assert ours.bos_token_id == tokenizer.bos_token_id
    assert ours.decode(ids) == text
    # The config says the same of the rotation, the norms and the heads.
    model.load_state_dict(stands_for)
    probe = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(plain(probe).logits, model(probe).logits)


def test_asked_for_precision_and_the_tokenizer_beside_the_file(
    make_gguf: Callable[..., Any], tmp_path: Path, tokenizer_folder: Path
) -> None:
    file, _, stands_for = make_gguf()
    digest = quantized_digest(file.parent)
    assert digest == quantized_digest(file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (file.parent / name).write_bytes((tokenizer_folder / name).read_bytes())
    assert quantized_digest(file) != digest
    dequantize(file.parent, tmp_path / "plain", torch.bfloat16)
    plain = load_model(tmp_path / "plain")
    assert plain.dtype == torch.bfloat16
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(plain.state_dict()[name], stands_for[name].bfloat16())
    copied = (tmp_path / "plain" / "tokenizer.json").read_bytes()
    assert copied == (tokenizer_folder / "tokenizer.json").read_bytes()


def test_gguf_files_that_cannot_be_read_get_a_sentence(
    make_gguf: Callable[..., Any], tmp_path: Path
) -> None:
    file, _, _ = make_gguf(split_count=3)
    with pytest.raises(InputError, match=r"one of 3 parts: join them with `llama-gguf-split"):
        dequantize(file, tmp_path / "out")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is not a whole GGUF file"):
        dequantize(file, tmp_path / "out")
    file.write_bytes(b"no such thing" * 9)
    with pytest.raises(InputError, match="is not a whole GGUF file"):
        dequantize(file, tmp_path / "out")
    writer = GGUFWriter(file, "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="architecture clip, which transformers reads from no"):
        dequantize(file, tmp_path / "out")
    (file.parent / "other.gguf").write_bytes(whole)
    with pytest.raises(InputError, match=r"holds 2 GGUF files; give the path of one .*other.gguf"):
        gguf_of(file.parent)
    assert not (tmp_path / "out").exists()


def test_gguf_beside_safetensors_is_not_looked_at(model_folder: FolderFactory) -> None:
    folder = model_folder("llama")
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    assert gguf_of(folder) is None
    check_folder(folder)


def with_quantization(folder: Path, **quantization: Any) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": quantization}
    file.write_text(json.dumps(config))
    return folder


def to_float8_blocks(folder: Path, block: int) -> dict[str, torch.Tensor]:
    """Write the linears of the blocks as 8-bit floats, a scale per square; gives their values."""
    file = folder / "model.safetensors"
    tensors, stands_for = load_file(file), {}
    for name, weight in list(tensors.items()):
        if "_proj" not in name:
            stands_for[name] = weight
            continue
        rows, columns = (size // block for size in weight.shape)
        squares = weight.view(rows, block, columns, block)
        scale = squares.abs().amax((1, 3)) / 448
        small = (squares / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name] = small.view(weight.shape)
        tensors[name.replace("weight", "weight_scale_inv")] = scale
        stands_for[name] = (small.float() * scale[:, None, :, None]).view(weight.shape)
    save_file(tensors, file, metadata={"format": "pt"})
    return stands_for


def test_float8_blocks_are_dequantised(model_folder: FolderFactory, tmp_path: Path) -> None:
    folder = model_folder("llama", **SIZES)
    stands_for = to_float8_blocks(folder, 16)
    with_quantization(folder, quant_method="fp8", weight_block_size=[16, 16])
    assert quantization_of(folder) == "fp8"
    facts = dequantize(folder, tmp_path / "plain", torch.float32)
    assert "is dequantised, from fp8 to float32" in facts["sentence"]
    plain = load_model(tmp_path / "plain").state_dict()
    assert plain.keys() == stands_for.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(weight, stands_for[name], rtol=0.01, atol=1e-4)
    assert quantization_of(tmp_path / "plain") is None
    assert load_tokenizer(tmp_path / "plain").bos_token_id == 0


def test_compressed_tensors_are_dequantised(model_folder: FolderFactory, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = model_folder("llama", **SIZES)
    file = folder / "model.safetensors"
    tensors, stands_for = load_file(file), {}
    for name, weight in list(tensors.items()):
        if "_proj" not in name:
            stands_for[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        small = (weight / scale).round().to(torch.int8)
        tensors[name], tensors[f"{name}_scale"] = small, scale
        stands_for[name] = small * scale
    save_file(tensors, file, metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    with_quantization(
        folder,
        quant_method="compressed-tensors",
        format="int-quantized",
        quantization_status="compressed",
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
    )
    dequantize(folder, tmp_path / "plain")
    for name, weight in load_model(tmp_path / "plain").state_dict().items():
        torch.testing.assert_close(weight, stands_for[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("quantization", "sentence"),
    [
        ({"quant_method": "gptq", "bits": 4}, "by gptq, .* no way back from it to plain weights"),
        ({"quant_method": "awq", "bits": 4}, "by awq, .* no way back from it to plain weights"),
        ({"quant_method": "sorcery"}, "by sorcery, .* Unknown quantization type, got sorcery"),
        ({"bits": 4}, "by an unnamed scheme, .* has no `quant_method`"),
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "by bitsandbytes, .*install"),
        ({"quant_method": "hqq"}, "by hqq, which cannot be dequantised here"),
    ],
)
def test_other_schemes_are_refused_in_a_sentence(
    model_folder: FolderFactory, tmp_path: Path, quantization: dict[str, Any], sentence: str
) -> None:
    folder = with_quantization(model_folder("llama"), **quantization)
    with pytest.raises(InputError, match=sentence) as refusal:
        dequantize(folder, tmp_path / "out")
    assert str(refusal.value).endswith("give the folder of the model that it was quantised from")
    assert not (tmp_path / "out").exists()


def test_library_says_what_to_do_first(
    model_folder: FolderFactory, make_gguf: Callable[..., Any]
) -> None:
    for place in (with_quantization(model_folder("llama"), quant_method="fp8"), make_gguf()[0]):
        with pytest.raises(InputError, match="make plain ones of them first"):
            load_config(place)
