"""The memory that is left is the least of the machine, of each control group around this process, and of its limits."""

import math
import resource

import pytest

from distdl import host_memory
from distdl.host_memory import allocations_limited, available_bytes, available_to_this_process

MIB = 2**20
MACHINE = "MemTotal: 9000000 kB\nMemAvailable: 1048576 kB\nSwapFree: 0 kB\n"
V2 = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n36 31 0:33 / /cpu rw - cgroup cgroup rw,cpu\n"


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder, limit, used, cached=0, version=2):
    """Return the files of a control group; the numbers are MiB."""
    shown = limit if isinstance(limit, str) else str(limit * MIB)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    stat = f"anon 5\n{names[2]} {cached * MIB}\n"
    return {
        f"sys/fs/cgroup/{folder}/{names[0]}": f"{shown}\n",
        f"sys/fs/cgroup/{folder}/{names[1]}": f"{used * MIB}\n",
        f"sys/fs/cgroup/{folder}/memory.stat": stat,
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"proc/meminfo": MACHINE}, 1024),
        ({"proc/meminfo": MACHINE.replace("SwapFree: 0", "SwapFree: 1048576")}, 2048),
        # version 2: a group without a limit, its own limit, the limit of a group around it
        ({"proc/self/cgroup": "0::/job\n", "proc/self/mountinfo": V2, **group("job", "max", 10)}, math.inf),
        ({"proc/self/cgroup": "0::/job\n", "proc/self/mountinfo": V2, **group("job", 300, 100, cached=40)}, 240),
        (
            {
                "proc/meminfo": MACHINE,
                "proc/self/cgroup": "0::/slurm/job/step\n",
                "proc/self/mountinfo": V2,
                **group("slurm/job/step", "max", 10),
                **group("slurm/job", 200, 150),
                **group("slurm", 900, 850),
            },
            50,
        ),
        ({"proc/self/cgroup": "0::/job\n", "proc/self/mountinfo": V2, **group("job", 100, 150)}, 0),
        # version 1, beside an empty version 2
        (
            {
                "proc/self/cgroup": "4:memory:/a/b\n1:cpu:/a\n0::/\n",
                "proc/self/mountinfo": V1 + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
                **group("memory/a", 500, 200, version=1),
                **group("memory/a/b", 2**40, 100, version=1),
            },
            300,
        ),
        # a container: the path is that of the host, of which a part is mounted
        (
            {
                "proc/self/cgroup": "0::/docker/123/inner\n",
                "proc/self/mountinfo": V2.replace(" / ", " /docker/123 "),
                **group("inner", 80, 10),
                **group("", 100, 10),
            },
            70,
        ),
        (
            {
                "proc/self/cgroup": "0::/elsewhere\n",
                "proc/self/mountinfo": V2.replace(" / ", " /docker/123 "),
                **group("", 100, 10),
            },
            90,
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_the_least_limit_counts(files, expected, tmp_path):
    assert available_bytes(tree(tmp_path, files)) == expected * MIB


def test_this_machine_has_some_memory():
    assert 2**20 < available_bytes() < 2**60


@pytest.mark.parametrize(("limited", "expected"), [(None, math.inf), ("RLIMIT_AS", 600), ("RLIMIT_DATA", 900)])
def test_the_limits_of_the_process_count(limited, expected, tmp_path, monkeypatch):
    def limit(which):
        is_limited = limited is not None and which == getattr(resource, limited)
        return (1000 * MIB if is_limited else resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    monkeypatch.setattr(host_memory.resource, "getrlimit", limit)
    status = f"Name: python\nVmSize: {400 * 1024} kB\nVmData: {100 * 1024} kB\n"
    assert available_to_this_process(tree(tmp_path, {"proc/self/status": status})) == expected * MIB


def test_an_allocation_beyond_the_memory_of_the_host_is_an_error_instead_of_an_end_by_the_kernel():
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with allocations_limited(100 * MIB):
        assert len(bytearray(10 * MIB)) == 10 * MIB
        with pytest.raises(MemoryError):
            bytearray(1000 * MIB)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    with allocations_limited(math.inf):
        assert len(bytearray(200 * MIB)) == 200 * MIB
