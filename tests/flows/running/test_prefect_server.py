"""A configured Prefect server is asked again while its database is away."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from foldstack.compression.errors import InputError
from foldstack.flows.running import prefect_server

CALL = """
from foldstack.flows.running.prefect_server import TemporaryServer
from prefect.client.orchestration import get_client

with TemporaryServer() as server:
    server.ready()
    print(get_client(sync_client=True).count_flow_runs())
"""
REFUSED = {"exception_message": "Internal Server Error"}
"""What Prefect's server answers, as 500, when Postgres refuses the connection."""


class Api(BaseHTTPRequestHandler):
    """Of a server with seven flow runs, whose database is away at the first call."""

    was_asked = False

    def do_GET(self) -> None:
        self._answer(404, {})  # such a server knows no CSRF tokens

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(*((200, 7) if type(self).was_asked else (500, REFUSED)))
        type(self).was_asked = True

    def _answer(self, code: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), type("FreshApi", (Api,), {})) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        pytest.param({}, "7\n", id="a call lives through a restart of the database"),
        pytest.param({"PREFECT_CLIENT_RETRY_EXTRA_CODES": "418"}, "", id="what was set stays"),
    ],
)
def test_a_server_whose_database_is_away(address: str, chosen: dict[str, str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CALL],
        env=os.environ | {"PREFECT_API_URL": address} | chosen,
        capture_output=True,
        text=True,
    )
    assert done.stdout == said, done.stderr
    assert (done.returncode == 0) == bool(said)


class Page(BaseHTTPRequestHandler):
    """The pages of a Prefect server: what it can do is below /api."""

    has_api = True

    def do_GET(self) -> None:
        self.send_response(200 if self.has_api and self.path == "/api/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("has_api", "said"), [(True, "add /api to it"), (False, "a Prefect server ends with /api")]
)
def test_the_address_of_the_page_is_not_that_of_the_api(has_api: bool, said: str) -> None:
    handler = type("FreshPage", (Page,), {"has_api": has_api})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match=said):
            prefect_server._check_answers(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_a_dead_address_of_a_profile_names_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(InputError, match=r"the profile of Prefect.*set PREFECT_PROFILE"):
        prefect_server._check_answers("http://127.0.0.1:9/api")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(InputError, match="unset PREFECT_API_URL"):
        prefect_server._check_answers("http://127.0.0.1:9/api")


def test_a_server_that_goes_away_with_the_command_has_no_pages_to_link_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every MLflow run would carry a link that leads nowhere."""
    monkeypatch.setattr(prefect_server, "_current", {"api": "http://127.0.0.1:1/api"})
    assert prefect_server.has_pages()
    prefect_server._current["temporary"] = "http://127.0.0.1:1/api"
    assert not prefect_server.has_pages()
