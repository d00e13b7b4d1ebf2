"""Quantised weights made plain again: GGUF files, and what transformers can dequantise."""

import contextlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import GgufConfig

from foldstack.compression.checkpoints.checkpoint import (
    SHARD_BYTES,
    quiet,
)
from foldstack.compression.checkpoints.model_folder import gguf_of, quantization_of
from foldstack.compression.checkpoints.tokenizer_files import TOKENIZER_FILES, copy_tokenizer
from foldstack.compression.errors import InputError, told
from foldstack.compression.storage.digest import digest_file, digest_folder, digest_json
from foldstack.compression.structure.architectures import architecture_of

PLAIN_TYPES = ("F64", "F32", "F16", "BF16")
"""Of a GGUF file's tensors: these are not quantised."""
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
COMPUTE_TYPE = torch.float32
"""What quantised weights become where nobody says: it holds every value that they stand for."""
LOADER: Any = AutoModelForCausalLM
UNFIT = "give the folder of the model that it was quantised from"


def quantized_digest(place: Path) -> str:
    """Digest of the bytes that `dequantize` reads: the weights, and the tokenizer beside them.

    Raises:
        InputError: the place holds several GGUF files.
    """
    file = gguf_of(place)
    if file is None:
        return digest_folder(place, ("*.safetensors", *TOKENIZER_FILES, "config.json"))
    beside = digest_folder(file.parent, TOKENIZER_FILES)
    return digest_json({"weights": digest_file(file), "tokenizer": beside})


def dequantize(place: Path, folder: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Write the model whose weights are quantised at `place` as a plain folder of safetensors.

    Args:
        place: a GGUF file, a folder with one, or a folder whose config names a quantisation.
        folder: where to; created.
        dtype: of the weights that are written. Without it those of a GGUF file become float32,
            which holds every value that they stand for; others the type that the config names.

    Returns:
        What was dequantised from what: "scheme", "dtype", and a "sentence" with both.

    Raises:
        InputError: it is a family or a scheme that cannot be read here, or its file is damaged.
    """
    file = gguf_of(place)
    if file is not None:
        model, scheme = _load_gguf(file, dtype)
    elif named := quantization_of(place):
        model, scheme = _load_quantized(place, named, dtype)
    else:
        raise InputError(f"{place} holds no quantised weights")
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        # Else transformers would write the tensors of the format that was read.
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES, save_original_format=False)
    _write_tokenizer(file or place, folder)
    name = str(model.dtype).removeprefix("torch.")
    sentence = (
        f"{(file or place).name} is dequantised, from {scheme} to {name}: what quantising has lost "
        "stays lost, and every figure is against the model as it is now"
    )
    return {"scheme": scheme, "dtype": name, "sentence": sentence}


def _load_gguf(file: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, str]:
    types, architecture = _gguf_header(file)
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise InputError(
            f"{file} is of the architecture {architecture}, which transformers reads from no GGUF "
            f"file: {UNFIT}"
        )
    source: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    quantized = [name for name, _ in types.most_common() if name not in PLAIN_TYPES]
    stored = next((DTYPES[name] for name in DTYPES if name in types and not quantized), None)
    # transformers draws a bar of its own, which has no switch.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            config = AutoConfig.from_pretrained(file.parent, **source)
            architecture_of(config)
            model, loading = LOADER.from_pretrained(
                file.parent,
                config=config,
                dtype=dtype or stored or COMPUTE_TYPE,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                **source,
            )
        except InputError:
            raise
        except (ValueError, LookupError, OSError, RuntimeError, TypeError) as error:
            raise InputError(f"{file} does not load: {told(error)}; {UNFIT}") from error
    for name, found, expected in loading["mismatched_keys"]:
        raise InputError(
            f"{file} has the weight {name} of shape {tuple(found)}, where its head asks for "
            f"{tuple(expected)}"
        )
    if missing := sorted(map(str, loading["missing_keys"])):
        raise InputError(f"{file} lacks {len(missing)} weights, the first is {missing[0]}")
    counts = [f"{count} tensors {name}" for name, count in types.most_common()]
    return model, f"GGUF ({', '.join(counts)})"


def _gguf_header(file: Path) -> tuple[Counter[str], str]:
    """How many tensors of each type there are, and the architecture.

    Raises:
        InputError: it is no GGUF file, is cut short, or is a part of one.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        fields = reader.fields
        types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
        architecture = str(fields["general.architecture"].contents())
        parts = fields["split.count"].contents() if "split.count" in fields else 1
    except (ValueError, LookupError, OSError, OverflowError, MemoryError, TypeError) as error:
        raise InputError(f"{file} is not a whole GGUF file: {told(error)}") from error
    if parts > 1:
        raise InputError(
            f"{file} is one of {parts} parts: join them with `llama-gguf-split --merge`"
        )
    return types, architecture


def _load_quantized(
    folder: Path, scheme: str, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, str]:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.json'} is not a config that transformers knows: {told(error)}"
        ) from error
    architecture_of(config)
    wanted = dtype or getattr(config, "dtype", None) or COMPUTE_TYPE
    with quiet():
        try:
            is_asked_of_loading = _can_load_plain(config.quantization_config, scheme)
            if is_asked_of_loading:
                config.quantization_config = {**config.quantization_config, "dequantize": True}
            model, loading = LOADER.from_pretrained(
                folder,
                config=config,
                dtype=wanted,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            if not is_asked_of_loading:
                model = model.dequantize()
        except (ImportError, ValueError, RuntimeError, OSError, LookupError, TypeError) as error:
            raise InputError(
                f"{folder} holds weights quantised by {scheme}, which cannot be dequantised here: "
                f"{told(error)}; mend that, or {UNFIT}"
            ) from error
    for problem in ("missing_keys", "unexpected_keys"):
        if names := sorted(map(str, loading[problem])):
            what = problem.removesuffix("_keys")
            raise InputError(f"{folder} has {len(names)} {what} weights, the first is {names[0]}")
    return model.to(wanted), scheme


def _can_load_plain(quantization: dict[str, Any], scheme: str) -> bool:
    """True where loading dequantises when it is asked to, False where the loaded model does.

    Raises:
        ValueError: neither does.
        ImportError: the package is missing that knows the scheme.
    """
    if hasattr(AutoQuantizationConfig.from_dict(quantization), "dequantize"):
        return True
    bits = "8bit" if quantization.get("load_in_8bit") else "4bit"
    quantizer: Any = (
        AUTO_QUANTIZER_MAPPING.get(scheme) or AUTO_QUANTIZER_MAPPING[f"{scheme}_{bits}"]
    )
    if quantizer._dequantize is HfQuantizer._dequantize:
        raise ValueError("transformers has no way back from it to plain weights")
    return False


def _write_tokenizer(place: Path, folder: Path) -> None:
    """The tokenizer's files beside the weights; without any the one inside a GGUF file."""
    beside = place.parent if place.is_file() else place
    if copy_tokenizer(beside, folder) or not place.is_file():
        return
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                place.parent, gguf_file=place.name, trust_remote_code=False
            )
        except (ValueError, LookupError, OSError, TypeError, ImportError) as error:
            raise InputError(
                f"{place} holds no tokenizer that transformers can read: {told(error)}; put "
                "the model's tokenizer.json beside it"
            ) from error
    tokenizer.save_pretrained(folder)
