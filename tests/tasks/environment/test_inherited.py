"""A process of ours does what it was asked to, whatever surrounds it was made for."""

import os
import urllib.request

import pytest

from foldstack.tasks.environment.inherited import own_environment


@pytest.fixture(autouse=True)
def own_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.mark.parametrize(
    "name",
    [
        "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_WORLD_SIZE",
        "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_FSDP", "PMI_RANK",
        "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "FSDP_VERSION",
    ],
)  # fmt: skip
def test_orders_of_another_launcher_are_not_ours(name: str) -> None:
    os.environ[name] = "2"
    own_environment()
    assert name not in os.environ


@pytest.mark.parametrize("name", ["RANKING", "MY_RANK", "MASTER_KEY", "OMP_NUM_THREADS"])
def test_other_variables_stay(name: str) -> None:
    os.environ[name] = "2"
    own_environment()
    assert os.environ[name] == "2"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "127.0.0.1,localhost,::1"),
        ("example.com, localhost", "example.com,localhost,127.0.0.1,::1"),
        ("*", "*"),
    ],
)
def test_this_machine_is_not_asked_for_through_a_proxy(before: str, after: str) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = before
    for name in ("HTTP_PROXY", "http_proxy"):
        os.environ[name] = "http://127.0.0.1:9"
    own_environment()
    own_environment()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == after


def test_libraries_heed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    import requests

    os.environ |= dict.fromkeys(("HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9")
    own_environment()
    assert urllib.request.proxy_bypass("127.0.0.1")
    assert not requests.utils.get_environ_proxies("http://127.0.0.1:4200/api")
    client = httpx.Client()
    direct = client._transport_for_url(httpx.URL("http://127.0.0.1:4200/api"))
    assert direct is client._transport
