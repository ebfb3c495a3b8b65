"""Train NumPy CNNs data-parallel over MPI, with the same bits on any number of ranks.

This module imports neither NumPy nor MPI, because NumPy reads the number of BLAS threads when it is loaded.
"""

import os
import sys
from contextlib import suppress

__version__ = "0.1.0"


def _leave_the_working_folder() -> None:
    """Take the working folder off the path if this is ``python -m distdl…``, which put it in front.

    Otherwise Python would run a file there that is called like a module, such as ``numpy.py``. ``python -P`` does the
    same, and does not look for ``distdl`` itself there either.
    """
    words = sys.orig_argv[1:]
    is_module = sys.argv[:1] == ["-m"] and "-m" in words[:-1] and not sys.flags.safe_path
    if is_module and words[words.index("-m") + 1].partition(".")[0] == "distdl":
        with suppress(OSError):  # the folder no longer exists
            if sys.path[0] == os.getcwd():  # noqa: PTH109  pathlib would be the first import
                del sys.path[0]


_leave_the_working_folder()
