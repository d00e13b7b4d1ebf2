"""Perplexity of the stories260K model on TinyStories in two protocols whose results are known.

    python benchmarks/stories260k.py --model DIR --text FILE [--json]

DIR is a Hugging Face directory of Karpathy's stories260K, FILE holds stories separated by
<|endoftext|>. Expected on the shuffled test split of 573 stories: 4.354 and 7.640.
"""

import argparse
import json
import math
import time
from pathlib import Path

from foldstack.compression.checkpoints.checkpoint import load_model, load_tokenizer
from foldstack.compression.checkpoints.model_folder import resolve
from foldstack.compression.evaluation.perplexity import measure_perplexity
from foldstack.compression.evaluation.records import PerplexityProtocol, PerplexityResult

END_OF_STORY = "<|endoftext|>"

# Stories follow one another, a BOS token before each; every token but the very first is predicted.
STORIES = PerplexityProtocol(window_tokens=512, bos="document", joiner="")
# As the published code of SVD-LLM does it: the lines of the file joined by blank lines, one BOS
# token before the whole text, 255 predictions in each of 200 windows of 256.
LINES = PerplexityProtocol(
    window_tokens=256, bos="stream", score_last=False, remainder="drop", max_tokens=200 * 256
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help='print {"figure": value, ...}')
    arguments = parser.parse_args()
    figures = measure(arguments.model, arguments.text.read_text(encoding="utf-8"))
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:32} {value:,.4f}" if isinstance(value, float) else f"{name:32} {value:,}")


def measure(model: Path, text: str) -> dict[str, float | int]:
    """Both protocols' figures."""
    folder = resolve(str(model))
    loaded, tokenizer = load_model(folder), load_tokenizer(folder)
    stories = [story.strip() for story in text.split(END_OF_STORY) if story.strip()]
    started = time.perf_counter()
    whole = measure_perplexity(loaded, tokenizer, stories, STORIES)
    lines = measure_perplexity(loaded, tokenizer, text.split("\n"), LINES)
    return {
        "stories_perplexity": whole.perplexity,
        "stories_bits_per_byte": whole.bits_per_byte or math.nan,
        "stories_tokens": whole.num_tokens,
        **full_windows(whole),
        "lines_perplexity": lines.perplexity,
        "lines_tokens": lines.num_tokens,
        "seconds": time.perf_counter() - started,
    }


def full_windows(result: PerplexityResult) -> dict[str, float | int]:
    """The same without the last, shorter window."""
    pairs = [
        (nll, tokens)
        for nll, tokens in zip(result.window_nll, result.window_tokens, strict=True)
        if tokens == result.protocol.window_tokens
    ]
    tokens = sum(count for _, count in pairs)
    return {
        "stories_full_windows_perplexity": math.exp(math.fsum(nll for nll, _ in pairs) / tokens),
        "stories_full_windows_tokens": tokens,
    }


if __name__ == "__main__":
    main()
