"""The recipe for one model that nobody has written one for: from a few wishes to a config."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldstack.compression.checkpoints.model_folder import REFERENCE
from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.speed import SpeedSpec
from foldstack.compression.statistics.sensitivity import SCORE_TOKENS
from foldstack.compression.text.corpus import PYTHON_STDLIB, SELF, TextSource, documents
from foldstack.compression.text.text_files import is_text_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SEARCH, WITHOUT_SEARCH = "search", "modegpt"
"""By docs/methods.md: what loses least, and what does of all that take no more than statistics."""
PATIENCE_SECONDS = 900.0
"""Of arithmetic on this machine, beyond which nobody gets a search who has not asked for it."""
SCORING_PASSES = 20.0
"""What a search may compute for scores and rounds, in passes of the calibration windows through the
whole model."""
LEAST_SCORED_WINDOWS = 2
"""Of fewer, nobody can say how far scores are off."""
DEFAULT_SPARSITY = 0.2
FRONT_POINTS = 5
FRONT_SPARSITY = 0.5
"""Where a front ends, if the method gets as far."""
REACH_STEP = 0.05
NUM_WINDOWS, WINDOW_TOKENS = 128, 256
NUM_TEST_WINDOWS = 64
RECOVERY_BATCH = 8
DISTILLATION = 0.5
MOST_CHARACTERS_PER_TOKEN = 16
"""No text of human language needs more to fill a window."""


@dataclass(frozen=True)
class Chosen:
    """A method, why it was chosen, and what variants are scored on where it scores some."""

    method: str
    why: str
    tokens: int | None = None
    """None: as many as usual."""


@dataclass(frozen=True)
class Wishes:
    """What a person says of the smaller model; everything but `model` may be left out."""

    model: str
    revision: str | None = None
    sparsity: float | None = None
    """When None `DEFAULT_SPARSITY`; of a front, where it ends, when None as far as the method gets
    and not beyond `FRONT_SPARSITY`."""
    front: bool = False
    """Whether several sizes are made and their speed is measured, for a person to pick one."""
    method: str = ""
    """When empty the default one."""
    calibration: str = ""
    """Text: see `source_named`. When empty, the reference model's own, or what the model writes."""
    test: str = ""
    """Text to measure on; when empty as for `calibration`."""
    recover: int = 0
    """Steps of recovery."""
    benchmarks: Sequence[str] = ()
    dtype: str = "auto"
    device: str = "auto"
    home: Path | None = None


def sparsity_of(sparsity: float | None, to: float | None) -> float | None:
    """The sparsity that was asked for, as what is gone or as what stays; None where none was.

    Raises:
        InputError: both were given, or it is no fraction between 0 and 1.
    """
    if sparsity is not None and to is not None:
        raise InputError(f"give --sparsity or --to, not both; got {sparsity:g} and {to:g}")
    name, value = ("--to", to) if to is not None else ("--sparsity", sparsity)
    if value is None:
        return None
    if not 0 < value < 1:
        raise InputError(f"{name} must be a fraction between 0 and 1, such as 0.3, got {value:g}")
    return value if to is None else round(1 - value, 12)


def source_named(text: str, split: str) -> dict[str, Any]:
    """The text source that a word on the command line stands for: "self", "python-stdlib", a file
    with text, or a dataset: its folder, NAME or NAME:SUBSET."""
    if text in (SELF, PYTHON_STDLIB):
        return {"corpus": text, "split": split}
    path = Path(text).expanduser()
    if path.is_file() or is_text_file(text):
        return {"corpus": str(path.absolute())}
    if path.is_dir():
        return {"corpus": str(path.absolute()), "split": split}
    name, _, subset = text.partition(":")
    return {"corpus": name, **({"subset": subset} if subset else {}), "split": split}


def recipe_for(wishes: Wishes, folder: Path, chosen: Chosen | None = None) -> dict[str, Any]:
    """The config, as plain data with nothing in it that is the default anyway.

    Args:
        wishes: what was asked for.
        folder: the model's, with plain weights.
        chosen: what `method_for` says; found here where it is None.

    Raises:
        InputError: the model has no usable tokenizer, or a text cannot be read.
    """
    from foldstack.compression.checkpoints.checkpoint import load_config, load_tokenizer

    config, tokenizer = load_config(folder), load_tokenizer(folder)
    own = PYTHON_STDLIB if wishes.model == REFERENCE else SELF
    context = getattr(config, "max_position_embeddings", None) or WINDOW_TOKENS
    tokens = min(WINDOW_TOKENS, context)
    bos = "document" if tokenizer.bos_token_id is not None else "none"
    source = source_named(wishes.calibration or own, "train")
    steps = {"steps": wishes.recover, "batch_size": RECOVERY_BATCH, "distillation": DISTILLATION}
    most = max(NUM_WINDOWS, wishes.recover * RECOVERY_BATCH)
    available = _windows_in(source, tokenizer, tokens, most)
    windows = {"window_tokens": tokens, "bos": bos}
    trained_on = {"num_windows": min(wishes.recover * RECOVERY_BATCH, available), "seed": 1}
    chosen = chosen or method_for(wishes, folder)
    model = {
        "name": _address(wishes.model),
        "revision": wishes.revision,
        "dtype": wishes.dtype,
        "device": wishes.device,
    }
    usual = (None, "auto")
    short = Path(wishes.model).name.removesuffix(".gguf")
    return {
        "name": f"{'front of' if wishes.front else 'compress'} {short}",
        "model": {key: value for key, value in model.items() if value not in usual},
        "calibration": {"source": source, "num_windows": min(NUM_WINDOWS, available), **windows},
        **({"sensitivity": {"tokens": chosen.tokens}} if chosen.tokens else {}),
        "methods": [chosen.method],
        "sparsities": _sparsities(wishes, chosen.method, config),
        **(
            {"recovery": {**steps, "source": source, "windows": {**trained_on, **windows}}}
            if wishes.recover
            else {}
        ),
        "evaluation": {
            "perplexity": _perplexity(wishes.test or own, tokens, bos),
            **({"benchmarks": list(wishes.benchmarks)} if wishes.benchmarks else {}),
        },
        "speed": _speed(context) if wishes.front else {"enabled": False},
        **({"output": {"home": str(wishes.home.expanduser().absolute())}} if wishes.home else {}),
    }


def method_for(
    wishes: Wishes, folder: Path, operations_per_second: Callable[[], float] = lambda: math.inf
) -> Chosen:
    """The method that is asked for, or the best one that this machine computes in a while; and on
    how many tokens variants are scored, if fewer than usual.

    Scores cost passes over their tokens, a variant each, so deep models and those of a large
    vocabulary are scored on fewer, but never on fewer windows than `LEAST_SCORED_WINDOWS`.

    Args:
        wishes: what was asked for.
        folder: the model's, with plain weights.
        operations_per_second: what the machine computes; called where that decides.
    """
    if wishes.method not in ("", SEARCH):
        return Chosen(wishes.method, "")
    from foldstack.compression.checkpoints.checkpoint import load_config

    config = load_config(folder)
    tokens = min(WINDOW_TOKENS, getattr(config, "max_position_embeddings", None) or WINDOW_TOKENS)
    cost, calibration = _cost_of_a_search(config), NUM_WINDOWS * tokens
    affordable = int(SCORING_PASSES * calibration / cost.passes) // tokens * tokens
    scored = max(LEAST_SCORED_WINDOWS * tokens, min(affordable, SCORE_TOKENS))
    if not wishes.method:
        seconds = scored * cost.operations / operations_per_second()
        if seconds > PATIENCE_SECONDS:
            why = f"a search, which loses less, would compute for {seconds / 60:,.0f} minutes here"
            return Chosen(WITHOUT_SEARCH, f"{why}: --method search")
    passes = cost.passes * scored / calibration
    why = f"its scores of {scored} tokens cost {passes:.1f} passes over the calibration windows"
    return Chosen(SEARCH, why, None if scored == SCORE_TOKENS else scored)


@dataclass(frozen=True)
class _SearchCost:
    """Of each token that variants are scored on; the making of their tensors is not in it."""

    passes: float
    """Over a pass of the token through the whole model."""
    operations: float


def _cost_of_a_search(config: "PreTrainedConfig") -> _SearchCost:
    from foldstack.compression.methods.search.scoring import scoring_arithmetic
    from foldstack.compression.methods.search.search import Search
    from foldstack.compression.structure.size import size_of
    from foldstack.compression.structure.surgery import build_on_meta

    meta, search = build_on_meta(config), Search(sparsity=DEFAULT_SPARSITY, refit="none")
    text = config.get_text_config(decoder=True)
    whole, head = size_of(meta).flops_per_token, 2 * text.hidden_size * text.vocab_size
    works = [scoring_arithmetic(meta, family, SCORE_TOKENS) for family in sorted(search.scores)]
    works.append(search.arithmetic(meta, SCORE_TOKENS))
    passes, heads = sum(work.passes for work in works), sum(work.heads for work in works)
    operations = passes * (whole - head) + heads * head
    return _SearchCost(operations / whole, operations)


def _sparsities(wishes: Wishes, method: str, config: "PreTrainedConfig") -> list[float]:
    """The one that is asked for, or those of the points of a front, as far apart as one another."""
    if not wishes.front:
        return [DEFAULT_SPARSITY if wishes.sparsity is None else wishes.sparsity]
    farthest = _reach(method, config) if wishes.sparsity is None else wishes.sparsity
    return [round(farthest * number / FRONT_POINTS, 3) for number in range(1, FRONT_POINTS + 1)]


def _reach(method: str, config: "PreTrainedConfig") -> float:
    """How far a front of a method goes for a model, from its shapes alone: no farther than
    `FRONT_SPARSITY`, and than the method gets."""
    from foldstack.compression.methods import METHODS
    from foldstack.compression.structure.surgery import build_on_meta

    chosen = METHODS.get(method)
    if chosen is None or chosen.grows:  # what reads the recipe says what is wrong with it
        return FRONT_SPARSITY
    meta = build_on_meta(config)
    for steps in range(round(FRONT_SPARSITY / REACH_STEP), 0, -1):
        sparsity = round(steps * REACH_STEP, 3)
        try:
            chosen(sparsity=sparsity).outline(meta)
        except InputError:
            continue
        return sparsity
    return REACH_STEP


def _speed(context: int) -> dict[str, Any]:
    """As it is measured anyway, with a prompt that leaves room for what is written."""
    spec = SpeedSpec()
    room = max(1, context - spec.new_tokens)
    return {"enabled": True} | ({"prompt_tokens": room} if room < spec.prompt_tokens else {})


def _address(model: str) -> str:
    """The name as it is found from anywhere: a recipe may be run in another folder."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() and model != REFERENCE else model


def _perplexity(text: str, tokens: int, bos: str) -> dict[str, Any]:
    source = source_named(text, "test")
    protocol: dict[str, Any] = {"window_tokens": tokens, "max_tokens": NUM_TEST_WINDOWS * tokens}
    if text == SELF:  # its windows again: each begins with a document
        protocol |= {"joiner": "", "bos": bos, "score_last": False}
    elif text != PYTHON_STDLIB and bos != "none":
        protocol |= {"bos": "window"}
    return {"source": source, "protocol": protocol}


def _windows_in(
    source: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", tokens: int, most: int
) -> int:
    """How many windows the text fills, from 1 to `most`; reads no more of it than it must."""
    if source["corpus"] == SELF:
        return most
    wanted = most * tokens
    found = 0
    for text in documents(TextSource(**source)):
        part = text[: wanted * MOST_CHARACTERS_PER_TOKEN]
        found += len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])
        if found >= wanted:
            return most
    return max(1, found // tokens)
