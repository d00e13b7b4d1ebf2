"""The judge: both orders, ties, words that are no decision, and an address that does not answer."""

import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from http.client import RemoteDisconnected
from typing import Any

import pytest

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.tracks.judge import Judge, win_rate

JUDGE = Judge(url="http://127.0.0.1:9/v1/", model="some")
Speak = Callable[[Callable[[str, str], str]], list[Any]]


@pytest.fixture
def speak(monkeypatch: pytest.MonkeyPatch) -> Speak:
    """Has the judge say what a function makes of the two answers; gives the requests."""

    def of(say: Callable[[str, str], str]) -> list[Any]:
        requests: list[Any] = []

        def answer(request: Any, timeout: float) -> Any:
            requests.append(request)
            prompt = json.loads(request.data)["messages"][0]["content"]
            a = prompt.partition("Answer A:\n")[2].partition("\n\nAnswer B:")[0]
            b = prompt.partition("Answer B:\n")[2].partition("\n\nBetter:")[0]
            content = {"choices": [{"message": {"content": say(a, b)}}]}
            return io.BytesIO(json.dumps(content).encode())

        monkeypatch.setattr(urllib.request, "urlopen", answer)
        return requests

    return of


def test_a_judge_that_always_takes_the_first_finds_nobody_better(speak: Speak) -> None:
    """The released script had one order: such a judge gave one model every point."""
    requests = speak(lambda a, b: "A")
    found = win_rate(JUDGE, ["q"] * 4, ["dense"] * 4, ["other"] * 4)
    assert (found.rate, found.swayed, found.unread) == (0.5, 4, 0)
    assert len(requests) == 8
    sent = json.loads(requests[0].data)
    assert (sent["model"], sent["temperature"]) == ("some", 0)
    assert requests[0].full_url == "http://127.0.0.1:9/v1/chat/completions"


def test_wins_ties_and_their_error(speak: Speak) -> None:
    """Breaks when a tie is a loss, or the answers of the second order are not turned around."""
    speak(lambda a, b: "T" if a == b else " B." if len(b) > len(a) else "Answer A")
    found = win_rate(JUDGE, ["q"] * 4, ["ab"] * 4, ["abc", "abc", "ab", "a"])
    assert found.rate == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert found.stderr == pytest.approx(0.2394, abs=1e-4)
    assert found.swayed == 0


def test_words_that_are_no_decision_are_counted_apart(speak: Speak) -> None:
    """They became [-1, -1], which nothing could aggregate."""
    speak(lambda a, b: "Both are fine" if "?" in a + b else "A" if a == "x" else "B")
    found = win_rate(JUDGE, ["q"] * 2, ["?", "y"], ["x", "x"])
    assert (found.rate, found.unread, found.num_questions, found.stderr) == (1.0, 1, 2, None)


def test_a_key_comes_from_the_environment_and_is_never_told(
    speak: Speak, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a secret must stand in a config, or a failure repeats it."""
    requests = speak(lambda a, b: "T")
    judge = Judge(url="https://judge.example/v1", model="some", key_variable="JUDGE_KEY")
    with pytest.raises(InputError, match="names JUDGE_KEY, which is not set"):
        win_rate(judge, ["q"], ["a"], ["b"])
    monkeypatch.setenv("JUDGE_KEY", "hidden")
    win_rate(judge, ["q"], ["a"], ["b"])
    assert requests[0].get_header("Authorization") == "Bearer hidden"
    with pytest.raises(ValueError, match="without a password"):
        Judge(url="http://me:secret@judge.example", model="some")


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (urllib.error.URLError("connection refused"), "connection refused"),
        (RemoteDisconnected("closed without response"), "closed without response"),
        (
            urllib.error.HTTPError("", 401, "No", Message(), io.BytesIO(b'{"message": "hidden?"}')),
            r'HTTP Error 401: No: {"message": "\.\.\.\?"}',
        ),
    ],
)
def test_a_judge_that_does_not_answer_is_a_sentence(
    failure: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when an evening's run ends in a traceback, or tells the key that was refused."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise failure

    monkeypatch.setenv("JUDGE_KEY", "hidden")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    judge = JUDGE.model_copy(update={"key_variable": "JUDGE_KEY"})
    with pytest.raises(
        InputError, match=f"the judge at http://127.0.0.1:9/v1 gave no answer: .*{said}"
    ):
        win_rate(judge, ["q"], ["a"], ["b"])
