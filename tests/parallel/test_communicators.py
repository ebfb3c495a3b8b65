"""One process and MPI keep the same contract; all ranks share errors; waiting ranks leave their core to others."""

import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pretended_ranks import Rank, World
from small_runs import remove, small_run

from distdl.arrays import sha256_of_arrays
from distdl.errors import DamagedFileError, UserError
from distdl.job.processes import Process
from distdl.mapped_files import created, open_mapped, release_pages
from distdl.parallel import OneProcess, guard, ranks_per_host, share_arrays, together, world
from distdl.parallel import shared as shared_module


def assert_contract(communicator):
    size, rank = communicator.size, communicator.rank
    assert communicator.allgather_json({"rank": rank}) == [{"rank": r} for r in range(size)]
    assert communicator.bcast_json(["from", rank, None, "äß"], root=size - 1) == ["from", size - 1, None, "äß"]
    array = np.full(5, rank, np.float64)
    communicator.bcast(array, root=size - 1)
    assert (array == size - 1).all()
    counts = np.array([rank, 1], np.int64)
    communicator.allreduce(counts)
    assert counts.tolist() == [size * (size - 1) // 2, size]
    # rank r sends r + 1 bytes of value r to all ranks
    send = np.full(size + 1, rank, np.uint8)
    receive = np.full(sum(r + 1 for r in range(size)), 99, np.uint8)
    starts = [r * (r + 1) // 2 for r in range(size)]
    communicator.alltoallv(send, [(0, rank + 1)] * size, receive, [(starts[r], r + 1) for r in range(size)])
    everything = [r for r in range(size) for _ in range(r + 1)]
    assert receive.tolist() == everything
    # the sent bytes may lie anywhere in the buffer, and ranks may send nothing, not even to themselves
    mail = np.arange(size, dtype=np.uint8) + 10 * rank
    arrived = np.full(size, 99, np.uint8)
    spans = [(r, int(r != rank)) for r in range(size)]
    communicator.alltoallv(mail, spans, arrived, spans)
    assert arrived.tolist() == [99 if r == rank else 10 * r + rank for r in range(size)]
    receive[:] = 99
    receive[starts[rank] :][: rank + 1] = rank
    communicator.allgatherv(receive, [r + 1 for r in range(size)])
    assert receive.tolist() == everything
    assert sum(ranks_per_host(communicator).values()) == size
    assert communicator.host().size == size  # the tests run on one machine
    assert communicator.split(None) is None
    parity = communicator.split(rank % 2)
    assert parity.size == len(range(rank % 2, size, 2))
    assert parity.rank == rank // 2
    communicator.barrier()


def test_one_process_keeps_the_contract():
    assert_contract(OneProcess())


@pytest.mark.mpi(min_size=2)
def test_mpi_keeps_the_contract(communicator):
    assert communicator.size > 1
    assert_contract(communicator)


@pytest.mark.mpi(min_size=2)
def test_an_error_of_one_rank_is_raised_on_every_rank(communicator):
    for culprit in range(communicator.size):

        def work(culprit=culprit):
            if communicator.rank == culprit:
                raise DamagedFileError(f"only rank {culprit} sees this")
            return communicator.rank

        with pytest.raises(DamagedFileError, match=f"only rank {culprit} sees this") as caught:
            together(communicator, work)
        assert caught.value.agreed
        assert caught.value.exit_code == 3
    assert together(communicator, lambda: communicator.rank) == communicator.rank


def test_the_guard_passes_an_error_that_every_rank_raises():
    with pytest.raises(UserError, match="mine"), guard(OneProcess()):
        raise UserError("mine")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("meet", [lambda ranks: ranks.barrier(), lambda ranks: ranks.split(0).free()])
def test_a_waiting_rank_leaves_its_core_to_others(communicator, meet):
    communicator.barrier()
    before, started = time.process_time(), time.perf_counter()
    if communicator.rank == 0:
        time.sleep(1.0)
    meet(communicator)
    if communicator.rank > 0:
        assert time.perf_counter() - started > 0.5
        assert time.process_time() - before < 0.5  # a rank that spins would burn the whole second


ARRAYS = {
    "images": np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5),
    "labels": np.arange(7, dtype=np.int64),
    "mean": np.array([0.5], np.float32),
    "none": np.empty((0, 4), np.float32),
}


def leftovers():
    return {path.name for path in Path("/dev/shm").glob("distdl-memory-*")}


def assert_no_new_file_since(before, communicator):
    """No new file remains; a file of another job exists for some milliseconds only."""
    deadline = time.monotonic() + 5
    while (new := leftovers() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    communicator.barrier()  # no rank creates files for the next test while another still looks
    assert not new


def assert_shared(communicator, **keywords):
    before = leftovers()
    communicator.barrier()
    shared = share_arrays(communicator, ARRAYS if communicator.rank == 0 else {}, **keywords)
    assert list(shared) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert shared[name].dtype == array.dtype
        assert shared[name].shape == array.shape
        assert (shared[name] == array).all()
        with pytest.raises(ValueError, match="read-only"):
            shared[name][...] = 0
    communicator.barrier()
    assert_no_new_file_since(before, communicator)


def test_one_process_shares_arrays_with_itself():
    assert_shared(OneProcess())


@pytest.mark.mpi(min_size=2)
def test_all_ranks_of_a_host_see_the_arrays_of_the_coordinator(communicator):
    assert_shared(communicator)


@pytest.mark.mpi(min_size=3)
def test_each_host_gets_a_copy(communicator):
    """Two simulated hosts: ranks 0 and 1 on the first, the others on the second."""
    assert_shared(communicator, host=communicator.split(min(communicator.rank // 2, 1)))


@pytest.mark.mpi(min_size=2)
def test_one_copy_serves_all_ranks_of_a_host(communicator):
    """Every rank has mapped the same file."""
    megabytes = np.zeros(2**22, np.uint8)
    shared = share_arrays(communicator, {"a": megabytes} if communicator.rank == 0 else {})
    address = shared["a"].ctypes.data
    mapped = next(
        line.split()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if int(line.split("-")[0], 16) <= address < int(line.split()[0].split("-")[1], 16)
    )
    inodes = communicator.allgather_json(mapped[4])
    assert len(set(inodes)) == 1
    assert inodes[0] != "0"


def assert_file_is_shared(communicator, folder, **keywords):
    """Share an array in a file together with one in memory, and check both on every rank."""
    given = {}
    if communicator.rank == 0:
        with created(folder / "rows.npy", (9, 4), np.uint8) as array:
            array[...] = np.arange(36).reshape(9, 4)
        given = {"rows": open_mapped(folder / "rows.npy"), **ARRAYS}
    shared = share_arrays(communicator, given, **keywords)
    assert isinstance(shared["rows"], np.memmap)
    assert np.array_equal(shared["rows"], np.arange(36).reshape(9, 4))
    for name, array in ARRAYS.items():
        assert np.array_equal(shared[name], array)
    communicator.barrier()
    assert [path.name for path in folder.iterdir()] == ["rows.npy"]


@pytest.mark.parametrize(
    "part",
    [
        *(lambda rows: rows[:5], lambda rows: rows[3:], lambda rows: rows[::2], lambda rows: rows[:, ::-1]),
        *(lambda rows: rows[:, :2], lambda rows: rows.view(np.int8), lambda rows: rows.astype(np.float32)),
        *(lambda rows: rows[[4, 2]], lambda rows: rows[..., np.newaxis], lambda rows: rows.T, np.asarray),
    ],
)
@pytest.mark.parametrize("is_ours", [True, False])
def test_any_part_of_an_array_in_a_file_arrives_as_it_is(part, is_ours, tmp_path):
    np.save(tmp_path / "rows.npy", np.arange(36, dtype=np.uint8).reshape(9, 4))
    opened = open_mapped(tmp_path / "rows.npy") if is_ours else np.load(tmp_path / "rows.npy", mmap_mode="r")
    given = part(opened)
    shared = share_arrays(OneProcess(), {"rows": given})["rows"]
    assert (shared.dtype, shared.shape) == (given.dtype, given.shape)
    assert np.array_equal(shared, given)


def test_changes_to_a_mapped_array_that_its_file_lacks_arrive(tmp_path):
    np.save(tmp_path / "rows.npy", np.zeros((9, 4), np.uint8))
    given = np.load(tmp_path / "rows.npy", mmap_mode="c")
    given += 7
    release_pages(given)
    assert (share_arrays(OneProcess(), {"rows": given})["rows"] == 7).all()


def shared_folder(communicator, tmp_path):
    return Path(communicator.bcast_json(str(tmp_path)))


def test_one_process_maps_an_array_in_a_file(tmp_path):
    assert_file_is_shared(OneProcess(), tmp_path)


@pytest.mark.mpi(min_size=2)
def test_all_ranks_map_an_array_in_a_file(communicator, tmp_path):
    assert_file_is_shared(communicator, shared_folder(communicator, tmp_path))


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("lacking", [(), (1,), (1, 2)])
def test_hosts_that_lack_the_file_get_it(lacking, communicator, tmp_path, monkeypatch):
    """As many simulated hosts as ranks."""
    if communicator.rank in lacking:
        monkeypatch.setattr(shared_module, "_holds", lambda path, count, sha256: False)
    monkeypatch.setattr(shared_module, "BLOCK_BYTES", 12)  # three rows
    assert_file_is_shared(communicator, shared_folder(communicator, tmp_path), host=OneProcess())


@pytest.mark.mpi(min_size=2)
def test_a_host_without_room_for_the_file_is_an_error_on_every_rank(communicator, tmp_path, monkeypatch):
    folder = shared_folder(communicator, tmp_path)

    def full(path, shape, dtype):
        raise UserError(f"cannot write to {path}: No space left on device")

    if communicator.rank == communicator.size - 1:
        monkeypatch.setattr(shared_module, "_holds", lambda path, count, sha256: False)
        monkeypatch.setattr(shared_module, "created", full)
    with pytest.raises(UserError, match=r"rows.npy: No space left on device"):
        assert_file_is_shared(communicator, folder, host=OneProcess())


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_waits_long_says_so_and_a_watchdog_takes_that_over(communicator, monkeypatch, capfd):
    from distdl.parallel import mpi

    monkeypatch.setattr(mpi, "SECONDS_UNTIL_REPORTED", 0.3)
    for reports in (True, False):
        monkeypatch.setattr(communicator.waiting, "reports", reports)
        communicator.barrier()
        capfd.readouterr()
        if communicator.rank == 0:
            time.sleep(1)
        communicator.barrier()
        said = capfd.readouterr().err
        if communicator.rank == 1:
            assert bool(re.fullmatch(r"distdl: rank 1 has waited for \d s for another rank\n", said)) == reports
        elif communicator.rank > 1:  # the first two ranks of a host speak
            assert said == ""


@pytest.mark.parametrize("damage", ["altered", "truncated", "absent", None])
def test_a_host_trusts_only_a_file_with_the_right_content(damage, tmp_path):
    path = tmp_path / "images.npy"
    with created(path, (9, 4), np.uint8) as array:
        array[...] = 5
    sha256 = sha256_of_arrays([("", open_mapped(path))])
    if damage == "absent":
        path.unlink()
    elif damage is not None:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + (b"\0" if damage == "altered" else b""))
    assert shared_module._holds(path, 9, sha256) == (damage is None)


def test_a_full_shared_memory_falls_back_to_the_temporary_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(shared_module.tempfile, "tempdir", None)
    monkeypatch.setattr(shared_module, "SHARED_MEMORY", tmp_path / "absent")
    assert_shared(OneProcess())
    assert not list(tmp_path.iterdir())


@pytest.mark.mpi(min_size=2)
def test_no_room_anywhere_is_an_error_on_every_rank(communicator, monkeypatch):
    def full(handle, start, length):
        raise OSError(28, "No space left on device")

    before = leftovers()
    communicator.barrier()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for .* MB of the dataset.*No space left on device"):
        share_arrays(communicator, ARRAYS if communicator.rank == 0 else {})
    assert_no_new_file_since(before, communicator)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("what", ["reserve", "map"])
def test_a_host_that_fails_leaves_no_file_on_any_host(what, communicator, monkeypatch):
    """As many simulated hosts as ranks; the last one has no room, or may not map its file."""

    def refused(*_arguments, **_keywords):
        raise OSError(12, "Cannot allocate memory")

    before = leftovers()
    host = communicator.split(communicator.rank)
    communicator.barrier()
    if communicator.rank == communicator.size - 1:
        owner, name = {"reserve": (os, "posix_fallocate"), "map": (shared_module.mmap, "mmap")}[what]
        monkeypatch.setattr(owner, name, refused)
    with pytest.raises(UserError, match=r"MB.*Cannot allocate memory"):
        share_arrays(communicator, ARRAYS if communicator.rank == 0 else {}, host=host)
    host.free()
    communicator.barrier()
    assert_no_new_file_since(before, communicator)


class Host(Rank):
    """A rank on a host of its own, simulated by a thread."""

    def bcast_json(self, value, root=0):
        return self._exchanged(value)[root]

    def bcast(self, array, root=0):
        array[...] = self._exchanged(array.copy())[root]


def test_every_simulated_host_has_the_arrays_of_rank_0():
    simulated = World([0.0] * 3)
    simulated.ranks = [Host(rank, simulated) for rank in range(3)]

    def work(rank):
        return share_arrays(rank, ARRAYS if rank.rank == 0 else {}, host=OneProcess())

    for shared in simulated.run(work):
        assert shared.keys() == ARRAYS.keys()
        for name, array in shared.items():
            np.testing.assert_array_equal(array, ARRAYS[name])
            assert (array.dtype, array.flags.writeable) == (ARRAYS[name].dtype, False)


@pytest.mark.mpi(min_size=2)
def test_many_trainings_do_not_exhaust_the_communicators_of_mpi(communicator, monkeypatch):
    from distdl.parallel.mpi import MpiCommunicator

    made, freed = [], []
    make, free = MpiCommunicator.__init__, MpiCommunicator.free
    monkeypatch.setattr(MpiCommunicator, "__init__", lambda self, *a, **k: (made.append(self), make(self, *a, **k))[1])
    monkeypatch.setattr(MpiCommunicator, "free", lambda self: (freed.append(self), free(self))[1])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # world() replaces it
    arrays = ARRAYS if communicator.rank == 0 else {}
    share_arrays(world(), arrays)
    kept = len(made) - len(freed)
    for _ in range(3):
        share_arrays(world(), arrays)
        share_arrays(world(), arrays, host=OneProcess())  # as on hosts of one rank each: all ranks are leaders
    assert len(made) - len(freed) == kept
    assert len(freed) == 3  # the groups of leaders
    world().barrier()


@pytest.mark.mpi(min_size=2)
def test_many_trainings_on_several_hosts_do_not_exhaust_the_communicators(communicator, shared_tmp_path, monkeypatch):
    """Each rank is a simulated host of its own."""
    own = communicator.split(communicator.rank)
    monkeypatch.setattr(type(communicator), "host", lambda _: own)
    for number in range(2):
        before = list(communicator._related.comms)
        small_run(communicator, shared_tmp_path / str(number), epochs=1)
        assert communicator._related.comms == before
    remove(communicator, shared_tmp_path)
    own.free()


@pytest.mark.parametrize("host", ["a group of its own", "the same ranks", "not used"])
def test_a_freed_communicator_frees_that_of_its_host(host):
    """MPI has about two thousand communicators in all. They are simulated here, since a job may need no own group."""
    mpi = pytest.importorskip("distdl.parallel.mpi", exc_type=(ImportError, RuntimeError))
    freed, related = [], mpi._Related()

    def simulated(name):
        one = object.__new__(mpi.MpiCommunicator)
        one._comm = SimpleNamespace(Free=lambda: freed.append(name))
        one._related, one._own_host = related, None
        related.comms.append(one._comm)
        return one

    part = simulated("part")
    part._own_host = {"a group of its own": simulated("host"), "the same ranks": part, "not used": None}[host]
    part.free()
    assert freed == (["host", "part"] if host == "a group of its own" else ["part"])
    assert len(related.comms) == 2 - len(freed)


@pytest.mark.parametrize("survives", [True, False])
@pytest.mark.parametrize(("revoked", "lost"), [(False, 0), (True, 0), (False, 1)])
def test_a_failure_is_known_from_any_communicator_that_is_revoked_or_has_lost_a_rank(
    revoked, lost, survives, monkeypatch
):
    mpi = pytest.importorskip("distdl.parallel.mpi", exc_type=(ImportError, RuntimeError))
    monkeypatch.setattr(mpi, "MPI", SimpleNamespace(COMM_SELF=SimpleNamespace(Iprobe=lambda: None)))
    monkeypatch.setattr(mpi, "SECONDS_TO_BE_NOTIFIED", 0.001)
    monkeypatch.setattr(mpi, "survives_failures", lambda: survives)
    related = mpi._Related()
    for is_revoked, failed in ((False, 0), (revoked, lost)):
        group, comm = SimpleNamespace(), SimpleNamespace()
        group.Get_size = lambda failed=failed: failed
        comm.Get_failed = lambda group=group: group
        comm.Is_revoked = lambda is_revoked=is_revoked: is_revoked
        related.comms.append(comm)
    assert related.has_failed() is (survives and (revoked or lost > 0))


def test_an_error_that_each_rank_finds_alone_is_not_agreed(monkeypatch):
    monkeypatch.setitem(sys.modules, "distdl.parallel.mpi", None)
    monkeypatch.delattr("distdl.parallel.mpi", raising=False)
    for name in ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setattr("distdl.parallel.start_checks.launcher_is_missing", lambda _launch: False)
    with pytest.raises(UserError, match="4 separate processes") as caught:
        world()
    assert not caught.value.agreed  # so a silent rank waits until rank 0 has printed it


def test_an_abort_after_a_recovery_wakes_the_survivors_and_ends_the_launcher_not_a_shell(monkeypatch):
    """The aborting rank may know only the group from before the failure."""
    mpi = pytest.importorskip("distdl.parallel.mpi", exc_type=(ImportError, RuntimeError))
    done = []

    class Survivors:
        _related = SimpleNamespace(revoke=lambda: done.append("survivors"))

    before = object.__new__(mpi.MpiCommunicator)
    before._related = SimpleNamespace(revoke=lambda: done.append("before"))
    above = [Process(22, "sh", "S", 11, 0), Process(11, "prterun", "S", 7, 0), Process(7, "mpirun", "S", 1, 0)]
    monkeypatch.setattr(mpi, "_world", Survivors())
    monkeypatch.setattr(mpi, "SECONDS_TO_PASS_ON", 0.0)
    monkeypatch.setattr(mpi, "survives_failures", lambda: True)
    monkeypatch.setattr(mpi, "ancestors", lambda: iter(above))
    monkeypatch.setattr(mpi.os, "kill", lambda *told: done.append(told))
    monkeypatch.setattr(mpi.os, "_exit", done.append)
    before.abort(3)
    assert sorted(done[:2]) == ["before", "survivors"]
    assert done[2:] == [(11, signal.SIGTERM), 3]
