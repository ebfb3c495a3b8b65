"""A trained network as an ``.npz`` file, for NumPy alone: its weights and buffers under distdl's names, and facts.

`numpy.load` reads it without pickle. The name of a parameter or buffer has a dot, that of a fact has none.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from distdl.export.facts import facts_of
from distdl.inference.load import Trained


def npz_file(trained: Trained) -> bytes:
    """Return the network as the content of an ``.npz`` file."""
    network, content = trained.network, io.BytesIO()
    arrays: dict[str, Any] = dict([*network.named_parameters(), *network.named_buffers()])
    arrays |= {name: np.array(value) for name, value in facts_of(trained).items() if value is not None}
    np.savez(content, **arrays)
    return content.getvalue()
