"""What a model writes: the greedy continuations of a few prompts, to be read beside another's."""

from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.records import Sample

Progress = Callable[[str, int, int], None]
MOST_CHARACTERS = 16
"""Of a token, about: more of a document is not looked at."""


class SampleSpec(BaseModel):
    """Which prompts are continued, and how far."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prompts: tuple[str, ...] = ()
    """Empty: the beginnings of documents of the text that perplexity is measured on."""
    count: int = Field(default=5, ge=1, le=50)
    """Of those documents, evenly spread over the text."""
    prompt_tokens: int = Field(default=32, ge=1)
    """Of each beginning; a document is used if it goes on."""
    new_tokens: int = Field(default=48, ge=1)
    """Written at most; a model may end before."""


def beginnings(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, spec: SampleSpec
) -> list[str]:
    """Prompts from documents that are spread evenly over a text.

    Raises:
        InputError: no document is longer than a prompt.
    """
    # Some more than are asked for: short ones are passed over.
    places = range(0, len(texts), max(1, len(texts) // (4 * spec.count)))
    found: list[str] = []
    for place in places:
        begin = texts[place][: MOST_CHARACTERS * (spec.prompt_tokens + 1)]
        ids = tokenizer(begin, add_special_tokens=False)["input_ids"]
        if len(ids) > spec.prompt_tokens:
            found.append(str(tokenizer.decode(ids[: spec.prompt_tokens])))
    if not found:
        raise InputError(
            f"samples.prompt_tokens may be at most what a document of the text has, got "
            f"{spec.prompt_tokens}; or give samples.prompts"
        )
    step = len(found) / min(spec.count, len(found))
    return [found[int(number * step)] for number in range(min(spec.count, len(found)))]


@torch.inference_mode()
def write_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    progress: Progress | None = None,
) -> list[Sample]:
    """The greedy continuation of each prompt, one by one, so that no padding has a say.

    Special tokens are put before a prompt as the tokenizer does by itself, and left out of what is
    returned.

    Raises:
        InputError: prompt and answer are longer than the model's context.
    """
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    found = []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        if context is not None and ids.shape[1] + new_tokens > context:
            raise InputError(
                f"a prompt of {ids.shape[1]} tokens and samples.new_tokens {new_tokens} exceed the "
                f"model's context of {context}"
            )
        written = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        found.append(Sample(prompt=prompt, continuation=str(text)))
        if progress is not None:
            progress("write samples", number + 1, len(prompts))
    return found
