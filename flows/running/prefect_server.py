"""A Prefect API server for the time of one command, for those who run none.

Prefect would start one itself, but only after importing all of its server into this process as
well, and it leaves the server behind when this process is killed. This one starts while the
libraries are still being imported, and ends with its parent however that ends.
"""

import argparse
import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from foldstack.compression.errors import InputError
from foldstack.flows.prefect_defaults import AGAINST_OUTAGES  # before Prefect

SERVER_SETTINGS = {
    "PREFECT__SERVER_EPHEMERAL": "1",  # no scheduler: nobody deploys to a server that goes away
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_UI_ENABLED": "0",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
}
DELIVERY_SECONDS = 5.0
CANCEL_SECONDS = 3.0
ANSWER_SECONDS = 10.0

# The flow run that is under way in this process, and the API that knows of it.
_current: dict[str, str] = {}

MIGRATED = "foldstack-migrated-by"


def prefect_home() -> Path:
    return Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()


class TemporaryServer:
    """Starts at once, in the background; `ready` waits for it and points Prefect at it.

    Does nothing where Prefect was told of a server: by PREFECT_API_URL, a profile or a settings
    file. What a profile says is known only once Prefect is imported; then this server is stopped.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (the server writes to it for long)
        if not os.environ.get("PREFECT_API_URL"):
            self._start()

    def __enter__(self) -> "TemporaryServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def ready(self) -> str:
        """Address of the API that flows will talk to.

        Raises:
            InputError: there is no server, and starting one is forbidden or failed; or the one that
            is configured does not answer.
        """
        from prefect.context import refresh_global_settings_context
        from prefect.settings import get_current_settings

        settings = get_current_settings()
        if settings.api.url:
            self.stop()
            for name, value in AGAINST_OUTAGES.items():
                os.environ.setdefault(name, value)
            refresh_global_settings_context()
            _current["api"] = str(settings.api.url)
            _check_answers(_current["api"])
            return _current["api"]
        if not settings.server.ephemeral.enabled:
            self.stop()
            raise InputError(
                "no Prefect server is configured and temporary ones are switched off; set "
                "PREFECT_API_URL, or unset PREFECT_SERVER_EPHEMERAL_ENABLED"
            )
        self._wait(settings.server.ephemeral.startup_timeout_seconds)
        os.environ["PREFECT_API_URL"] = self._url
        refresh_global_settings_context()
        _current["api"] = self._url
        _note_migration()
        return self._url

    def stop(self) -> None:
        """End the server; its database stays in PREFECT_HOME."""
        process, self._process = self._process, None
        if process is None:
            self._log.close()
            return
        deliver_what_waits()
        if os.environ.get("PREFECT_API_URL") == self._url:
            del os.environ["PREFECT_API_URL"]
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._log.close()

    def abandon(self) -> None:
        """End the server without delivering anything any more: this process is about to end."""
        if self._process is not None:
            self._process.terminate()

    def _start(self) -> None:
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}/api"
        migrated = {"PREFECT_API_DATABASE_MIGRATE_ON_START": "false"} if _is_migrated() else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, "--port", str(port), "--parent", str(os.getpid())],
            env={**os.environ, **SERVER_SETTINGS, **migrated},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def _wait(self, seconds: int) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process and self._process.poll() is None:
            with suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self._url}/health", timeout=5).close()
                return
            time.sleep(0.05)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self.stop()
        raise InputError(
            f"the temporary Prefect server did not start within {seconds} s "
            f"({lines[-1] if lines else 'it said nothing'}); start one with `prefect server start` "
            "and set PREFECT_API_URL"
        )


def note_flow_run(run_id: str) -> None:
    """Remember the flow run that is under way in this process."""
    _current["run"] = run_id


def cancel_flow_run() -> None:
    """Tell Prefect, as far as it answers, that the flow run ends here.

    Without that, it would be shown as running for ever.
    """
    if "run" not in _current or "api" not in _current:
        return
    state = {"type": "CANCELLED", "name": "Cancelled", "message": "stopped in the terminal"}
    request = urllib.request.Request(
        f"{_current['api']}/flow_runs/{_current['run']}/set_state",
        data=json.dumps({"state": state, "force": True}).encode(),
        headers={"Content-Type": "application/json", **_login()},
    )
    with suppress(OSError):
        urllib.request.urlopen(request, timeout=CANCEL_SECONDS).close()


def _login() -> dict[str, str]:
    """The header by which Prefect's own client logs in."""
    from prefect.settings import get_current_settings

    api = get_current_settings().api
    if api.auth_string is not None:
        words = base64.b64encode(api.auth_string.get_secret_value().encode()).decode()
        return {"Authorization": f"Basic {words}"}
    if api.key is not None:
        return {"Authorization": f"Bearer {api.key.get_secret_value()}"}
    return {}


def _check_answers(url: str) -> None:
    """Raises InputError when nothing answers at a configured address."""
    try:
        urllib.request.urlopen(f"{url}/health", timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return  # somebody answers; what about is for Prefect to find out
    except OSError as error:
        raise InputError(
            f"the Prefect server at {url} does not answer ({error}); start it, or unset "
            "PREFECT_API_URL to have a temporary one"
        ) from None


def deliver_what_waits() -> None:
    """Let Prefect send its last logs and events: without a server it retries for a minute."""
    if "prefect.logging.handlers" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    with suppress(Exception):
        APILogWorker.drain_all(timeout=DELIVERY_SECONDS)
        EventsWorker.drain_all(timeout=DELIVERY_SECONDS)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _is_migrated() -> bool:
    """True when this version of Prefect has already prepared the database: that takes seconds."""
    from importlib.metadata import version

    home = prefect_home()
    if os.environ.get("PREFECT_API_DATABASE_CONNECTION_URL") or os.environ.get(
        "PREFECT_SERVER_DATABASE_CONNECTION_URL"
    ):
        return False
    try:
        noted = (home / MIGRATED).read_text().split()
        status = (home / "prefect.db").stat()
    except OSError:
        return False
    return noted == [version("prefect"), str(status.st_ino)]


def _note_migration() -> None:
    from importlib.metadata import version

    with suppress(OSError):
        status = (prefect_home() / "prefect.db").stat()
        (prefect_home() / MIGRATED).write_text(f"{version('prefect')} {status.st_ino}\n")


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, also when that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def main() -> None:
    """Serve the API on loopback until the parent process ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    threading.Thread(target=_end_with, args=[arguments.parent], daemon=True).start()
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=arguments.port,
        log_level="error",
        lifespan="on",
    )


if __name__ == "__main__":
    main()
