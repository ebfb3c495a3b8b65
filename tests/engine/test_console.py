"""Counting proves the advice on the number of ranks. The live line appears only on a terminal."""

import io
import os
import re
import sys
from pathlib import Path

import pytest

from distdl.engine import console as progress
from distdl.engine.console import CLEAR_LINE, Console
from distdl.engine.printed_lines import banner, shares_of
from distdl.parallel import contiguous_shards

ADVICE = re.compile(r".*: as slow as (\d+) ranks?, use (\d+) or (\d+)")


def slowest(micro_batches, ranks):
    """Return the duration of a step: the micro-batches of the rank that has the most."""
    return max(map(len, contiguous_shards(micro_batches, ranks)))


@pytest.mark.parametrize("micro_batches", range(1, 65))
def test_advice_on_the_number_of_ranks_is_true(micro_batches):
    seconds = {ranks: slowest(micro_batches, ranks) for ranks in range(1, micro_batches + 1)}
    for ranks, ours in seconds.items():
        said = shares_of(micro_batches, ranks)
        lengths = [len(shard) for shard in contiguous_shards(micro_batches, ranks)]
        least, most = min(lengths), max(lengths)
        how_many = f"{least} to {most}" if least < most else f"{most}"
        assert said.split(":")[0] == f"{how_many} micro-batch{'es' if most > 1 else ''} a rank"

        as_fast = min(fewer for fewer in seconds if seconds[fewer] == ours)
        advice = ADVICE.fullmatch(said)
        assert (advice is not None) == (as_fast < ranks and least < most), said
        if advice:
            faster = min(more for more in seconds if seconds[more] < ours)
            assert [int(number) for number in advice.groups()] == [as_fast, as_fast, faster]
            assert as_fast < ranks < faster


def test_there_is_no_advice_if_fewer_ranks_would_be_slower():
    assert shares_of(8, 1) == "8 micro-batches a rank"
    assert shares_of(8, 3) == "2 to 3 micro-batches a rank"
    assert shares_of(8, 8) == "1 micro-batch a rank"
    assert shares_of(8, 7) == "1 to 2 micro-batches a rank: as slow as 4 ranks, use 4 or 8"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Set a clock that advances by one second per call."""
    now = iter(range(1, 1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))


def terminal_of(monkeypatch):
    """Replace the output by a terminal. This is no fixture, because pytest captures the output after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def test_the_live_line_shows_the_progress_of_the_epoch(monkeypatch, clock):
    terminal = terminal_of(monkeypatch)
    shown = Console(live=True)
    shown.live(1, 3, 5, 10, 0.123456)
    shown.live(3, 3, 10, 10, 2.0)
    assert terminal.getvalue() == (
        f"{CLEAR_LINE}epoch 1/3 [############------------] step 5/10 loss 0.1235"
        f"{CLEAR_LINE}epoch 3/3 [########################] step 10/10 loss 2.0000"
    )


def test_a_line_replaces_the_live_line(monkeypatch, clock):
    terminal = terminal_of(monkeypatch)
    shown = Console(live=True)
    shown.line("before")
    shown.live(1, 1, 1, 2, 0.5)
    shown.line("epoch 1")
    shown.line("after")
    before, live, after = terminal.getvalue().partition(f"{CLEAR_LINE}epoch 1/1")
    assert (before, live != "") == ("before\n", True)
    assert after.endswith(f"loss 0.5000{CLEAR_LINE}epoch 1\nafter\n")


def test_a_warning_clears_the_live_line_and_goes_to_the_error_stream(monkeypatch, clock, capsys):
    terminal = terminal_of(monkeypatch)
    shown = Console(live=True)
    shown.live(1, 1, 1, 2, 0.5)
    shown.warning("the disk is full")
    shown.warning("still")
    assert terminal.getvalue().endswith(f"loss 0.5000{CLEAR_LINE}")
    assert capsys.readouterr().err == "distdl: warning: the disk is full\ndistdl: warning: still\n"


def test_the_live_line_is_rewritten_at_a_readable_rate(monkeypatch):
    times = iter([10.0, 10.0, 10.05, 10.2, 10.2])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    terminal = terminal_of(monkeypatch)
    shown = Console(live=True)
    for step in (1, 2, 3):
        shown.live(1, 1, step, 3, 0.0)
    assert re.findall(r"step (\d)", terminal.getvalue()) == ["1", "3"]


@pytest.mark.parametrize(("live", "stream"), [(False, Terminal), (True, io.StringIO), (False, io.StringIO)])
def test_there_is_no_live_line_without_a_terminal_or_under_a_launcher(live, stream, monkeypatch, clock):
    monkeypatch.setattr(sys, "stdout", stream())
    shown = Console(live=live)
    shown.live(1, 1, 1, 2, 0.5)
    shown.line("epoch 1")
    assert sys.stdout.getvalue() == "epoch 1\n"


def test_a_disk_that_is_full_for_a_while_loses_only_the_lines_of_that_time(monkeypatch, tmp_path):
    """Python also exits without an error if the disk is full at the end, when it flushes the output."""
    with (tmp_path / "train.log").open("w") as stream, Path("/dev/full").open("wb") as full:
        monkeypatch.setattr(sys, "stdout", stream)
        shown, disk = Console(live=False), os.dup(stream.fileno())
        shown.line("epoch 1")
        assert shown.lost is None
        os.dup2(full.fileno(), stream.fileno())
        shown.line("epoch 2")
        assert shown.lost == "No space left on device"
        os.dup2(disk, stream.fileno())
        shown.line("epoch 3")
        os.dup2(full.fileno(), stream.fileno())
        shown.line("epoch 4")
        os.close(disk)
    assert (tmp_path / "train.log").read_text() == "epoch 1\nepoch 3\n"


def environment(ranks, hosts):
    return {"ranks": ranks, "hosts": hosts, "communicator": "MPICH 5.0.1", "versions": {"distdl": "0.1.0"}}


def test_the_banner_names_the_data_the_model_the_hosts_and_whether_failures_are_survived():
    hosts = {"node-a": 2, "node-b": 2}
    assert banner(environment(4, hosts), "digits · mlp", 2, "batch 128", "2 micro-batches a rank", "no") == [
        "distdl 0.1.0 · digits · mlp",
        "4 ranks × 2 threads · MPICH 5.0.1 · hosts node-a (2), node-b (2)",
        "batch 128 · 2 micro-batches a rank",
        "survives failures: no",
    ]


def test_the_banner_of_one_rank_is_in_the_singular():
    assert (
        banner(environment(1, {"here": 1}), "", 1, "", "", "yes")[1]
        == "1 rank × 1 thread · MPICH 5.0.1 · host here (1)"
    )
