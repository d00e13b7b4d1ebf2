"""Model folders: find one, load it, save one, and prove that what was saved loads anywhere."""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from foldstack.compression.checkpoints import reload_check
from foldstack.compression.checkpoints.agreement import (
    agreement,
    check_unread,
    misshapen,
    read_config,
)
from foldstack.compression.checkpoints.model_folder import check_folder
from foldstack.compression.checkpoints.older_readers import write_older_names
from foldstack.compression.checkpoints.tokenizer_files import (
    TOKENIZER_FILES,
    check_same_tokens,
    copy_tokenizer,
    missing_package,
    name_class,
    sample_text,
    tokens_of,
)
from foldstack.compression.errors import InputError, refusing
from foldstack.compression.standby import Standby
from foldstack.compression.storage.digest import digest_folder
from foldstack.compression.storage.mapped_memory import release, releasing
from foldstack.compression.structure import modeling_foldstack
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.modeling_foldstack import FoldstackForCausalLM
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters
from foldstack.compression.structure.surgery import BUILDING, plan_of

Grade = Literal["native", "portable"]

PLAN_FILE = "plan.json"
MODELING_FILE = "modeling_foldstack.py"
ONE_FILE = "tokenizer.json"
"""A tokenizer that is one file says itself what it is."""
AUTO_MAP = {
    "AutoConfig": "modeling_foldstack.FoldstackConfig",
    "AutoModel": "modeling_foldstack.FoldstackModel",
    "AutoModelForCausalLM": "modeling_foldstack.FoldstackForCausalLM",
}
SHARD_BYTES = 1 << 29
FINGERPRINTED = ("*.safetensors", "*.json", "*.txt", "*.py", "*.jinja", *TOKENIZER_FILES)

# Largest difference of a reloaded logit, relative to the largest logit. Reloading computes the same
# sums in the same order; decoding from a cache orders them differently.
RELOAD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CACHE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}
PROBE_TOKENS = 48
RELOADER = Standby(
    # -P and not -I: packages may lie where PYTHONPATH or the user's site says.
    ("-P", reload_check.__file__),
    {"HF_HUB_OFFLINE": "1"},
    # The code that was copied beside the weights is imported from a cache of its own.
    folder_in="HF_MODULES_CACHE",
)


def model_fingerprint(folder: Path) -> str:
    """Digest of everything in a model folder that changes what it computes."""
    return digest_folder(folder, FINGERPRINTED)


def load_config(folder: Path) -> PreTrainedConfig:
    """The config of a supported decoder, with what it says wrongly of the weights put right.

    Raises:
        InputError: the folder is not a whole model, its files are of two models, or the family is
            none that foldstack supports.
    """
    check_folder(folder)
    config = read_config(folder)
    agreement(folder).apply(config)
    return config


def load_model(
    folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> PreTrainedModel:
    """The model in a folder, stock or ours, in eval mode; in its saved dtype unless told otherwise.

    Raises:
        InputError: weights are missing, damaged or misshapen, or the family is unsupported.
    """
    config = load_config(folder)
    is_ours = config.model_type == "foldstack"
    loader: Any = FoldstackForCausalLM if is_ours else AutoModelForCausalLM
    with BUILDING, quiet(), refusing(f"the weights in {folder} do not load"):
        model, loading = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below, in a sentence
            **({} if is_ours else {"trust_remote_code": False}),
        )
    for name, found, expected in loading["mismatched_keys"]:
        raise InputError(misshapen(folder, name, found, expected))
    if names := sorted(map(str, loading["missing_keys"])):
        raise InputError(f"{folder} has {len(names)} missing weights, the first is {names[0]}")
    check_unread(folder, sorted(map(str, loading["unexpected_keys"])), model)
    return model.eval().to(device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder; never runs code from it.

    Raises:
        InputError: there is none, or it needs code of its own.
    """
    config = _without_code(folder)
    needed = missing_package(folder)
    try:
        with refusing(f"{folder} holds no usable tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, config=config
            )
    except InputError as error:
        if not needed:
            raise
        # Without what transformers says: of a SentencePiece file it asks for tiktoken.
        raise InputError(f"{folder} holds no usable tokenizer: {needed}") from error
    return tokenizer


def check_tokenizer_travels(folder: Path) -> None:
    """Whether the tokenizer is the same where only its own files are.

    Raises:
        InputError: it is not.
    """
    if (folder / ONE_FILE).is_file():
        return
    tokenizer, config = load_tokenizer(folder), _without_code(folder)
    texts = sample_text(tokenizer)
    with tempfile.TemporaryDirectory(prefix="foldstack-tokenizer-") as other:
        copy_tokenizer(folder, Path(other))
        name_class(Path(other), tokenizer)
        with refusing(f"the tokenizer in {folder} does not travel"):
            again = AutoTokenizer.from_pretrained(other, trust_remote_code=False, config=config)
        found = tokens_of(again, texts)
        check_same_tokens(Path(other), tokens_of(tokenizer, texts), found, texts)


def _without_code(folder: Path) -> PreTrainedConfig:
    # A portable folder names remote code in its config; loading its tokenizer must not ask for it.
    config = load_config(folder)
    return config.base_config if config.model_type == "foldstack" else config


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars: a flow has its own."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def save_model(
    model: PreTrainedModel, folder: Path, *, tokenizer_from: Path, plan: Plan | None = None
) -> Grade:
    """Write a Hugging Face model folder: weights, config, tokenizer, plan, code if it needs any.

    Args:
        model: a stock model (saved as the native grade) or a FoldstackForCausalLM (portable).
        folder: where to; created.
        tokenizer_from: model folder whose tokenizer files are copied.
        plan: the structure relative to the first base model; default: that of `model` itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_ours = isinstance(model, FoldstackForCausalLM)
    if is_ours:
        model.config.auto_map = AUTO_MAP
        shutil.copyfile(modeling_foldstack.__file__, folder / MODELING_FILE)
    with quiet():
        state = _ReleasedState(model.state_dict())
        model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD_BYTES)
    if copy_tokenizer(tokenizer_from, folder) and is_ours and not (folder / ONE_FILE).is_file():
        name_class(folder, load_tokenizer(tokenizer_from))
    if not is_ours:
        write_older_names(folder)
    text = (plan or plan_of(model)).model_dump_json(indent=2) + "\n"
    (folder / PLAN_FILE).write_text(text, encoding="utf-8")
    return "portable" if is_ours else "native"


class _ReleasedState(dict[str, torch.Tensor]):
    """A state dict that gives back the memory of what lies in files while transformers, which pops
    the tensors of one shard after the other, writes it.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self._popped: list[torch.Tensor] = []
        self._popped_bytes = 0

    def pop(self, name: str) -> torch.Tensor:  # type: ignore[override]
        if self._popped_bytes > SHARD_BYTES:
            release(self._popped)
            self._popped, self._popped_bytes = [], 0
        tensor = super().pop(name)
        self._popped.append(tensor)
        self._popped_bytes += tensor.nbytes
        return tensor


def load_plan(folder: Path) -> Plan:
    """The structure of the model in a folder: its plan file, or the identity of a stock model."""
    if (folder / PLAN_FILE).is_file():
        return Plan.model_validate_json((folder / PLAN_FILE).read_text(encoding="utf-8"))
    return plan_of(load_config(folder))


@dataclass(frozen=True)
class ReloadReport:
    """What a fresh process without foldstack saw in a saved folder."""

    logits_scale: float
    logits_difference: float
    cached_difference: float
    is_finite: bool
    generated_tokens: tuple[int, ...]
    parameters: int
    class_name: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_reload(
    model: PreTrainedModel, folder: Path, tokenizer_from: Path | None = None
) -> ReloadReport:
    """Load `folder` in a fresh process, without foldstack, and compare it with `model`.

    Compared: the logits of a random probe, decoding from the KV cache against the full forward, a
    greedy generation, the number of stored parameters, and what the tokenizer makes of a text with
    what that of the folder `tokenizer_from` does.

    Raises:
        RuntimeError: the folder does not load there, or computes something else.
        InputError: its tokenizer is another.
    """
    tokenizer = None if tokenizer_from is None else load_tokenizer(tokenizer_from)
    texts = [] if tokenizer is None else sample_text(tokenizer)
    expected = [] if tokenizer is None else tokens_of(tokenizer, texts)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="foldstack-reload-") as work:
        probe = Path(work) / "probe.safetensors"
        save_file(_probe(model), probe)
        request = {
            "folder": str(folder.resolve()),
            "probe": str(probe),
            "texts": texts,
            "trust_remote_code": isinstance(model, FoldstackForCausalLM),
        }
        try:
            seen = RELOADER.ask(request)
        except RuntimeError as error:
            seen = {"error": str(error)}
    if "error" in seen:
        raise RuntimeError(f"{folder} does not load in a fresh process: {seen['error']}")
    seen["generated_tokens"] = tuple(seen["generated_tokens"])
    check_same_tokens(folder, expected, seen.pop("tokens"), texts)
    report = ReloadReport(**seen, seconds=time.perf_counter() - started)
    _judge(report, model, folder)
    return report


def _probe(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    limit = getattr(model.config, "max_position_embeddings", PROBE_TOKENS)
    tokens = min(PROBE_TOKENS, limit - reload_check.GREEDY_TOKENS)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator)
    with torch.inference_mode(), releasing(architecture_of(model).blocks(model)):
        logits = model(ids.to(model.device), use_cache=False).logits.float().cpu()
    return {"input_ids": ids, "logits": logits.contiguous()}


def _judge(report: ReloadReport, model: PreTrainedModel, folder: Path) -> None:
    scale = max(report.logits_scale, 1e-6)
    if not report.is_finite:
        raise RuntimeError(f"{folder} gives logits that are not finite after reloading")
    if report.logits_difference > RELOAD_TOLERANCE[model.dtype] * scale:
        raise RuntimeError(
            f"{folder} computes other logits after reloading: they differ by "
            f"{report.logits_difference:.3g} on a scale of {scale:.3g}"
        )
    if report.cached_difference > CACHE_TOLERANCE[model.dtype] * scale:
        raise RuntimeError(
            f"{folder} decodes otherwise from its KV cache: logits differ by "
            f"{report.cached_difference:.3g} on a scale of {scale:.3g}"
        )
    if report.parameters != count_parameters(model):
        raise RuntimeError(
            f"{folder} has {report.parameters} parameters after reloading, "
            f"the model had {count_parameters(model)}"
        )
