"""Files and folders that appear under their name when they are complete, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def written_whole(path: Path | str) -> Iterator[Path]:
    """A path to write a file, or make a folder, beside `path`; takes its name at the end.

    On any error it is removed, and what `path` held before is intact. Raises OSError naming
    `path` where the disk is full, whichever library met that.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".partial")
    _remove(beside)  # of a process that was killed
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield beside
        if beside.is_dir():  # folders, unlike files, do not take the place of another
            _remove(path)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        # Errors that name a file, or were worded by us, say enough.
        if isinstance(error, OSError) and (error.errno is None or error.filename is not None):
            raise
        raise OSError(f"{path} could not be written, nothing of it is kept: {error}") from error
    finally:
        _remove(beside)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with written_whole(path) as beside:
        beside.write_text(text)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
