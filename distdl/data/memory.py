"""The memory that is still free for this process: on its machine, and within its control groups."""

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Return the bytes that a process can still allocate without swapping; None if that is unknown."""
    found = [_of_machine(), *_of_groups()]
    return min((one for one in found if one is not None), default=None)


def _of_machine() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, LookupError):
        return None


def _of_groups() -> list[int | None]:
    """Return what is left of the limits of the group of this process and of the groups around it."""
    left: list[int | None] = []
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return left
    for line in lines:
        _, _, group = line.partition(":")
        kinds, _, path = group.partition(":")
        if kinds == "":  # version 2
            root, limit, used = GROUPS, "memory.max", "memory.current"
        elif "memory" in kinds.split(","):
            root, limit, used = GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            left.append(_left(folder, limit, used))
            if folder == root:
                break
    return left


def _left(folder: Path, limit: str, used: str) -> int | None:
    """Return the limit of a group minus its use, without cached files, which the kernel drops if needed."""
    try:
        most = int((folder / limit).read_text())  # "max" is not a number
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = int(statistics.get("inactive_file", statistics.get("total_inactive_file", "0")))
        return max(0, most - int((folder / used).read_text()) + cache)
    except (OSError, ValueError):
        return None
