"""The start of the world, and errors outside of any agreement."""

import sys
from dataclasses import replace

import pytest

from distdl.errors import DamagedFileError, UserError
from distdl.job.launched_by import read_launch
from distdl.parallel import OneProcess, shared, tell_the_others, world

module = sys.modules[world.__module__]


class Everyone:
    """The ranks of a simulated job."""

    size = 2

    def __init__(self, rank):
        self.rank = rank

    def abort(self, exit_code):
        raise SystemExit(exit_code)


def test_a_start_in_one_process_removes_the_files_of_killed_runs(monkeypatch):
    swept = []
    monkeypatch.setattr(module, "_world", None)
    monkeypatch.setattr(module, "read_launch", lambda: replace(read_launch(), by=None))
    monkeypatch.setattr(module.leftovers, "sweep", swept.append)
    assert isinstance(world(), OneProcess)
    assert swept == [shared.folders()]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_that_one_rank_alone_has_later_ends_the_job_after_rank_0_had_time_to_report_its_own(rank, monkeypatch):
    everyone, error, done = Everyone(rank), DamagedFileError("the file is damaged"), []
    monkeypatch.setattr(module, "_world", everyone)
    monkeypatch.setattr(module.time, "sleep", done.append)
    monkeypatch.setattr(module, "end_the_job", lambda *which: done.append(which))
    if rank == 0:
        with pytest.raises(SystemExit) as exited:
            tell_the_others(error)
        assert exited.value.code == error.exit_code
        assert done == []
    else:
        tell_the_others(error)
        assert done == [module.SECONDS_FOR_RANK_0, (everyone, error)]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_uncaught_exception_ends_the_job_and_rank_0_reports_one_that_all_ranks_raise(rank, monkeypatch):
    everyone, error, ended, said = Everyone(rank), UserError("wrong flag"), [], []

    def end(communicator, why):
        ended.append((communicator, why))
        raise SystemExit(1)

    monkeypatch.setattr(module, "end_the_job", end)
    monkeypatch.setattr(module, "say_line", said.append)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    module._end_the_job_on_uncaught_exceptions(everyone)
    with pytest.raises(SystemExit):
        sys.excepthook(UserError, error, None)
    assert (ended, said) == ([(everyone, error)], [])
    error.agreed = True
    with pytest.raises(SystemExit) as exited:
        sys.excepthook(UserError, error, None)
    assert exited.value.code == error.exit_code
    assert len(ended) == 1
    assert said == (["error: wrong flag"] if rank == 0 else [])
