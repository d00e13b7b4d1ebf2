"""Secrets of the environment and of addresses, and that nothing says them."""

import logging
import traceback
from pathlib import Path

import pytest

from foldstack.compression.errors import InputError
from foldstack.flows.config.run_config import parse_config
from foldstack.tasks.environment.redaction import hide_in_logs, redacted, without_secrets
from foldstack.tasks.tracking.mlflow_pages import pages
from foldstack.tasks.tracking.run_record import RunRecord
from foldstack.tasks.tracking.tracker import Tracker

PASSWORD = "correct-horse-battery"


@pytest.mark.parametrize(
    "address, shown",
    [
        (f"http://bob:{PASSWORD}@host:5000/x", "http://host:5000/x"),
        (f"postgresql+asyncpg://bob:{PASSWORD}@db/prefect", "postgresql+asyncpg://db/prefect"),
        (f"cannot reach 'http://b:{PASSWORD}@h/a' now", "cannot reach 'http://h/a' now"),
        (f"http://:{PASSWORD}@host", "http://host"),
        ("http://host:5000/@someone", "http://host:5000/@someone"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("hf://datasets/a@main/b: no such file", "hf://datasets/a@main/b: no such file"),
    ],
)
def test_addresses_lose_their_passwords(address: str, shown: str) -> None:
    assert redacted(address) == shown


@pytest.mark.parametrize(
    "name, value",
    [
        ("HF_TOKEN", PASSWORD),
        ("MLFLOW_TRACKING_PASSWORD", PASSWORD),
        ("AWS_SECRET_ACCESS_KEY", PASSWORD),
        ("PREFECT_API_AUTH_STRING", f"admin:{PASSWORD}"),
    ],
)
def test_secrets_of_the_environment_are_hidden(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    text = f"401 for {PASSWORD} ({value})"
    assert redacted(text) == text
    monkeypatch.setenv(name, value)
    assert PASSWORD not in redacted(text)


def test_other_variables_and_short_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    monkeypatch.setenv("HF_TOKEN_PATH", "/root/somewhere")
    monkeypatch.setenv("SOME_PASSWORD", "false")
    assert redacted("falsehood in /root/somewhere is false") == (
        "falsehood in /root/somewhere is false"
    )


def test_an_error_leaves_without_the_secret_that_its_cause_speaks_of() -> None:
    def connect() -> None:
        try:
            raise OSError(f"no route to http://bob:{PASSWORD}@host/")
        except OSError as error:
            raise ValueError("the hub did not answer") from error

    said = "ValueError: the hub did not answer"
    with pytest.raises(RuntimeError, match=said) as caught, without_secrets():
        connect()
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


def test_a_mistake_stays_a_mistake_and_an_innocent_error_stays_itself() -> None:
    with pytest.raises(InputError, match="no model at http://host/"), without_secrets():
        raise InputError(f"no model at http://bob:{PASSWORD}@host/")
    innocent = KeyError("x")
    with pytest.raises(KeyError) as caught, without_secrets():
        raise innocent
    assert caught.value is innocent


def test_a_password_in_the_config_is_refused_and_not_repeated() -> None:
    data = {
        "methods": [{"name": "shortgpt"}],
        "tracking": {"uri": f"http://bob:{PASSWORD}@host"},
    }
    with pytest.raises(InputError, match="MLFLOW_TRACKING_PASSWORD in the environment") as caught:
        parse_config(data)
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_is_away_is_named_without_its_password(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"http://bob:{PASSWORD}@127.0.0.1:9"
    tracker = Tracker(uri, "e", tmp_path)
    with caplog.at_level(logging.WARNING):
        tracker.log(RunRecord(name="r", fingerprint="f" * 16))
        tracker.finish()
    (warning,) = tracker.warnings
    assert "http://127.0.0.1:9" in warning
    assert PASSWORD not in warning + caplog.text


def test_what_other_libraries_log_holds_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    make = logging.getLogRecordFactory()
    try:
        hide_in_logs()
        address = f"http://bob:{PASSWORD}@host/a"
        logging.getLogger("huggingface_hub.utils").warning("thrown while requesting %s", address)
        logging.getLogger("other").warning("%d of %d", 1, 2)
    finally:
        logging.setLogRecordFactory(make)
    assert caplog.messages == ["thrown while requesting http://host/a", "1 of 2"]


def test_addresses_of_pages_hold_no_password() -> None:
    for page in pages(f"http://bob:{PASSWORD}@host:5000", "1", "sweep").values():
        assert page.startswith("http://host:5000/#/")
        assert PASSWORD not in page
