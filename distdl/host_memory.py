"""The memory that processes of this host can still use: of the machine, of the control groups, and of the limits.

A control group ("cgroup") limits a container or a batch job. If its processes use more, the kernel kills one of them
without a message. So a program that knows its needs compares them with these numbers first.
"""

import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> float:
    """Return the bytes that all processes of this control group can still use together; infinity if it is unknown.

    Caches of files count as available, and so does swap space. `root` is the folder of ``proc`` and ``sys``.
    """
    machine = _fields(root / "proc/meminfo")
    known = [1024 * (machine["MemAvailable"] + machine.get("SwapFree", 0))] if "MemAvailable" in machine else []
    return min([*known, *_left_in_groups(root)], default=math.inf)


def available_to_this_process(root: Path = Path("/")) -> float:
    """Return the bytes that this process can still allocate within its own limits (``ulimit -v``, ``ulimit -d``)."""
    status = _fields(root / "proc/self/status")
    left = [math.inf]
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            left.append(max(soft - 1024 * status.get(used, 0), 0))
    return min(left)


@contextmanager
def allocations_limited(room: float | None = None) -> Iterator[None]:
    """Let an allocation of more than `room` bytes, by default all that are available, raise `MemoryError`.

    Without this, the kernel may promise memory that it does not have, and later kill a process without a message.
    """
    room = available_bytes() if room is None else room
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = 1024 * _fields(Path("/proc/self/status")).get("VmSize", 0) + min(room, 2**62)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (int(limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left in each control group with a limit: that of this process and all groups around it."""
    for folder, top, version in _groups(root):
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        for group in (folder, *folder.parents):
            limit, used = _number(group / names[0]), _number(group / names[1])
            if limit is not None and used is not None:
                cached = _fields(group / "memory.stat").get(names[2], 0)
                yield max(limit - used + cached, 0)
            if group == top:
                break


def _groups(root: Path) -> Iterator[tuple[Path, Path, int]]:
    """Yield the folder of this process's group in each hierarchy, the hierarchy's top folder, and its version."""
    groups = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            groups[2] = path
        elif "memory" in controllers.split(","):
            groups[1] = path
    for line in _lines(root / "proc/self/mountinfo"):
        mounted, _, described = line.partition(" - ")
        kind, _, options = described.split(" ", 2)
        version = {"cgroup2": 2, "cgroup": 1 if "memory" in options.split()[-1].split(",") else 0}.get(kind, 0)
        if version in groups:
            inside, place = mounted.split(" ")[3:5]
            top = root / place.lstrip("/")
            # In a container the path may be that of the host, of which only the part from `inside` on is mounted.
            below = groups[version].removeprefix(inside.rstrip("/")).strip("/")
            yield (top / below if (top / below).is_dir() else top), top, version


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers of a file with lines such as ``MemTotal: 123 kB`` or ``cache 123``."""
    found = {}
    for line in _lines(path):
        name, *rest = line.replace(":", " ").split()
        if rest and rest[0].isdecimal():
            found[name] = int(rest[0])
    return found


def _number(path: Path) -> int | None:
    """Return the number in a file; None for "max" or without the file."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None
