"""The tokenizer of a model folder as llama.cpp stores it: read from tokenizer.json.

llama.cpp knows pre-tokenizers by names, and splits text by rules of its own for each. A pattern
that it has no name for is refused: another one would read text as other tokens without a word.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from foldstack.compression.errors import InputError

# By what they match, in order of how they are told apart: the regular expressions of tokenizer.json
# and llama.cpp's name for the splitter that does the same.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITTERS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}


@dataclass
class Vocabulary:
    """What goes into a GGUF file: `kind` is llama.cpp's name of the algorithm."""

    kind: str
    splitter: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    adds_space: bool = False


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The vocabulary in `folder`, padded to as many tokens as the embedding has rows.

    Raises:
        InputError: there is no tokenizer.json, or llama.cpp has no such tokenizer.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{folder} has no tokenizer.json, which a GGUF file is made from")
    stored = json.loads(file.read_text(encoding="utf-8"))
    model = stored["model"]
    if model.get("type") != "BPE":
        raise InputError(
            f"the tokenizer in {folder} is a {model.get('type')}; GGUF files are written for BPE"
        )
    tokens, types = _tokens(stored, rows)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if model.get("byte_fallback"):
        return _of_pieces(stored, tokens, types, merges)
    return Vocabulary("gpt2", _splitter(stored, folder), tokens, types, merges)


def _tokens(stored: dict[str, Any], rows: int) -> tuple[list[str], list[TokenType]]:
    vocab = dict(stored["model"]["vocab"])
    added = {token["id"]: token for token in stored.get("added_tokens", [])}
    names = {index: name for name, index in vocab.items()}
    names |= {index: token["content"] for index, token in added.items()}
    tokens, types = [], []
    for index in range(rows):
        name = names.get(index)
        tokens.append(f"[PAD{index}]" if name is None else name)
        if name is None:
            types.append(TokenType.UNUSED)
        elif index in added:
            special = added[index]["special"]
            types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    return tokens, types


def _of_pieces(
    stored: dict[str, Any], tokens: list[str], types: list[TokenType], merges: list[str]
) -> Vocabulary:
    """SentencePiece's form: bytes where no piece fits, and a score that says what merges first."""
    rank = {merge.replace(" ", ""): place for place, merge in reversed(list(enumerate(merges)))}
    scores = [-float(rank.get(token, len(merges))) for token in tokens]
    unknown = stored["model"].get("unk_token")
    for index, token in enumerate(tokens):
        if len(token) == len("<0x00>") and token.startswith("<0x"):
            types[index] = TokenType.BYTE
        elif token == unknown:
            types[index] = TokenType.UNKNOWN
    return Vocabulary(
        "llama", "default", tokens, types, scores=scores, adds_space=_adds_space(stored)
    )


def _parts(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    return step.get("normalizers") or step.get("pretokenizers") or [step]


def _adds_space(stored: dict[str, Any]) -> bool:
    steps = _parts(stored.get("normalizer")) + _parts(stored.get("pre_tokenizer"))
    return any(
        step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never"
        for step in steps
    )


def _splitter(stored: dict[str, Any], folder: Path) -> str:
    steps = _parts(stored.get("pre_tokenizer"))
    patterns = [s["pattern"].get("Regex") for s in steps if s["type"] == "Split"]
    is_gpt2 = any(step["type"] == "ByteLevel" and step.get("use_regex", True) for step in steps)
    if not patterns and is_gpt2 and not any(s.get("add_prefix_space") for s in steps):
        return "gpt-2"
    if len(patterns) == 1 and patterns[0] in _SPLITTERS:
        return _SPLITTERS[patterns[0]]
    raise InputError(
        f"the tokenizer in {folder} splits text in a way that llama.cpp has no name for: in a GGUF "
        "file it would read other tokens"
    )


def write_vocabulary(
    writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The vocabulary, special tokens and the chat template."""
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.splitter)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.kind == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    named: dict[str, Any] = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for name, index in named.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = list(tokenizer("a")["input_ids"])
    writer.add_add_bos_token(bool(ids) and ids[0] == named["bos"])
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == named["eos"])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
