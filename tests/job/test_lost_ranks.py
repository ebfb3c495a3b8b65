"""The ring of ranks: a rank that dies ends all others, and one that exits ends none."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest

from distdl.job import lost_ranks
from distdl.job.lost_ranks import EXIT_LOST_RANK, Member, accept, connect, network_identity

#: A rank: it exchanges values through its streams, and then waits for a line: `exit` ends it.
RANK = """
import json, os, sys, time
from distdl.job import lost_ranks
lost_ranks.SECONDS_FOR_THE_LAUNCHER, lost_ranks.SECONDS_FOR_THE_FIRST = 0.1, 1.0

def exchange(value):
    print(json.dumps(value), flush=True)
    return json.loads(sys.stdin.readline())

ring = lost_ranks.Ring(int(sys.argv[1]), exchange, os._exit, lambda: None)
while len(ring._connections) < 2:
    time.sleep(0.01)
print("connected", flush=True)
sys.stdin.readline()
"""


@contextmanager
def ranks(count):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([sys.executable, "-c", RANK, str(rank)], text=True, **pipes) for rank in range(count)]
    try:
        members = [json.loads(process.stdout.readline()) for process in started]
        for process in started:
            process.stdin.write(json.dumps(members) + "\n")
            process.stdin.flush()
        assert [process.stdout.readline() for process in started] == ["connected\n"] * count
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("count", [2, 4])
def test_a_killed_rank_ends_all_others_with_one_line(count):
    with ranks(count) as started:
        victim = started[1]
        victim.kill()
        others = [process for process in started if process is not victim]
        assert [process.wait(20) for process in others] == [EXIT_LOST_RANK] * (count - 1)
        errors = "".join(process.stderr.read() for process in others)
        host = os.uname().nodename
        assert f"error: rank 1 (process {victim.pid}, host {host}) was lost" in errors
        assert errors.count("\n") == 1


def test_a_rank_that_exits_ends_no_other_and_a_stopped_one_neither():
    with ranks(3) as started:
        started[2].communicate("exit\n", timeout=20)
        started[1].send_signal(signal.SIGSTOP)
        with pytest.raises(subprocess.TimeoutExpired):
            started[0].wait(1.5)
        started[1].send_signal(signal.SIGCONT)
        for process in started[:2]:
            assert process.communicate("exit\n", timeout=20) == ("", "")
            assert process.returncode == 0


@pytest.fixture
def listener():
    with socket.create_server(("", 0)) as listening:
        yield listening


def member(rank, port=0, secret="ab" * 16, network=None):
    addresses = ["192.0.2.1"] if network else lost_ranks.addresses()
    return Member(rank, "nowhere.invalid", 1, network or network_identity(), addresses, port, secret)


def test_only_a_process_that_knows_the_secret_is_accepted(listener, monkeypatch):
    monkeypatch.setattr(lost_ranks, "SECONDS_TO_ACCEPT", 1.0)
    port = listener.getsockname()[1]
    own = member(0, port, "cd" * 16)
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
    strangers[0].sendall(bytes(16))
    strangers[1].close()
    monkeypatch.setattr(lost_ranks, "SECONDS_TO_CONNECT", 0.2)
    assert accept(listener, own, member(1)) is None
    with suppress(ConnectionResetError):
        assert strangers[0].recv(16) == b""
    strangers[0].close()


def test_a_server_that_does_not_know_our_secret_is_left_alone(listener, monkeypatch):
    monkeypatch.setattr(lost_ranks, "SECONDS_TO_ACCEPT", 0.2)
    assert connect(member(0), member(1, listener.getsockname()[1])) is None


class Unreachable:
    """A connection on which the kernel has given up."""

    def recv(self, _size):
        raise TimeoutError

    def send(self, _what):
        raise OSError


class Closed(Unreachable):
    """A connection to a process that was killed."""

    def recv(self, _size):
        return b""


def test_survivors_of_a_lost_rank_end_only_if_a_host_does_not_answer(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(lost_ranks, "SECONDS_FOR_THE_LAUNCHER", 0.0)
    monkeypatch.setattr(lost_ranks.os, "kill", lambda *_: None)
    neighbour = {"rank": 1, "host": "n2", "pid": 7, "network": "another", "addresses": [], "port": 9}
    ring = lost_ranks.Ring(0, lambda own: [own, {**neighbour, "secret": "00" * 16}], ended.append, None)
    atexit.unregister(ring.leave)
    ring._wait_at(Closed(), ring._after, 0.0)
    assert not ended
    ring._wait_at(Unreachable(), ring._after, 0.0)
    assert ended == [EXIT_LOST_RANK]
    said = capsys.readouterr().err
    assert said.startswith("distdl: error: rank 1 (process 7, host n2) has not answered for 45 s: its host or the")


def test_a_neighbour_that_cannot_be_reached_is_named(monkeypatch, capsys):
    monkeypatch.setattr(lost_ranks, "SECONDS_TO_CONNECT", 0.2)
    monkeypatch.setattr(lost_ranks, "SECONDS_TO_ACCEPT", 0.2)
    unreachable = {"rank": 1, "host": "nowhere.invalid", "pid": 7, "network": "another", "addresses": [], "port": 9}
    ring = lost_ranks.Ring(0, lambda own: [own, {**unreachable, "secret": "00" * 16}], os._exit, lambda: None)
    atexit.unregister(ring.leave)
    said, deadline = "", time.monotonic() + 20
    while not said and time.monotonic() < deadline:
        time.sleep(0.02)
        said = capsys.readouterr().err
    assert said.startswith("distdl: rank 0 cannot connect to rank 1 (process 7, host nowhere.invalid)")
