"""A real Slurm of two nodes on one machine: two `slurmd` in network namespaces, with own shared memory and host names.

Everything is inside one folder and two namespaces: an own munge key and socket, an own `/etc/hosts` for the nodes, own
ports. So it disturbs no other Slurm of the machine. It needs root.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
#: As many clusters may run at the same time, each with a number, which names its network, ports and control groups.
MOST_CLUSTERS = 4
NODES = ("n1", "n2")
CONTROLLERS = ("memory", "cpuset", "freezer", "cpuacct", "devices")
CGROUPS = Path("/sys/fs/cgroup")
SECONDS_TO_START = 30
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={controller}({network}.254)
SlurmctldPort={port}
SlurmdPort={port}1
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity,task/cgroup
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=5
MpiDefault=none
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
NodeName=n1 NodeAddr={network}.1 CPUs=2 CoresPerSocket=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeAddr={network}.2 CPUs=2 CoresPerSocket=2 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10
"""
CGROUP_CONFIGURATION = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainRAMSpace=yes
ConstrainCores=no
"""


@cache
def own_number():
    """Return a number that no other process uses for a cluster, until this process ends; None if all are used."""
    for number in range(MOST_CLUSTERS):
        path = Path(tempfile.gettempdir(), f"distdl-tests-slurm-{number}.lock")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
        else:
            return number
    return None


def why_not():
    """Return the reason why no cluster can start here, or None."""
    if os.geteuid() != 0:
        return "a Slurm of two nodes needs root"
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            return f"a Slurm of two nodes needs {program} (package {package})"
    for controller in CONTROLLERS:
        if not (CGROUPS / controller / "cgroup.procs").exists():
            return f"a Slurm of two nodes needs the control group {controller} (version 1)"
    if own_number() is None:
        return f"{MOST_CLUSTERS} other tests run a Slurm of two nodes"
    probe = f"ddslurm{os.getpid() % 10000}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return "a Slurm of two nodes needs network namespaces, which are not permitted here"
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return None


class Cluster:
    """The cluster, inside its ``with`` block."""

    def __init__(self, folder):
        self.folder = folder
        self.label = f"ddslurm{own_number()}"
        self.network = f"10.78.{own_number()}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PMI", "OMPI"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_):
        self._end()

    def call(self, *words, check=True, stderr=False, variables=None, timeout=60, cwd=None):
        """Run a command of Slurm; return its output."""
        done = subprocess.run(
            words,
            env={**self.environment, **(variables or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr if stderr else done.stdout

    def field(self, job, name):
        """Return what Slurm says about a job, such as its JobState."""
        for word in self.call("scontrol", "show", "job", str(job)).split():
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
        raise AssertionError(f"Slurm shows no {name} of job {job}")

    def processes_of(self, node):
        """Return the process numbers of everything that runs on a node."""
        words = ["ip", "netns", "pids", self._namespace(node)]
        listed = subprocess.run(words, capture_output=True, check=True)
        return [int(pid) for pid in listed.stdout.split()]

    def kill(self, node):
        """Kill everything on a node at once, as a power failure would."""
        for pid in self.processes_of(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self, node, state="down"):
        """Cut the cable of a node, or repair it."""
        ip("-n", self._namespace(node), "link", "set", "eth0", state)

    def replace(self, node):
        """Repair the cable of a node, and start it again: Slurm would notice a repaired cable minutes later."""
        self.cut(node, "up")
        self.kill(node)
        self.start_node(node)

    def start_node(self, node):
        """Start the daemon of a node."""
        hosts = self.folder / "hosts"
        binds = "".join(f"mount --bind {CGROUPS}/{one}/{self._cgroup(node)} {CGROUPS}/{one} && " for one in CONTROLLERS)
        script = (
            f"mount --make-rprivate / && mount -t tmpfs -o mode=1777 tmpfs /dev/shm && {binds}"
            f"mount --bind {hosts} /etc/hosts && echo {node} >/proc/sys/kernel/hostname && "
            f"exec slurmd -N {node} -f {self.folder}/slurm.conf"
        )
        inside = ["nsenter", f"--net=/run/netns/{self._namespace(node)}", "unshare", "--uts", "--mount", "sh", "-c"]
        self._daemon([*inside, script], node)

    def wait_until_idle(self):
        idle = ("sinfo", "-h", "-t", "idle", "-p", "low", "-o", "%D")
        self.until(lambda: self.call(*idle).strip() == "2", SECONDS_TO_START)

    def until(self, condition, seconds, log=None):
        """Wait until the condition holds; the time limit is only against hanging."""
        deadline = time.monotonic() + seconds
        while not condition():
            printed = log.read_text() if log is not None and log.exists() else ""
            assert time.monotonic() < deadline, f"waited too long\n{printed}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self):
        return "".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}\n" for path in self.folder.glob("log/*")
        )

    def _start(self):
        self._end()  # what a killed test left
        folder = self.folder
        for name in ("state", "log", "munge", *(f"tmp-{node}" for node in NODES)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        lines = [f"{self.network}.{number} {node}\n" for number, node in enumerate(NODES, 1)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        values = {
            "folder": folder,
            "network": self.network,
            "port": 1680 + own_number(),
            "controller": os.uname().nodename.partition(".")[0],
        }
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        (folder / "cgroup.conf").write_text(CGROUP_CONFIGURATION)
        self._start_munge()
        ip("link", "add", self.label, "type", "bridge")
        ip("address", "add", f"{self.network}.254/24", "dev", self.label)
        ip("link", "set", self.label, "up")
        for number, node in enumerate(NODES, 1):
            space, cable = self._namespace(node), f"{self.label}{node}"
            ip("netns", "add", space)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", cable, "master", self.label, "up")
            ip("-n", space, "address", "add", f"{self.network}.{number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")
            for controller in CONTROLLERS:
                (CGROUPS / controller / self._cgroup(node)).mkdir(exist_ok=True)
            for file in ("cpus", "mems"):
                everything = (CGROUPS / "cpuset" / f"cpuset.{file}").read_text()
                (CGROUPS / "cpuset" / self._cgroup(node) / f"cpuset.{file}").write_text(everything)
        self._daemon(["slurmctld", "-f", str(folder / "slurm.conf")], "slurmctld")
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()

    def _start_munge(self):
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(64))
        (munge / "key").chmod(0o400)
        words = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon(["munged", "--force", f"--socket={munge}/socket", *words], "munged")

    def _daemon(self, argv, name):
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            subprocess.run(
                argv,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                check=True,
                timeout=30,
            )

    def _end(self):
        for node in NODES:
            with suppress(subprocess.CalledProcessError):  # no such namespace
                self.kill(node)
        for path in (self.folder / "slurmctld.pid", self.folder / "munge" / "pid"):
            with suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)
        for node in NODES:
            ip("netns", "delete", self._namespace(node), check=False)
            ip("link", "delete", f"{self.label}{node}", check=False)
            for controller in CONTROLLERS:
                self._remove_cgroup(CGROUPS / controller / self._cgroup(node))
        ip("link", "delete", self.label, check=False)

    def _remove_cgroup(self, group):
        folders = sorted(group.glob("**/"), key=lambda path: len(path.parts), reverse=True)
        for folder in folders:
            with suppress(OSError):  # a killed process may still be listed
                folder.rmdir()

    def _namespace(self, node):
        return f"{self.label}-{node}"

    def _cgroup(self, node):
        return f"{self.label}_{node}"


def ip(*words, check=True):
    subprocess.run(["ip", *words], capture_output=True, check=check)
