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


def sync_files(folder: Path) -> None:
    """Wait until the files of a folder, which has no folders in it, are on the disk."""
    for file in folder.iterdir():
        sync_file(file)
    sync_folder(folder)
