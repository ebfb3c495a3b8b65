"""Do the ranks, and a run and the checkpoint that it resumes from, compute the same bits? Their fingerprints tell."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from distdl.config import TrainConfig
from distdl.engine.fingerprint import Fingerprint, fingerprint, first_difference
from distdl.engine.storage.header import CheckpointHeader
from distdl.engine.storage.run_folder import StartingPoint
from distdl.errors import UserError, listed
from distdl.parallel import Communicator, on_rank_0, together
from distdl.parallel.alike import MOST_HOSTS, hosts_by_text

if TYPE_CHECKING:
    from distdl.engine.coordinator import RunFacts
    from distdl.engine.trainer import Trainer

#: The packages whose versions are compared between hosts.
COMPUTING = ("numpy", "mpi4py", "numba", "llvmlite")


def with_bits(facts: RunFacts, trainer: Trainer, start: StartingPoint | None) -> RunFacts:
    """Return the facts with the part of the environment about bits. Collective; `start` is needed on rank 0.

    Raises `UserError` on every rank as `require_same_bits` demands.
    """
    config, communicator = trainer.config, trainer.communicator
    ours = together(communicator, lambda: fingerprint(config, trainer.data, trainer.state.network))
    different = versions_that_differ(communicator, facts.environment["versions"])
    found = {**facts.environment, **bits_of_ranks(communicator, ours), "versions_that_differ": different}
    if config.require_same_bits:
        on_rank_0(communicator, lambda: check_same_bits(start, found))
    return replace(facts, environment=found)


def bits_of_ranks(communicator: Communicator, ours: Fingerprint) -> dict[str, Any]:
    """Return the part of ``env.json`` about the bits: the fingerprint of rank 0, and a text for ranks that differ.

    Collective.
    """
    hosts = communicator.allgather_json(socket.gethostname())
    digests = communicator.allgather_json(blake2b(repr(ours).encode(), digest_size=16).hexdigest())
    if len(set(digests)) == 1:
        return {"fingerprint": ours, "ranks_that_differ": []}
    first, *others = communicator.allgather_json(ours)
    of_host: dict[tuple[str, str], list[int]] = {}
    for rank, found in enumerate(others, start=1):
        name = first_difference(first, found)
        if name is not None:
            of_host.setdefault((hosts[rank], name), []).append(rank)
    different = [
        f"{_named(ranks)} on {host} and rank 0 on {hosts[0]} compute other bits, first in: {name}"
        for (host, name), ranks in of_host.items()
    ]
    return {"fingerprint": first, "ranks_that_differ": different}


def versions_that_differ(communicator: Communicator, versions: Mapping[str, str]) -> list[str]:
    """Return a text for each package that computes or communicates in another version on some hosts. Collective."""
    ours = {name: versions[name] for name in COMPUTING if name in versions}
    found = hosts_by_text(communicator, json.dumps(ours))
    texts = []
    for name in ours:
        hosts: dict[str, list[str]] = {}
        for text, some in found.items():
            hosts.setdefault(json.loads(text)[name], []).extend(some)
        if len(hosts) > 1:
            each = "; ".join(f"{number} on {listed(some, MOST_HOSTS)}" for number, some in hosts.items())
            texts.append(f"{name} has different versions ({each}): install the same version on every host")
    return texts


def change_of_bits(before: CheckpointHeader, environment: Mapping[str, Any]) -> str | None:
    """Return what differs between the run that wrote a checkpoint and this one; None if nothing is known to differ.

    A checkpoint of an earlier version has only the name of its kernel family.
    """
    now = " and ".join(environment["kernel_families"])
    if before.fingerprint is None or "fingerprint" not in environment:
        same = before.kernel_family == now
        return None if same else f"the checkpoint was made with the kernels {before.kernel_family}, this run has {now}"
    name = first_difference(before.fingerprint, environment["fingerprint"])
    if name is None:
        return None
    where = "" if before.kernel_family == now else f" ({before.kernel_family}; here {now})"
    return f"the run that wrote the checkpoint{where} computed other bits than this one, first in: {name}"


def warnings_about_bits(start: StartingPoint, config: TrainConfig, environment: Mapping[str, Any]) -> list[str]:
    """Return warnings about ranks, and about a checkpoint to resume from, that may have other bits than this run."""
    warnings = [f"{different}: bits depend on the ranks" for different in environment.get("ranks_that_differ", ())]
    warnings += environment.get("versions_that_differ", ())
    if start.found is None or "proof" in environment:
        return warnings
    before = start.found.header()
    if change := change_of_bits(before, environment):
        warnings.append(f"{change}: bits may differ")
    for what, was, now in (
        ("NumPy", before.versions.get("numpy"), environment["versions"]["numpy"]),
        ("--threads-per-rank", before.config.get("threads_per_rank"), config.threads_per_rank),
    ):
        if was != now:
            warnings.append(f"the checkpoint was made with {what} {was}, this run has {now}: bits may differ")
    return warnings


def check_same_bits(start: StartingPoint | None, environment: Mapping[str, Any]) -> None:
    """Raise `UserError` unless all ranks and the checkpoint to resume from show the same bits: `require_same_bits`."""
    for different in environment["ranks_that_differ"]:
        raise UserError(
            f"--require-same-bits: {different}; give --kernels compiled or hosts of one kind, or leave the flag out"
        )
    if start is None or start.found is None:
        return
    header = start.found.header()
    change = change_of_bits(header, environment)
    if change is None and header.fingerprint is None:
        change = "an earlier version wrote the checkpoint, without a fingerprint"
    if change is not None:
        raise UserError(
            f"--require-same-bits: cannot resume from {start.found.path}: {change}; resume where it was made, or "
            "leave the flag out"
        )


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
