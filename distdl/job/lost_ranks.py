"""End the job if a rank is lost and neither MPI nor the launcher reacts, as under `srun --mpi=pmi2`.

The ranks form a ring. Each keeps a connection to the next rank, on any host, and both ends only wait. If a process
dies, its kernel closes its connections at once. So both neighbours know that it is gone, however it died. A slow or
stopped process keeps its connections. If a host or the interconnect between two hosts fails, the kernel gives up after
`SECONDS_WITHOUT_ANSWER`.

A rank that exits first meets the others, and then says goodbye. A rank that ends because another was lost tells its
other neighbour. So all ranks end, even if MPI_Abort does nothing.

If the ranks survive the death of another one, only a host that does not answer ends the job: MPI itself does not notice
that for minutes.

A launcher that ends the job itself gets `SECONDS_FOR_THE_LAUNCHER`. Each rank accepts one connection, from a process
that knows the secret that it has sent through MPI.
"""

import atexit
import hmac
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from distdl.job.processes import boot_id
from distdl.job.streams import say_line

#: mpirun and `srun -K` end a job of their own accord, most within a second.
SECONDS_FOR_THE_LAUNCHER = 3.0
#: The second neighbour of a lost rank reports it only if the first one does not.
SECONDS_FOR_THE_FIRST = 2.0
#: A rank that cannot end its job in this time kills itself.
SECONDS_TO_END = 10.0
SECONDS_TO_CONNECT = 5.0
#: The neighbour may begin to accept a little later; it has passed the start of MPI.
SECONDS_TO_ACCEPT = 30.0
#: The kernel asks an idle neighbour after 20 s, and then every 5 s.
KEEPALIVE = {socket.TCP_KEEPIDLE: 20, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 5}
SECONDS_WITHOUT_ANSWER = (
    KEEPALIVE[socket.TCP_KEEPIDLE] + KEEPALIVE[socket.TCP_KEEPINTVL] * KEEPALIVE[socket.TCP_KEEPCNT]
)
#: The exit code of a shell after a process that SIGKILL ended: `--restarts` starts the job again.
EXIT_LOST_RANK = 137
GOODBYE, TOLD = b"g", b"t"
LOST = "was lost"
SECRET_BYTES = 16
#: After the ranks have met at exit, MPI_Finalize takes much less, unless a rank was lost. No thread runs meanwhile.
SECONDS_TO_FINALIZE = 45


@dataclass(frozen=True)
class Member:
    """A rank of the ring, and where it accepts the connection of the rank before it; port 0 if it cannot."""

    rank: int
    host: str
    pid: int
    network: str
    addresses: Sequence[str]
    port: int
    secret: str

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid}, host {self.host})"


class Ring:
    """The connections of this rank to its two neighbours; a thread waits at each.

    `exchange` returns the values of all ranks, in the order of ranks. `end` ends the job with an exit code. `meet`
    waits for all ranks; None if they survive the death of another one. Collective.
    """

    def __init__(
        self,
        rank: int,
        exchange: Callable[[Any], Sequence[Any]],
        end: Callable[[int], NoReturn],
        meet: Callable[[], None] | None,
    ) -> None:
        self._end, self._meet = end, meet
        self._leaves = False
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        listener = _listener()
        port = 0 if listener is None else listener.getsockname()[1]
        own = Member(rank, os.uname().nodename, os.getpid(), network_identity(), addresses(), port, _new_secret())
        members = [Member(**one) for one in exchange(asdict(own))]
        place = [member.secret for member in members].index(own.secret)
        self._own, self._before = own, members[place - 1]
        self._after = members[(place + 1) % len(members)]
        for work in (self._wait_for_the_one_after, lambda: self._wait_for_the_one_before(listener)):
            threading.Thread(target=work, name="lost ranks", daemon=True).start()
        atexit.register(self.leave)

    def leave(self) -> None:
        """Meet the other ranks at exit, and say goodbye; limit the time that MPI_Finalize may take."""
        if self._meet is None:
            self._say(GOODBYE)
            return
        self._meet()
        self._say(GOODBYE)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS_TO_FINALIZE)

    def _say(self, what: bytes) -> None:
        with self._lock:
            self._leaves = True
            for connection in self._connections:
                with suppress(OSError):
                    connection.send(what)

    def _wait_for_the_one_after(self) -> None:
        connection = connect(self._own, self._after)
        if connection is None:
            if not self._leaves and self._meet is not None:
                say_line(
                    f"rank {self._own.rank} cannot connect to {self._after}: if that rank is killed, the job may wait "
                    "for it; start with srun -K (--kill-on-bad-exit)"
                )
            return
        self._wait_at(connection, self._after, 0.0)

    def _wait_for_the_one_before(self, listener: socket.socket | None) -> None:
        if listener is not None:
            with listener:
                connection = accept(listener, self._own, self._before)
            if connection is not None:
                self._wait_at(connection, self._before, SECONDS_FOR_THE_FIRST)

    def _wait_at(self, connection: socket.socket, neighbour: Member, seconds_longer: float) -> None:
        """Wait for the end of a neighbour; end the job if it said no goodbye."""
        with self._lock:
            self._connections.append(connection)
            if self._leaves:
                return
        try:
            heard = connection.recv(1)
            what = LOST
        except TimeoutError:
            heard, what = b"", f"has not answered for {SECONDS_WITHOUT_ANSWER} s: its host or the interconnect failed"
        except OSError:
            heard, what = b"", LOST
        is_survived = self._meet is None and heard != TOLD and what == LOST
        if heard == GOODBYE or is_survived:
            return
        if heard != TOLD:
            time.sleep(SECONDS_FOR_THE_LAUNCHER + seconds_longer)
        if self._leaves:
            return
        self._say(TOLD)
        if heard != TOLD:
            say_line(f"error: {neighbour} {what}; the others cannot continue without it, so the job ends: resume it")
        killer = threading.Timer(SECONDS_TO_END, os.kill, [os.getpid(), signal.SIGKILL])
        killer.daemon = True
        killer.start()
        self._end(EXIT_LOST_RANK)


def connect(own: Member, other: Member) -> socket.socket | None:
    """Return a connection to the rank that accepts one there, or None."""
    same_network = own.network == other.network
    for address in ["127.0.0.1"] if same_network else [*other.addresses, other.host]:
        with suppress(OSError):
            connection = socket.create_connection((address, other.port), SECONDS_TO_CONNECT)
            try:
                connection.sendall(bytes.fromhex(other.secret))
                connection.settimeout(SECONDS_TO_ACCEPT)
                if _receives(connection, own.secret):
                    return _kept_alive(connection)
            except OSError:
                pass
            connection.close()
    return None


def accept(listener: socket.socket, own: Member, other: Member) -> socket.socket | None:
    """Return the connection of the rank that knows our secret, or None if it does not come."""
    deadline = time.monotonic() + SECONDS_TO_ACCEPT
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection = listener.accept()[0]
        except OSError:
            return None
        with suppress(OSError):
            connection.settimeout(SECONDS_TO_CONNECT)
            if _receives(connection, own.secret):
                connection.sendall(bytes.fromhex(other.secret))
                return _kept_alive(connection)
        connection.close()
    return None


def _receives(connection: socket.socket, secret: str) -> bool:
    """Return whether the other side sends the secret."""
    expected, received = bytes.fromhex(secret), b""
    while len(received) < SECRET_BYTES and (more := connection.recv(SECRET_BYTES - len(received))):
        received += more
    return hmac.compare_digest(received, expected)


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def _listener() -> socket.socket | None:
    try:
        return socket.create_server(("", 0))
    except OSError:
        return None


def _new_secret() -> str:
    return secrets.token_hex(SECRET_BYTES)


def network_identity() -> str:
    """Return a text that is equal on processes with the same network interfaces, and different on others."""
    return f"{boot_id()} {Path('/proc/self/ns/net').stat().st_ino}"


def addresses() -> list[str]:
    """Return the IPv4 addresses of this host, without those of the loopback interface."""
    with suppress(OSError):
        table = Path("/proc/net/fib_trie").read_text()
        found = re.findall(r"\|-- ([\d.]+)\n\s+/32 host LOCAL", table)
        return sorted({address for address in found if not address.startswith("127.")})
    return []


def cancel_the_step() -> None:
    """Ask Slurm to end all tasks of this step, on all hosts."""
    scancel = shutil.which("scancel")
    step = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"
    if scancel is not None:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                [scancel, "--signal=KILL", step],
                env=os.environ.copy(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS_TO_END,
                check=False,
            )
