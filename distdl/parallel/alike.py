"""Are all ranks alike? Rank 0 sends a short hash; the texts themselves travel only if one differs."""

import socket
from hashlib import blake2b

import numpy as np

from distdl.errors import UserError, listed
from distdl.job.sources import version_and_hash
from distdl.parallel.communicator import Bytes, Communicator

#: The hosts that a message names for each text.
MOST_HOSTS = 4


def hosts_by_text(communicator: Communicator, text: str) -> dict[str, list[str]]:
    """Return the hosts of each text, in the order of the ranks; nothing if all ranks have the same. Collective."""
    mine = digest_of(text)
    first = mine.copy()
    communicator.bcast(first)
    different = np.array([(mine != first).any()], np.int64)
    communicator.allreduce(different)
    found: dict[str, list[str]] = {}
    if different[0]:
        for host, one in communicator.allgather_json([socket.gethostname(), text]):
            hosts = found.setdefault(one, [])
            if host not in hosts:
                hosts.append(host)
    return found


def digest_of(text: str) -> Bytes:
    """Return a hash of a text that ranks can exchange."""
    return np.frombuffer(blake2b(text.encode(), digest_size=32).digest(), np.uint8)


def check_same_program(communicator: Communicator) -> None:
    """Raise `UserError` on every rank unless all ranks have the same source files of distdl. Collective."""
    found = hosts_by_text(communicator, version_and_hash())
    if found:
        each = "; ".join(f"{program} on {listed(hosts, MOST_HOSTS)}" for program, hosts in found.items())
        raise UserError(
            f"the ranks run different versions of distdl: {each}: install the same version on every host", agreed=True
        )
