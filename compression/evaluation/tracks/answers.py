"""How written answers are scored: exact match and F1 as SQuAD has them, rouge-L, and variety.

An answer is only what the model wrote, never the prompt; an empty one is wrong.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
REPEATED = 4
"""Words that make a repetition."""


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and extra space (SQuAD's evaluation script)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is one of those accepted."""
    found = normalised(answer)
    return float(bool(found) and found in {normalised(each) for each in accepted})


def f1(answer: str, accepted: Sequence[str]) -> float:
    """Of the words shared with the nearest of those accepted."""
    return max((_f1(normalised(answer).split(), normalised(each).split()) for each in accepted),
               default=0.0)  # fmt: skip


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of stemmed words (Lin 2004)."""
    score = _scorer().score(reference, answer)["rougeL"]
    return float(score.fmeasure)


def distinct(text: str, words: int) -> float:
    """Share of the runs of so many words that are different ones; 0 for a text of fewer words."""
    runs = _runs(text, words)
    return len(set(runs)) / len(runs) if runs else 0.0


def repetition(text: str) -> float:
    """Share of its runs of four words that stood there before."""
    runs = _runs(text, REPEATED)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _runs(text: str, words: int) -> list[tuple[str, ...]]:
    found = text.split()
    return [tuple(found[start : start + words]) for start in range(len(found) - words + 1)]


def _f1(answer: Sequence[str], accepted: Sequence[str]) -> float:
    shared = sum((Counter(answer) & Counter(accepted)).values())
    return 2 * shared / (len(answer) + len(accepted)) if shared else 0.0


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
