"""Files that are still there when the machine has died: on its disk, not in its memory."""

import os
from pathlib import Path


def sync_file(file: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: of new files, after a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file that readers find whole, old or new, whatever happens in between."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync_file(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(file.parent)


def sync_files(folder: Path) -> None:
    """Wait until the files of a folder, which has no folders in it, are on the disk."""
    for file in folder.iterdir():
        sync_file(file)
    sync_folder(folder)
