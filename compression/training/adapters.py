"""What of a model is trained, and how it is put back: adapters that are merged at the end, or
parameters in place."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.modeling_foldstack import Borrowed, is_linear, linear_shape
from foldstack.compression.structure.surgery import BUILDING, plan_of

Survivors = Literal["lora_merge", "none", "full"]

_NAME = "default"

# Up to this many weights, W + s B A is made in each forward pass: two thin products with B and A
# would cost more time than their arithmetic, above all on a CPU. On a large linear it is the other
# way round, and the sum would have to be kept for the backward pass.
FOLD_UP_TO = 2**20


class FoldingLora(PeftLinear):
    """peft's LoRA linear, computed as one product with W + s B A where that is faster."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **settings: Any) -> None:
        super().__init__(base_layer, adapter_name, **settings)
        # peft decides this once for the whole model, but a model may hold linears of both kinds.
        self.fan_in_fan_out = self.is_target_conv_1d_layer = type(base_layer) is Conv1D
        self.has_dropout = isinstance(self.lora_dropout[adapter_name], nn.Dropout)

    @property
    def is_folding(self) -> bool:
        """True where a forward pass in training makes W + s B A."""
        base: Any = self.get_base_layer()
        return not self.has_dropout and base.weight.numel() <= FOLD_UP_TO

    @property
    def weight(self) -> Tensor:
        """W + s B A as W is stored: what a linear that uses slices of this one takes."""
        base: Any = self.get_base_layer()
        if self.merged:
            merged: Tensor = base.weight
            return merged
        with torch.autocast(base.weight.device.type, enabled=False):
            weight = self._folded(base)
        return weight.T if self.fan_in_fan_out else weight

    def forward(self, x: Tensor, *args: Any, **settings: Any) -> Tensor:
        base: Any = self.get_base_layer()
        if self.merged or not self.is_folding:
            result: Tensor = super().forward(x, *args, **settings)
            return result
        with torch.autocast(x.device.type, enabled=False):
            weight = self._folded(base)
        return F.linear(x, weight, base.bias)

    def _folded(self, base: Any) -> Tensor:
        """W + s B A as (out, in)."""
        first: Any = self.lora_A[_NAME].weight
        second: Any = self.lora_B[_NAME].weight
        weight = base.weight.T if self.fan_in_fan_out else base.weight
        return torch.addmm(weight.to(first), second, first, alpha=self.scaling[_NAME])


def linear_names(model: PreTrainedModel) -> list[str]:
    """Full names of the linears stored in the blocks of `model`; one shared by positions is one.

    A linear of which nothing is stored (all its slices are others') is none.
    """
    blocks = architecture_of(model).blocks(model)
    (path,) = [name for name, module in model.named_modules() if module is blocks]
    return [
        f"{path}.{name}"
        for name, module in blocks.named_modules()
        if is_linear(module) and all(linear_shape(module))
    ]


class Adapters:
    """A model opened for training: adapters on its linears, its vectors trained in place.

    Virtual blocks (see `plan.BlockPlan.is_virtual`) train in place in any case: the adapters that
    belong to their structure, their gains, biases and norms.

    Args:
        train_vectors: also train the norms and every other 1-d parameter, except of the embeddings.
        in_float32: hold the whole model in float32 meanwhile, not just what is trained.
        survivors: what trains of the other blocks; full trains their linears in place, none leaves
            all but the virtual blocks as it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rank: int,
        alpha: int,
        dropout: float,
        train_vectors: bool,
        in_float32: bool,
        survivors: Survivors = "lora_merge",
    ) -> None:
        self.model = model
        self._was_trainable = {p: p.requires_grad for p in model.parameters()}
        self._was_training = model.training
        model.eval()  # the dropout of the adapters is the only one
        self.virtual = _of_virtual_blocks(model)
        linears = [name for name in linear_names(model) if f"{name}.weight" not in self.virtual]
        self.vectors = {}
        if train_vectors and survivors != "none":
            found = _vectors(model)
            self.vectors = {name: found[name] for name in found if name not in self.virtual}
        self.weights: dict[str, nn.Parameter] = {}
        if survivors == "full":
            parameters = dict(model.named_parameters())
            self.weights = {f"{name}.weight": parameters[f"{name}.weight"] for name in linears}
        in_place = {**self.weights, **self.vectors, **self.virtual}
        self._values_before = {name: p.detach().clone() for name, p in in_place.items()}
        self._stored_dtypes = {
            p: p.dtype
            for p in (model.parameters() if in_float32 else in_place.values())
            if p.dtype in (torch.float16, torch.bfloat16)
        }
        for parameter in self._stored_dtypes:
            parameter.data = parameter.data.float()
        model.requires_grad_(False)
        self._peft: PeftModel | None = None
        if survivors == "lora_merge" and linears:
            with BUILDING:  # while another thread builds a model, nothing gets first values
                self._peft = _attach(model, linears, rank, alpha, dropout)
        self.matrices = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.matrices |= self.weights
        for parameter in in_place.values():
            parameter.requires_grad_(True)
        if dropout > 0:
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.lora_dropout.train()

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {**self.matrices, **self.vectors, **self.virtual}

    @property
    def num_bytes(self) -> int:
        """Of what training holds besides activations: the weights, what is needed to undo it, the
        gradients and AdamW's two moments, and W + s B A of every use of a linear until the backward
        pass. What head-wise sharing puts together of slices is left out."""
        in_place = sum(tensor.nbytes for tensor in self._values_before.values())
        trained = sum(parameter.nbytes for parameter in self.trainable.values())
        folded = sum(4 * weight.numel() for weight in self._folded())
        return sum(p.nbytes for p in self.model.parameters()) + in_place + 3 * trained + folded

    def _folded(self) -> Iterator[Tensor]:
        """The weights W that fold in a forward pass, once for each block that uses them."""
        for module in self.model.modules():
            used = module.target if isinstance(module, Borrowed) else module
            if isinstance(used, FoldingLora) and used.is_folding:
                base: Any = used.get_base_layer()
                yield base.weight

    def merge(self) -> None:
        """Add the adapters to the weights: the model is again what it was, with other values."""
        if self._peft is not None:
            self._peft.merge_and_unload()
        self._close()

    def discard(self) -> None:
        """Undo everything: the model is again what it was."""
        if self._peft is not None:
            self._peft.unload()
        in_place = {**self.weights, **self.vectors, **self.virtual}
        for name, parameter in in_place.items():
            parameter.data.copy_(self._values_before[name])
        self._close()

    def _close(self) -> None:
        for parameter, dtype in self._stored_dtypes.items():
            parameter.data = parameter.data.to(dtype)
        for parameter, flag in self._was_trainable.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        self.model.train(self._was_training)


def _of_virtual_blocks(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    blocks = architecture_of(model).blocks(model)
    virtual = {
        parameter
        for block, block_plan in zip(blocks, plan_of(model).blocks, strict=True)
        if block_plan.is_virtual
        for parameter in block.parameters()
    }
    return {name: p for name, p in model.named_parameters() if p in virtual}


def _vectors(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    excluded = {parameter for module in ends for parameter in module.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and parameter not in excluded
    }


def _attach(
    model: PreTrainedModel, names: list[str], rank: int, alpha: int, dropout: float
) -> PeftModel:
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    config._register_custom_module({nn.Linear: FoldingLora, Conv1D: FoldingLora})
    with warnings.catch_warnings():
        # peft asks transformers for a name that transformers has deprecated.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        # peft draws first values in memory, and only then puts them where the model is.
        is_without_memory = all(parameter.is_meta for parameter in model.parameters())
        with no_init_weights() if is_without_memory else nullcontext():
            wrapped = get_peft_model(model, config)
    # peft matches names by their ends too, and so could take more than was named.
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert sorted(adapted) == sorted(names), set(adapted) ^ set(names)
    return wrapped
