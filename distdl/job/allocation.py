"""The hosts and cores that a scheduler (Slurm, PBS or LSF) has given to this job, as its variables list them."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distdl.errors import counted


@dataclass(frozen=True)
class Allocation:
    """The hosts of a job, with the cores that it may use on each; Slurm may count hardware threads as cores."""

    job: str
    cores: dict[str, int]

    def idle_hosts(self, hosts: Sequence[str]) -> list[str]:
        """Return the allocated hosts on which no rank runs; `hosts` are those with ranks.

        A scheduler may have names of its own for the hosts. Then the result is empty.

        >>> Allocation("job", {"n1": 2, "n2": 2}).idle_hosts(["n1.cluster"])
        ['n2']
        """
        known, used = {_short(name) for name in self.cores}, {_short(name) for name in hosts}
        return [name for name in self.cores if _short(name) not in used] if used <= known else []


def read_allocation(environment: Mapping[str, str] = os.environ) -> Allocation | None:
    """Return the allocation of this job; None outside of a job, or if its variables are incomplete.

    >>> read_allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "4(x2)"})
    Allocation(job='Slurm job 7', cores={'n1': 4, 'n2': 4})
    """
    for read in (_slurm, _pbs, _lsf):
        try:
            found = read(environment)
        except (LookupError, ValueError, OSError):
            continue
        if found.cores:
            return found
    return None


def placement_lines(allocation: Allocation | None, hosts: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Return facts and warnings about the use of the allocation by the ranks; `hosts` has the number on each host."""
    if allocation is None:
        return [], []
    nodes, cores = len(allocation.cores), sum(allocation.cores.values())
    used = f"{len(hosts)} of {counted(nodes, 'node')} in use"
    fact = f"{allocation.job}: {used}, {counted(sum(hosts.values()), 'rank')} on {counted(cores, 'core')}"
    if not (idle := allocation.idle_hosts(list(hosts))):
        return [fact], []
    who = f"{', '.join(idle[:4])}{' …' if len(idle) > 4 else ''} {'have' if len(idle) > 1 else 'has'} no rank"
    return [fact], [f"{allocation.job} has {nodes} nodes, but {who}: start {cores} ranks, or ask for fewer nodes"]


def expand_slurm_names(names: str) -> list[str]:
    """Return the hosts that a list of Slurm names.

    >>> expand_slurm_names("n[1-2,05],login,r[1-2]s[3]")
    ['n1', 'n2', 'n05', 'login', 'r1s3', 'r2s3']
    """
    found = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", names):
        before, bracket, rest = name.partition("[")
        if not bracket:
            found.append(before)
            continue
        numbers, _, after = rest.partition("]")
        for part in numbers.split(","):
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                found += [f"{before}{number:0{len(first)}d}{end}" for end in expand_slurm_names(after) or [""]]
    return found


def expand_slurm_counts(counts: str) -> list[int]:
    """Return a number for each host from a list of Slurm.

    >>> expand_slurm_counts("2(x2),4")
    [2, 2, 4]
    """
    found = []
    for part in counts.split(","):
        number, _, times = part.partition("(x")
        found += [int(number)] * int(times.rstrip(")") or 1)
    return found


def _slurm(environment: Mapping[str, str]) -> Allocation:
    names = expand_slurm_names(environment["SLURM_JOB_NODELIST"])
    cores = expand_slurm_counts(environment["SLURM_JOB_CPUS_PER_NODE"])
    return Allocation(f"Slurm job {environment['SLURM_JOB_ID']}", dict(zip(names, cores, strict=True)))


def _pbs(environment: Mapping[str, str]) -> Allocation:
    slots = Path(environment["PBS_NODEFILE"]).read_text().split()
    return Allocation(f"PBS job {environment['PBS_JOBID']}", dict(Counter(slots)))


def _lsf(environment: Mapping[str, str]) -> Allocation:
    words = environment["LSB_MCPU_HOSTS"].split()
    cores = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    return Allocation(f"LSF job {environment['LSB_JOBID']}", cores)


def _short(name: str) -> str:
    return name.partition(".")[0].lower()
