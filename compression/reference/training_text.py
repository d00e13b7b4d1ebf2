"""The train split as batches of packed documents, for the training of the reference model."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from foldstack.compression.reference.stdlib_corpus import stdlib_split

CONTEXT = 512


@dataclass
class Progress:
    """Where a run stands: all that a resumed run needs besides tensors."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    pass_index: int = 0
    batch_index: int = 0

    def to_json(self) -> str:
        """Give it as text for a checkpoint's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Progress":
        """Read what `to_json` gave."""
        return cls(**json.loads(text))


class TrainingText:
    """Batches of packed documents, in an order that pass and seed decide."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int) -> None:
        self.modules = encode(tokenizer, list(stdlib_split("train").values()))
        self.batch_size, self.seed = batch_size, seed

    def batches(self, progress: Progress) -> Iterator[Tensor]:
        """Give batches without end from where `progress` stands, and move it along."""
        while True:
            batches = self.one_pass(progress.pass_index)
            while progress.batch_index < len(batches):
                progress.batch_index += 1
                yield batches[progress.batch_index - 1]
            progress.pass_index, progress.batch_index = progress.pass_index + 1, 0

    def one_pass(self, index: int) -> Tensor:
        """Give one pass over all modules in a new order: batches x rows x tokens."""
        dice = torch.Generator().manual_seed(self.seed * 1000 + index)
        order = torch.randperm(len(self.modules), generator=dice).tolist()
        stream = torch.cat([self.modules[i] for i in order])
        stream = stream[int(torch.randint(CONTEXT, (), generator=dice)) :]
        rows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        rows = rows[torch.randperm(len(rows), generator=dice)]
        whole = len(rows) // self.batch_size * self.batch_size
        return rows[:whole].view(-1, self.batch_size, CONTEXT)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Tensor]:
    """Turn texts into token ids, each led by the beginning-of-sequence token."""
    bos = tokenizer.bos_token_id
    return [
        torch.tensor([bos, *ids])
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ]
