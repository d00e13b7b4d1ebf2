"""GGUF files and stock folders hold the model that they were made from."""

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from foldstack.compression.checkpoints.checkpoint import load_model, save_model
from foldstack.compression.errors import InputError
from foldstack.compression.export.block_configs import mlp_widths, write_deci, write_openelm
from foldstack.compression.export.engines import ENGINES, ask, brings_our_code
from foldstack.compression.export.export_report import ExportReport
from foldstack.compression.export.exported import (
    GREEDY_TOKENS,
    TEXTS,
    export_model,
    greedy_tokens,
    log_probabilities_of,
)
from foldstack.compression.export.forms import ENGINES_OF, Form, NoSuchForm
from foldstack.compression.export.gguf_tokenizer import read_vocabulary
from foldstack.compression.export.mlx_folder import write_mlx
from foldstack.compression.structure.modeling_foldstack import FoldstackForCausalLM
from foldstack.compression.structure.size import count_parameters
from foldstack.compression.structure.surgery import config_for, plan_of

SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture
def saved(
    structured: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> Callable[..., tuple[Any, Path]]:
    """Maker of a portable folder with a tokenizer, and the model in it."""

    def make(structure: str, family: str, **overrides: Any) -> tuple[Any, Path]:
        model = structured(structure, family, vocab_size=len(tokenizer) + 3, **overrides)
        folder, of_tokenizer = tmp_path / "model", tmp_path / "tokenizer"
        tokenizer.save_pretrained(of_tokenizer)
        save_model(model, folder, tokenizer_from=of_tokenizer)
        return model, folder

    return make


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.foreign_warnings
@pytest.mark.parametrize("structure", ["shared_blocks", "narrow_heads"])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama_tied", {"rope_parameters": LLAMA3}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("gemma3_text", {"query_pre_attn_scalar": 20}),
    ],
)
def test_transformers_reads_the_same_model_back_from_the_file(
    structure: str,
    family: str,
    overrides: Any,
    saved: Callable[..., tuple[Any, Path]],
    tmp_path: Path,
) -> None:
    """Its reader of GGUF files was written by others, for the files of llama.cpp's converter."""
    if structure == "narrow_heads" and family in ("qwen3", "gemma3_text"):
        return  # queries and keys are normed whole
    model, folder = saved(structure, family, **overrides)
    report = export_model(folder, Form.of("gguf"), tmp_path / "out")
    if not report.checks:
        assert "pip install llama-cpp-python" in report.unchecked[0]
    file = tmp_path / "out" / report.file
    # Of what it does not read of these families' settings the config says it: heads and scales.
    config = copy.deepcopy(model.config.base_config)
    if family == "gemma3_text":
        config.query_pre_attn_scalar = config.head_dim  # the only scale that llama.cpp has
    again = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=config, attn_implementation="eager"
    ).eval()
    ids = torch.randint(2, 97, (1, 24), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_narrow_mlps_keep_their_widths_in_a_file_of_their_own_architecture(
    saved: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = saved("narrow_mlps", "qwen2")
    report = export_model(folder, Form.of("gguf"), tmp_path / "out")
    assert report.form == "deci"
    assert report.parameters_after == report.parameters_before
    reader = GGUFReader(tmp_path / "out" / report.file)
    field = reader.fields["deci.feed_forward_length"]
    assert [int(field.parts[place][0]) for place in field.data] == [24, 56, 40, 56]
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    block = model.stock.model.layers[2]
    np.testing.assert_array_equal(
        tensors["blk.2.ffn_down.weight"], block.mlp.down_proj.weight.detach()
    )
    # Rotated in neighbouring pairs there: coordinate i + half comes right behind coordinate i.
    heads = block.self_attn.q_proj.weight.detach().unflatten(0, (4, 8))
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    np.testing.assert_array_equal(tensors["blk.2.attn_q.weight"], heads[:, order].flatten(0, 1))


def test_a_stock_folder_is_native_and_computes_the_same(
    saved: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = saved("shared_heads", "llama")
    report = export_model(folder, Form.of("stock"), tmp_path / "out")
    assert report.form == "LlamaForCausalLM"
    assert report.parameters_after > report.parameters_before
    (check,) = report.checks
    assert check.difference < 1e-5
    assert check.greedy_is_equal
    assert ExportReport.load(tmp_path / "out") == report
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"checked with {check.version}" in card
    ids = torch.arange(2, 30)[None]
    again = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "auto_map" not in config


def test_what_cannot_be_written_is_said_before_anything_is(
    saved: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _, folder = saved("light_block", "llama")
    with pytest.raises(NoSuchForm, match="a light network stands where blocks were"):
        export_model(folder, Form.of("stock"), out)
    assert not out.exists()
    with pytest.raises(InputError, match=r"stock-q8_0 is no form to export to"):
        Form.of("stock-q8_0")
    with pytest.raises(InputError, match="is there already"):
        export_model(folder, Form.of("stock"), folder)
    _, other = saved("shared_blocks", "opt")
    for form, said in (
        ("gguf", r"GGUF files are written for .*, and not for opt"),
        ("deci", r"block_configs \(deci\) is for llama, mistral, qwen2, and not for opt"),
    ):
        with pytest.raises(NoSuchForm, match=said):
            export_model(other, Form.of(form), out)
    assert not out.exists()


def test_a_tokenizer_that_splits_otherwise_is_refused(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    stored = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    assert read_vocabulary(tokenizer_folder, 300).splitter == "gpt-2"
    stored["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"splits text in a way that llama.cpp has no name for"):
        read_vocabulary(tmp_path, 300)
    stored["model"] = {"type": "WordPiece", "vocab": {}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="is a WordPiece; GGUF files are written for BPE"):
        read_vocabulary(tmp_path, 300)


@pytest.mark.foreign_warnings
def test_the_vocabulary_reads_texts_as_the_tokenizer_does(
    saved: Callable[..., tuple[Any, Path]], tokenizer: Any, tmp_path: Path
) -> None:
    _, folder = saved("shared_blocks", "llama")
    report = export_model(folder, Form.of("gguf"), tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=report.file)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.foreign_warnings
def test_block_configs_have_widths_that_their_readers_compute(
    saved: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    """All of them round int(2 * ffn_mult * hidden / 3) up to a multiple of 256."""
    model, folder = saved("narrow_mlps", "qwen2", intermediate_size=300)
    out = tmp_path / "out"
    report = export_model(folder, Form.of("deci"), out)
    config = json.loads((out / "config.json").read_text())
    tensors = load_file(out / "model.safetensors")
    hidden = config["hidden_size"]
    for place, (block, width) in enumerate(
        zip(config["block_configs"], [256, 512, 256, 512], strict=True)
    ):
        assert -(-int(2 * block["ffn"]["ffn_mult"] * hidden / 3) // 256) * 256 == width
        up = tensors[f"model.layers.{place}.mlp.up_proj.weight"]
        stored = model.stock.model.layers[place].mlp.up_proj.weight
        assert up.shape == (width, hidden)
        assert torch.equal(up[: len(stored)], stored)
        assert not up[len(stored) :].any()
        assert not tensors[f"model.layers.{place}.self_attn.o_proj.bias"].any()
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert report.parameters_after == sum(tensor.numel() for tensor in tensors.values())
    read = AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert read.block_configs[1].attention.no_op is False
    assert json.loads(read.to_json_string())["block_configs"] == config["block_configs"]


@pytest.mark.parametrize(
    ("family", "overrides", "entries"),
    [
        ("llama", {}, {"rope_theta": 10000.0}),
        ("gemma3_text", {}, {"sliding_window_pattern": 2, "rope_local_base_freq": 10000.0}),
        # It counts which blocks attend to everything: one that lost blocks has them elsewhere.
        ("gemma3_text", {"layer_types": [SLIDING, FULL, FULL, SLIDING]}, None),
        ("mistral", {"sliding_window": 16}, None),  # its class attends to everything
        ("gpt2", {"n_inner": None}, {"n_ctx": 128}),
        ("gpt2", {"n_inner": 56}, None),  # its class has no such MLPs
        ("opt", {}, None),
    ],
)
def test_mlx_gets_its_own_class_where_that_computes_the_same(
    family: str,
    overrides: Any,
    entries: dict[str, Any] | None,
    tiny_model: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Any other would be read as another model, without a word."""
    form, parameters = write_mlx(tiny_model(family, **overrides), tmp_path, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    brings_code = (tmp_path / "out" / "foldstack_mlx.py").exists()
    assert ("foldstack_mlx" in form) == ("model_file" in config) == brings_code
    assert brings_code == (entries is None)
    assert dict(config) | (entries or {}) == config
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert parameters == sum(tensor.numel() for tensor in tensors.values())


def test_a_file_of_ours_keeps_every_structure_as_small_as_it_is(
    structure: str, structured: Callable[..., Any], tmp_path: Path
) -> None:
    model = structured(structure)
    form, parameters = write_mlx(model, tmp_path, tmp_path / "out")
    assert parameters == count_parameters(model)
    assert ("foldstack_mlx" in form) == (structure != "narrow_mlps")  # which OpenELM's class has
    if structure != "narrow_mlps":
        assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(model.state_dict())


def test_an_absent_mlp_is_zeros_to_whoever_takes_none_and_nothing_in_a_file_of_ours(
    structured: Callable[..., Any], tmp_path: Path
) -> None:
    """llama.cpp and mlx-lm refuse widths of zero."""
    dense = structured("narrow_mlps")
    plan = plan_of(dense).narrow({0: 0})
    model = FoldstackForCausalLM(config_for(dense.config, plan)).eval()
    write_openelm(model, tmp_path, tmp_path / "openelm")
    tensors = load_file(tmp_path / "openelm" / "model.safetensors")
    assert tensors["transformer.layers.0.ffn.proj_2.weight"].shape == (32, 1)
    assert not tensors["transformer.layers.0.ffn.proj_1.weight"].any()
    write_deci(model, tmp_path, tmp_path / "deci")
    up = load_file(tmp_path / "deci" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert up.shape == (256, 32)
    assert not up.any()
    assert mlp_widths(plan, 56, absent=32) == [32, 56, 40, 56]  # in a GGUF file
    assert "foldstack_mlx" in write_mlx(model, tmp_path, tmp_path / "mlx")[0]
    names = load_file(tmp_path / "mlx" / "model.safetensors")
    assert not [name for name in names if "layers.0.mlp" in name]


def test_an_engine_runs_code_that_is_this_versions_and_no_other(
    saved: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    _, folder = saved("factored", "llama")
    report = export_model(folder, Form.of("mlx"), tmp_path / "out")
    assert report.needs_trust
    assert "--trust-remote-code" in (tmp_path / "out" / "README.md").read_text() or report.unchecked
    assert brings_our_code(str(folder))
    assert brings_our_code(str(tmp_path / "out"))
    (tmp_path / "out" / "foldstack_mlx.py").write_text("")
    assert not brings_our_code(str(tmp_path / "out"))


def test_what_the_file_of_ours_does_not_compute_is_refused(
    structured: Callable[..., Any], tmp_path: Path
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    for overrides, said in (
        ({"hidden_act": "mish"}, "its activation is mish"),
        ({"rope_parameters": rope}, "its rotary frequencies change with the length"),
    ):
        model = structured("shared_blocks", **overrides)
        with pytest.raises(InputError, match=said):
            write_mlx(model, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["gguf", "openelm"])
def test_narrow_mlps_of_qwen3_keep_their_widths(
    target: str, saved: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = saved("narrow_mlps", "qwen3", tie_word_embeddings=True)
    report = export_model(folder, Form.of(target), tmp_path / "out")
    assert report.parameters_after == report.parameters_before
    gate, up = (
        getattr(model.stock.model.layers[0].mlp, f"{n}_proj").weight for n in ("gate", "up")
    )
    if target == "gguf":
        assert report.form == "openelm"
        reader = GGUFReader(tmp_path / "out" / report.file)
        read = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}
        assert torch.equal(read["blk.0.ffn_gate.weight"], gate)
        assert torch.equal(read["blk.0.ffn_up.weight"], up)
    else:
        read = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(read["transformer.layers.0.ffn.proj_1.weight"], torch.cat([gate, up]))


@pytest.mark.parametrize(
    ("structure", "target", "what"),
    [
        ("narrow_mlps", "deci", None),
        ("factored", "vllm", None),
        ("factored", "gguf", "its factored or sliced linears"),
        ("shared_blocks", "mlx", None),
        ("shared_blocks", "openelm", "its shared blocks"),
        ("light_first", "deci", "its light network"),
        ("narrow_mlps", "stock", "MLPs of several widths"),
    ],
)
def test_a_target_says_what_it_does_not_keep(
    structure: str, target: str, what: str | None, structured: Callable[..., Any]
) -> None:
    assert Form.of(target).why_not_kept(plan_of(structured(structure))) == what


@pytest.mark.engines
@pytest.mark.parametrize(
    ("target", "structure", "family"),
    [
        *(
            ("gguf", structure, "llama")
            for structure in (
                *("shared_blocks", "narrow_heads", "narrow_mlps", "factored"),
                *("light_block", "light_first", "sliced", "virtual_blocks"),
            )
        ),
        ("gguf", "narrow_mlps", "qwen3_tied"),
        ("gguf", "shared_blocks", "gpt2"),
        ("deci", "narrow_mlps", "llama"),
        ("openelm", "narrow_mlps", "qwen3_tied"),
        ("mlx", "shared_heads", "llama"),
        ("vllm", "shared_heads", "llama"),
        ("vllm", "narrow_heads", "llama"),
    ],
)
def test_engines_compute_the_same(
    target: str, structure: str, family: str, saved: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    form = Form.of(target)
    lacking = [ENGINES[n].variable for n in ENGINES_OF[form.target] if not ENGINES[n].python()]
    if lacking:
        pytest.skip(f"{' and '.join(lacking)} name no Python that has the engine")
    family, _, tied = family.partition("_")
    more = {} if family == "gpt2" else {"head_dim": 32, "hidden_size": 128}
    _, folder = saved(structure, family, **more, **({"tie_word_embeddings": True} if tied else {}))
    report = export_model(folder, form, tmp_path / "out")
    for check in report.checks:
        # GELU is read off a table of float16 there.
        assert check.difference < (5e-3 if family == "gpt2" else 1e-4)
        assert check.greedy_is_equal
        assert check.tokens_are_equal is not False


@pytest.mark.engines
@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "opt", "gpt2"],
)
def test_mlx_lm_computes_every_structure(
    family: str, structures: tuple[str, ...], structured: Callable[..., Any], tmp_path: Path
) -> None:
    """A text longer than the families' windows, read at once and decoded from its KV cache."""
    engine = ENGINES["mlx-lm"]
    if (python := engine.python()) is None:
        pytest.skip(f"{engine.variable} names no Python that has it")
    ids = torch.randint(2, 97, (1, 40), generator=torch.Generator().manual_seed(5))
    requests, expected = [], {}
    for structure in structures:
        if structure == "sliced" and family in ("gemma2", "gemma3_text"):
            continue  # refused: their norms after attention and the MLP have no sliced form
        model = structured(structure, family)
        for name, pairs in model.named_buffers():
            if name.endswith("rotary_pairs"):  # not the same ones for every head
                pairs.add_(torch.arange(len(pairs))[:, None])
        write_mlx(model, tmp_path, tmp_path / structure)
        expected[structure] = log_probabilities_of(model, ids), greedy_tokens(model, ids)
        asked = {"do": "check", "tokens": ids[0].tolist(), "generate": GREEDY_TOKENS, "texts": []}
        requests.append({**asked, "model": str(tmp_path / structure)})
    answers = ask(engine, python, requests)
    for (structure, (seen, greedy)), answer in zip(expected.items(), answers, strict=True):
        assert "error" not in answer, (structure, answer["error"])
        found = torch.tensor(answer["log_probabilities"], dtype=seen.dtype)
        torch.testing.assert_close(found, seen, rtol=0, atol=1e-4, msg=structure)
        assert answer["greedy"] == greedy, structure


QUANTISE_AND_TUNE = """
import sys
from pathlib import Path
import mlx.core as mx, mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

for folder in map(Path, sys.argv[1:]):
    tokens = mx.array([list(range(2, 40))])
    model, config = load_model(folder, trust_remote_code=True)
    plain = model(tokens)
    model, config = quantize_model(model, config, 32, 8)
    quantised = model(tokens)
    save_model(folder, model, donate_model=False)
    save_config(config, folder / "config.json")
    model, _ = load_model(folder, trust_remote_code=True)
    assert abs(model(tokens) - quantised).max() == 0, folder
    assert 0 < abs(quantised - plain).max() < 0.3, folder
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 2, "scale": 1.0, "dropout": 0.0})
    assert abs(model(tokens) - quantised).max() == 0, folder
    for module in model.modules():
        if type(module).__name__ == "LoRALinear":
            module.lora_b = 0.1 * mx.ones_like(module.lora_b)
    loss = lambda m, x: nn.losses.cross_entropy(m(x)[:, :-1], x[:, 1:]).mean()
    gradients = tree_flatten(nn.value_and_grad(model, loss)(model, tokens)[1])
    assert len(gradients) > 20 and all(abs(each).max() > 0 for _, each in gradients), folder
"""


@pytest.mark.engines
def test_mlx_lm_quantises_and_tunes_what_is_borrowed(
    structured: Callable[..., Any], tmp_path: Path
) -> None:
    """What takes the place of an owner's linear is used by all who borrow it."""
    if (python := ENGINES["mlx-lm"].python()) is None:
        pytest.skip(f"{ENGINES['mlx-lm'].variable} names no Python that has it")
    folders = []
    for structure in ("shared_heads", "shared_basis", "virtual_blocks", "narrow_heads"):
        model = structured(structure, "qwen2", hidden_size=64, intermediate_size=96, head_dim=16)
        folders.append(str(tmp_path / structure))
        write_mlx(model, tmp_path, tmp_path / structure)
    subprocess.run([python, "-c", QUANTISE_AND_TUNE, *folders], check=True)
