"""How much is run, where the results go, and which MPI there is.

| variable | meaning |
|---|---|
| `DISTDL_FAULTS=full` | as many runs as the right-hand column of docs/reliability.md says, instead of a few |
| `DISTDL_FAULTS_LOG=FILE` | append a line of JSON for each run; `python tests/faults/report.py FILE` prints the table |
| `DISTDL_FAULTS_SOAK_SECONDS=N` | length of the soak, which only the full matrix has (1800) |
| `DISTDL_FAULTS_SEED=N` | another choice of victims and moments (0) |
| `DISTDL_FAULTS_AT_ONCE=N` | so many jobs at the same time (2) |
| `DISTDL_FAULTS_NO_SKIPS=1` | a test that is skipped fails, unless it is marked `may_skip` |
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import pytest

FULL = os.environ.get("DISTDL_FAULTS", "") == "full"
SEED = int(os.environ.get("DISTDL_FAULTS_SEED", "0"))
#: A row is given up after so many.
FAILURES = 5 if FULL else 2
AT_ONCE = int(os.environ.get("DISTDL_FAULTS_AT_ONCE", "2"))
collect_ignore = [] if FULL else ["test_soak.py"]


def pytest_configure(config):
    config.addinivalue_line("markers", "may_skip: what this machine may not permit")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Where the matrix must be whole, as in .ci/run with Open MPI, a test that skips itself fails."""
    report = yield
    if report.skipped and os.environ.get("DISTDL_FAULTS_NO_SKIPS") and not item.get_closest_marker("may_skip"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skipped, where nothing may be: {reason}"
    return report


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Callable[..., harness.Undisturbed]:
    """What a job with these flags comes to when nothing happens: one process, once a session."""
    known: dict[tuple[str, ...], harness.Undisturbed] = {}
    lock = threading.Lock()

    def get(*flags: str) -> harness.Undisturbed:
        with lock:
            if flags not in known:
                outcome = harness.run(tmp_path_factory.mktemp("undisturbed") / "run", None, *flags)
                assert outcome.code == 0, str(outcome)
                assert outcome.receipt is not None
                known[flags] = harness.Undisturbed(outcome.receipt, outcome.metrics)
            return known[flags]

    return get


class Row:
    """A row of the matrix: its seeded choices, its runs, and the line that each of them adds to the log."""

    def __init__(self, name: str, ci: int, full: int, folder: Path, survives: bool) -> None:
        self.name = name
        self.count = full if FULL else ci
        self.folder = folder
        self._survives = survives

    def random(self, number: int) -> random.Random:
        """Return the choices of a run of this row."""
        return random.Random(zlib.crc32(f"{self.name} {SEED} {number}".encode()))

    def runs(self, work: Callable[[int, Path], tuple[harness.Outcome, str]]) -> None:
        """Do `work(number, folder)`, which does one run and says how it ended, as often as the row asks.

        All runs are done, unless several fail: then those that have not begun are left out.
        """
        faulthandler.cancel_dump_traceback_later()  # a row may take hours; each of its jobs has a limit of its own
        failures: list[str] = []

        def one(number: int) -> None:
            if len(failures) >= FAILURES:
                return
            try:
                outcome, ended = work(number, self.folder / str(number))
            except Exception as error:  # noqa: BLE001  whatever it is, the row goes on
                text = f"{type(error).__name__}: {error}"
                failures.append(f"run {number}: {text}")
                self._log({"number": number, "ok": False, "ended": text[:300], "whole": text})
                return
            seconds = [recovery["seconds"] for recovery in outcome.recoveries]
            left = [name for name in outcome.leftover_files if name.startswith("/dev/shm/")]
            more = {"code": outcome.code, "recovery_seconds": seconds, "left_in_shared_memory": left}
            self._log({"number": number, "ok": True, "ended": ended, **more})

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(one, range(self.count)))
        if failures:
            pytest.fail("\n\n".join(failures), pytrace=False)

    def _log(self, record: dict[str, Any]) -> None:
        path = os.environ.get("DISTDL_FAULTS_LOG")
        if path:
            mpi = "Open MPI" if self._survives else "MPICH"
            line = json.dumps({"fault": self.name, "mpi": mpi, "seed": SEED, **record}) + "\n"
            with Path(path).open("ab", buffering=0) as file:
                file.write(line.encode())


@pytest.fixture
def row(tmp_path, survives) -> Callable[[str, int, int], Row]:
    """Make a row of the matrix: its name, how many runs in CI, how many in full."""
    return lambda name, ci, full: Row(name, ci, full, tmp_path, survives)
