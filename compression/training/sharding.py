"""A model spread over the processes of a training: each block is put together where it computes.

FSDP2 of PyTorch (arXiv 2304.11277), one unit for each block. Blocks that use one another's weights
are one unit, or a block would find but a part of what it borrows. What trains outside of the blocks
is spread, too; embeddings and output projection are frozen and whole in every process, as the loss
is computed in slices of them.
"""

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.modeling_foldstack import Borrowed, SlicedLinear
from foldstack.compression.training.distillation import Blend, projection_of
from foldstack.compression.training.objective import Objective, Tail

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

FSDP_VERSION = "2"


def mesh_of(accelerator: "Accelerator") -> "DeviceMesh | None":
    """The processes among which a model is spread; None where each holds it whole.

    They are those of a launch with `accelerate launch --use_fsdp --fsdp_version 2`. On CPUs, where
    Accelerate knows no FSDP, the environment that it makes counts.

    Raises:
        InputError: FSDP of version 1.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked or accelerator.num_processes == 1:
        return None
    if os.environ.get("FSDP_VERSION", "1") != FSDP_VERSION:
        raise InputError(
            "recovery shares a model out by FSDP of version 2: launch it with --fsdp_version 2"
        )
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def check_agreement(digest: str, accelerator: "Accelerator") -> None:
    """Raises InputError where processes do not train the same: what came of it would be nothing."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    if len(set(gather_object([digest]))) > 1:
        raise InputError(
            "processes that recover a model together need the same model, windows and settings; "
            "theirs differ: load the whole model in each (FSDP_CPU_RAM_EFFICIENT_LOADING=false)"
        )


def spread_objective(
    student: PreTrainedModel,
    blend: Blend,
    teacher: PreTrainedModel | None,
    autocast_to: torch.dtype | None,
    tail: Tail | None,
    mesh: "DeviceMesh",
    device: torch.device,
) -> Objective:
    """The objective of copies of the models, whose blocks are spread; they themselves stay whole.

    It is this that has to be called: what is inside it is not put together before.
    """
    # It tells of blocks that are one linear. Nobody changes what a block gives in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    student = _spread_blocks(student, mesh, device)
    if teacher is not None:
        teacher = _spread_blocks(teacher, mesh, device, is_frozen=True)
        _spread_rest(teacher, mesh)
    objective = Objective(student, projection_of(student), blend, teacher, autocast_to, tail)
    _spread_rest(objective, mesh)
    return objective


def _spread_blocks(
    model: PreTrainedModel, mesh: "DeviceMesh", device: torch.device, is_frozen: bool = False
) -> PreTrainedModel:
    from torch.distributed.fsdp import fully_shard

    # New parameters on the old numbers: only what has been spread takes memory of its own.
    again = {
        id(parameter): nn.Parameter(
            parameter.detach(), requires_grad=parameter.requires_grad and not is_frozen
        )
        for parameter in model.parameters()
    }
    spread = copy.deepcopy(model, dict(again))
    for blocks in together(list(architecture_of(spread).blocks(spread))):
        fully_shard(blocks if len(blocks) > 1 else blocks[0], mesh=mesh)
    for parameter in _whole(spread):
        parameter.data = parameter.data.to(device)
    return spread


def _spread_rest(root: nn.Module, mesh: "DeviceMesh") -> None:
    """Spread what trains of `root` besides the blocks."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(root, mesh=mesh, ignored_params=set(_whole(root)))


def parts_of(
    spread: Objective, whole: PreTrainedModel, parameters: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """This process's parts of parameters of `whole`, whatever these are called by now."""
    parts = dict(spread.student.named_parameters())
    names = {parameter: name for name, parameter in whole.named_parameters()}
    return {name: parts[names[parameter]] for name, parameter in parameters.items()}


def take_back(trained: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Put the values of parts into the whole parameters of the same name; every process does."""
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        for name, parameter in parameters.items():
            part = trained[name]
            assert isinstance(part, DTensor), name
            parameter.copy_(part.full_tensor())


def together(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """`blocks` in groups, none of which uses weights that another stores; each once, in order."""
    first_of: dict[object, int] = {}  # by module and by parameter
    group = list(range(len(blocks)))

    def root(number: int) -> int:
        while group[number] != number:
            number = group[number]
        return number

    def join(one: int, other: int) -> None:
        low, high = sorted((root(one), root(other)))
        group[high] = low

    for number, block in enumerate(blocks):
        for thing in (*block.modules(), *block.parameters()):
            join(first_of.setdefault(thing, number), number)
    for number, block in enumerate(blocks):
        for module in block.modules():
            lenders = module.lenders if isinstance(module, SlicedLinear) else (module,)
            for lender in lenders:
                if isinstance(lender, Borrowed):
                    join(first_of[lender.holder], number)
    groups: dict[int, dict[nn.Module, None]] = {}
    for number, block in enumerate(blocks):
        groups.setdefault(root(number), {})[block] = None
    return [list(members) for members in groups.values()]


def _whole(module: nn.Module) -> Iterator[nn.Parameter]:
    """The frozen parameters that are not spread."""
    from torch.distributed.tensor import DTensor

    for parameter in module.parameters():
        if not parameter.requires_grad and not isinstance(parameter, DTensor):
            yield parameter
