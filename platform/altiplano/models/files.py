"""Files that are whole at every moment."""

import os
import tempfile
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Make `data` the contents of `path`, on disk when this returns; a crash or a full disk leaves the old file whole.

    The file is readable by its owner only. Its folder must be there.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
