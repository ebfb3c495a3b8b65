"""A timeline splits the time of a step into its parts. A trace shows the parts on one clock for all ranks."""

import itertools
import json
import os

import numpy as np
import pytest
from pretended_ranks import World
from small_runs import piece_of_digits, remove, small_config, small_run

from distdl.engine import train
from distdl.engine.storage.files import check_output
from distdl.engine.timing import timeline as timeline_module
from distdl.engine.timing.timeline import STEPS_COMPARED, Spent, Timeline
from distdl.engine.timing.trace import MOST_STEPS, TRACK, Trace
from distdl.errors import UserError
from distdl.parallel import OneProcess

REDUCTION, UPDATE = 0.25, 0.5


def take_steps(timeline, rank, seconds_of_steps):
    """Take steps in which rank r computes ``seconds[r]`` and all leave the reduction together."""
    for seconds in seconds_of_steps:
        timeline.begin()
        began = rank.now
        rank.now = began + seconds[rank.rank]
        timeline.shard_done()
        rank.now = began + max(seconds) + REDUCTION
        timeline.allows_update()
        rank.now += UPDATE
        timeline.end()


def test_the_last_rank_does_not_wait_and_the_others_wait_for_it():
    def work(rank):
        timeline = Timeline(rank, rank.clock)
        take_steps(timeline, rank, [(1.0, 3.0, 2.0), (4.0, 3.0, 4.0)])
        first = timeline.spent()
        take_steps(timeline, rank, [(1.0, 1.0, 2.0)])
        return first, timeline.spent()

    for first, second in World([0.0, 100.0, -7.0]).run(work):
        np.testing.assert_allclose(first.compute, [5 + 2 * UPDATE, 6 + 2 * UPDATE, 6 + 2 * UPDATE])
        np.testing.assert_allclose(first.reduction, [2 * REDUCTION] * 3)
        np.testing.assert_allclose(first.waiting, [2, 1, 1], atol=1e-9)
        assert first.slowest == 1
        np.testing.assert_allclose(second.waiting, [1, 1, 0], atol=1e-9)  # only the steps since then
        assert second.slowest == 2


def test_waiting_is_computed_for_each_step():
    """Over two steps both ranks compute equally long, yet each waits for the other once."""

    def work(rank):
        timeline = Timeline(rank, rank.clock)
        take_steps(timeline, rank, [(1.0, 2.0), (2.0, 1.0)])
        return timeline.spent()

    for spent in World([0.0, 0.0]).run(work):
        np.testing.assert_allclose(spent.waiting, [1, 1])


def test_steps_beyond_the_size_of_the_buffer_also_count(monkeypatch):
    monkeypatch.setattr(timeline_module, "STEPS_COMPARED", 4)

    def work(rank):
        timeline = Timeline(rank, rank.clock)
        take_steps(timeline, rank, [(1.0, 2.0)] * 11)
        return timeline.spent()

    for spent in World([0.0, 0.0]).run(work):
        np.testing.assert_allclose(spent.waiting, [11, 0], atol=1e-9)
        assert spent.seconds == pytest.approx(11 * (2 + REDUCTION + UPDATE))


def test_all_shares_are_zero_without_a_step():
    assert Timeline(OneProcess()).spent().shares() == (0, 0, 0)
    assert str(Spent((1.0, 2.0), (0.5, 0.5), (1.0, 0.0))) == (
        "compute 60.0% · reduction 20.0% · wait 20.0% (slowest: rank 1)"
    )


def test_a_repeated_step_counts_once():
    clock = iter([0.0, 1.0, 10.0, 11.0, 12.0, 13.0])
    timeline = Timeline(OneProcess(), lambda: next(clock))
    timeline.begin()
    timeline.shard_done()
    timeline.begin()
    timeline.shard_done()
    timeline.allows_update()
    timeline.end()
    assert timeline.step_seconds == 3.0
    assert timeline.spent().compute == (2.0,)


# ------------------------------------------------------------------------------------------------------- the trace


def traced(world, seconds_of_steps, *, pauses=0.0):
    def work(rank):
        timeline = Timeline(rank, rank.clock)
        trace = Trace(timeline)
        rank.now += pauses
        take_steps(timeline, rank, seconds_of_steps)
        rank.now += pauses
        timeline.spent()
        return trace.gather(len(seconds_of_steps))

    found = world.run(work)
    assert found[1:] == [None] * (world.size - 1)
    return found[0]


def slices(trace, rank):
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == rank]


def assert_is_a_trace(trace, ranks):
    """Assert that the trace has the two kinds of events of the format, and that no two of a track overlap."""
    assert json.loads(json.dumps(trace)) == trace
    named = {event["pid"] for event in trace["traceEvents"] if event["ph"] == "M" and event["name"] == "process_name"}
    assert named == set(range(ranks))
    for event in trace["traceEvents"]:
        assert event["ph"] in {"X", "M"}
        assert (type(event["pid"]), event["tid"], type(event["name"])) == (int, 0, str)
        if event["ph"] == "X":
            assert event["name"] in TRACK
            assert event["ts"] >= 0
            assert event["dur"] > 0
    for rank in range(ranks):
        for one, next_one in itertools.pairwise(slices(trace, rank)):
            assert round(1000 * (one["ts"] + one["dur"])) <= round(1000 * next_one["ts"]), (one, next_one)
            assert one["args"]["step"] <= next_one["args"]["step"]


def test_a_trace_shows_compute_waiting_and_reduction_of_every_step():
    trace = traced(World([0.0, 0.0]), [(1.0, 3.0), (2.0, 1.0)])
    assert_is_a_trace(trace, 2)
    shown = [(event["name"], event["args"]["step"], event["dur"] / 1e6) for event in slices(trace, 0)]
    assert shown == [
        ("compute", 1, 1.0),
        ("waiting", 1, 2.0),
        ("reduction", 1, REDUCTION),
        ("compute", 1, UPDATE),
        ("compute", 2, 2.0),
        ("reduction", 2, REDUCTION),
        ("compute", 2, UPDATE),
    ]


def test_clocks_with_different_times_and_rates_are_aligned():
    world = World(ahead=[5.0, -1000.0, 3600.0], drift=[0.0, 1e-4, -5e-5])
    trace = traced(world, [(1.0, 2.0, 3.0), (3.0, 2.0, 1.0), (1.0, 1.0, 1.0)], pauses=50.0)
    assert_is_a_trace(trace, 3)
    for step in (1, 2, 3):
        ends = [
            event["ts"] + event["dur"]
            for rank in range(3)
            for event in slices(trace, rank)
            if (event["name"], event["args"]["step"]) == ("reduction", step)
        ]
        assert max(ends) - min(ends) < 200, "all ranks leave the reduction together, here within 0.2 milliseconds"


def test_memory_is_bounded_and_the_newest_steps_are_kept(monkeypatch):
    monkeypatch.setattr("distdl.engine.timing.trace.MOST_STEPS", 10)
    monkeypatch.setattr(timeline_module, "STEPS_COMPARED", 3)
    for steps in (4, 5, 6, 17):
        trace = traced(World([0.0, 0.0]), [(1.0, 2.0)] * steps)
        assert_is_a_trace(trace, 2)
        assert trace["otherData"]["earlier_steps_left_out"] == max(0, steps - 5)
        assert {event["args"]["step"] for event in slices(trace, 1)} == set(range(max(1, steps - 4), steps + 1))
    assert MOST_STEPS * len(TRACK) < 2**19
    assert STEPS_COMPARED * 8 < 2**16


@pytest.mark.parametrize("name", ["", "file/trace.json", "/proc/trace.json", "x" * 5000])
def test_a_trace_that_cannot_be_written_is_refused_before_the_run_starts(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        UserError, match=r"^--trace .* cannot be written: .*; give another file$|is a folder: give the name"
    ):
        check_output(tmp_path / name, "--trace")
    with pytest.raises(UserError, match="--trace"):
        train(small_config(tmp_path / "run", trace=tmp_path / name), OneProcess())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "lock", "step-000000001.safetensors"])
def test_a_trace_replaces_no_file_of_a_run(tmp_path, name):
    path = tmp_path / "run" / name
    with pytest.raises(UserError, match=r"^--trace .* has the name of a file of a run: give another name"):
        train(small_config(tmp_path / "run", trace=path), OneProcess())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["pipe", "link", "dangling link"])
def test_a_trace_replaces_only_a_regular_file(tmp_path, kind):
    path = tmp_path / "trace.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        (tmp_path / "file").touch()
        path.symlink_to(tmp_path / ("file" if kind == "link" else "nothing"))
    with pytest.raises(UserError, match=r"^--trace .* is not a regular file, and would be overwritten: give another"):
        train(small_config(tmp_path / "run", trace=path), OneProcess())
    assert not (tmp_path / "run").exists()


def test_a_trace_may_replace_an_older_trace(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("an older one")
    check_output(path, "--trace")
    assert path.read_text() == "an older one"


def test_a_trace_may_be_written_to_a_folder_that_does_not_exist_yet(tmp_path):
    train(small_config(tmp_path / "run", trace=tmp_path / "run" / "a" / "trace.json"), OneProcess())
    assert_is_a_trace(json.loads((tmp_path / "run" / "a" / "trace.json").read_bytes()), 1)


@pytest.mark.mpi(min_size=1)
def test_tracing_changes_neither_receipt_nor_metrics_even_with_a_resume(communicator, shared_tmp_path):
    expected = small_run(communicator, shared_tmp_path / "plain")
    file = shared_tmp_path / "trace.json"
    assert small_run(communicator, shared_tmp_path / "traced", trace=file) == expected
    if communicator.rank == 0:
        trace = json.loads(file.read_bytes())
        assert_is_a_trace(trace, communicator.size)
        for rank in range(communicator.size):
            assert {event["args"]["step"] for event in slices(trace, rank)} == {1, 2, 3, 4, 5, 6}
        assert "trace" not in (shared_tmp_path / "traced" / "config.toml").read_text()

    small_run(communicator, shared_tmp_path / "halves", max_steps=4, trace=file)
    assert small_run(communicator, shared_tmp_path / "halves", resume="auto", trace=file) == expected
    if communicator.rank == 0:
        assert {event["args"]["step"] for event in slices(json.loads(file.read_bytes()), 0)} == {5, 6}
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=1)
def test_each_epoch_reports_the_parts_of_its_time(communicator, shared_tmp_path, capsys):
    train(small_config(shared_tmp_path / "run"), communicator, dataset=piece_of_digits(94))
    if communicator.rank == 0:
        records = [json.loads(line) for line in (shared_tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
        for record in records:
            parts = [record[f"{name}_share"] for name in ("compute", "reduction", "wait")]
            assert sum(parts) == pytest.approx(1)
            assert min(parts) >= 0
            assert record["compute_seconds"][record["slowest_rank"]] == max(record["compute_seconds"])
            assert len(record["wait_seconds"]) == communicator.size
        lines = capsys.readouterr().out.splitlines()
        assert len([line for line in lines if line.startswith("epoch")]) == 2
        assert len([line for line in lines if "(slowest: rank " in line]) == (communicator.size > 1)
    remove(communicator, shared_tmp_path)
