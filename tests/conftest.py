"""Fixtures for every test: tiny random models of each family, a tokenizer, a Prefect server.

Ask for `architecture` to run a test once per supported family, for `tiny_model` to make a model
(`tiny_model("qwen2", num_hidden_layers=3)`), for `model_folder` to have one on disk with a
tokenizer. Nothing is downloaded.
"""

import os

# Before anything imports torch, transformers or Prefect; what the environment says comes first.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MPLBACKEND", "agg")

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

NUM_BLOCKS = 4
VOCAB_SIZE = 97

# Sizes that differ from one another, so that two of them swapped cannot go unnoticed.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
HEADS_OF_12 = {"head_dim": 12}
ALTERNATING = ["sliding_attention", "full_attention"] * (NUM_BLOCKS // 2)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama", "tie_word_embeddings": False},
    "llama_tied": SIZES | {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": SIZES | HEADS_OF_12 | {"model_type": "mistral", "sliding_window": 16},
    "qwen2": SIZES | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": SIZES | HEADS_OF_12 | {"model_type": "qwen3"},
    "gemma": SIZES | HEADS_OF_12 | {"model_type": "gemma"},
    "gemma2": SIZES
    | HEADS_OF_12
    | {"model_type": "gemma2", "sliding_window": 16, "query_pre_attn_scalar": 12},
    "gemma3_text": SIZES
    | HEADS_OF_12
    | {
        "model_type": "gemma3_text",
        "sliding_window": 16,
        "query_pre_attn_scalar": 12,
        "layer_types": ALTERNATING,
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 56,
        "num_hidden_layers": NUM_BLOCKS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "n_embd": 32,
        "n_inner": 56,
        "n_layer": NUM_BLOCKS,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "phi3": SIZES | {"model_type": "phi3", "sliding_window": None},
}

ModelFactory = Callable[..., PreTrainedModel]
FolderFactory = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def own_log_level() -> Iterator[None]:
    """A flow that runs in the tests' process sets the package's level: not for the next files."""
    package = logging.getLogger("foldstack")
    before = package.level
    yield
    package.setLevel(before)


def pytest_configure() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


FOREIGN_WARNINGS = (
    "DeprecationWarning",
    "ResourceWarning",
    "UserWarning",
    "FutureWarning",
    "pytest.PytestUnraisableExceptionWarning",
)
"""Of libraries in their own code, on Python 3.11 with our versions."""


LONGEST_FIRST = ("flows", "tasks", "deploy", "benchmarks")
"""Folders whose tests start servers and processes: begun last, one of them would run alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    here = Path(__file__).parent
    items.sort(key=lambda item: order.get(item.path.relative_to(here).parts[0], len(order)))
    for item in items:
        if "foreign_warnings" in item.keywords:
            for category in FOREIGN_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{category}"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


# Gemma is Gemma 2 without what is special there: only the matrix of all methods has it.
MOST = [name for name in ARCHITECTURES if name != "gemma"]


@pytest.fixture(params=MOST)
def architecture(request: pytest.FixtureRequest) -> str:
    """Name of a supported model family, one after another."""
    return str(request.param)


@pytest.fixture(params=list(ARCHITECTURES))
def family(request: pytest.FixtureRequest) -> str:
    """The same with those whose like is there already."""
    return str(request.param)


@pytest.fixture(scope="session")
def architectures() -> tuple[str, ...]:
    return tuple(ARCHITECTURES)


@pytest.fixture(scope="session")
def tiny_model() -> ModelFactory:
    """Maker of a fresh random model in eval mode and float32: `tiny_model("llama", seed=1)`."""

    def make(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        settings = ARCHITECTURES[architecture] | overrides
        config = AutoConfig.for_model(**settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        fill_every_parameter(model, seed)
        return model.eval()

    return make


def fill_every_parameter(model: PreTrainedModel, seed: int) -> None:
    """Give all parameters values of their own: a stock model's biases are 0 and its norms 1, so
    that code which drops one of them would compute the same.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1:
                # Gemma's norms multiply by 1 + weight: what is around 0 must stay around 0.
                parameter.copy_(parameter.mean().round() + 0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


@pytest.fixture(scope="session")
def text_lines() -> tuple[str, ...]:
    """Some plain text, enough to train the tiny tokenizer and to fill a few windows."""
    return tuple(
        f"def item_{number}(value):\n    return value * {number} + len('{'ab' * (number % 7)}')\n"
        for number in range(200)
    )


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, text_lines: tuple[str, ...]) -> Path:
    """Saved byte-level BPE tokenizer: any text is representable, id 0 starts and ends documents."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text_lines, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=128,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    assert isinstance(loaded, PreTrainedTokenizerBase)
    return loaded


@pytest.fixture
def model_folder(
    tmp_path: Path, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerBase
) -> FolderFactory:
    """Maker of a Hugging Face directory, model and matching tokenizer: `model_folder("gpt2")`."""

    def make(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
        sizes = {"vocab_size": len(tokenizer)} | overrides
        folder = tmp_path / f"{architecture}-{seed}-{len(list(tmp_path.iterdir()))}"
        tiny_model(architecture, seed=seed, **sizes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def free_port() -> int:
    """A port on loopback on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def new_display() -> Callable[[], Any]:
    """Maker of a display that remembers what a person would have been told."""
    from foldstack.flows.running.progress import Silent

    class Heard(Silent):
        def __init__(self) -> None:
            self.outcomes: dict[str, str] = {}
            self.progress: set[str] = set()

        def report(self, label: str, what: str, done: int, total: int) -> None:
            self.progress.add(label)

        def finished(self, label: str, outcome: str, seconds: float) -> None:
            self.outcomes[label] = outcome

    return Heard


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prefect server with an empty database, for the tests that run flows."""
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_HOME,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness

    # Joining the heartbeat thread costs each flow 0.8 s.
    settings = {
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
        PREFECT_HOME: tmp_path_factory.mktemp("prefect-home"),
    }
    with temporary_settings(updates=settings), prefect_test_harness(server_startup_timeout=400):
        yield PREFECT_API_URL.value()
