"""The rows of the fault matrix: number of runs, log of results, seeds.

| variable | meaning |
|---|---|
| `DISTDL_FAULTS=full` | the full number of runs from docs/reliability.md, instead of a few |
| `DISTDL_FAULTS_LOG=FILE` | append a line of JSON for each run; `python tests/faults/report.py FILE` prints the table |
| `DISTDL_FAULTS_SOAK_SECONDS=N` | length of the soak, which is only in the full matrix (1800) |
| `DISTDL_FAULTS_SEED=N` | seed of the victims and moments (0) |
| `DISTDL_FAULTS_AT_ONCE=N` | number of jobs at the same time (2) |
| `DISTDL_FAULTS_NO_SKIPS=1` | a skipped test fails, unless it is marked `may_skip` |
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
#: A row stops after this number of failed runs.
FAILURES = 5 if FULL else 2
AT_ONCE = int(os.environ.get("DISTDL_FAULTS_AT_ONCE", "2"))
collect_ignore = [] if FULL else ["test_soak.py"]


def pytest_configure(config):
    config.addinivalue_line("markers", "may_skip: needs a permission that this machine may lack")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Fail skipped tests if the whole matrix must run, as in .ci/run with Open MPI."""
    report = yield
    if report.skipped and os.environ.get("DISTDL_FAULTS_NO_SKIPS") and not item.get_closest_marker("may_skip"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skipped, but no test may be skipped: {reason}"
    return report


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Callable[..., harness.Undisturbed]:
    """Return the results of a job with these flags in one process without faults; run it once per session."""
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
    """A row of the matrix: its seeded choices and its runs. Each run adds a line to the log."""

    def __init__(self, name: str, ci: int, full: int, folder: Path, survives: bool) -> None:
        self.name = name
        self.count = full if FULL else ci
        self.folder = folder
        self._survives = survives

    def random(self, number: int) -> random.Random:
        """Return the generator of the choices of one run of this row."""
        return random.Random(zlib.crc32(f"{self.name} {SEED} {number}".encode()))

    def runs(self, work: Callable[[int, Path], tuple[harness.Outcome, str]]) -> None:
        """Call `work(number, folder)` for each run of the row. It returns the outcome of the run and a description.

        After several failures no further run is started.
        """
        faulthandler.cancel_dump_traceback_later()  # a row may take hours; each job has its own limit
        failures: list[str] = []

        def one(number: int) -> None:
            if len(failures) >= FAILURES:
                return
            try:
                outcome, ended = work(number, self.folder / str(number))
            except Exception as error:  # noqa: BLE001  the row continues after any error
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
    """Return a function that creates a row: its name, its number of runs in CI and in the full matrix."""
    return lambda name, ci, full: Row(name, ci, full, tmp_path, survives)
