"""A residual stream in another basis at each link, with only the leading directions kept.

RMSN(x Q) Q^T = RMSN(x) for an orthogonal Q: once a norm's gain is part of the linears behind it, a
network is the same in any basis of its residual stream (SliceGPT, arXiv 2401.15024, theorem 1), and
directions in which the signal has little energy can go. A LayerNorm is such a norm of a centred
signal, so everything that writes to the residual stream is centred first.

A link is a place between two sub-layers: 0 is what the embeddings write, 2 l + 1 what the MLP of
block l reads, 2 l + 2 what leaves block l. A basis is a matrix with one column per kept direction,
in the coordinates of the model as it came. What leaves the last block is in those coordinates
again, so the final norm and the head stay as they are.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.statistics.kept_pass import STATES, KeptPass
from foldstack.compression.statistics.stream import BlockStream
from foldstack.compression.storage.mapped_memory import release
from foldstack.compression.storage.spool import Spool
from foldstack.compression.structure.architectures import architecture_of, base_config_of, stock_of
from foldstack.compression.structure.modeling_foldstack import (
    PRE_NORM_NAMES,
    SlicedBlock,
    sliced_block,
)
from foldstack.compression.structure.surgery import as_stored

Basis = Float64[Tensor, "hidden _"]
States = Float[Tensor, "_ tokens hidden"]
Choose = Callable[[int, Float64[Tensor, "hidden hidden"]], Basis]
"""The basis of a link, given the second moments of the signal there."""


def check_sliceable(model: PreTrainedModel) -> None:
    """Raises InputError when a change of the residual stream's basis would change the function."""
    config = base_config_of(model.config)
    reason = None
    if any(hasattr(b, "post_feedforward_layernorm") for b in architecture_of(model).blocks(model)):
        reason = "it norms what attention and the MLP add to it, each coordinate by a gain"
    elif not getattr(config, "do_layer_norm_before", True):
        reason = "it norms behind the residual links instead of before attention and the MLP"
    elif getattr(config, "_remove_final_layer_norm", False):
        reason = "it has no norm before its head"
    elif getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        reason = "it projects its embeddings to the hidden size"
    elif not getattr(config, "enable_bias", True):
        reason = "its linears have no biases to hold those of its norms"
    elif getattr(config, "add_cross_attention", False):
        reason = "it has cross-attention"
    if reason is not None:
        raise InputError(
            f"the residual stream of this {config.model_type} model cannot be sliced: {reason}"
        )


class FusedBlock:
    """One block without gains in its norms, in float64, ready for any bases.

    Its function is that of the model's block (on a centred signal, where the norms centre theirs).
    """

    def __init__(self, model: PreTrainedModel, position: int) -> None:
        self.architecture = architecture_of(model)
        self.stock: Any = self.architecture.blocks(model)[position]
        names = next(names for names in PRE_NORM_NAMES if hasattr(self.stock, names[0]))
        norms = dict(zip(("attention_input", "mlp_input"), names, strict=True))
        self.others = {
            name: tensor
            for name, tensor in self.stock.state_dict().items()
            if name.rpartition(".")[0] not in names
        }
        # Values whose own bias has gone to the output projection (narrow heads) send the norm's
        # after it: attention adds up to one, so a constant in all values is one in their mean.
        moved: Tensor | None = None
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        for site in self.architecture.linears:
            linear: Any = self.stock.get_submodule(site.name)
            weight = self.architecture.weight(linear).detach().to(model.device).double()
            bias: Any = None
            if linear.bias is not None:
                bias = linear.bias.detach().to(model.device).double()
            if site.reads in norms:
                gain, shift = _affine(model, self.stock.get_submodule(norms[site.reads]))
                constant = None if shift is None else weight @ shift
                if bias is None:
                    moved = constant
                elif constant is not None:
                    bias = bias + constant
                weight = weight * gain
            if site.reads == "attention_output" and moved is not None:
                bias = bias + weight @ moved
            if site.reads not in norms and centres(model):
                weight = weight - weight.mean(0)
                bias = None if bias is None else bias - bias.mean()
            self.weights[site.name] = weight
            if bias is not None:
                self.biases[site.name] = bias

    def tensors(self, entering: Basis, middle: Basis, leaving: Basis) -> dict[str, Tensor]:
        """All tensors of the sliced block by their names inside it; new ones are float64."""
        result = dict(self.others)
        reads = {"attention_input": entering, "mlp_input": middle}
        writes = {"attention_output": middle, "mlp_output": leaving}
        for site in self.architecture.linears:
            weight, bias = self.weights[site.name], self.biases.get(site.name)
            if site.reads in reads:
                weight = weight @ reads[site.reads]
            else:
                basis = writes[site.reads]
                weight = basis.T @ weight
                bias = None if bias is None else bias @ basis
            linear = self.stock.get_submodule(site.name)
            result[f"{site.name}.weight"] = self.architecture.stored_weight(linear, weight)
            if bias is not None:
                result[f"{site.name}.bias"] = bias
        result["attention_shortcut.weight"] = middle.T @ entering
        result["mlp_shortcut.weight"] = leaving.T @ middle
        return result

    def build(self, entering: Basis, middle: Basis, leaving: Basis) -> SlicedBlock:
        """The block that computes in these bases, in float32."""
        widths = {
            "entering": entering.shape[1],
            "middle": middle.shape[1],
            "leaving": leaving.shape[1],
        }
        block = sliced_block(copy.deepcopy(self.stock), widths, len(entering))
        block.load_state_dict(self.tensors(entering, middle, leaving))
        return block.to(entering.device).float().eval()


def centres(model: PreTrainedModel) -> bool:
    """Whether the norms of the model subtract the mean."""
    return isinstance(architecture_of(model).final_norm(model), nn.LayerNorm)


def _affine(model: PreTrainedModel, norm: Any) -> tuple[Tensor | float, Tensor | None]:
    """Gain and shift of a norm; no shift where it has none."""
    if norm.weight is None:
        return 1.0, None
    gain = norm.weight.detach().to(model.device).double()
    if base_config_of(model.config).model_type == "gemma":
        gain = 1 + gain
    shift = getattr(norm, "bias", None)
    return gain, None if shift is None else shift.detach().to(model.device).double()


def principal_basis(
    moments: Float64[Tensor, "hidden hidden"],
) -> tuple[Float64[Tensor, " hidden"], Float64[Tensor, "hidden hidden"]]:
    """Energies in descending order and the orthonormal directions that have them (equation 8)."""
    energies, directions = torch.linalg.eigh((moments + moments.T) / 2)
    return energies.flip(0).clamp_min(0), directions.flip(1)


def second_moments(
    batches: Iterable[States],
    device: torch.device | str = "cpu",
    *,
    skip_first_token: bool = False,
) -> Float64[Tensor, "hidden hidden"]:
    """Sum over all tokens of x^T x, not centred, in float64, on `device`."""
    total: Any = 0
    for states in batches:
        x = states[:, int(skip_first_token) :].to(device).flatten(0, -2).double()
        total = total + x.T @ x
    if not torch.isfinite(total).all():
        raise InputError("the residual stream must be finite on the calibration windows, it is not")
    moments: Tensor = total
    return moments


def sliced_tensors(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows tokens"],
    choose: Choose,
    *,
    dense_signal: bool = False,
    skip_first_token: bool = False,
    work: Path | None = None,
    progress: Callable[[int], None] = lambda _done: None,
) -> dict[str, Tensor]:
    """The tensors of the sliced model, named as in a `Cut`, link after link.

    `choose` sees the signal that the links sliced so far have left (algorithm of section 3.3 and of
    the released code), or that of the model as it came with `dense_signal`. Each block runs twice
    over all windows; between blocks only the signal lives, in the coordinates of the model. What a
    killed run has left in `work` is not done again.
    """
    slicing = _Slicing(model, windows, choose, dense_signal, skip_first_token, work)
    for position in range(slicing.num_blocks):
        if position >= slicing.stream.position:
            slicing.slice(position)
        progress(position + 1)
    return slicing.spool.tensors


class _Slicing:
    """The signal of a model that is sliced from the embeddings up, and what is sliced already."""

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Int[Tensor, "windows tokens"],
        choose: Choose,
        dense_signal: bool,
        skip_first_token: bool,
        work: Path | None,
    ) -> None:
        self.model, self.choose = model, choose
        self.dense_signal, self.skip_first_token = dense_signal, skip_first_token
        self.kept = KeptPass(None if work is None else work / "stream")
        self.stream = BlockStream(
            model, windows, folder=self.kept.folder, name=self.kept.name(STATES)
        )
        self.stream.put(_centred(h, centres(model)).float() for h in self.stream.batches())
        self.num_blocks = len(self.stream.blocks)
        width = self.stream.states.all.shape[-1]
        self.whole = torch.eye(width, dtype=torch.float64, device=model.device)
        self.bases = Spool(None if work is None else work / "bases")
        self.spool = Spool(None if work is None else work / "spool")
        self.stored, self.seen = self._chosen(0, self.stream.batches())
        """What the link at hand is stored in, and what the blocks behind it are calibrated in."""
        self.spool.part("embeddings", lambda: _embeddings(model, self.stored))
        self._resume()

    def _resume(self) -> None:
        """Stand where a killed run has stood, if what it has made is there."""
        position = self.kept.position
        links = range(2 * position + (position < self.num_blocks))
        has_bases = all(self.bases.has(f"link-{link}") for link in links)
        if not (has_bases and all(self.spool.has(f"block-{p}") for p in range(position))):
            self.kept.begin_anew()
            return
        for done in range(position):
            self.spool.part(f"block-{done}", dict)
        if position > 0:
            self.stream.resume(position)
            self.stored, self.seen = self._behind(position)

    def slice(self, position: int) -> None:
        """Slice the block before which the signal stands, and pass it."""
        stream, whole, entering = self.stream, self.whole, self.stored
        block = FusedBlock(self.model, position)
        attended = _middle_states(stream, block.build(self.seen, whole, whole), self.seen, position)
        middle, middle_seen = self._chosen(2 * position + 1, attended)
        running = block.build(self.seen, middle_seen, whole)
        with torch.no_grad():
            outputs = (stream.call(running, _in(self.seen, x), position) for x in stream.batches())
            stream.put(outputs, position + 1)
        self.stored, self.seen = self._behind(position + 1)
        of_block = partial(_named, self.model, position, block, (entering, middle, self.stored))
        self.spool.part(f"block-{position}", of_block)
        release(stream.blocks[position])
        self.kept.checkpoint(position + 1)

    def _behind(self, num_done: int) -> tuple[Basis, Basis]:
        """The bases of the link behind so many blocks."""
        if num_done == self.num_blocks:
            return self.whole, self.whole
        return self._chosen(2 * num_done, self.stream.batches())

    def _chosen(self, link: int, batches: Iterable[States]) -> tuple[Basis, Basis]:
        def found() -> dict[str, Tensor]:
            moments = second_moments(
                batches, self.model.device, skip_first_token=self.skip_first_token
            )
            return {"basis": self.choose(link, moments)}

        basis = self.bases.part(f"link-{link}", found)["basis"].to(self.whole.device)
        return basis, self.whole if self.dense_signal else basis


def _named(
    model: PreTrainedModel, position: int, block: FusedBlock, bases: tuple[Basis, Basis, Basis]
) -> dict[str, Tensor]:
    tensors = as_stored(block.tensors(*bases), model)
    return {f"blocks.{position}.{name}": tensor for name, tensor in tensors.items()}


def _centred(states: Tensor, centres: bool) -> Tensor:
    return states - states.mean(-1, keepdim=True) if centres else states


def _in(
    basis: Float64[Tensor, "hidden kept"], states: States
) -> Float[Tensor, "batch tokens kept"]:
    return states.to(basis.device) @ basis.to(states.dtype)


def _embeddings(model: PreTrainedModel, basis: Basis) -> dict[str, Tensor]:
    """Every table outside the blocks (tokens, learned positions), by its stock name."""
    inside = set(architecture_of(model).blocks(model).modules())
    return {
        f"{name}.weight": (_centred(module.weight.detach().double(), centres(model)) @ basis).to(
            module.weight.dtype
        )
        for name, module in stock_of(model).named_modules()
        if isinstance(module, nn.Embedding) and module not in inside
    }


class _Reached(Exception):
    """Ends a block's forward pass once its MLP's norm was reached."""


def _middle_states(
    stream: BlockStream, block: SlicedBlock, seen: Basis, position: int
) -> Iterator[States]:
    """What stands on the residual stream between attention and MLP, per batch."""
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])
        raise _Reached

    block.mlp_norm.register_forward_pre_hook(catch)
    for x in stream.batches():
        try:
            with torch.no_grad():
                stream.call(block, _in(seen, x), position)
        except _Reached:
            yield caught.pop()
