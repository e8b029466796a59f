"""Files that people asked for: what lay there is replaced once the new one is complete; pipes are written to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from paramdelta.checkpoint.wording import printable
from paramdelta.errors import OutputError
from paramdelta.storage.sink import output_refused

if TYPE_CHECKING:
    from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file.

    Raises:
        OutputError: it cannot be written; what lay there is as it was.
    """
    try:
        path = path.resolve()  # a link stays one
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            fresh.write_bytes(content)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise output_refused(error, path) from error
    except ValueError as error:  # a name that no system call takes
        raise OutputError(f"cannot be written: {error}", file=printable(str(path))) from error
