"""Disturb jobs of each launch form at random: ``python -m tests.launch.disturbances --runs 200 --seed 1 --log FILE``.

While a process of a job lives, the job prints something at least once a minute. The job ends with the receipt of an
undisturbed process, or the same command with ``--resume auto`` does. No process is left. Each run adds a line of JSON
to the log, and a failed one a file with its output. Two hosts, Slurm and a full disk need root.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import forms
from forms import HOSTS, LAUNCHERS, REPOSITORY, SLURM, Launch, name_of, state_of, words_of
from harness import RECEIPT
from slurm_cluster import Cluster
from ssh_hosts import SshHosts, ip

TRAINING = ["--dataset", "digits", "--model", "mlp", "--epochs", "20", "--kernels", "numpy"]
TRAINING += ["--log-every", "1", "--checkpoint-every", "7"]
STEPS = 200
LONGEST_SILENCE = 60.0
#: A start that cannot succeed ends after ten minutes.
LONGEST_JOB = 720.0
#: A stopped rank continues after this time, unless the job has ended.
SECONDS_STOPPED = 75.0
STOPS = {"stop, --detect-hangs": ["--detect-hangs", "10"], "stop, --stall-warning": ["--stall-warning", "10"]}
DISTURBANCES = ["kill a rank", "kill rank 0", "kill the launcher", *STOPS, "memory limit"]
BEFORE_THE_START = ["another version", "stale variable"]
STALE = ("OMPI_COMM_WORLD_RANK=2", "PMI_RANK=1", "SLURM_PROCID=1", "PMIX_RANK=1", "OMPI_COMM_WORLD_SIZE=3")
only_one_uses_slurm = threading.Lock()


def possible_runs(pythons, pattern=""):
    """Return the launch forms and disturbances that are possible here and that the pattern finds.

    Each is a form, a Python and a disturbance. The pattern sees, for example, ``hosts.sh, MPICH, cut cable``.
    """
    return [
        (form, python, fault)
        for python in pythons
        for form, python in forms.possible_forms(python)
        for fault in _disturbances(form)
        if re.search(pattern, f"{form}, {forms.mpi_of(python)}, {fault}")
    ]


def _disturbances(form):
    possible = [*DISTURBANCES, *BEFORE_THE_START]
    possible += ["full disk"] if os.geteuid() == 0 and not form.startswith(SLURM) else []
    return possible + (["cut cable"] if form == HOSTS or form.startswith(SLURM) else [])


class Run:
    """One disturbed job and its resume, in a folder of its own."""

    def __init__(self, seed, number, possible, folder):
        self.rng = random.Random(f"{seed} {number}")
        self.form, self.python, self.fault = self.rng.choice(possible)
        self.folder, self.log, self.disk = folder, folder / "output", folder / "disk"
        self.silence, self.left = 0.0, []
        self.record = {"number": number, "form": f"{self.form}, {forms.mpi_of(self.python)}", "fault": self.fault}
        self.record["moment"] = "late"  # the job ends before it

    def result(self, expected, cluster):
        """Run the job, and resume it if it gave no receipt; return the record."""
        self.disk.mkdir()
        with ExitStack() as stack:
            if self.fault == "full disk":
                size = "120m" if self.form == HOSTS else "2m"  # its doctor refuses a smaller disk
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.disk], check=True)
                stack.callback(subprocess.run, ["umount", "-l", self.disk], check=True)
            hosts = stack.enter_context(SshHosts(self.folder / "ssh")) if self.form == HOSTS else None
            cluster = stack.enter_context(only_one_uses_slurm) and cluster if self.form.startswith(SLURM) else None
            mark = f"{os.getpid()} {self.record['number']}"
            self.launch = Launch(self.form, self.python, mark, self.folder, self.rng, hosts, cluster)
            stack.callback(self.kill_all)
            code = self.watch(disturbed=True)
            said = self.log.read_text(errors="replace")
            self.record |= {"code": code, "said": said.strip().splitlines()[-1:]}
            wrong = ["no message"] if code != 0 and not said and "launcher" not in self.fault else []
            receipt = RECEIPT.findall(said)[-1:]
            if not receipt and code != "hangs":
                self.record["resume"] = code = self.watch(disturbed=False)
                receipt = RECEIPT.findall(self.log.read_text(errors="replace")[len(said) :])[-1:]
            wrong += ["hangs"] if code == "hangs" else [] if receipt == [expected] else ["receipt"]
            wrong += ["silence"] if self.silence > LONGEST_SILENCE else []
            wrong += [f"left: {self.left}"] if self.left else []
        return self.record | {"silence": round(self.silence, 1), "receipt": receipt == [expected], "wrong": wrong}

    def prepare(self, *, disturbed):
        """Return the command line and its environment; undo or make what lies before the start."""
        flags = [*TRAINING, "--run-dir", str(self.disk / "run"), *STOPS.get(self.fault, [])]
        flags += [] if disturbed else ["--resume", "auto"]
        module = "distdl.train"
        if self.fault == "another version" and disturbed:
            self.record["moment"] = "before"
            forms.write_another_version(self.folder)
            module = module if self.form == HOSTS else "other"
        if self.fault == "another version" and self.form == HOSTS:
            self.launch.mount_another_version(undo=not disturbed)
        words, env = self.launch.command(flags, module, self.log)
        if self.fault == "stale variable" and disturbed:
            self.record["moment"] = stale = self.rng.choice(STALE)
            env |= [stale.split("=")]
        return [str(word) for word in words], env

    def watch(self, *, disturbed):
        """Run the job, and disturb it; return its exit code. Measure the longest silence of living processes."""
        words, env = self.prepare(disturbed=disturbed)
        moment = self.rng.choice(["start", "step", "step", "step"])
        moment = moment if disturbed and self.fault not in BEFORE_THE_START else ""
        step, seconds, seen = self.rng.randrange(1, STEPS - 20), self.rng.random() * 2.5, 0.0
        with self.log.open("ab") as output:
            job = subprocess.Popen(
                words, env=env, cwd=self.folder, stdin=-3, stdout=output, stderr=-2, start_new_session=True
            )
        self.job, undo, size = job.pid, None, 0
        started = spoke = time.monotonic()
        while True:
            living = self.launch.processes()
            living.pop(self.job, None)
            now = time.monotonic()
            over = job.poll() is not None and not living
            if self.log.stat().st_size != size or (self.launch.cluster and not living):  # it waits in the queue
                size, spoke = self.log.stat().st_size, now
            self.silence = max(self.silence, 0.0 if over else now - spoke)
            if moment and any(rank is not None for rank in living.values()):
                seen = seen or now
                if (now - seen >= seconds) if moment == "start" else (self.step() >= step):
                    self.record["moment"] = f"{moment} {round(seconds, 1) if moment == 'start' else step}"
                    undo, disturbed_at, moment = self.disturb(living), now, ""
            if undo and (over or now - disturbed_at > SECONDS_STOPPED):
                undo()
                undo = None
            if over:
                return job.returncode
            if now - started > LONGEST_JOB * (2 if self.launch.cluster else 1):
                self.left = [f"{pid} {words_of(pid)} {state_of(pid)}" for pid in living]
                self.kill_all(signal.SIGABRT)  # faulthandler prints the stacks
                time.sleep(2)
                self.kill_all()
                job.wait()
                return "hangs"
            time.sleep(0.02 if moment else 0.2)

    def disturb(self, living):
        """Disturb the job; return a function that removes the cause, or None."""
        ranks = {rank: pid for pid, rank in sorted(living.items(), reverse=True) if rank is not None}
        pid = ranks.get(0, self.job) if self.fault == "kill rank 0" else ranks[self.rng.choice(sorted(ranks))]
        if self.fault == "kill the launcher":
            pid = self.rng.choice([self.job, *(one for one in living if name_of(one) in LAUNCHERS)])
            self.record["victim"] = name_of(pid)
        with suppress(ProcessLookupError, FileNotFoundError):
            if self.fault.startswith("kill"):
                os.kill(pid, signal.SIGKILL)
            elif self.fault in STOPS:
                os.kill(pid, signal.SIGSTOP)
                return lambda: self.kill_all(signal.SIGCONT)
            elif self.fault == "memory limit":
                size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
                resource.prlimit(pid, resource.RLIMIT_AS, (size + self.rng.randrange(2**23),) * 2)
            elif self.fault == "full disk":
                filler = self.disk / "filler"
                with suppress(OSError), filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(b"x" * 4096)
                return filler.unlink
            elif self.launch.cluster:
                self.launch.cluster.cut("n2")
                return lambda: self.launch.cluster.replace("n2")
            else:
                cable = ["-n", self.launch.hosts.names[0], "link", "set", self.launch.hosts.names[0]]
                ip(*cable, "down")
                return lambda: ip(*cable, "up")
        return None

    def step(self):
        with suppress(OSError, ValueError, IndexError):
            return json.loads((self.disk / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        return 0

    def kill_all(self, by=signal.SIGKILL):
        for pid in self.launch.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, by)


def run_all(numbers, seed, log, at_once, possible, cluster=None):
    """Yield the record of each run; append it to the log."""
    with tempfile.TemporaryDirectory(prefix="distdl-disturbed-") as folder:
        words = [possible[0][1], "-m", "distdl.train", *TRAINING, "--run-dir", f"{folder}/undisturbed"]
        printed = subprocess.run(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True).stdout
        [expected] = RECEIPT.findall(printed)

        def one(number):
            own = Path(folder, str(number))
            own.mkdir()
            run = Run(seed, number, possible, own)
            try:
                record = run.result(expected, cluster)
            except Exception as error:  # noqa: BLE001  the other runs continue
                record = run.record | {"wrong": [f"{type(error).__name__}: {error}"]}
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if record["wrong"] and run.log.exists():
                shutil.copy(run.log, f"{log}.{seed}-{number}.txt")
            shutil.rmtree(own, ignore_errors=True)
            return record

        with ThreadPoolExecutor(at_once) as pool, ExitStack() as stack:
            stack.callback(pool.shutdown, cancel_futures=True)
            yield from pool.map(one, numbers)


def table(records):
    """Return the number of runs, the longest silence and the failures by form and disturbance."""
    rows = defaultdict(list)
    for record in records:
        rows[record["form"], record["fault"]].append(record)
    lines = ["| form | disturbance | runs | longest silence, s | failures |", "|---|---|---|---|---|"]
    for (form, fault), some in sorted(rows.items()):
        failed = sum(bool(record["wrong"]) for record in some)
        lines.append(f"| {form} | {fault} | {len(some)} | {max(r.get('silence', 0) for r in some)} | {failed} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for flag, default in (("--runs", 200), ("--first", 0), ("--seed", 0), ("--at-once", 2)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--log", type=Path, default="disturbances.jsonl")
    parser.add_argument("--python", nargs="*", default=[sys.executable], help="the Python of each MPI")
    parser.add_argument("--only", default="", help="a pattern such as 'hosts.*cable'")
    given = parser.parse_args()
    pythons = [os.path.abspath(python) for python in given.python]  # noqa: PTH100  a resolved link has no packages
    possible = possible_runs(pythons, given.only)
    numbers, records = range(given.first, given.first + given.runs), []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the hosts and Slurm must end too
    with ExitStack() as stack:
        cluster = None
        if any(form.startswith(SLURM) for form, *_ in possible):
            cluster = stack.enter_context(Cluster(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        for record in run_all(numbers, given.seed, given.log, given.at_once, possible, cluster):
            records.append(record)
            print(json.dumps(record), flush=True)
    print(table(records))
    return any(record["wrong"] for record in records)


if __name__ == "__main__":
    sys.exit(main())
