"""Are all ranks alike? Rank 0 sends a short hash; the texts themselves travel only if one differs."""

import os
import socket
from hashlib import blake2b

import numpy as np

from distdl.errors import UserError, listed
from distdl.job.program import version_and_hash
from distdl.parallel.communicator import Bytes, Communicator

#: The variable of MPICH by which ranks read each other's memory; `probes.py` turns it off.
READING = "MPIR_CVAR_CH4_CMA_ENABLE"
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


def check_same_access(communicator: Communicator) -> None:
    """Raise `UserError` on every rank if some ranks of a host cannot read the memory of the others. Collective."""
    found = hosts_by_text(communicator, os.environ.get(READING, "1"))
    several = [
        host for host in found.get("0", ()) if any(host in hosts for text, hosts in found.items() if text != "0")
    ]
    if several:
        raise UserError(
            f"on {listed(several, MOST_HOSTS)} some ranks are in a container and some not, so MPI cannot read their "
            f"memory: start all ranks with {READING}=0 in their environment",
            agreed=True,
        )


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
