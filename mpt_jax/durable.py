"""Files that are whole or not there, also after a crash."""

from __future__ import annotations

import os
import pathlib
import uuid
from collections.abc import Callable


def replace(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Makes ``path`` what ``write`` puts in a file beside it: all of it, or nothing.

    Of several processes that write it at a time the last one wins. Raises: OSError, and
    what ``write`` raises; then ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: str | os.PathLike) -> None:
    """Puts a file, or the names in a directory, on the disk: a rename may be lost."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: str | os.PathLike) -> None:
    """fsync of a directory and all that is below it."""
    for folder, _, names in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in names)):
            fsync(path)
