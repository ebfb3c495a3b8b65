"""Two network namespaces, each with an ssh server, its own shared memory and its own host name: two hosts by ssh.

Needs root, `ip`, `unshare` and `sshd` (Debian: openssh-server). The servers listen on a high port, with keys and
settings of their own, and end with the block.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

PORT = 2222
SSHD = f"""\
Port {PORT}
HostKey {{folder}}/host_key
AuthorizedKeysFile {{folder}}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
MaxStartups 100
"""
SSH = f"""\
Host *
  Port {PORT}
  IdentityFile {{folder}}/key
  IdentitiesOnly yes
  BatchMode yes
  ConnectTimeout 10
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
#: Makes a process a host of its own: shared memory, host name, names of hosts. No name server is asked: it would not
#: answer.
BECOME = """
mount -t tmpfs -o mode=1777 tmpfs /dev/shm && echo "$0" >/proc/sys/kernel/hostname &&
mount --bind {folder}/hosts /etc/hosts && mount --bind /dev/null /etc/resolv.conf && exec "$@"
"""


def why_impossible():
    """Return why no such hosts can be made here; None if they can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    missing = [name for name in ("ip", "unshare", "nsenter", "ssh", "ssh-keygen") if shutil.which(name) is None]
    if sshd() is None:
        missing.append("sshd")
    if missing:
        return f"no {', '.join(missing)} here"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False)
    return "no namespaces here" if tried.returncode else None


def sshd():
    return shutil.which("sshd", path=f"/usr/sbin:{os.environ.get('PATH', '')}")


class SshHosts:
    """Use: ``with SshHosts(folder) as hosts``; `hosts.addresses` can be reached by ``ssh -F folder/ssh_config``."""

    made = itertools.count()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        number = (os.getpid() + next(SshHosts.made)) % 10000
        self.names = [f"sh{number}a", f"sh{number}b"]
        self.network = f"10.232.{number % 250}"
        self.addresses = [f"{self.network}.1", f"{self.network}.2"]
        self.servers: list[subprocess.Popen[bytes]] = []

    def __enter__(self):
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        (folder / "sshd_config").write_text(SSHD.format(folder=folder))
        (folder / "ssh_config").write_text(SSH.format(folder=folder))
        lines = [f"{address} {name}\n" for address, name in zip(self.addresses, self.names, strict=True)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        self.rsh = folder / "rsh"
        self.rsh.write_text(f'#!/bin/sh\nexec ssh -F {folder}/ssh_config "$@"\n')
        self.rsh.chmod(0o755)
        first, second = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", first, "netns", first, "type", "veth", "peer", "name", second, "netns", second)
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", name, "up")
        for name in self.names:
            command = [*self.on(name), sshd(), "-D", "-e", "-f", folder / "sshd_config"]
            with (folder / f"sshd-{name}.log").open("wb") as log:
                self.servers.append(subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL))
        self._wait_for_servers()
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.kill()
            server.wait()
        for name in self.names:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in inside.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def on(self, name):
        """Return the beginning of a command line that runs on a host."""
        return [
            "ip",
            "netns",
            "exec",
            name,
            "unshare",
            "--uts",
            "--mount",
            "sh",
            "-c",
            BECOME.format(folder=self.folder),
            name,
        ]

    def kill_rank(self, name):
        """Kill a rank of `distdl.train` on a host; return its process number."""
        inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
        for pid in inside.stdout.split():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"/python" in words[0] and b"distdl.train" in words:
                os.kill(int(pid), signal.SIGKILL)
                return int(pid)
        raise AssertionError(f"no rank of distdl.train on {name}")

    def run(self, argv, *, cwd, env, timeout):
        """Run a command on the first host."""
        return subprocess.run(
            [*self.on(self.names[0]), *map(str, argv)],
            cwd=cwd,
            env=env | self.variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    @property
    def variables(self):
        """Return the environment variables of a job on both hosts."""
        return {
            "RSH": str(self.rsh),
            "UCX_TLS": "tcp,self",  # MPICH would find the shared memory of the other host
            # Both hosts see all network devices of this machine's configuration, but share this network only.
            "PRTE_MCA_prte_if_include": f"{self.network}.0/24",
            "OMPI_MCA_btl_tcp_if_include": f"{self.network}.0/24",
        }

    def _wait_for_servers(self):
        for address in self.addresses:
            for _ in range(100):
                command = [*self.on(self.names[0]), str(self.rsh), address, "true"]
                if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                    break
                time.sleep(0.1)
            else:
                logs = [path.read_text() for path in self.folder.glob("sshd-*.log")]
                raise RuntimeError(f"no ssh server answers: {logs}")


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)
