"""Perplexity and bits per byte against brute force and against what can be worked out by hand."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation import perplexity, token_losses
from foldstack.compression.evaluation.perplexity import measure_perplexity
from foldstack.compression.evaluation.records import PerplexityProtocol
from foldstack.compression.text.text_tokens import encode_stream

DOCUMENTS = (
    "def item(value):\n    return value * 3\n",
    "# naïve café, 日本語 and 🎉🎉\nx = '“quoted”'\n",
    "for number in range(10):\n    print(number, number ** 2, sep=', ')\n",
)
BRIEF = ("def item_1(value):\n", "    return é日 * 3")
MIXED_TEXT = st.text(alphabet="aé日🎉 \n“def(value)", min_size=1, max_size=40)


@pytest.fixture(scope="session")
def model(tiny_model: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    made: PreTrainedModel = tiny_model("llama", vocab_size=len(tokenizer)).double()
    return made


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def brute_force(model: PreTrainedModel, contexts: Sequence[list[int]], targets: list[int]) -> float:
    """Mean loss, one prefix and one token at a time."""
    losses = []
    with torch.inference_mode():
        for context, target in zip(contexts, targets, strict=True):
            logits = model(torch.tensor([context])).logits[0, -1]
            losses.append(-torch.log_softmax(logits, dim=-1)[target].item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("score_last", [True, False])
@pytest.mark.parametrize("remainder", ["score", "drop"])
def test_loss_is_that_of_a_loop_over_prefixes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, score_last: bool, remainder: Any
) -> None:
    size = 8
    stream = ids_of(tokenizer, "\n\n".join(BRIEF))
    contexts, targets = [], []
    for position in range(1, len(stream)):
        start = (position - 1) // size * size
        if position % size == 0 and not score_last:
            continue
        is_full = len(stream) >= start + size + score_last
        if is_full or remainder == "score":
            contexts.append(stream[start:position])
            targets.append(stream[position])
    protocol = PerplexityProtocol(
        window_tokens=size, score_last=score_last, remainder=remainder, batch_size=3
    )
    result = measure_perplexity(model, tokenizer, BRIEF, protocol)
    assert result.num_tokens == len(targets)
    assert result.nll == pytest.approx(brute_force(model, contexts, targets), rel=1e-9)
    assert result.perplexity == pytest.approx(math.exp(result.nll))


def test_bos_of_a_window_predicts_its_first_token_and_is_never_predicted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    stream = ids_of(tokenizer, "\n\n".join(BRIEF))
    size, bos = 8, tokenizer.bos_token_id
    for score_last, text_tokens in ((True, size), (False, size - 1)):
        contexts = [
            [bos, *stream[position // text_tokens * text_tokens : position]]
            for position in range(len(stream))
        ]
        protocol = PerplexityProtocol(window_tokens=size, bos="window", score_last=score_last)
        result = measure_perplexity(model, tokenizer, BRIEF, protocol)
        assert result.num_tokens == len(stream)
        assert result.nll == pytest.approx(brute_force(model, contexts, stream), rel=1e-9)


def test_bos_before_each_document_is_part_of_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    bos = tokenizer.bos_token_id
    per_document = encode_stream(tokenizer, [*DOCUMENTS, ""], bos="document")
    expected = [token for text in DOCUMENTS for token in (bos, *ids_of(tokenizer, text))]
    assert per_document.tokens.tolist() == expected
    once = encode_stream(tokenizer, DOCUMENTS, joiner=" ", bos="stream")
    assert once.tokens.tolist() == [bos, *ids_of(tokenizer, " ".join(DOCUMENTS))]


def test_result_does_not_depend_on_the_batch_size(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    one, many = (
        measure_perplexity(
            model,
            tokenizer,
            DOCUMENTS,
            PerplexityProtocol(window_tokens=8, joiner="", batch_size=batch_size),
        )
        for batch_size in (1, 64)
    )
    assert one.window_tokens == many.window_tokens
    assert one.window_nll == pytest.approx(many.window_nll, rel=1e-10)


def test_mean_is_over_tokens_and_not_over_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    result = measure_perplexity(model, tokenizer, DOCUMENTS, PerplexityProtocol(window_tokens=32))
    assert result.window_tokens[-1] < result.window_tokens[0]
    assert len(result.window_nll) == result.num_windows == len(result.window_tokens)
    assert sum(result.window_tokens) == result.num_tokens
    assert result.nll == pytest.approx(sum(result.window_nll) / result.num_tokens, rel=1e-12)
    means = [a / b for a, b in zip(result.window_nll, result.window_tokens, strict=True)]
    assert result.nll != pytest.approx(sum(means) / len(means), rel=1e-6)


@pytest.fixture
def uniform(tiny_model: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model that knows nothing: all its logits are equal."""
    made: PreTrainedModel = tiny_model("llama", vocab_size=len(tokenizer))
    torch.nn.init.zeros_(made.lm_head.weight)
    return made


def test_uniform_logits_give_the_size_of_the_vocabulary(
    uniform: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    result = measure_perplexity(uniform, tokenizer, DOCUMENTS, PerplexityProtocol(window_tokens=16))
    assert result.perplexity == pytest.approx(len(tokenizer), rel=1e-12)


def test_bits_per_byte_by_hand(
    uniform: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "é" * 5 + "日" * 4  # 10 + 12 bytes; the tokenizer never saw either: one token per byte
    protocol = PerplexityProtocol(window_tokens=8, bos="stream", joiner="-")
    result = measure_perplexity(uniform, tokenizer, [text], protocol)
    assert (result.num_tokens, result.num_bytes) == (22, 22)
    assert result.bits_per_byte == pytest.approx(math.log2(len(tokenizer)), rel=1e-12)


@pytest.mark.parametrize("score_last", [True, False])
def test_bytes_are_those_of_the_tokens_predicted(
    uniform: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, score_last: bool
) -> None:
    # Windows of 5 cut through the three bytes of the characters.
    text, size = "日本語" * 7, 5
    protocol = PerplexityProtocol(window_tokens=size, joiner="", score_last=score_last)
    result = measure_perplexity(uniform, tokenizer, [text], protocol)
    assert len(text.encode()) == 63
    assert result.num_bytes == (62 if score_last else 63 - 13)
    assert result.num_bytes == result.num_tokens


@settings(deadline=None)
@given(text=MIXED_TEXT)
def test_bytes_of_the_tokens_add_up_to_the_text(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    stream = encode_stream(tokenizer, [text])
    names = tokenizer.convert_ids_to_tokens(stream.tokens.tolist())
    assert stream.num_bytes is not None
    assert int(stream.num_bytes.sum()) == len(text.encode())
    # Byte-level BPE writes every byte as one letter.
    assert stream.num_bytes.tolist() == [len(name) for name in names]


@settings(deadline=None)
@given(text=MIXED_TEXT)
def test_bytes_add_up_with_sentencepiece_and_byte_tokens_too(text: str) -> None:
    tokenizer = sentencepiece_like()
    stream = encode_stream(tokenizer, [text])
    assert stream.num_bytes is not None
    assert int(stream.num_bytes.sum()) == len(text.encode())
    for token, size in zip(stream.tokens.tolist(), stream.num_bytes.tolist(), strict=True):
        name = str(tokenizer.convert_ids_to_tokens(token))
        assert size == 1 if name.startswith("<0x") else size in (0, len(name.encode()), 1)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2: "▁" before a text, and a character outside the vocabulary becomes bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"adefluv()é"]
    bpe = models.BPE(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        unk_token="<unk>",
        byte_fallback=True,
    )
    made = Tokenizer(bpe)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_max_tokens_takes_the_beginning(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    for score_last, predicted in ((True, 32), (False, 30)):
        protocol = PerplexityProtocol(window_tokens=16, max_tokens=32, score_last=score_last)
        result = measure_perplexity(model, tokenizer, DOCUMENTS, protocol)
        assert (result.num_windows, result.num_tokens) == (2, predicted)
        whole = measure_perplexity(
            model, tokenizer, DOCUMENTS, protocol.model_copy(update={"max_tokens": 0})
        )
        assert result.window_nll == pytest.approx(whole.window_nll[:2])


def test_a_loss_that_is_not_finite_names_the_window(
    tiny_model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = tiny_model("llama", vocab_size=len(tokenizer))
    stream = ids_of(tokenizer, "\n\n".join(DOCUMENTS))
    poison = next(token for token in stream[20:] if token not in stream[:20])
    with torch.no_grad():
        made.get_input_embeddings().weight[poison] = torch.nan
    window = stream.index(poison) // 8
    with pytest.raises(InputError, match=rf"not finite in window {window} of "):
        measure_perplexity(made, tokenizer, DOCUMENTS, PerplexityProtocol(window_tokens=8))


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: no")]
)
def test_short_memory_halves_the_batch_and_changes_no_number(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    protocol = PerplexityProtocol(window_tokens=8, batch_size=8)
    plenty = measure_perplexity(model, tokenizer, DOCUMENTS, protocol)
    sizes: list[int] = []

    def room_for_two(model: Any, tokens: torch.Tensor, head: Any) -> torch.Tensor:
        sizes.append(len(tokens))
        if len(tokens) > 2:
            raise error
        return token_losses.token_losses(model, tokens, head)

    monkeypatch.setattr(perplexity, "token_losses", room_for_two)
    with caplog.at_level(logging.WARNING):
        short = measure_perplexity(model, tokenizer, DOCUMENTS, protocol)
    assert sizes[:4] == [8, 4, 2, 2]
    assert "8 windows at once do not fit in memory, going on with 4" in caplog.text
    assert short.window_nll == pytest.approx(plenty.window_nll, rel=1e-10)


def test_no_memory_for_one_window_is_told(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(perplexity, "token_losses", no_room)
    with pytest.raises(InputError, match="does not fit in memory: set window_tokens lower"):
        measure_perplexity(model, tokenizer, DOCUMENTS, PerplexityProtocol(window_tokens=8))


def test_other_runtime_errors_are_not_taken_for_short_memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(perplexity, "token_losses", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        measure_perplexity(model, tokenizer, DOCUMENTS, PerplexityProtocol(window_tokens=8))


def test_losses_are_those_of_the_whole_logits_in_every_family(
    architecture: str, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_losses, "LOGITS_AT_ONCE", 5 * 97)
    made = tiny_model(architecture)
    tokens = torch.randint(2, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        head = token_losses.plain_head(made, tokens[0])
        losses = token_losses.token_losses(made, tokens, head)
        logits = made(tokens).logits[:, :-1].double()
    expected = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert (head is None) == (architecture == "gemma2")  # which caps its logits


def test_model_is_left_in_the_mode_it_came_in(
    tiny_model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = tiny_model("gpt2", vocab_size=len(tokenizer), resid_pdrop=0.5)
    protocol = PerplexityProtocol(window_tokens=16)
    in_eval = measure_perplexity(made, tokenizer, DOCUMENTS, protocol)
    in_training = measure_perplexity(made.train(), tokenizer, DOCUMENTS, protocol)
    assert made.training
    assert in_training.nll == in_eval.nll


def test_bad_input_is_told_in_a_sentence(
    model: PreTrainedModel, tiny_model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    short = PerplexityProtocol(window_tokens=64, remainder="drop")
    with pytest.raises(InputError, match="the text is too short for windows of 64 tokens"):
        measure_perplexity(model, tokenizer, ["x = 1"], short)
    with pytest.raises(InputError, match="the text is too short"):
        measure_perplexity(model, tokenizer, [], PerplexityProtocol(window_tokens=8))
    with pytest.raises(InputError, match="at most the model's context of 128 tokens, got 129"):
        measure_perplexity(model, tokenizer, DOCUMENTS, PerplexityProtocol(window_tokens=129))
    with pytest.raises(InputError, match="the tokenizer does not match the model"):
        measure_perplexity(
            tiny_model("llama"), tokenizer, DOCUMENTS, PerplexityProtocol(window_tokens=8)
        )
    with pytest.raises(InputError, match="has no BOS token: set bos to none"):
        measure_perplexity(
            model,
            sentencepiece_like(),
            DOCUMENTS,
            PerplexityProtocol(window_tokens=8, bos="window"),
        )
    with pytest.raises(ValidationError, match="set joiner to '' or bos to 'stream'"):
        PerplexityProtocol(bos="document")


def test_unknown_tokens_are_counted(tiny_model: Any) -> None:
    words = {"<unk>": 0, "a": 1, "b": 2}
    known = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, unk_token="<unk>")
    documents = ["a", "c", "b", "d"]
    protocol = PerplexityProtocol(window_tokens=8, joiner="")
    result = measure_perplexity(tiny_model("llama"), tokenizer, documents, protocol)
    assert result.num_unknown == 2


def test_result_survives_json_even_when_it_is_infinite(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    result = measure_perplexity(model, tokenizer, DOCUMENTS, PerplexityProtocol(window_tokens=16))
    ruined = result.model_copy(update={"perplexity": math.inf})
    for one in (result, ruined):
        assert type(one).model_validate_json(one.model_dump_json()) == one


def test_progress_ends_at_the_number_of_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    seen: list[tuple[str, int, int]] = []
    result = measure_perplexity(
        model,
        tokenizer,
        DOCUMENTS,
        PerplexityProtocol(window_tokens=16),
        lambda what, done, total: seen.append((what, done, total)),
    )
    assert seen[-1] == ("perplexity", result.num_windows, result.num_windows)
