"""A long text is encoded part after part, as if at once; and only as far as is needed."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from foldstack.compression.text import text_tokens
from foldstack.compression.text.text_tokens import encode_stream, token_pieces

WORDS = [
    "fold",
    "x",
    "Größe",
    "да",
    "中文",
    "🙂",
    "naïve",
    "12345",
    "return",
    "  ",
    "\n\n",
    "\t",
    "'s",
]


def long_text(words: int, seed: int = 0) -> str:
    dice = random.Random(seed)
    return "".join(dice.choice(WORDS) + dice.choice(["", " ", " ", "\n"]) for _ in range(words))


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([long_text(400, 1)], trainer)
    return made


def like_llama_2() -> Tokenizer:
    """No pre-tokenizer: merges may go over blanks; bytes for what is unknown."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prefix = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(prefix)
    special = ["<unk>", *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    made.train_from_iterator([text.replace("🙂", "") for text in [long_text(400, 1)]], trainer)
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    made.train_from_iterator([long_text(400, 1)], trainer)
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]"], show_progress=False
    )
    made.train_from_iterator([long_text(400, 1)], trainer)
    return made


KINDS = {each.__name__: each for each in (byte_level, like_llama_2, unigram, word_piece)}


@pytest.fixture(params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[request.param]())


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_tokens, "PIECE", 300)
    monkeypatch.setattr(text_tokens, "OVERLAP", 400)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("seed", range(4))
def test_parts_are_those_of_the_whole(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    text = long_text(700, seed)
    parts = list(token_pieces(tokenizer, text))
    assert len(parts) > 5
    expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert [token for tokens, _ in parts for token in tokens] == expected["input_ids"]
    sizes = [size for _, sizes in parts for size in sizes]
    names = tokenizer.convert_ids_to_tokens(expected["input_ids"])
    whole = text_tokens.bytes_per_token(text, expected["offset_mapping"], names)
    assert sizes == whole.tolist()
    assert sum(sizes) == len(text.encode())


@pytest.mark.usefixtures("small_pieces")
def test_one_word_without_an_end_is_encoded_in_larger_parts() -> None:
    """All of it is one pre-token, so that what comes at its end decides about its beginning."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    text = "fold" * 2000
    found = [token for tokens, _ in token_pieces(tokenizer, text) for token in tokens]
    assert found == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.usefixtures("small_pieces")
def test_no_more_is_encoded_than_is_needed(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [long_text(500, seed) for seed in range(20)]
    whole = encode_stream(tokenizer, documents, joiner="\n\n")
    read = 0
    encode = type(tokenizer).__call__

    def counting(self: PreTrainedTokenizerFast, text: str, **options: object) -> object:
        nonlocal read
        read += len(text)
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    some = encode_stream(tokenizer, documents, joiner="\n\n", max_tokens=200)
    assert some.tokens.tolist() == whole.tokens[:200].tolist()
    assert some.num_bytes is not None
    assert whole.num_bytes is not None
    assert some.num_bytes.tolist() == whole.num_bytes[:200].tolist()
    assert read < 3000 < sum(map(len, documents)) / 10
