"""Windows that the model writes itself, for where there is no text to calibrate on.

A model samples from its own distribution, token by token, so that what it is calibrated on is what
it would say, in its own languages and proportions. Source: self-calibration, arXiv 2410.17170;
without a BOS token each window begins with a random token, as in LLM-QAT, arXiv 2305.17888.
"""

import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.storage.digest import digest_json
from foldstack.compression.text.calibration import Windows, WindowSpec
from foldstack.compression.text.corpus import TextSource, documents
from foldstack.compression.text.text_tokens import bos_token

Progress = Callable[[str, int, int], None]

WRITING_BATCH = 64
"""Windows that are written side by side: the weights are read once for all of their next tokens."""
CACHE_NAMES = ("cache", "past_key_values")
"""What a KV cache is called among arguments and outputs: since transformers 5.24, and before."""


@torch.inference_mode()
def write_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: WindowSpec,
    *,
    split: str = "train",
    temperature: float = 1.0,
    batch_size: int = WRITING_BATCH,
    progress: Progress | None = None,
) -> Windows:
    """Sample windows from the model, each from a BOS token or a random one on.

    With `spec.bos` "document" a BOS token also follows whatever ends a document. Which tokens are
    drawn depends on the seed, the split and the number of the window, not on the batch; a smaller
    `num_windows` gives the first of them.

    Args:
        model: the dense one, in eval mode.
        tokenizer: its tokenizer: rows of the embedding beyond its tokens are never drawn.
        spec: number, length and seed of the windows, and where BOS tokens stand.
        split: "train" and "test" draw other numbers from the same seed.
        temperature: what the logits are divided by.
        batch_size: windows side by side; only their time depends on it.
        progress: told of tokens written.
    """
    chances = chances_of(spec, split)
    spec = spec.for_tokenizer(tokenizer)
    bos = None if spec.bos == "none" else bos_token(tokenizer)
    first = _first_tokens(tokenizer, chances[:, 0], bos)
    writer = _Writer(
        model,
        temperature=temperature,
        vocabulary=min(len(tokenizer), model.config.get_text_config(decoder=True).vocab_size),
        ends=_ends(model, tokenizer),
        restart=bos if spec.bos == "document" else None,
    )
    written = []
    for start in range(0, spec.num_windows, batch_size):
        stop = min(start + batch_size, spec.num_windows)

        def tell(done: int, start: int = start, stop: int = stop) -> None:
            if progress is not None:
                tokens = start * spec.window_tokens + (stop - start) * done
                progress("write", tokens, spec.num_windows * spec.window_tokens)

        written.append(writer.write(first[start:stop], chances[start:stop], tell))
    tokens = torch.cat(written)
    starts = _document_starts(tokens, bos)
    return Windows(
        tokens=tokens.to(torch.int32),
        document_starts=starts,
        num_available=spec.num_windows,
        num_text_tokens=tokens.numel(),
        num_documents=sum(map(len, starts)),
    )


def texts_of(
    source: TextSource, written: Path | None, tokenizer: PreTrainedTokenizerBase
) -> Sequence[str]:
    """The text that a model is measured on: `source`, or the windows in the folder `written`."""
    if written is None:
        return documents(source)
    return written_texts(Windows.load(written), tokenizer)


def written_texts(windows: Windows, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The documents of written windows as text, in order, without those that are blank."""
    texts: list[str] = []
    for tokens, starts in zip(windows.tokens.tolist(), windows.document_starts, strict=True):
        places = sorted({0, *starts, len(tokens)})
        for begin, end in pairwise(places):
            texts.append(str(tokenizer.decode(tokens[begin:end], skip_special_tokens=True)))
    return [text for text in texts if text.strip()]


def draw_tokens(
    logits: Float[Tensor, "batch vocabulary"],
    chances: Float64[Tensor, " batch"],
    temperature: float,
) -> Int64[Tensor, " batch"]:
    """A token of each row by its probability: the one in whose part of [0, 1) the chance lies."""
    # Apple's GPUs have no float64.
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    shares = torch.softmax(logits.float() / temperature, dim=-1).to(precise).cumsum(-1)
    places = chances.to(logits.device, precise)[:, None] * shares[:, -1:]
    # The last one of several places that are equal: those before it have no probability.
    drawn = torch.searchsorted(shares, places, right=True)[:, 0]
    return drawn.clamp(max=logits.shape[1] - 1)


class _Writer:
    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float,
        vocabulary: int,
        ends: list[int],
        restart: int | None,
    ) -> None:
        self._model = model
        self._temperature = temperature
        self._vocabulary = vocabulary
        self._ends = torch.tensor(ends, dtype=torch.int64, device=model.device)
        self._restart = restart
        arguments = inspect.signature(type(model).forward).parameters
        self._cache_name = next(name for name in CACHE_NAMES if name in arguments)

    def write(
        self,
        first: Int64[Tensor, " batch"],
        chances: Float64[Tensor, "batch tokens"],
        progress: Callable[[int], None],
    ) -> Int64[Tensor, "batch tokens"]:
        """Windows that begin with `first`, on the CPU."""
        tokens, cache = [first.to(self._model.device)], None
        for place in range(1, chances.shape[1]):
            output = self._model(tokens[-1][:, None], use_cache=True, **{self._cache_name: cache})
            cache = next(output[name] for name in CACHE_NAMES if name in output)
            logits = output.logits[:, -1, : self._vocabulary]
            drawn = draw_tokens(logits, chances[:, place], self._temperature)
            if self._restart is not None:
                has_ended = torch.isin(tokens[-1], self._ends)
                drawn = torch.where(has_ended, self._restart, drawn)
            tokens.append(drawn)
            progress(place + 1)
        return torch.stack(tokens, dim=1).cpu()


def chances_of(spec: WindowSpec, split: str) -> Float64[Tensor, "windows tokens"]:
    """One number from [0, 1) for each token to draw."""
    seed = int(digest_json([spec.seed, split])[:15], 16)
    dice = torch.Generator().manual_seed(seed)
    rows = [
        torch.rand(spec.window_tokens, generator=dice, dtype=torch.float64)
        for _ in range(spec.num_windows)
    ]
    return torch.stack(rows)


def _first_tokens(
    tokenizer: PreTrainedTokenizerBase, chances: Float64[Tensor, " windows"], bos: int | None
) -> Int64[Tensor, " windows"]:
    if bos is not None:
        return torch.full(chances.shape, bos, dtype=torch.int64)
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - special))
    return plain[(chances * len(plain)).long()]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a document and do not begin the next one themselves."""
    named = getattr(model.generation_config, "eos_token_id", None)
    of_model = named if isinstance(named, list) else [named]
    ends = {tokenizer.eos_token_id, *of_model} - {None, tokenizer.bos_token_id}
    return sorted(int(token) for token in ends)


def _document_starts(tokens: Int[Tensor, "windows tokens"], bos: int | None) -> list[list[int]]:
    if bos is None:
        return [[0] for _ in tokens]
    return [(window == bos).nonzero()[:, 0].tolist() for window in tokens]
