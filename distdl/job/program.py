"""The version of distdl that a process runs, and a hash of its source files: equal on all ranks of a job."""

import hashlib
import os
from functools import cache
from pathlib import Path

import distdl

#: The digits of the hash in messages.
DIGITS = 10


@cache
def version_and_hash() -> str:
    """Return the version, and the first digits of a hash over the names and contents of all source files.

    >>> version_and_hash().split()[1].startswith("(sources")
    True
    """
    return f"{distdl.__version__} (sources {hash_of_sources(Path(distdl.__file__).parent)[:DIGITS]})"


def hash_of_sources(folder: Path) -> str:
    """Return the sha256 over the names and contents of all Python files below a folder, in a fixed order."""
    digest = hashlib.sha256()
    for above, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(name for name in names if name.endswith(".py")):
            content = Path(above, name).read_bytes()
            digest.update(f"{Path(above, name).relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
