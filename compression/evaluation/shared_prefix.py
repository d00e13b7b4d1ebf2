"""lm-eval's model, with a context computed once for all its endings, and only logits that count.

lm-eval's own scores each choice of an item as a whole text, and computes the logits of every
position: with a vocabulary of 262,144 those of the context alone cost more than the blocks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence

from foldstack.compression.structure.modeling_foldstack import cache_name

Request = tuple[Any, Sequence[int], Sequence[int]]
"""What lm-eval asks by, the tokens of a context, and those of an ending."""
Answer = tuple[float, bool]
"""Log likelihood of the ending, nats, and whether greedy decoding would write it."""


def share_prefixes(lm: Any) -> None:
    """Have an HFLM of lm-eval's score endings that way: its scores stay, up to rounding."""
    lm._loglikelihood_tokens = SharedPrefixes(lm, lm._loglikelihood_tokens)


@dataclass(frozen=True)
class SharedPrefixes:
    """Answers in place of an HFLM's own method, for a decoder."""

    lm: Any
    stock: Callable[..., list[Answer]]
    """That method."""

    def __call__(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        import lm_eval.models.huggingface

        bar = lm_eval.models.huggingface.tqdm(total=len(requests), disable=disable_tqdm)
        answers: dict[int, Answer] = {}
        # What does not fit is cut from the left, so that its endings share no context.
        fits = [len(ctx) + len(end) <= self.lm.max_length + 1 for _, ctx, end in requests]
        long = [number for number, fit in enumerate(fits) if not fit]
        if long:
            found = self.stock([requests[n] for n in long], disable_tqdm=True)
            answers |= dict(zip(long, found, strict=True))
            bar.update(len(long))
        for batch in self._batches(requests, [n for n, fit in enumerate(fits) if fit]):
            found = self._score([(requests[n][1], requests[n][2]) for n in batch])
            answers |= dict(zip(batch, found, strict=True))
            for number in batch:
                if requests[number][0] is not None:
                    self.lm.cache_hook.add_partial(
                        "loglikelihood", requests[number][0], answers[number]
                    )
            bar.update(len(batch))
        bar.close()
        return [answers[number] for number in range(len(requests))]

    def _batches(self, requests: Sequence[Request], chosen: Iterable[int]) -> Iterator[list[int]]:
        """Numbers of requests that are answered at once: contexts of one length, whole families."""
        families: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number in chosen:
            families[tuple(requests[number][1])].append(number)
        batch: list[int] = []
        length = 0
        # Contexts without a second ending gain nothing by a cache, and need not be alike.
        by_kind = sorted(families.items(), key=lambda each: (len(each[1]) > 1, -len(each[0])))
        for context, family in by_kind:
            alike = len(family) > 1 and len(context)
            if batch and (alike != length or len(batch) + len(family) > int(self.lm.batch_size)):
                yield batch
                batch = []
            batch, length = batch + family, alike
        if batch:
            yield batch

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Answer]:
        contexts = list(dict.fromkeys(tuple(context) for context, _ in pairs))
        if len(contexts) == len(pairs):
            return self._score_alone(pairs)
        name = cache_name(type(self.lm.model))
        ids = torch.tensor(contexts, device=self.lm.device)
        first, cache = self._logits(ids, [[ids.shape[1] - 1]] * len(contexts), name)
        if cache is None:  # a model that keeps none
            return self._score_alone(pairs)
        owners = [contexts.index(tuple(context)) for context, _ in pairs]
        longer = [row for row, (_, ending) in enumerate(pairs) if len(ending) > 1]
        rest: dict[int, Float[Tensor, "tokens vocab"]] = {}
        if longer:
            cache.batch_select_indices(torch.tensor([owners[row] for row in longer]).to(ids.device))
            inputs = [pairs[row][1][:-1] for row in longer]
            places = [list(range(len(tokens))) for tokens in inputs]
            logits, _ = self._logits(self._padded(inputs), places, name, cache)
            rest = dict(zip(longer, logits, strict=True))
        return [
            self._answer(torch.cat([first[owner], *([rest[row]] if row in rest else [])]), ending)
            for row, (owner, (_, ending)) in enumerate(zip(owners, pairs, strict=True))
        ]

    def _score_alone(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Answer]:
        inputs = [[*context, *ending][:-1] for context, ending in pairs]
        places = [
            list(range(len(tokens) - len(ending), len(tokens)))
            for tokens, (_, ending) in zip(inputs, pairs, strict=True)
        ]
        logits, _ = self._logits(self._padded(inputs), places)
        return [self._answer(*each) for each in zip(logits, [e for _, e in pairs], strict=True)]

    def _padded(self, rows: Sequence[Sequence[int]]) -> Int[Tensor, "rows longest"]:
        """On the right, where a causal model does not see it."""
        tensors = [torch.tensor(list(row)) for row in rows]
        return pad_sequence(tensors, batch_first=True).to(self.lm.device)

    def _logits(
        self,
        ids: Int[Tensor, "rows tokens"],
        places: Sequence[Sequence[int]],
        cache_as: str = "",
        cache: Any = None,
    ) -> tuple[tuple[Float[Tensor, "some vocab"], ...], Any]:
        """Logits at some places of each row, and no others; the cache where it is named."""
        model: Any = self.lm.model
        flat = [row * ids.shape[1] + place for row, own in enumerate(places) for place in own]
        chosen = torch.tensor(flat, device=ids.device)

        def keep_chosen(_head: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states = arguments[0]
            return (states.flatten(0, 1)[chosen.to(states.device)].unsqueeze(0), *arguments[1:])

        hook = model.get_output_embeddings().register_forward_pre_hook(keep_chosen)
        extra = {cache_as: cache} if cache is not None else {}
        try:
            output = model(input_ids=ids, use_cache=bool(cache_as), **extra)
        finally:
            hook.remove()
        logits = output.logits[0].split([len(own) for own in places])
        return logits, output.get(cache_as) if cache_as else None

    def _answer(self, logits: Float[Tensor, "tokens vocab"], ending: Sequence[int]) -> Answer:
        scores = log_softmax(logits, dim=-1, dtype=self.lm.softmax_dtype)
        targets = torch.tensor(ending, device=logits.device)
        chosen = scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return float(chosen.sum()), bool((scores.argmax(-1) == targets).all())
