"""Blocks with narrower MLPs and attention heads compute what masking the wide ones computes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from foldstack.compression.checkpoints.checkpoint import check_reload, save_model
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.block_plan import NarrowHeads
from foldstack.compression.structure.modeling_foldstack import FoldstackForCausalLM, NarrowAttention
from foldstack.compression.structure.size import size_of, size_of_plan
from foldstack.compression.structure.surgery import Cut, cut, plan_of
from foldstack.compression.training.adapters import linear_names

MLP_WIDTH, V_DIM = 41, 5


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(3))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def assert_cached_decoding_equals_full_forward(model: Any, ids: Tensor) -> None:
    cache, steps = None, []
    with torch.inference_mode():
        for start, stop in ((0, 25), (25, 26), (26, 40)):
            out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model, ids), rtol=1e-4, atol=1e-4)


def kept_of(model: Any, family: str) -> tuple[Tensor, Tensor, int]:
    """Per key head the kept query-key coordinates and rotary pairs; the number of pairs kept."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(1)
    rotary = 0 if family in ("gpt2", "opt") else head_dim
    if family == "phi3":
        rotary = int(head_dim * config.rope_parameters["partial_rotary_factor"])
    kept_pairs = 0 if rotary == 0 else rotary // 2 - 1
    choose = lambda n, k: torch.randperm(n, generator=generator)[:k].sort().values  # noqa: E731
    pairs = torch.stack([choose(rotary // 2, kept_pairs) for _ in range(heads)])
    still = torch.stack([
        rotary + choose(head_dim - rotary, max(0, head_dim - rotary - 1)) for _ in range(heads)
    ])  # fmt: skip
    return torch.cat([pairs, pairs + rotary // 2, still], dim=1), pairs, kept_pairs


def narrowed(model: Any, family: str, position: int) -> tuple[Any, Any]:
    """The model with one narrow block, and the wide one with what was dropped set to zero.

    In the wide one the dropped query-key coordinates, the value coordinates from V_DIM on and the
    MLP's channels from MLP_WIDTH on are zero, so both must compute the same.
    """
    masked = copy.deepcopy(model)
    kept, pairs, num_pairs = kept_of(model, family)
    heads = NarrowHeads(qk_dim=kept.shape[1], v_dim=V_DIM, rotary_dim=2 * num_pairs)
    architecture = architecture_of(model)
    block = architecture.blocks(masked)[position]
    tensors: dict[str, Tensor] = {}

    def take(name: str, rows: Tensor, columns: Tensor | None = None) -> None:
        module = block.get_submodule(name)
        weight = architecture.weight(module).detach()
        wiped = torch.ones(len(weight), dtype=torch.bool)
        if columns is None:
            wiped[rows] = False
            weight[wiped] = 0
            narrow = weight[rows]
        else:
            narrow = weight[:, columns]
        if module.bias is not None:
            if columns is None:
                module.bias.data[wiped] = 0
            tensors[f"blocks.{position}.{name}.bias"] = module.bias[rows].detach()
        place = f"blocks.{position}.{name}.weight"
        tensors[place] = architecture.stored_weight(module, narrow).clone()

    config = model.config
    num_heads, num_kv = config.num_attention_heads, len(kept)
    dim = block.get_submodule(architecture.linears[0].name.split(".")[0]).head_dim
    of_head = torch.arange(num_heads) // (num_heads // num_kv)
    query = (torch.arange(num_heads)[:, None] * dim + kept[of_head]).flatten()
    key = (torch.arange(num_kv)[:, None] * dim + kept).flatten()
    value = (torch.arange(num_kv)[:, None] * dim + torch.arange(V_DIM)).flatten()
    out = (torch.arange(num_heads)[:, None] * dim + torch.arange(V_DIM)).flatten()
    q_rows, k_rows = num_heads * dim, num_kv * dim
    of = {site.reads: [s.name for s in architecture.linears if s.reads == site.reads]
          for site in architecture.linears}  # fmt: skip
    if len(of["attention_input"]) == 1:
        take(of["attention_input"][0], torch.cat([query, q_rows + key, q_rows + k_rows + value]))
    else:
        for name, rows in zip(of["attention_input"], (query, key, value), strict=True):
            take(name, rows)
    everything = torch.arange(config.hidden_size)
    take(of["attention_output"][0], everything, out)
    channels = torch.arange(MLP_WIDTH)
    fused = len(of["mlp_input"]) == 1 and family == "phi3"
    for name in of["mlp_input"]:
        take(name, torch.cat([channels, 56 + channels]) if fused else channels)
    take(of["mlp_output"][0], everything, channels)
    attention = architecture.linears[0].name.split(".")[0]
    if num_pairs:
        tensors[f"blocks.{position}.{attention}.rotary_pairs"] = pairs
    plan = plan_of(model).narrow({position: MLP_WIDTH}, {position: heads})
    return cut(model, Cut(plan, (0, 1, 2, 3), tensors)), masked


FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "opt", "gpt2", "phi3", "phi3_partial")


def make(family: str, tiny_model: Any) -> tuple[Any, str]:
    if family != "phi3_partial":
        return tiny_model(family), family
    rope = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    return tiny_model("phi3", head_dim=12, rope_parameters=rope), "phi3"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_a_narrow_block_equals_the_masked_one(
    family: str, kind: str, tiny_model: Any, ids: Tensor
) -> None:
    if (family, kind) == ("gemma2", "sdpa"):
        kind = "eager"  # transformers' sdpa has no soft-capping
    model, name = make(family, tiny_model)
    smaller, masked = narrowed(model, name, 1)
    assert isinstance(smaller, FoldstackForCausalLM)
    for made in (model, smaller, masked):
        made.set_attn_implementation(kind)
    assert smaller.model.config._attn_implementation == kind
    torch.testing.assert_close(logits(smaller, ids), logits(masked, ids), rtol=1e-5, atol=1e-5)
    assert (logits(smaller, ids) - logits(model, ids)).abs().max() > 1e-3
    assert_cached_decoding_equals_full_forward(smaller, ids)


def test_whole_heads_as_narrow_heads_change_nothing(
    architecture: str, tiny_model: Any, ids: Tensor
) -> None:
    """Also with norms on queries and keys."""
    model = tiny_model(architecture)
    site = architecture_of(model).linears[0].name.split(".")[0]
    dim = architecture_of(model).blocks(model)[0].get_submodule(site).head_dim
    rotary = 0 if architecture in ("opt", "gpt2") else dim
    heads = NarrowHeads(qk_dim=dim, v_dim=dim, rotary_dim=rotary)
    pairs = torch.arange(rotary // 2).repeat(size_of(model).kv_bytes_per_token // (32 * dim), 1)
    plan = plan_of(model).narrow(heads=dict.fromkeys(range(4), heads))
    tensors = {f"blocks.{p}.{site}.rotary_pairs": pairs for p in range(4) if rotary}
    same = cut(model, Cut(plan, (0, 1, 2, 3), tensors))
    torch.testing.assert_close(logits(same, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    assert size_of(same) == size_of(model) == size_of_plan(model.config, plan)


def test_size_counts_the_narrow_cache(tiny_model: Any) -> None:
    model = tiny_model("llama")
    smaller, _ = narrowed(model, "llama", 1)
    dense = size_of(model)
    assert dense.kv_bytes_per_token == 4 * 4 * 2 * (8 + 8)
    assert size_of(smaller).kv_bytes_per_token == 4 * 2 * (3 * (8 + 8) + 6 + V_DIM)
    assert size_of(smaller) == size_of_plan(model.config, plan_of(smaller))
    cache = smaller(torch.zeros(1, 3, dtype=torch.long), use_cache=True).past_key_values
    assert cache.layers[1].keys.shape[-1] + cache.layers[1].values.shape[-1] == 6 + V_DIM


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_it_loads_where_foldstack_is_not_installed(
    family: str, model_folder: Any, tmp_path: Path
) -> None:
    folder = model_folder(family)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    smaller, _ = narrowed(model, family, 1)
    assert save_model(smaller, tmp_path / "saved", tokenizer_from=folder) == "portable"
    check_reload(smaller, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in again.state_dict().items()}
    selections = [name for name in dtypes if name.endswith("rotary_pairs")]
    assert all(dtypes.pop(name) == torch.int64 for name in selections)
    assert len(selections) == (family == "qwen2")
    assert set(dtypes.values()) == {torch.bfloat16}


def test_one_mlp_width_for_all_blocks_is_a_stock_model(
    architecture: str, tiny_model: Any, ids: Tensor
) -> None:
    model = tiny_model(architecture)
    arch = architecture_of(model)
    kept = torch.arange(MLP_WIDTH)
    tensors = {}
    masked = copy.deepcopy(model)
    for position, block in enumerate(arch.blocks(masked)):
        for site in arch.linears:
            module = block.get_submodule(site.name)
            weight = arch.weight(module).detach()
            rows = torch.cat([kept, 56 + kept]) if architecture == "phi3" else kept
            place = f"blocks.{position}.{site.name}"
            if site.reads == "mlp_input":
                tensors[f"{place}.weight"] = arch.stored_weight(module, weight[rows])
                if module.bias is not None:
                    tensors[f"{place}.bias"] = module.bias[rows]
            elif site.reads == "mlp_output":
                tensors[f"{place}.weight"] = arch.stored_weight(module, weight[:, kept].clone())
                weight[:, MLP_WIDTH:] = 0
    plan = plan_of(model).narrow(dict.fromkeys(range(4), MLP_WIDTH))
    smaller = cut(model, Cut(plan, (0, 1, 2, 3), tensors))
    assert type(smaller) is type(model)
    assert plan_of(smaller).blocks[0].mlp_width is None
    torch.testing.assert_close(logits(smaller, ids), logits(masked, ids), rtol=1e-5, atol=1e-5)
    assert size_of(smaller) == size_of_plan(model.config, plan)


def test_adapters_find_the_linears_of_a_narrow_block(tiny_model: Any) -> None:
    model = tiny_model("llama")
    smaller, _ = narrowed(model, "llama", 1)
    assert len(linear_names(smaller)) == len(linear_names(model))


def test_training_uses_the_stock_dropouts(tiny_model: Any) -> None:
    model = tiny_model("gpt2", attn_pdrop=0.25, resid_pdrop=0.5)
    smaller, _ = narrowed(model, "gpt2", 1)
    attention = architecture_of(smaller).blocks(smaller)[1].attn
    assert isinstance(attention, NarrowAttention)
    assert attention.attention_dropout == 0.25
    assert isinstance(attention.resid_dropout, nn.Dropout)
    assert attention.resid_dropout.p == 0.5
