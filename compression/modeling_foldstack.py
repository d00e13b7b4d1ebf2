"""A compressed decoder: a stock Hugging Face model whose blocks were restructured after a plan.

This file is copied beside the weights of every portable checkpoint, so it needs nothing but torch
and transformers: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads the
folder where foldstack is not installed. It is the only interpreter of a plan there is; `surgery.py`
uses it too.

Each stored tensor exists once. A position that uses another's weights holds a `Borrowed` module,
which has no parameters and looks the owner's module up when it is called; so nothing has to be
tied, and an adapter put on the owner (peft) is at once the adapter of every borrower.
"""

import copy
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec

ATTENTION_FREE = ("ffn", "swiglu")


class FoldstackConfig(PreTrainedConfig):
    """The stock config of the executed depth, and the plan that restructures its blocks."""

    model_type = "foldstack"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "base_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    def __init__(
        self,
        base_config: dict[str, Any] | PreTrainedConfig | None = None,
        plan: dict[str, Any] | None = None,
        blocks_path: str = "model.layers",
        **kwargs: Any,
    ) -> None:
        self.base_config: Any = base_config
        self.plan = plan
        self.blocks_path = blocks_path
        super().__init__(**kwargs)

    @property
    def block_plans(self) -> list[dict[str, Any]]:
        return (self.plan or {}).get("blocks", [])

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The stock config as a KV cache must see it: attention-free blocks have no entry."""
        attends = [block["kind"] not in ATTENTION_FREE for block in self.block_plans]
        if all(attends):
            return self.base_config
        seen_by_cache = copy.deepcopy(self.base_config)
        layer_types = getattr(self.base_config, "layer_types", None)
        seen_by_cache.num_hidden_layers = sum(attends)
        if layer_types is not None:
            seen_by_cache.layer_types = [
                t for t, has in zip(layer_types, attends, strict=True) if has
            ]
        return seen_by_cache

    # What generic tools (lm-eval, generation, serving) read from a causal model's config.
    @property
    def vocab_size(self) -> int:
        return self.base_config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.base_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.base_config.num_hidden_layers

    @property
    def max_position_embeddings(self) -> int:
        return self.base_config.max_position_embeddings


class Borrowed(nn.Module):
    """Stands where a position uses a module stored elsewhere; has no parameters of its own."""

    def __init__(self, holder: nn.Module, name: str) -> None:
        super().__init__()
        # In a tuple, nn.Module does not see the holder and register its parameters again.
        self._holder = (holder,)
        self._name = name

    @property
    def target(self) -> nn.Module:
        """The module itself, found anew at each call: it may have been wrapped by an adapter."""
        return getattr(self._holder[0], self._name)

    @property
    def weight(self) -> Any:
        return self.target.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.target(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{type(self._holder[0]).__name__}.{self._name}"


class LowRankLinear(nn.Module):
    """y = second(first(x)): a linear of rank `rank`; the bias, if any, sits on `second`."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.first: nn.Module = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class _Ffn(nn.Module):
    """W2 relu(W1 x + b1) + b2."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.relu(self.up(x)))


class _SwiGlu(nn.Module):
    """W_down(silu(W_gate x) * W_up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class AttentionFreeBlock(nn.Module):
    """A light network in place of a run of blocks: no attention, no norm, no residual.

    Source: LLM-Streamline, arXiv 2403.19135, section 3 (FFN and SwiGLU replacements).
    """

    def __init__(self, kind: str, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        network = {"ffn": _Ffn, "swiglu": _SwiGlu}[kind]
        self.ffn = network(hidden_size, intermediate_size)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.ffn(hidden_states)


def restructure(
    model: PreTrainedModel, block_plans: list[dict[str, Any]], blocks_path: str
) -> None:
    """Change the blocks of a stock model of the executed depth, in place, as the plan says."""
    blocks = model.get_submodule(blocks_path)
    assert isinstance(blocks, nn.ModuleList)
    assert len(blocks) == len(block_plans)
    attention_position = 0
    for position, block_plan in enumerate(block_plans):
        if block_plan["kind"] in ATTENTION_FREE:
            blocks[position] = AttentionFreeBlock(
                block_plan["kind"], model.config.hidden_size, block_plan["intermediate_size"]
            )
            continue
        for module in blocks[position].modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = attention_position  # type: ignore[assignment]  # in the KV cache
        attention_position += 1
        for name, form in block_plan["linears"].items():
            _factor_linear(blocks, position, name, form)
        if block_plan["weights_of"] is not None:
            _borrow_linears(blocks[block_plan["weights_of"]], blocks[position])


def _split(path: str) -> tuple[str, str]:
    parent, _, name = path.rpartition(".")
    return parent, name


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear and for transformers' Conv1D (GPT-2), whose weight is transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear or a Conv1D."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)


def _factor_linear(blocks: nn.ModuleList, position: int, name: str, form: dict[str, Any]) -> None:
    parent_path, attribute = _split(name)
    parent = blocks[position].get_submodule(parent_path)
    dense = getattr(parent, attribute)
    out_features, in_features = linear_shape(dense)
    factored = LowRankLinear(in_features, out_features, form["rank"], dense.bias is not None)
    if form.get("basis_of") is not None:
        holder = blocks[form["basis_of"]].get_submodule(name)
        factored.first = Borrowed(holder, "first")
    setattr(parent, attribute, factored)


def _borrow_linears(owner: nn.Module, borrower: nn.Module) -> None:
    linears = [
        name
        for name, module in owner.named_modules()
        if isinstance(module, LowRankLinear)
        or (is_linear(module) and not _inside_low_rank(owner, name))
    ]
    for name in linears:
        parent_path, attribute = _split(name)
        holder = owner.get_submodule(parent_path)
        setattr(borrower.get_submodule(parent_path), attribute, Borrowed(holder, attribute))


def _inside_low_rank(block: nn.Module, name: str) -> bool:
    return isinstance(block.get_submodule(_split(name)[0]), LowRankLinear)


class FoldstackForCausalLM(PreTrainedModel, GenerationMixin):
    """A stock causal model whose blocks were restructured after `config.plan`."""

    config_class = FoldstackConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: FoldstackConfig) -> None:
        super().__init__(config)
        stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.base_config)]
        self.model = stock_class(config.base_config)
        restructure(self.model, config.block_plans, config.blocks_path)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.set_output_embeddings(value)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.model.prepare_inputs_for_generation(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """The stock model's forward, on a cache that has entries for the attending blocks alone."""
        wants_cache = self.model.config.use_cache if use_cache is None else use_cache
        if wants_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


AutoConfig.register(FoldstackConfig.model_type, FoldstackConfig, exist_ok=True)
AutoModelForCausalLM.register(FoldstackConfig, FoldstackForCausalLM, exist_ok=True)
