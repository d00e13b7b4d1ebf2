"""Whether a config and the weights beside it describe one model; where the config errs, which way.

Asked before anything is loaded, of the weights' headers. transformers goes on with a warning where
names differ, fills what is missing with random numbers, and casts to what the config says.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from foldstack.compression.checkpoints.folder_files import LARGEST_BYTES, read_json_object
from foldstack.compression.checkpoints.stored_weights import StoredTensor, stored_tensors
from foldstack.compression.errors import InputError, refusing
from foldstack.compression.structure.architectures import architecture_of, base_config_of
from foldstack.compression.structure.surgery import build_on_meta

ROWS_AT_ONCE = 1 << 14
HALF = 0.5
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|\.inv_freq|\.position_ids)$")
"""Tensors of old files that no model reads any more: masks and frequencies, computed today."""

OF_A_CALL = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
"""Entries about what a call returns, and not about the model: they would break whoever calls."""


@dataclass(frozen=True)
class Agreement:
    """What is to be changed in a config so that it says what the weights are."""

    is_untied: bool = False
    """The file holds a head that is not the embedding, and the config says that it is."""
    dtype: torch.dtype | None = None
    """What holds all that the weights and the precision of the config do, where that is another
    one, or says nothing: a float16 file of a config that says bfloat16 is read in float32, which
    overflows in neither."""
    unread: frozenset[str] = frozenset()
    """Tensors that are no part of the decoder: they are left out."""
    notes: tuple[str, ...] = ()
    """A sentence for each of these, for the user."""

    def apply(self, config: PreTrainedConfig) -> None:
        """Change the config."""
        base = base_config_of(config)
        if self.is_untied:
            base.tie_word_embeddings = False
        if self.dtype is not None:
            base.dtype = config.dtype = self.dtype


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a supported decoder, which transformers can build a model of.

    Raises:
        InputError: it is not.
    """
    file = folder / "config.json"
    entries = read_json_object(file, LARGEST_BYTES[file.name])
    with refusing(f"{file} is not a config that transformers knows"):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    architecture_of(config)
    base = base_config_of(config)
    # Which kernels compute attention is this machine's choice, and not the model's.
    config._attn_implementation = base._attn_implementation = None
    for name, value in OF_A_CALL.items():
        if entries.get(name, value) != value:
            for part in (config, base):
                setattr(part, name, value)
    _check_token_ids(base, file)
    return config


def _check_token_ids(config: Any, file: Path) -> None:
    """transformers builds an embedding for `pad_token_id`, and a failed assertion tells nobody."""
    rows = config.vocab_size
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and not isinstance(rows, bool) and not -rows <= pad < rows:
        raise InputError(
            f"{file}: pad_token_id is {pad}, and the {rows} tokens of vocab_size end at "
            f"{rows - 1}: set it to null or to one of them"
        )


def agreement(folder: Path) -> Agreement:
    """Compare names, shapes, ties and precisions of the weights in `folder` with its config.

    Raises:
        InputError: transformers cannot build the model, or weights are missing, of another shape,
            or such that this model has no place for them inside its decoder.
    """
    files = {folder / "config.json", *(tensor.file for tensor in stored_tensors(folder).values())}
    states = [(file, file.stat()) for file in sorted(files)]
    return _compared(folder, tuple((f, s.st_mtime_ns, s.st_size) for f, s in states))


@lru_cache(maxsize=64)
def _compared(folder: Path, _states: Any) -> Agreement:
    config = read_config(folder)
    with refusing(f"{folder / 'config.json'} describes no model that transformers can build"):
        model = build_on_meta(config)
    if getattr(config, "quantization_config", None):
        return Agreement()  # its names and shapes are those of the packed form
    expected = model.state_dict()
    held = {_name_in(model, n, expected): t for n, t in stored_tensors(folder).items()}
    blocks = [n for n in expected if f".{architecture_of(config).blocks_path}." in f".{n}"]
    if sum(name in held for name in blocks) < HALF * len(blocks):
        return Agreement()  # names of another form, which transformers may know
    unread = sorted(tensor.name for name, tensor in held.items() if name not in expected)
    check_unread(folder, unread, model)
    for name, tensor in held.items():
        if name in expected and tensor.shape != tuple(expected[name].shape):
            raise InputError(misshapen(folder, name, tensor.shape, expected[name].shape))
    _check_missing(folder, model, held)
    return _differences(folder, model, held, unread)


def misshapen(folder: Path, name: str, found: Sequence[int], expected: Sequence[int]) -> str:
    """The sentence for a weight of another shape than the config's."""
    return (
        f"{folder} has the weight {name} of shape {tuple(found)}, where its config asks for "
        f"{tuple(expected)}"
    )


def _name_in(model: PreTrainedModel, name: str, known: Container[str]) -> str:
    """What a stored tensor is called in the model with its head: some files hold the decoder alone,
    under names that begin inside of it.
    """
    prefix = f"{model.base_model_prefix}."
    found = (n for n in (name, prefix + name, name.removeprefix(prefix)) if n in known)
    return next(found, name)


def check_unread(folder: Path, names: Iterable[str], model: PreTrainedModel) -> None:
    """Whether tensors that the model does not read may be left out: `v_head.*`, `mtp.*`.

    Raises:
        InputError: one is a weight of the decoder.
    """
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    patterns = [BUFFERS, *map(re.compile, ignored)]
    modules = dict(model.named_modules())
    path = architecture_of(model).blocks_path
    block = re.compile(rf"(^|\.)({re.escape(path)}|{re.escape(path.rpartition('.')[2])})\.(\d+)\.")
    config: Any = base_config_of(model.config)
    guessing = getattr(config, "num_nextn_predict_layers", None) or 0
    for name in names:
        if any(pattern.search(name) for pattern in patterns):
            continue
        inside = block.search(name)
        number = int(inside[3]) if inside else -1
        if number >= config.num_hidden_layers:
            if number < config.num_hidden_layers + guessing:
                continue  # layers that guess tokens ahead
            raise InputError(
                f"{folder} holds {name}, and config.json says that there are "
                f"{config.num_hidden_layers} blocks (num_hidden_layers): one of the two is wrong"
            )
        owner = name.rpartition(".")[0]
        if inside or (owner and _name_in(model, owner, modules) in modules):
            raise InputError(
                f"{folder} has unexpected weights, the first is {name}: a {config.model_type} with "
                "the entries of its config.json has no place for it"
            )


def _check_missing(folder: Path, model: PreTrainedModel, held: Container[str]) -> None:
    groups: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(tensor), []).append(name)
    missing = [ns[0] for ns in groups.values() if not any(name in held for name in ns)]
    if not missing:
        return
    why = ""
    if missing == _names_of(model, model.get_output_embeddings()):
        why = (
            ": config.json says that the head is not the embedding, and the file holds no head; "
            "set tie_word_embeddings to true if the embedding is the head"
        )
    first = sorted(missing)[0]
    raise InputError(f"{folder} has {len(missing)} missing weights, the first is {first}{why}")


def _differences(
    folder: Path, model: PreTrainedModel, held: Mapping[str, StoredTensor], unread: list[str]
) -> Agreement:
    notes, file = [], folder / "config.json"
    is_untied = _is_untied(model, held)
    if is_untied:
        notes.append(
            f"{file} says that the head is the embedding (tie_word_embeddings), and the weights "
            "hold another head: the weights are right"
        )
    said: Any = model.config.dtype
    stored = _stored_dtype(held.values())
    dtype = stored if said is None else None
    if said is not None and stored is not None and said != stored:
        wider = torch.promote_types(said, stored)
        notes.append(
            f"{file} says {_named(said)}, and the weights are stored in {_named(stored)}: they are "
            f"read in {_named(wider)} (model.dtype decides)"
        )
        dtype = wider if wider != said else None
    left_out = [name for name in unread if not BUFFERS.search(name)]
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        notes.append(f"{folder} holds {left_out[0]}{more}, no part of the decoder: left out")
    return Agreement(is_untied, dtype, frozenset(unread), tuple(notes))


def _is_untied(model: PreTrainedModel, held: Mapping[str, StoredTensor]) -> bool:
    """True when a head that the config ties to the embedding is stored with other values."""
    names = _names_of(model, model.get_output_embeddings())
    found = [held[name] for name in names if name in held]
    return not all(_are_equal(found[0], other) for other in found[1:])


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    with safe_open(one.file, "pt") as first, safe_open(other.file, "pt") as second:
        a, b = first.get_slice(one.name), second.get_slice(other.name)
        starts = range(0, one.shape[0], ROWS_AT_ONCE)
        return all(bool((a[s : s + ROWS_AT_ONCE] == b[s : s + ROWS_AT_ONCE]).all()) for s in starts)


def _names_of(model: PreTrainedModel, module: Any) -> list[str]:
    """All names of a module's weight: of a tied one there are several."""
    weight = getattr(module, "weight", None)
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, tensor in named if tensor is weight]


def _stored_dtype(tensors: Iterable[StoredTensor]) -> torch.dtype | None:
    """What most bytes of the weights are stored in; None for what no CPU computes in."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    return DTYPES.get(max(sizes, key=sizes.__getitem__, default=""))


def _named(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
