"""Output files: written whole or not at all, and a disk that refuses them is one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a name beside `path` to write to; it replaces `path` when the block ends without an error.

    The name is hidden, has the same suffix and is the same at each call, so what a killed process leaves
    behind is overwritten by the next write. On an error the file is removed and an older `path` stays as it
    was. An OSError (a full disk, a folder that cannot be written) becomes a UserError, so the block should do
    nothing but write.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder `path` and its parents where they are missing; UserError where that fails."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made: {error.strerror or error}") from error
    return path
