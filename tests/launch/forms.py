"""The launch forms: how each starts a training on three or four ranks, and the living processes of its job."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY), str(REPOSITORY / "tests" / "faults")]

import slurm_cluster  # noqa: E402
from harness import MARK, RANK_NAMES, _environments  # noqa: E402
from ssh_hosts import why_impossible  # noqa: E402

HOSTS, SLURM = "hosts.sh", "slurm.sbatch"
FORMS = ("local.sh", "mpirun", HOSTS, f"{SLURM} mpirun", f"{SLURM} srun")
LAUNCHERS = {"mpirun", "prterun", "prted", "mpiexec.hydra", "hydra_pmi_proxy", "srun", "hosts.sh"}
DAEMONS = {"slurmstepd", "slurmd", "sshd"}
#: What a bare mpirun needs here: root, and more ranks than cores.
BARE = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
#: Imports another distdl on rank 1.
OTHER = """
import os, runpy, sys
if "1" in map(os.environ.get, ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")):
    sys.path.insert(0, {changed!r})
runpy.run_module("distdl.train", run_name="__main__", alter_sys=True)
"""


@cache
def mpi_of(python):
    version = subprocess.run(
        [Path(python).with_name("mpirun"), "--version"], capture_output=True, text=True, check=True
    )
    return "Open MPI" if "Open" in version.stdout else "MPICH"


def possible_forms(python):
    """Return the launch forms that are possible here, each with its Python."""
    impossible = {HOSTS: why_impossible(), SLURM: slurm_cluster.why_not()}
    return [(form, python) for form in FORMS if impossible.get(form.split()[0]) is None]


def write_another_version(folder):
    """Write a distdl with another source, and the module `other`, which imports it on rank 1."""
    shutil.copytree(REPOSITORY / "distdl", folder / "changed" / "distdl")
    with (folder / "changed" / "distdl" / "optim.py").open("a") as file:
        file.write("# changed\n")
    (folder / "other.py").write_text(OTHER.format(changed=str(folder / "changed")))


class Launch:
    """One launch form in a folder; `hosts` (ssh) or `cluster` (Slurm) if the form needs it."""

    def __init__(self, form, python, mark, folder, rng, hosts, cluster):
        self.form, self.python, self.mark, self.folder = form, python, mark, folder
        self.hosts, self.cluster = hosts, cluster
        self.restarts = rng.choice([["--restarts", "2"], []])
        self.ulfm = ["--with-ft", "ulfm"] if mpi_of(python) == "Open MPI" and rng.random() < 0.5 else []
        self.spaces = (
            hosts.names if hosts else [f"{cluster.label}-{node}" for node in slurm_cluster.NODES] if cluster else []
        )
        self.before = set()
        self.before = set(self.processes())

    def command(self, flags, module, log):
        """Return the command line and its environment."""
        env = {**os.environ, MARK: self.mark, "PYTHONPATH": f"{REPOSITORY}:{self.folder}", "PYTHON": self.python}
        env |= {"PYTHONFAULTHANDLER": "1", "TMPDIR": str(self.folder)}
        if self.form == "local.sh":
            return [REPOSITORY / "launch/local.sh", "-n3", "--module", module, *self.restarts, "--", *flags], env
        if self.form == "mpirun":
            mpirun = [Path(self.python).with_name("mpirun"), *self.ulfm, "-n", "3"]
            return [*mpirun, self.python, "-m", module, *flags], env | BARE
        if self.form == HOSTS:
            hostfile = self.folder / "hostfile"
            hostfile.write_text("".join(f"{address}:2\n" for address in self.hosts.addresses))
            words = [*self.hosts.on(self.hosts.names[0]), REPOSITORY / "launch/hosts.sh", hostfile]
            return [*words, *self.restarts, "--", *flags], env | self.hosts.variables
        launch = {"MPICH": "pmi2", "Open MPI": "pmix"}[mpi_of(self.python)] if self.form.endswith("srun") else "mpirun"
        script = (REPOSITORY / "launch/slurm.sbatch").read_text().replace("tasks-per-node=4", "tasks-per-node=2")
        script = script.replace("flags=(--dataset digits --epochs 20)", f"flags=({' '.join(flags)})")
        (self.folder / "job.sbatch").write_text(script.replace("module=distdl.train\n", f"module={module}\n"))
        env |= self.cluster.environment | {"LAUNCH": launch, "RUN": "unused", "SLURM_TIMELIMIT": "5"}
        return ["sbatch", "--wait", f"--output={log}", "--open-mode=append", self.folder / "job.sbatch"], env

    def mount_another_version(self, *, undo=False):
        """Let the second host see another distdl in the place of ours."""
        ours = REPOSITORY / "distdl"
        words = ["umount", ours] if undo else ["mount", "--bind", self.folder / "changed" / "distdl", ours]
        subprocess.run(["nsenter", "-t", str(self.hosts.servers[1].pid), "-m", *words], check=True)

    def processes(self):
        """Return the living processes of the job on all hosts, each with its rank, or None (mpirun, a daemon)."""
        inside = set()
        for name in self.spaces:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            inside |= {int(pid) for pid in pids.split()}
        found = {}
        for pid, environment in _environments():
            ours = environment.get(MARK) == self.mark or pid in inside
            if ours and pid not in self.before and state_of(pid)[:1] != "Z" and name_of(pid) not in DAEMONS:
                trains = re.match(r"\S*python\S* .*-m (distdl.train|other)\b", words_of(pid))
                numbers = [environment[name] for name in (*RANK_NAMES, "SLURM_PROCID") if name in environment]
                found[pid] = int(numbers[0]) if numbers and numbers[0].isdecimal() and trains else None
        return found


def words_of(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def name_of(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def state_of(pid):
    with suppress(OSError):
        return " ".join(re.findall(r"(?m)^(?:State|PPid):\s+(.*)", Path(f"/proc/{pid}/status").read_text()))
    return ""
