"""A Prefect API server for the time of one command, for those who run none.

Prefect would start one itself, but only after importing all of its server into this process as
well, and it leaves the server behind when this process is killed. This one starts while the
libraries are still being imported, and ends with its parent however that ends.
"""

import argparse
import base64
import json
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from foldstack.compression.errors import TOLD_CHARACTERS, InputError, refusing
from foldstack.flows.prefect_defaults import AGAINST_OUTAGES  # before Prefect
from foldstack.flows.running.prefect_database import (
    FILE,
    database_file,
    database_settings,
    is_chosen,
    prefect_home,
)
from foldstack.tasks.environment.inherited import own_environment
from foldstack.tasks.environment.redaction import redacted

if TYPE_CHECKING:
    from prefect.settings import Settings

logger = logging.getLogger(__name__)

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

# The flow run that is under way in this process, and the API that knows of it; "temporary" where
# that goes away with this process.
_current: dict[str, str] = {}

MIGRATED = "foldstack-migrated-by"


class TemporaryServer:
    """Starts at once, in the background; `ready` waits for it and points Prefect at it.

    Does nothing where Prefect was told of a server: by PREFECT_API_URL, a profile or a settings
    file. What a profile says is known only once Prefect is imported; then this server is stopped.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""
        self._database: Path | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (the server writes to it for long)
        self._started = time.monotonic()
        own_environment()
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
        settings = settings_of_prefect()
        from prefect.context import refresh_global_settings_context

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
        _current["api"] = _current["temporary"] = self._url
        if self._database is not None:
            _note_migration(self._database)
            if self._database.name != FILE:
                logger.warning(
                    "%s was made by another version of Prefect and stays as it is: runs are kept "
                    "in %s", prefect_home() / FILE, self._database,
                )  # fmt: skip
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
        self._database = None if is_chosen() else database_file()
        is_ready = self._database is not None and _is_migrated(self._database)
        migrated = {"PREFECT_API_DATABASE_MIGRATE_ON_START": "false"} if is_ready else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, "--port", str(port), "--parent", str(os.getpid())],
            env={**os.environ, **SERVER_SETTINGS, **database_settings(), **migrated},
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
        code = self._process.poll() if self._process else None
        took = time.monotonic() - self._started
        self._log.seek(0)
        words = last_words(self._log.read().decode(errors="replace"))
        self.stop()
        what = f"did not answer within {seconds} s"
        if code is not None:
            what = f"ended with code {code} after {took:.0f} s"
        raise InputError(
            f"the temporary Prefect server {what} ({words}); set PREFECT_HOME to an empty folder, "
            "or start a server with `prefect server start` and set PREFECT_API_URL"
        )


def settings_of_prefect() -> "Settings":
    """What Prefect was told; whoever imports it asks this first, as it reads them at once.

    Raises:
        InputError: they cannot be read.
    """
    with refusing("Prefect cannot read its settings (a profile, prefect.toml or .env)"):
        from prefect.settings import get_current_settings

        return get_current_settings()


def last_words(log: str) -> str:
    """What a program said of its end: the last line about an error, else the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [
        line for line in lines if re.search(r"error|exception|denied|can't|cannot", line, re.I)
    ]
    found = (errors or lines or ["it said nothing"])[-1]
    return found if len(found) <= TOLD_CHARACTERS else f"{found[:TOLD_CHARACTERS]} ..."


def has_pages() -> bool:
    """Whether the server of the flow run will still be there for somebody who follows a link."""
    return "temporary" not in _current


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
    """Raises InputError when nothing answers at a configured address, or something else does."""
    named = "PREFECT_API_URL" if os.environ.get("PREFECT_API_URL") else "the profile of Prefect"
    try:
        status = _status(f"{url}/health")
        if status == 404 and not url.rstrip("/").endswith("/api"):
            is_page = _status(f"{url.rstrip('/')}/api/health") == 200
            hint = "add /api to it" if is_page else "that of a Prefect server ends with /api"
            raise InputError(f"{named} is {redacted(url)}, where no Prefect API answers: {hint}")
    except OSError as error:
        way_out = (
            "unset PREFECT_API_URL" if named.isupper() else "set PREFECT_PROFILE to another one"
        )
        raise InputError(
            f"the Prefect server at {redacted(url)} ({named}) does not answer ({error}); start it, "
            f"or {way_out} to have a temporary one"
        ) from None


def _status(address: str) -> int:
    """HTTP status of an answer; raises OSError where there is none."""
    try:
        with urllib.request.urlopen(address, timeout=ANSWER_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


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


def _is_migrated(file: Path) -> bool:
    """True when this version of Prefect has already prepared the database: that takes seconds."""
    try:
        noted = (file.parent / MIGRATED).read_text().split()
        status = file.stat()
    except OSError:
        return False
    return noted == [version("prefect"), str(status.st_ino)]


def _note_migration(file: Path) -> None:
    with suppress(OSError):
        noted = f"{version('prefect')} {file.stat().st_ino}\n"
        (file.parent / MIGRATED).write_text(noted)


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
