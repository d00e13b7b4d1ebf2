"""A scheduled run on the real topology, and the pages it is seen on, in a real browser.

Chromium is driven over its DevTools protocol with the `websockets` that Prefect brings along: no
driver to install, none to match with the browser's version.
"""

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from foldstack.tasks.tracking.mlflow_pages import pages

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--window-size=2000,1000", "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self._call("Page.enable")
        self._call("Network.enable")

    def log_in(self, words: str) -> None:
        """Send `user:password` with every request from now on."""
        token = base64.b64encode(words.encode()).decode()
        headers = {"Authorization": f"Basic {token}"}
        self._call("Network.setExtraHTTPHeaders", headers=headers)

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    @property
    def text(self) -> str:
        """What is to be read on the page."""
        return str(self.run("document.body ? document.body.innerText : ''") or "")

    def wait_for(self, *wanted: str, seconds: float = 90.0) -> str:
        """The page's text, as soon as all of `wanted` (regular expressions) are in it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            text = self.text
            if all(re.search(pattern, text) for pattern in wanted):
                return text
            time.sleep(0.5)
        lacking = [pattern for pattern in wanted if not re.search(pattern, self.text)]
        raise AssertionError(f"the page does not show {lacking} but:\n{self.text}")

    def press(self, label: str) -> None:
        """Click on everything that says exactly `label`."""
        leaves = "[...document.querySelectorAll('*')].filter(e => e.children.length == 0)"
        self.run(
            f"{leaves}.filter(e => e.innerText == {json.dumps(label)}).forEach(e => e.click())"
        )

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while True:  # events come in between
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A fresh headless Chromium and its one tab."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (address.exists() and address.read_text().strip()):
            assert process.poll() is None, "Chromium ended"
            assert time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.1)
        port = address.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
            (tab, *_) = [each for each in json.load(answer) if each["type"] == "page"]
        with connect(tab["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, Any]]:
    """The figures of one scheduled run, with everything still up."""
    if not (shutil.which("postgres") or list(Path("/usr/lib/postgresql").glob("*/bin/postgres"))):
        pytest.skip("needs Postgres: apt-get install postgresql")
    script = Path(__file__).parents[2] / "deploy" / "scheduled_run.py"
    with tempfile.TemporaryDirectory(prefix="foldstack-") as home:
        Path(home).chmod(0o711)  # Postgres's user passes through
        command = [sys.executable, script, "--home", home, "--json", "--keep"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                line = process.stdout.readline()
                assert line, f"it ended with {process.wait()}"
                yield json.loads(line) | {
                    f"secrets_of_{name}": word
                    for name, word in json.loads((Path(home) / "secrets.json").read_text()).items()
                }
            finally:
                process.terminate()
                process.wait(120)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_a_scheduled_run_goes_through_and_shows_up_in_mlflow(seen: dict[str, Any]) -> None:
    assert (seen["state"], seen["by_scheduler"]) == ("Completed", True), seen["message"]
    runs = {run["name"]: run for run in seen["mlflow_runs"]}
    assert set(runs) == {
        "scheduled check", "dense", "shortgpt 0.15", "shortgpt 0.30", "svd_llm 0.15",
        "svd_llm 0.30",
    }  # fmt: skip
    assert {run["status"] for run in runs.values()} == {"FINISHED"}
    assert all(run["flow_run_url"].startswith(seen["prefect"]) for run in runs.values())


def test_the_worker_refreshes_the_comparison(seen: dict[str, Any]) -> None:
    refreshed = seen["refresh"]
    assert refreshed["state"] == "Completed", refreshed["message"]
    rows = {(row["sweep"], row["model"]) for row in refreshed["rows"]}
    assert {("scheduled check", "dense"), ("scheduled check", "svd_llm 0.30")} <= rows


def test_a_failed_run_sends_an_alert_with_its_cause(seen: dict[str, Any]) -> None:
    alert = seen["alert"]
    assert alert["state"] == "Failed"
    first, cause, page, *_ = alert["text"].splitlines()
    assert re.fullmatch(r"must fail .*: Failed", first)
    assert "sparsity" in cause
    assert page.strip().startswith(seen["prefect"])


@pytest.mark.parametrize("place", ["prefect", "mlflow"])
def test_servers_let_nobody_in_without_a_password(seen: dict[str, Any], place: str) -> None:
    paths = {
        "prefect": "/api/admin/version",
        "mlflow": "/api/2.0/mlflow/experiments/get?experiment_id=0",
    }
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(seen[place] + paths[place], timeout=30)


def test_prefect_shows_the_run_its_stages_and_its_artifacts(
    seen: dict[str, Any], page: Page
) -> None:
    (url, *_) = {run["flow_run_url"] for run in seen["mlflow_runs"]}
    page.log_in(f"admin:{seen['secrets_of_prefect']}")
    page.open(f"{seen['prefect']}/login")
    page.wait_for("Login")
    words = json.dumps(f"admin:{seen['secrets_of_prefect']}")
    page.run(f"localStorage.setItem('prefect-password', {words})")
    page.open(url)
    page.wait_for("scheduled check", "Completed", "compress svd_llm 0.30", "evaluate dense")
    page.press("Artifacts")
    page.wait_for("comparison-", "ranking-", "mlflow-runs-", "mlflow-compare-")


def test_mlflow_shows_the_variants_with_their_metrics(seen: dict[str, Any], page: Page) -> None:
    page.log_in(f"admin:{seen['secrets_of_mlflow']}")
    variants = [run for run in seen["mlflow_runs"] if run["bits_per_byte"] is not None]
    page.open(pages(seen["mlflow"], variants[0]["experiment_id"], "")["mlflow runs"])
    wanted = [text for run in variants for text in (run["name"], str(run["bits_per_byte"])[:8])]
    page.wait_for(*[re.escape(text) for text in wanted], "quality/bits_per_byte", "sparsity")


def test_mlflow_draws_what_decides(seen: dict[str, Any], page: Page) -> None:
    page.log_in(f"admin:{seen['secrets_of_mlflow']}")
    (dense,) = [run for run in seen["mlflow_runs"] if run["name"] == "dense"]
    page.open(pages(seen["mlflow"], dense["experiment_id"], dense["sweeps"])["mlflow compare"])
    page.wait_for("what decides", "size/parameters vs. quality/bits_per_byte")


def test_mlflow_shows_the_plot(seen: dict[str, Any], page: Page) -> None:
    page.log_in(f"admin:{seen['secrets_of_mlflow']}")
    (sweep,) = [run for run in seen["mlflow_runs"] if run["name"] == "scheduled check"]
    run = f"experiments/{sweep['experiment_id']}/runs/{sweep['run_id']}"
    page.open(f"{seen['mlflow']}/#/{run}/artifacts/quality_against_size.png")
    page.wait_for("quality_against_size")
    deadline = time.monotonic() + 60
    widths = "[...document.images].filter(e => e.src.startsWith('blob:')).map(e => e.naturalWidth)"
    while not any(width > 300 for width in page.run(widths)):
        assert time.monotonic() < deadline, "the plot is not drawn"
        time.sleep(0.5)
