"""Cutting: what is left computes what it did before, in every family."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.modeling_foldstack import (
    AttentionFreeBlock,
    FoldstackForCausalLM,
)
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import (
    linear_shapes,
    size_of,
    size_of_plan,
    sparsity_between,
)
from foldstack.compression.structure.surgery import Cut, cut, plan_of


class PassThrough(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


@pytest.fixture
def ids():
    return torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(3))


def logits(model, ids):
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def assert_same(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_cached_decoding_equals_full_forward(model, ids):
    full = logits(model, ids)
    cache, steps = None, []
    with torch.inference_mode():
        for start, stop in ((0, 25), (25, 26), (26, 27), (27, ids.shape[1])):
            out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert_same(torch.cat(steps, dim=1), full)


def keep(model, positions):
    return cut(model, Cut(plan_of(model).keep(positions), tuple(positions)))


def full_rank_factors(model, positions):
    """Exact factors W = W I of every linear at these positions."""
    architecture = architecture_of(model)
    ranks, tensors = {}, {}
    for (position, name), (_, in_features) in linear_shapes(model).items():
        if position not in positions:
            continue
        module = architecture.blocks(model)[position].get_submodule(name)
        place = f"blocks.{position}.{name}"
        ranks[position, name] = in_features
        tensors[f"{place}.first.weight"] = torch.eye(in_features)
        tensors[f"{place}.second.weight"] = architecture.weight(module)
        if module.bias is not None:
            tensors[f"{place}.second.bias"] = module.bias
    return ranks, tensors


def factored(model, positions):
    ranks, tensors = full_rank_factors(model, positions)
    plan = plan_of(model).factor(ranks)
    return cut(model, Cut(plan, tuple(range(len(plan.blocks))), tensors))


def share(model, owner, members):
    """The group uses the linears of `owner`, stored at its first position."""
    plan = plan_of(model).share(owner, members)
    first = min(owner, *members)
    block = architecture_of(model).blocks(model)[owner]
    tensors = {}
    for site in architecture_of(model).linears:
        for name, tensor in block.get_submodule(site.name).state_dict().items():
            tensors[f"blocks.{first}.{site.name}.{name}"] = tensor
    return cut(model, Cut(plan, tuple(range(len(plan.blocks))), tensors))


def test_identity_cut_changes_no_logit(architecture, tiny_model, ids):
    model = tiny_model(architecture)
    same = cut(model, Cut(plan_of(model), (0, 1, 2, 3)))
    assert type(same) is type(model)
    assert_same(logits(same, ids), logits(model, ids), tolerance=0)


def test_a_cut_model_shares_no_memory_with_its_source(tiny_model):
    model = tiny_model("llama_tied")
    before = copy.deepcopy(model.state_dict())
    smaller = keep(model, [0, 2])
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("kept", [[2, 3], [0, 1, 3], [1, 2]])
def test_removed_blocks_act_as_identity(architecture, tiny_model, ids, kept):
    model = tiny_model(architecture)
    smaller = keep(model, kept)
    blocks = architecture_of(model).blocks(model)
    for position in set(range(4)) - set(kept):
        blocks[position] = PassThrough()
    assert_same(logits(smaller, ids), logits(model, ids))
    assert not isinstance(smaller, FoldstackForCausalLM)
    assert_cached_decoding_equals_full_forward(smaller, ids)


WINDOWED = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
PATTERNS = [
    ("mistral", {}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("phi3", {"sliding_window": 16}),
    ("qwen2", WINDOWED),
    ("qwen3", WINDOWED),
    ("qwen2", {**WINDOWED, "layer_types": ["full_attention", "sliding_attention"] * 2}),
]


@pytest.mark.parametrize(("family", "entries"), PATTERNS)
@pytest.mark.parametrize("kept", [[1, 2], [3], [0, 2, 3]])
def test_what_a_config_says_per_block_goes_with_the_block(
    family, entries, kept, tiny_model, ids, tmp_path
):
    """Windows of 16 over 40 tokens: a block with another's attention would compute other logits."""
    model = tiny_model(family, **entries)
    smaller = keep(model, kept)
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    blocks, left = (architecture_of(m).blocks(m) for m in (model, again))
    for new, old in enumerate(kept):
        mine, before = left[new].self_attn, blocks[old].self_attn
        assert mine.layer_idx == new
        for name in ("layer_type", "sliding_window", "is_sliding", "rotary_emb"):
            assert getattr(mine, name, None) == getattr(before, name, None)
    types = getattr(model.config, "layer_types", None)
    assert getattr(again.config, "layer_types", None) == (types and [types[p] for p in kept])
    assert getattr(again.config, "max_window_layers", 0) <= len(kept)
    assert again.config.num_hidden_layers == len(kept)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    for position in set(range(4)) - set(kept):
        blocks[position] = PassThrough()
    assert_same(logits(again, ids), logits(model, ids))
    assert_cached_decoding_equals_full_forward(again, ids)


def test_survivors_keep_their_attention_type(tiny_model):
    model = tiny_model("gemma3_text")
    types = model.config.layer_types
    assert keep(model, [1, 2, 3]).config.layer_types == types[1:]
    assert keep(model, [0, 1, 2]).config.layer_types != keep(model, [1, 2, 3]).config.layer_types


def test_full_rank_factors_change_nothing(architecture, tiny_model, ids):
    model = tiny_model(architecture)
    portable = factored(model, [0, 2])
    assert isinstance(portable, FoldstackForCausalLM)
    assert_same(logits(portable, ids), logits(model, ids))
    assert_cached_decoding_equals_full_forward(portable, ids)


def test_shared_blocks_use_one_set_of_linears_and_their_own_norms(architecture, tiny_model, ids):
    model = tiny_model(architecture)
    shared = share(model, 2, [1])
    by_hand = copy.deepcopy(model)
    blocks = architecture_of(model).blocks(by_hand)
    for site in architecture_of(model).linears:
        source = blocks[2].get_submodule(site.name)
        blocks[1].get_submodule(site.name).load_state_dict(source.state_dict())
    assert_same(logits(shared, ids), logits(by_hand, ids))
    assert_cached_decoding_equals_full_forward(shared, ids)
    block_linears = size_of(model).block_linear_parameters
    assert size_of(shared).block_linear_parameters == block_linears * 3 // 4
    assert size_of(shared).flops_per_token == size_of(model).flops_per_token


def borrowing(model, bases, outputs="plain", gain=None):
    """Every position in `bases` on its base's linears, with the adapters that make up for it."""
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    ranks, tensors = {}, {}
    for position, base in bases.items():
        for site in architecture.linears:
            mine, other = (blocks[p].get_submodule(site.name) for p in (position, base))
            difference = architecture.weight(mine) - architecture.weight(other)
            ranks[site.name] = min(difference.shape)
            left, values, right = torch.linalg.svd(difference, full_matrices=False)
            place = f"blocks.{position}.{site.name}.adapter"
            tensors[f"{place}.first.weight"] = values[:, None] * right
            tensors[f"{place}.second.weight"] = left
            if mine.bias is not None:
                tensors[f"{place}.second.bias"] = mine.bias - other.bias
        if outputs != "plain":
            for name in ("attention_output", "mlp_output"):
                tensors[f"blocks.{position}.{name}.weight"] = gain
    plan = plan_of(model).borrow(bases, ranks, outputs)
    return cut(model, Cut(plan, tuple(range(len(plan.blocks))), tensors))


@pytest.mark.parametrize("bases", [{1: 2}, {2: 0, 1: 3}])
def test_adapters_of_full_rank_make_a_borrowing_block_the_block_it_was(
    architecture, tiny_model, ids, bases, tmp_path
):
    """Also on a base that comes later: orientation, biases, positions, fused and Conv1D linears."""
    model = tiny_model(architecture)
    virtual = borrowing(model, bases)
    assert_same(logits(virtual, ids), logits(model, ids), tolerance=1e-4)
    assert_cached_decoding_equals_full_forward(virtual, ids)
    virtual.save_pretrained(tmp_path)
    again = FoldstackForCausalLM.from_pretrained(tmp_path).eval()
    assert_same(logits(again, ids), logits(virtual, ids), tolerance=0)
    assert size_of(virtual) == size_of(again) == size_of_plan(model.config, plan_of(virtual))
    assert size_of(virtual).kv_bytes_per_token == size_of(model).kv_bytes_per_token
    assert size_of(virtual).flops_per_token > size_of(model).flops_per_token


def test_a_factored_base_serves_its_borrowers(architecture, tiny_model, ids):
    virtual = borrowing(tiny_model(architecture), {1: 3})
    both = factored(virtual, [3])
    assert_same(logits(both, ids), logits(virtual, ids), tolerance=1e-4)
    left = keep(both, [1, 2, 3])
    assert plan_of(left).blocks[0].weights_of == 2
    assert plan_of(left).blocks[0].adapters == plan_of(virtual).blocks[1].adapters
    assert_cached_decoding_equals_full_forward(left, ids)


def change_outputs(model, position, of_attention, of_mlp):
    """Make block `position` x + of_attention(attention), then x + of_mlp(MLP), by hand."""
    block = architecture_of(model).blocks(model)[position]
    if hasattr(block, "post_feedforward_layernorm"):
        places = block.post_attention_layernorm, block.post_feedforward_layernorm
    else:
        mlp = block.mlp if hasattr(block, "mlp") else block.fc2
        places = block.attn if hasattr(block, "attn") else block.self_attn, mlp
    for place, change in zip(places, (of_attention, of_mlp), strict=True):

        def forward(*args, inner=place.forward, change=change, **kwargs):
            out = inner(*args, **kwargs)
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        place.forward = forward


@pytest.mark.parametrize("kind", ["normed", "scaled"])
def test_outputs_are_changed_before_the_residual(architecture, tiny_model, ids, kind):
    model = tiny_model(architecture)
    gain = torch.randn(32, generator=torch.Generator().manual_seed(1))
    virtual = borrowing(model, {1: 3}, kind, gain)

    def change(y):
        if kind == "scaled":
            return y * gain
        centred = y - y.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    expected = copy.deepcopy(model)
    change_outputs(expected, 1, change, change)
    assert_same(logits(virtual, ids), logits(expected, ids), tolerance=1e-3)
    assert_cached_decoding_equals_full_forward(virtual, ids)
    silent = copy.deepcopy(virtual)
    with torch.no_grad():
        for name, parameter in silent.named_parameters():
            if name.endswith("_output.weight"):
                parameter.zero_()
    # Without its outputs the block is the identity, bit for bit; the original is not touched.
    assert torch.equal(logits(silent, ids), logits(keep(model, [0, 2, 3]), ids))
    assert_same(logits(virtual, ids), logits(expected, ids), tolerance=1e-3)


def test_scaled_outputs_of_a_block_that_others_borrow_from_are_its_own(
    architecture, tiny_model, ids
):
    """OPT's MLP ends in a linear that is borrowed; scaling it must not reach the borrower."""
    model = tiny_model(architecture)
    shared = share(model, 1, [2])
    plan = plan_of(shared)
    blocks = list(plan.blocks)
    generator = torch.Generator().manual_seed(1)
    gains = {}
    for position in (1, 3):
        blocks[position] = blocks[position].model_copy(update={"outputs": "scaled"})
        for name in ("attention_output", "mlp_output"):
            gains[f"blocks.{position}.{name}.weight"] = torch.randn(32, generator=generator)
    plan = plan.model_copy(update={"blocks": tuple(blocks)})
    scaled = cut(shared, Cut(plan, (0, 1, 2, 3), gains))
    for position in (1, 3):
        pair = (gains[f"blocks.{position}.{name}_output.weight"] for name in ("attention", "mlp"))
        change_outputs(shared, position, *(lambda y, gain=gain: y * gain for gain in pair))
    if hasattr(architecture_of(shared).blocks(shared)[1], "fc2"):
        # By hand it is the linear itself that scales; what borrows it takes that back.
        gain = gains["blocks.1.mlp_output.weight"]
        change_outputs(shared, 2, lambda y: y, lambda y: y / gain)
    assert_same(logits(scaled, ids), logits(shared, ids), tolerance=1e-4)
    assert_cached_decoding_equals_full_forward(scaled, ids)


def test_repeated_blocks_deepen_a_model(architecture, tiny_model, ids, tmp_path):
    model = tiny_model(architecture)
    order = (0, 1, 2, 1, 2, 3)
    plan = plan_of(model)
    deeper = cut(model, Cut(plan.repeat(order, {}), order))
    copies = plan.model_copy(update={"blocks": tuple(plan.blocks[p] for p in order)})
    stored_twice = cut(model, Cut(copies, order))
    assert type(stored_twice) is type(model)
    assert_same(logits(deeper, ids), logits(stored_twice, ids))
    assert_cached_decoding_equals_full_forward(deeper, ids)
    assert size_of(deeper).block_linear_parameters == size_of(model).block_linear_parameters
    assert size_of(deeper).kv_bytes_per_token == size_of(stored_twice).kv_bytes_per_token
    deeper.save_pretrained(tmp_path)
    again = FoldstackForCausalLM.from_pretrained(tmp_path).eval()
    assert_same(logits(again, ids), logits(deeper, ids), tolerance=0)


def test_an_attention_free_block_has_no_cache_entry(architecture, tiny_model, ids):
    model = tiny_model(architecture)
    hidden = model.config.hidden_size
    for start in (0, 2):  # the first block too: its cache entry is the one that generation looks at
        plan = plan_of(model).replace(start, start + 2, "ffn", 16)
        tensors = {
            f"blocks.{start}.ffn.up.weight": torch.randn(16, hidden),
            f"blocks.{start}.ffn.up.bias": torch.randn(16),
            f"blocks.{start}.ffn.down.weight": torch.randn(hidden, 16),
            f"blocks.{start}.ffn.down.bias": torch.randn(hidden),
        }
        inherits = (None, 2, 3) if start == 0 else (0, 1, None)
        smaller = cut(model, Cut(plan, inherits, tensors))
        network = AttentionFreeBlock("ffn", hidden, 16)
        network.load_state_dict({k.split(".", 2)[2]: v for k, v in tensors.items()})
        by_hand = copy.deepcopy(model)
        blocks = architecture_of(model).blocks(by_hand)
        blocks[start], blocks[start + 1] = network, PassThrough()
        assert_same(logits(smaller, ids), logits(by_hand, ids))
        assert_cached_decoding_equals_full_forward(smaller, ids)
        with torch.inference_mode():
            assert len(smaller(ids, use_cache=True).past_key_values) == 2
        dense = size_of(model)
        assert size_of(smaller).kv_bytes_per_token == dense.kv_bytes_per_token // 2


def test_stacked_cuts_load_and_compute_like_their_parts(architecture, tiny_model, ids):
    """Share, then factor the shared weights, then remove their owner: the heir takes over."""
    model = tiny_model(architecture)
    shared = share(model, 1, [2])
    both = factored(shared, [1, 3])
    assert_same(logits(both, ids), logits(shared, ids))
    left = keep(both, [0, 2, 3])
    assert plan_of(left).blocks[1].linears
    assert plan_of(left).blocks[1].weights_of is None
    by_hand = copy.deepcopy(shared)
    # Only its forward goes: block 2 still borrows the linears that it holds.
    architecture_of(model).blocks(by_hand)[1].forward = lambda hidden_states, *_, **__: (
        hidden_states
    )
    assert_same(logits(left, ids), logits(by_hand, ids))
    assert_cached_decoding_equals_full_forward(left, ids)


def test_size_of_a_plan_is_known_before_the_model_is_built(architecture, tiny_model):
    model = tiny_model(architecture)
    for smaller in (keep(model, [0, 3]), factored(model, [1]), share(model, 0, [1, 2])):
        assert size_of_plan(model.config, plan_of(smaller)) == size_of(smaller)


def test_bytes_follow_the_stored_precision(tiny_model):
    half = tiny_model("llama").bfloat16()
    half.config.dtype = torch.bfloat16
    assert size_of_plan(half.config, plan_of(half)) == size_of(half)
    assert size_of(half).bytes == 2 * size_of(half).parameters


def test_tied_embeddings_count_once(tiny_model):
    tied, untied = tiny_model("llama_tied"), tiny_model("llama")
    table = tied.config.vocab_size * tied.config.hidden_size
    assert size_of(untied).parameters - size_of(tied).parameters == table
    half = keep(tied, [0, 1])
    assert half.get_output_embeddings().weight is half.get_input_embeddings().weight
    block_share = (size_of(tied).parameters - table - 32) / size_of(tied).parameters
    assert sparsity_between(size_of(tied), size_of(half)) == pytest.approx(block_share / 2)


def test_llama_2_7b_counts():
    """Nine of its 32 blocks are 27.03 % (ShortGPT); four gone and four pairs shared are 24.0 %."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    )  # fmt: skip
    dense_plan = Plan.identity("llama", 32)
    dense = size_of_plan(config, dense_plan)
    assert dense.parameters == 6_738_415_616
    pruned = size_of_plan(config, dense_plan.keep([*range(21), 30, 31]))
    assert sparsity_between(dense, pruned) == pytest.approx(0.2703, abs=5e-5)
    plan = dense_plan.keep(range(28))
    for first in (4, 8, 12, 16):
        plan = plan.share(first, [first + 1])
    assert sparsity_between(dense, size_of_plan(config, plan)) == pytest.approx(0.240, abs=5e-4)


def test_a_missing_misplaced_or_misshapen_tensor_is_refused(tiny_model):
    model = tiny_model("llama")
    plan = plan_of(model).factor({(0, "self_attn.q_proj"): 3})
    first = torch.zeros(3, 32)
    second = torch.zeros(32, 3)
    place = "blocks.0.self_attn.q_proj"
    everything = {f"{place}.first.weight": first, f"{place}.second.weight": second}
    with pytest.raises(
        ValueError, match=r"no tensor for blocks\.0\.self_attn\.q_proj\.second\.weight"
    ):
        cut(model, Cut(plan, (0, 1, 2, 3), {f"{place}.first.weight": first}))
    with pytest.raises(ValueError, match=r"no place for blocks\.9\.x"):
        cut(model, Cut(plan, (0, 1, 2, 3), {**everything, "blocks.9.x": first}))
    with pytest.raises(ValueError, match=r"shape \(3, 32\), its place \(32, 3\)"):
        cut(model, Cut(plan, (0, 1, 2, 3), {**everything, f"{place}.second.weight": first}))


def test_buffers_are_what_a_reload_computes(architecture, tiny_model, ids, tmp_path):
    """The input model was cast, its frequencies with it; a cut and its folder are float32 there."""
    model = tiny_model(architecture).bfloat16()
    for smaller in (keep(model, [1, 3]), share(model, 1, [2])):
        smaller.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        buffers = dict(again.named_buffers())
        assert buffers.keys() == dict(smaller.named_buffers()).keys()
        for name, buffer in smaller.named_buffers():
            if "embed_scale" not in name:  # is rounded to the weights' precision where it is used
                assert buffer.dtype == buffers[name].dtype, name
            assert torch.equal(buffer.to(buffers[name].dtype), buffers[name]), name
        assert_same(logits(smaller, ids), logits(again, ids), tolerance=0)


def test_a_cut_forgets_the_long_input_that_its_source_saw(tiny_model):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = tiny_model("llama", max_position_embeddings=32, rope_parameters=rope)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    logits(model, torch.ones(1, 60, dtype=torch.long))
    assert not torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert torch.equal(keep(model, [0, 2]).model.rotary_emb.inv_freq, frequencies)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_name(tiny_model, value):
    model = tiny_model("llama")
    name = "mlp.down_proj.weight"
    broken = model.model.layers[2].mlp.down_proj.weight.detach().clone()
    broken[3, 4] = value
    change = Cut(plan_of(model).keep([0, 2]), (0, 2), {f"blocks.1.{name}": broken})
    for share_memory in (False, True):
        with pytest.raises(ValueError, match=rf"layers\.1\.{name} has values .* not finite"):
            cut(model, change, share_memory=share_memory)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.copy_(broken)
    with pytest.raises(ValueError, match=rf"layers\.1\.{name} has values .* not finite"):
        keep(model, [0, 2])
    keep(model, [0, 1, 3])  # what goes may be anything
