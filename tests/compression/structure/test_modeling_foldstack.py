"""What stock code, tools and serving engines may ask of a portable model, for every structure."""

import copy
import inspect
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from foldstack.compression.structure import modeling_foldstack
from foldstack.compression.structure.modeling_foldstack import (
    NEWEST_TRANSFORMERS,
    FoldstackConfig,
    FoldstackForCausalLM,
    FoldstackModel,
    LentLinear,
    NarrowAttention,
    OneStepNorm,
    SlicedLinear,
    argument_names,
    cache_name,
    is_linear,
    take_cache,
    version_warning,
)

FAMILIES = ["llama_tied", "gpt2", "opt"]
FORMS = modeling_foldstack._LINEAR_FORMS
Maker = Callable[..., FoldstackForCausalLM]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 97, (2, 12), generator=torch.Generator().manual_seed(3))


def logits(model: Any, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **settings).logits


def attends(model: FoldstackForCausalLM) -> list[bool]:
    return [block["kind"] not in ("ffn", "swiglu") for block in model.config.block_plans]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_is_missing_from_what_is_recorded(
    structure: str, family: str, structured: Maker, ids: torch.Tensor
) -> None:
    model = structured(structure, family)
    model.set_attn_implementation("eager")
    out = model(ids, output_hidden_states=True, output_attentions=True)
    blocks = len(model.config.block_plans)
    assert len(out.hidden_states) == blocks + 1
    assert len(out.attentions) == sum(attends(model))
    assert all(weights.shape == (2, 4, 12, 12) for weights in out.attentions)
    # Each block's output is what enters the next one, not a neighbour's.
    entered: list[torch.Tensor] = []
    blocks_of: Any = model.stock.get_submodule(model.config.blocks_path)
    for block in blocks_of:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    again = model(ids, output_hidden_states=True)
    for state, seen in zip(again.hidden_states[:-1], entered, strict=True):
        assert torch.equal(state, seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_model_gives_the_hidden_states_that_the_head_reads(
    structure: str, family: str, structured: Maker, ids: torch.Tensor, tmp_path: Any
) -> None:
    model = structured(structure, family)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert type(model.base_model).__name__.removesuffix("Model") in type(model.stock).__name__
    torch.testing.assert_close(model.get_output_embeddings()(states), logits(model, ids))

    model.save_pretrained(tmp_path)
    loaded, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is FoldstackModel
    assert not loading["missing_keys"]
    first = loaded.eval()(ids, use_cache=False, return_dict=False)[0]
    assert torch.equal(first, states)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_added_saved_and_loaded(
    structure: str, family: str, structured: Maker, ids: torch.Tensor, tmp_path: Any
) -> None:
    model = structured(structure, family)
    before = logits(model, ids)
    model.resize_token_embeddings(103, mean_resizing=False)
    assert model.config.vocab_size == model.config.get_text_config().vocab_size == 103
    torch.testing.assert_close(logits(model, ids)[..., :97], before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_buffers_of_a_model_without_memory_come_from_init(
    structure: str, structured: Maker
) -> None:
    """transformers builds on the meta device and initialises what no file gives."""
    config = structured(structure).config
    made = FoldstackForCausalLM(copy.deepcopy(config))
    with torch.device("meta"):
        empty = FoldstackForCausalLM(copy.deepcopy(config))
    empty.to_empty(device="cpu").init_weights()
    found = dict(empty.named_buffers())
    assert found.keys() == dict(made.named_buffers()).keys()
    for name, buffer in made.named_buffers():
        assert torch.equal(found[name], buffer), name


def test_the_config_is_flat_and_answers_for_the_stock_one(
    structure: str, structured: Maker, tmp_path: Any
) -> None:
    model = structured(structure, "gemma3_text") if structure != "sliced" else structured(structure)
    config = model.config
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["base_model_type"] == config.base_config.model_type
    nested = [name for name, value in stored.items() if isinstance(value, dict)]
    assert not [name for name in nested if "model_type" in stored[name]]
    assert stored["num_attention_heads"] == config.num_attention_heads == 4

    text = config.get_text_config()
    assert text is config
    assert text.num_hidden_layers == sum(attends(model))
    if (
        types := config.base_config.layer_types if hasattr(config, "layer_types") else None
    ) is not None:
        assert text.layer_types == [t for t, a in zip(types, attends(model), strict=True) if a]
    text.pad_token_id = 7
    text._attn_implementation = "eager"
    assert config.pad_token_id == config.base_config.pad_token_id == 7
    assert model.stock.config._attn_implementation == "eager"

    again = FoldstackConfig.from_pretrained(tmp_path)
    again.pad_token_id = 7
    assert again.base_config.to_dict() == config.base_config.to_dict() | {
        "architectures": again.base_config.architectures
    }
    assert copy.deepcopy(again) == again
    assert not isinstance(again.plan, PreTrainedConfig)


def test_folders_with_a_nested_config_still_load(
    structure: str, structured: Maker, ids: torch.Tensor, tmp_path: Any
) -> None:
    """What foldstack 0.1 wrote: the stock config as one entry."""
    model = structured(structure)
    model.save_pretrained(tmp_path)
    flat = json.loads((tmp_path / "config.json").read_text())
    ours = ("architectures", "model_type", "plan", "blocks_path", "dtype", "transformers_version")
    stock = {name: value for name, value in flat.items() if name not in (*ours, "base_model_type")}
    nested = {name: flat[name] for name in ours} | {
        "base_config": stock | {"model_type": flat["base_model_type"]}
    }
    (tmp_path / "config.json").write_text(json.dumps(nested))
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_linears_that_store_nothing_are_no_modules_and_old_files_that_have_them_load(
    structured: Maker, ids: torch.Tensor, tmp_path: Any
) -> None:
    model = structured("shared_heads")
    assert all(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    empty = [f"{n}.stored.weight" for n, m in model.named_modules() if getattr(m, "own", 1) == []]
    assert empty
    # vLLM passes over what fits these, and computed with memory that nobody had filled.
    ignored = model._keys_to_ignore_on_load_unexpected
    assert not [name for name in state for pattern in ignored if re.search(pattern, name)]
    state |= {name: torch.zeros(0, 32) for name in empty}
    from safetensors.torch import save_file

    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, loading = FoldstackForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["unexpected_keys"]
    assert torch.equal(logits(again.eval(), ids), logits(model, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_built_otherwise_is_of_another_class(
    structure: str, family: str, structured: Maker
) -> None:
    """Engines look at one instance of a class and rewrite all of them."""
    seen: dict[type, list[tuple[str, str]]] = {}
    for module in structured(structure, family).modules():
        if list(module.children()) and not isinstance(module, nn.ModuleList | nn.Sequential):
            linears = [
                (name, type(child).__name__)
                for name, child in module.named_children()
                if is_linear(child) or isinstance(child, FORMS)
            ]
            assert seen.setdefault(type(module), linears) == linears, type(module)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_elsewhere_are_fetched_by_their_own_module(
    structure: str, family: str, structured: Maker, ids: torch.Tensor, tmp_path: Any
) -> None:
    """accelerate's offloading to CPU and disk hangs on the forward of each module."""
    model = structured(structure, family)
    expected = logits(model, ids)
    on_cpu = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits(on_cpu, ids), expected)
    on_disk = accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits(on_disk, ids), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize(
    ("family", "names"),
    [("llama", ()), ("gpt2", ()), ("opt", ("k_proj", "fc2"))],
)
def test_adapters_on_linears_have_an_effect_and_merge(
    structure: str, family: str, names: tuple[str, ...], structured: Maker, ids: torch.Tensor
) -> None:
    """By name, peft refuses what stands for the linear: the names of those inside are asked for."""
    model = structured(structure, family)
    before = logits(model, ids)
    targets = model.stored_linears(*names) if names else "all-linear"
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    parameters = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped.eval()
    adapted = logits(wrapped, ids)
    assert (adapted - before).abs().max() > 1e-3
    wrapped(ids, labels=ids).loss.backward()
    idle = [name for name, p in parameters.items() if p.grad is None or not p.grad.abs().sum()]
    assert not idle
    if names:
        assert len(parameters) == 2 * len(targets)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_gradients_are_the_same_where_blocks_are_computed_again(
    structure: str, family: str, structured: Maker, ids: torch.Tensor
) -> None:
    """Gradient checkpointing, TRL's default: forward runs again, and none of the block's hooks."""
    model = structured(structure, family).train()
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_linears_that_no_block_has_are_named(structured: Maker) -> None:
    with pytest.raises(ValueError, match="'down' is no module of this model"):
        structured("factored").stored_linears("q_proj", "down")


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_linear_in_slices_computes_the_same_whichever_way_it_goes(
    family: str, structured: Maker, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {"attention_bias": True} if family == "llama" else {}
    model = structured("shared_heads", family, **overrides)
    expected = logits(model, ids)
    monkeypatch.setattr(SlicedLinear, "FEW", 100)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(modeling_foldstack, "_is_plain", lambda _: False)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)


def test_hooks_on_any_linear_are_called(
    structure: str, structured: Maker, ids: torch.Tensor
) -> None:
    """Products are made without the call of a linear only where nobody watches it."""
    model = structured(structure)
    expected = logits(model, ids)
    linears = {module: name for name, module in model.named_modules() if is_linear(module)}
    seen = set()
    for module in linears:
        module.register_forward_hook(lambda linear, _, __: seen.add(linears[linear]))
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
    assert seen == set(linears.values())


def test_norms_in_one_step_are_the_stock_ones(architecture: str, tiny_model: Any) -> None:
    """Where a family's norm is not what its name stands for, every structure computes nonsense."""
    stock = tiny_model(architecture)
    norms = [m for m in stock.modules() if type(m).__name__ in modeling_foldstack._STOCK_NORMS]
    assert norms or architecture in ("gpt2", "opt")
    for norm in norms[:2]:
        x = 3 * torch.randn(2, 5, len(norm.weight))
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float64, 0)):
            taken = copy.deepcopy(norm).to(dtype)
            expected = taken(x.to(dtype))
            OneStepNorm.take_over(taken)
            found = taken(x.to(dtype))
            assert found.dtype == expected.dtype
            assert isinstance(taken, type(norm))
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            with torch.no_grad():  # a token that is decoded
                one, of_all = taken(x[:1, :1].to(dtype)), expected[:1, :1]
            torch.testing.assert_close(one, of_all, rtol=tolerance, atol=tolerance)


class _Called(nn.Module):
    """Stock modules with the arguments of older and newer versions."""

    def forward(self, hidden_states: Any, cache: Any = None, attention_mask: Any = None) -> None:
        raise NotImplementedError


def test_the_cache_is_found_under_every_name_that_it_has_had() -> None:
    assert argument_names(_Called) == ("hidden_states", "cache", "attention_mask")
    assert cache_name(_Called) == "cache"
    paged, kept = object(), object()
    for name in ("past_key_values", "past_key_value", "layer_past"):
        arguments = {name: kept, "cache": None}
        assert take_cache(arguments, "cache") is kept
        assert arguments == {}
    # Before 5.24 `cache` is a paged cache, which the attention function takes for itself.
    arguments = {"past_key_values": kept, "cache": paged}
    assert take_cache(arguments, "past_key_values") is kept
    assert arguments == {"cache": paged}


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_heads_take_the_cache_by_position_and_by_any_name(
    family: str, structured: Maker, ids: torch.Tensor
) -> None:
    attention: Any = next(
        m for m in structured("narrow_heads", family).modules() if isinstance(m, NarrowAttention)
    )
    hidden = torch.randn(1, 3, 32)
    rotary = (torch.ones(1, 3, 4), torch.zeros(1, 3, 4)) if family == "llama_tied" else None
    attention.layer_idx = 0
    for name in ("cache", "past_key_values", "past_key_value"):
        attention._cache_name = "cache" if name == "cache" else "past_key_values"
        cache = DynamicCache()
        attention(hidden, position_embeddings=rotary, **{name: cache})
        assert cache.get_seq_length() == 3, name
    cache = DynamicCache()
    attention._argument_names = ("past_key_values", "attention_mask")
    attention(hidden, cache, None, position_embeddings=rotary)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_heads_are_padded_for_caches_and_engines_of_one_width(
    family: str, structured: Maker, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = structured("narrow_heads", family)
    expected = logits(model, ids)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def engine(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        assert {t.shape[-1] for t in (query, key, value)} == {8}  # as config.head_dim says
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        output, _ = attend(module, query, key, value, mask, is_causal=True, **settings)
        is_ours = isinstance(module, NarrowAttention)
        return output.flatten(0, 1).flatten(1) if is_ours else output, None  # [tokens, heads]

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "an_engine", engine)
    model.stock.config._attn_implementation = "an_engine"
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
    model.stock.config._attn_implementation = "sdpa"

    class Filled(CacheLayerMixin):
        """A layer that knew its widths before it saw a key, as torch.export wants it."""

        def __init__(self) -> None:
            super().__init__()
            self.keys = self.values = torch.zeros(2, self_heads, 0, 8)
            self.is_initialized = True

        def lazy_initialization(self, *_: Any) -> None: ...

        def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> Any:
            self.keys = torch.cat([self.keys, keys], -2)
            self.values = torch.cat([self.values, values], -2)
            return self.keys, self.values

        def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
            length = query_length if isinstance(query_length, int) else len(query_length)
            return self.keys.shape[-2] + length, 0

        def get_seq_length(self, *_: Any) -> int:
            return int(self.keys.shape[-2])

        def get_max_length(self) -> int:
            return -1

        get_max_cache_shape = get_max_length

    self_heads = getattr(model.config, "num_key_value_heads", 4)
    cache = Cache(layers=[Filled() for _ in range(4)])
    with torch.no_grad():
        first = model(ids[:, :9], past_key_values=cache, use_cache=True).logits
        second = model(ids[:, 9:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=1e-5, atol=1e-5)


def test_engines_cannot_fuse_what_others_borrow(structure: str, structured: Maker) -> None:
    """An engine names an attention function of its own before it builds the model."""
    config = copy.deepcopy(structured(structure).config)
    plain = FoldstackModel(copy.deepcopy(config))
    config.get_text_config()._attn_implementation = "an_engine"
    with pytest.MonkeyPatch.context() as patch:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "an_engine", sdpa)
        served = FoldstackModel(config)
    assert served.state_dict().keys() == plain.state_dict().keys()
    lent = sum(isinstance(module, LentLinear) for module in served.modules())
    whole = {"shared_blocks": 7, "scaled_outputs": 7, "virtual_blocks": 7}
    assert lent == (whole | {"shared_basis": 1, "shared_heads": 8}).get(structure, 0)
    assert not any(isinstance(module, LentLinear) for module in plain.modules())


@pytest.mark.parametrize("structure", ["shared_heads", "narrow_heads", "light_first"])
def test_one_graph_holds_the_whole_model(
    structure: str, structured: Maker, ids: torch.Tensor
) -> None:
    model = structured(structure)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids))


def test_a_pickled_model_finds_its_classes_in_another_process(
    structure: str, structured: Maker, ids: torch.Tensor
) -> None:
    """Most of them are made as they are needed, and those of a folder's code are under no path
    until transformers was asked for it."""
    model = structured(structure)
    pickled = pickle.dumps(model)
    assert pickled.index(b"init_hf_modules") < pickled.index(b"import_module")
    assert torch.equal(logits(pickle.loads(pickled), ids), logits(model, ids))


def test_an_untested_version_says_so() -> None:
    newest = ".".join(map(str, NEWEST_TRANSFORMERS))
    assert version_warning(transformers.__version__) is None
    assert version_warning(f"{newest}.3") is None
    for version in ("4.57.1", "5.9.9", f"{NEWEST_TRANSFORMERS[0]}.{NEWEST_TRANSFORMERS[1] + 1}.0"):
        said = version_warning(version)
        assert said is not None
        assert f"5.10 to {newest}, and this is {version}: compare" in said


def test_engines_find_the_call_of_the_attention_function_in_forward() -> None:
    """vLLM reads the source of `forward`, and refuses a block in which the call is not there."""
    lookup = "ALL_ATTENTION_FUNCTIONS.get_interface"
    classes = [c for c in vars(modeling_foldstack).values() if isinstance(c, type)]
    attends = [c for c in classes if c.__module__ == modeling_foldstack.__name__
               and lookup in inspect.getsource(c)]  # fmt: skip
    assert attends
    for found in attends:
        forward = inspect.getsource(found.forward)  # type: ignore[attr-defined]
        assert forward.count(lookup) == inspect.getsource(found).count(lookup) == 1
        assert "scaling=self.scaling" in forward
