"""Train NumPy CNNs data-parallel over MPI, with the same bits on any number of ranks (docs/library.md).

>>> import distdl
>>> result = distdl.train(distdl.TrainConfig(epochs=1))  # doctest: +SKIP
>>> model = distdl.load(result.run_dir)  # doctest: +SKIP

This module imports neither NumPy nor MPI, because NumPy reads the number of BLAS threads when it is loaded. A public
name is imported when it is first used.
"""

import os
import sys
from contextlib import suppress

__version__ = "0.1.0"
__all__ = ["Callback", "Dataset", "TrainConfig", "__version__", "load", "nn", "train"]

TYPE_CHECKING = False  # as in `typing`, without its import
if TYPE_CHECKING:
    from distdl import nn
    from distdl.config import TrainConfig
    from distdl.data import Dataset
    from distdl.engine.callbacks import Callback
    from distdl.library import load, train

#: The module of each public name that is not a module itself.
_MODULE_OF = {
    "Callback": "distdl.engine.callbacks",
    "Dataset": "distdl.data",
    "TrainConfig": "distdl.config",
    "load": "distdl.library",
    "train": "distdl.library",
}


def __getattr__(name: str) -> object:
    """Import a public name on its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # noqa: PLC0415  not before `_leave_the_working_folder`

    if name == "nn":
        return importlib.import_module("distdl.nn")
    value: object = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
