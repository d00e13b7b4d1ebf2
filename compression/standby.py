"""A process that stands by with its imports done, and answers each request, a line of JSON, by one.

A fresh Python needs seconds to import torch and transformers, more than what it is then asked for
takes. What stands by has them, and forks for each request, so that each answer comes from a process
that has seen nothing but those imports.
"""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


class Standby:
    """Such a process, as seen by those who ask; it starts with the first request."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        folder_in: str | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            arguments: of this Python, to which standard input gives requests.
            environment: what it has beside the environment of this process.
            folder_in: name of the variable that tells it of a folder of its own.
        """
        self._arguments = tuple(arguments)
        self._environment = dict(environment or {})
        self._folder_in = folder_in
        self._process: subprocess.Popen[str] | None = None
        self._complaints: IO[str] | None = None
        self._folder = Path()
        self._lock = threading.Lock()
        atexit.register(self.end)

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Its answer to one request.

        Raises:
            RuntimeError: it ended without an answer; says its last words.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._clear()
                self._start()
            try:
                return self._answer(json.dumps(request))
            except BaseException:
                self._clear()  # it may be in the middle of its answer
                raise

    def end(self) -> None:
        """End the process, if there is one: it has nothing to lose."""
        with self._lock:
            self._clear()

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="foldstack-standby-"))
        own = {self._folder_in: str(self._folder)} if self._folder_in else {}
        if os.environ.get("PYTHONPATH"):  # whose relative places are relative to where we are
            places = os.environ["PYTHONPATH"].split(os.pathsep)
            own["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, places)))
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115  `_clear` closes it
        self._process = subprocess.Popen(
            [sys.executable, *self._arguments],
            cwd=self._folder.anchor,  # which is still there when temporary folders are swept
            env={**os.environ, **self._environment, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
        )

    def _answer(self, line: str) -> Any:
        assert self._process is not None
        asking, answering = self._process.stdin, self._process.stdout
        assert asking is not None
        assert answering is not None
        self._folder.mkdir(parents=True, exist_ok=True)  # it may have been swept
        with suppress(BrokenPipeError):  # then it is gone, and there is no answer
            asking.write(line + "\n")
            asking.flush()
        answer = answering.readline()
        if not answer:
            raise RuntimeError(self._last_words())
        return json.loads(answer)

    def _last_words(self) -> str:
        assert self._process is not None
        assert self._complaints is not None
        code = self._process.wait()
        self._complaints.seek(0)
        said = self._complaints.read().strip().splitlines()
        return said[-1] if said else f"exit code {code}"

    def _clear(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._complaints is not None:
            self._complaints.close()
        self._process = self._complaints = None
