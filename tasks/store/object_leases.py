"""Leases as objects on a storage that machines share which have no disk in common.

An object is created only if it is not there (on S3: `If-None-Match: *`), and a beat puts it anew.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

from foldstack.tasks.store.leases import STALE_SECONDS

TRY_AGAIN = "ConditionalRequestConflict"
"""What Amazon answers when an object of that name is just being removed."""


class ObjectLeases:
    """The leases of one artifact under an address of fsspec's `files`.

    No clock is asked, as those of machines differ: a lease is stale when this object has seen its
    date unchanged for STALE_SECONDS.
    """

    def __init__(
        self, files: Any, place: str, explained: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._all, self._place, self._explained = files, place, explained
        self._texts: dict[str, str] = {}
        self._seen: dict[str, tuple[datetime | None, float]] = {}

    def names(self) -> list[str]:
        with self._explained():
            try:
                listed = self._all.ls(self._place, detail=False)
            except FileNotFoundError:
                return []
        return [path.rpartition("/")[2] for path in listed]

    def create(self, name: str, text: str) -> bool:
        with self._explained():
            try:
                self._all.pipe_file(self._at(name), text.encode(), mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if TRY_AGAIN in f"{error} {error.__cause__}":
                    return False
                raise
        self._texts[name] = text
        return True

    def read(self, name: str) -> str:
        content = self._looked_up(self._all.cat_file, name)
        return content.decode(errors="replace")

    def is_stale(self, name: str) -> bool:
        try:
            date = put_at(self._looked_up(self._all.info, name))
        except FileNotFoundError:
            return True
        now = time.monotonic()
        known, since = self._seen.get(name, (None, now))
        if known != date:
            known, since = date, now
        self._seen[name] = known, since
        return now - since > STALE_SECONDS

    def touch(self, name: str) -> None:
        """Raises FileNotFoundError when it was taken over: it is not to come back."""
        self._looked_up(self._all.info, name)
        with self._explained():
            self._all.pipe_file(self._at(name), self._texts[name].encode())

    def rename(self, name: str, to: str) -> None:
        """First the new one, as the lease that counts is the one that sorts last."""
        self._looked_up(self._all.info, name)
        with self._explained():
            self._all.pipe_file(self._at(to), self._texts[name].encode())
        self.remove(name)

    def remove(self, name: str) -> None:
        with self._explained():
            try:
                self._all.rm_file(self._at(name))
            except FileNotFoundError:
                return

    def remove_empty(self) -> None:
        """There is nothing to do: a place is where objects are."""

    def _looked_up(self, look: Callable[[str], Any], name: str) -> Any:
        with self._explained():
            try:
                return look(self._at(name))
            except FileNotFoundError as error:
                missing = error
        raise missing

    def _at(self, name: str) -> str:
        return f"{self._place}/{name}"


def put_at(info: Mapping[str, Any]) -> datetime:
    """When an object was put; the name for that differs between storages."""
    moment = next(info[key] for key in ("LastModified", "created", "updated") if key in info)
    if isinstance(moment, (int, float)):
        return datetime.fromtimestamp(moment, UTC)
    assert isinstance(moment, datetime)
    return moment
