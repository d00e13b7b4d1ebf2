"""Structures that no stock block computes are layers of `deci` that compute them.

`Deci` reads a file as llama.cpp's `src/models/deci.cpp` does, in float32.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from foldstack.compression.checkpoints.checkpoint import save_model
from foldstack.compression.export.engines import ENGINES
from foldstack.compression.export.exported import export_model
from foldstack.compression.export.forms import ENGINES_OF, Form, NoSuchForm, why_no_stock
from foldstack.compression.export.mapped_stream import _Shortcut, mapped_stream
from foldstack.compression.structure.block_plan import NarrowHeads
from foldstack.compression.structure.heads import head_sizes
from foldstack.compression.structure.modeling_foldstack import FoldstackForCausalLM
from foldstack.compression.structure.surgery import config_for, plan_of

WITHOUT_STOCK_FORM = ("light_block", "light_first", "sliced", "virtual_blocks")


class Deci:
    def __init__(self, file: Path) -> None:
        self.reader = GGUFReader(file)
        self.tensors = {
            each.name: torch.tensor(np.array(each.data).reshape(tuple(each.shape)[::-1]))
            for each in self.reader.tensors
        }
        self.heads, self.kv_heads, self.widths = (
            self._of_layers(name)
            for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
        )
        (self.eps,) = self._of_layers("attention.layer_norm_rms_epsilon")
        (self.head_dim,) = self._of_layers("attention.key_length")
        (self.theta,) = self._of_layers("rope.freq_base")

    def _of_layers(self, name: str) -> list[Any]:
        field = self.reader.fields[f"deci.{name}"]
        return [field.parts[place][0].item() for place in field.data]

    def logits(self, ids: Tensor) -> Tensor:
        x = self.tensors["token_embd.weight"][ids]
        for position in range(len(self.heads)):
            layer = f"blk.{position}"
            assert self.widths[position], "a layer that llama.cpp leaves out"
            if self.heads[position]:
                x = x + self._attention(position, self._norm(x, f"{layer}.attn_norm"))
            h = self._norm(x, f"{layer}.ffn_norm")
            gate, up = (self._linear(h, f"{layer}.ffn_{name}") for name in ("gate", "up"))
            x = x + self._linear(silu(gate) * up, f"{layer}.ffn_down")
        head = "output" if "output.weight" in self.tensors else "token_embd"
        return self._linear(self._norm(x, "output_norm"), head)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.double().square().mean(-1, keepdim=True).float()
        return x * (1 / torch.sqrt(mean + self.eps)) * self.tensors[f"{name}.weight"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _attention(self, position: int, x: Tensor) -> Tensor:
        layer, heads, kv_heads = f"blk.{position}", self.heads[position], self.kv_heads[position]
        if not kv_heads:
            return x @ self.tensors[f"{layer}.attn_output.weight"].T  # it reads no bias
        q, k, v = (
            self._linear(x, f"{layer}.attn_{name}").unflatten(-1, (-1, self.head_dim))
            for name in "qkv"
        )
        q, k, v = (each.transpose(1, 2) for each in (self._rotated(q), self._rotated(k), v))
        seen = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=heads != kv_heads
        )
        return self._linear(seen.transpose(1, 2).flatten(2), f"{layer}.attn_output")

    def _rotated(self, x: Tensor) -> Tensor:
        """Neighbouring coordinates; x is [batch, tokens, heads, coordinates]."""
        powers = torch.arange(0, self.head_dim, 2) / self.head_dim
        angles = (torch.arange(x.shape[1])[:, None] * self.theta**-powers)[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        turned = (
            even * angles.cos() - odd * angles.sin(),
            even * angles.sin() + odd * angles.cos(),
        )
        return torch.stack(turned, dim=-1).flatten(-2)


@pytest.fixture
def exported(tokenizer: Any, tmp_path: Path) -> Callable[[Any], Deci]:
    def export(model: Any) -> Deci:
        folder, of_tokenizer = tmp_path / "model", tmp_path / "tokenizer"
        tokenizer.save_pretrained(of_tokenizer)
        save_model(model, folder, tokenizer_from=of_tokenizer)
        report = export_model(folder, Form.of("gguf"), tmp_path / "out")
        assert report.form == "deci"
        return Deci(tmp_path / "out" / report.file)

    return export


@torch.no_grad()
def difference(model: Any, deci: Deci) -> float:
    """Of log-probabilities, in nats."""
    ids = torch.randint(2, 97, (2, 20), generator=torch.Generator().manual_seed(5))
    ours, theirs = model(ids, use_cache=False).logits, deci.logits(ids)
    return float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2"])
@pytest.mark.parametrize("structure", WITHOUT_STOCK_FORM)
def test_the_file_computes_the_same(
    structure: str,
    family: str,
    structured: Callable[..., Any],
    tokenizer: Any,
    exported: Callable[[Any], Deci],
) -> None:
    model = structured(structure, family, vocab_size=len(tokenizer))
    assert why_no_stock(plan_of(model)) is not None
    assert difference(model, exported(model)) < 2e-5


@pytest.fixture
def of_other_heads(tiny_model: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    """Maker of a model with one key head in block 1 and no attention in blocks 0 and 2."""

    def make(family: str, **overrides: Any) -> Any:
        dense = tiny_model(family, vocab_size=len(tokenizer), **overrides)
        width = head_sizes(dense).head_dim
        one = NarrowHeads(qk_dim=width, v_dim=width, rotary_dim=width, kv_heads=1)
        none = NarrowHeads(qk_dim=0, v_dim=0)
        plan = plan_of(dense).narrow(heads={0: none, 1: one, 2: none})
        model = FoldstackForCausalLM(config_for(dense.config, plan)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        return model

    return make


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_blocks_keep_their_heads(
    family: str, of_other_heads: Callable[..., Any], exported: Callable[[Any], Deci]
) -> None:
    model = of_other_heads(family)
    deci = exported(model)
    heads, full = model.config.num_attention_heads, model.config.num_key_value_heads
    assert deci.heads == [heads, heads, 0, heads]
    assert deci.kv_heads == [1, 1, 0, full]  # a reader looks at the first block for what heads are
    assert difference(model, deci) < 2e-5
    assert Form.of("gguf").why_not_kept(plan_of(model)) == "its narrower heads"  # of block 1


@pytest.mark.engines
@pytest.mark.parametrize("target", ["gguf", "deci", "openelm"])
def test_engines_take_blocks_of_other_heads(
    target: str, of_other_heads: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    form = Form.of(target)
    if lacking := [name for name in ENGINES_OF[form.target] if not ENGINES[name].python()]:
        pytest.skip(f"no Python has {' and '.join(lacking)}")
    model = of_other_heads("llama", hidden_size=128, head_dim=32)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_model(model, tmp_path / "model", tokenizer_from=tmp_path / "tokenizer")
    report = export_model(tmp_path / "model", form, tmp_path / "out")
    assert report.checks
    for check in report.checks:
        assert check.difference < 1e-4
        assert check.greedy_is_equal


def test_so_it_does_beside_a_token_of_a_thousand_times_the_size(
    structured: Callable[..., Any], tokenizer: Any, exported: Callable[[Any], Deci]
) -> None:
    """Real models have such residuals, at the first token above all."""
    model = structured("virtual_blocks", "llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] *= 1000
    assert difference(model, exported(model)) < 2e-5


def test_kinds_stand_beside_each_other(
    tiny_model: Callable[..., Any], tokenizer: Any, exported: Callable[[Any], Deci]
) -> None:
    """Two light networks in a row, first of all, then blocks whose outputs are normed."""
    dense = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=6)
    plan = plan_of(dense).replace(0, 2, "ffn", 16).replace(1, 2, "swiglu", 40)
    plan = plan.borrow({3: 2}, {"self_attn.q_proj": 3}, outputs="normed")
    model = FoldstackForCausalLM(config_for(dense.config, plan)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    deci = exported(model)
    assert difference(model, deci) < 2e-5
    assert len(deci.heads) == 1 + 2 + 1 + 2 * 5 + 1


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("rank", [0, 3, 6])
def test_what_a_shortcut_maps_is_the_sum(shape: tuple[int, int], rank: int) -> None:
    """However ill-conditioned it is, and nothing is more than doubled."""
    generator = torch.Generator().manual_seed(rank)
    leaving, entering = shape
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in shape)
    shortcut = nn.Linear(entering, leaving, bias=False).double()
    x, y = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (entering, leaving))
    with torch.no_grad():
        shortcut.weight.copy_(left @ right.T / 7)
        end = _Shortcut(shortcut)
        beside = torch.zeros(len(end.before), dtype=torch.float64)
        beside[:entering] = x
        found = end.map @ (beside + end.before @ y)
        torch.testing.assert_close(found, shortcut.weight @ x + y)
    assert torch.linalg.matrix_norm(end.before, 2) <= 2 + 1e-12


def test_what_takes_things_away_stays_in_float32(structured: Callable[..., Any]) -> None:
    stream = mapped_stream(structured("sliced", "llama").bfloat16())
    assert len(stream.layers) == 16
    for layer in stream.layers:
        for name, tensor in layer.tensors.items():
            is_precise = tensor.ndim == 1 or (layer.is_linear and name == "attn_output.weight")
            assert tensor.dtype == (torch.float32 if is_precise else torch.bfloat16)


def test_families_that_deci_does_not_compute_are_named(
    structured: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = structured("light_block", "qwen3", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_model(model, tmp_path / "model", tokenizer_from=tmp_path / "tokenizer")
    with pytest.raises(NoSuchForm, match=r"GGUF files have of llama, .*, and not of qwen3"):
        export_model(tmp_path / "model", Form.of("gguf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
