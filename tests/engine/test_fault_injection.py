"""A registered fault strikes at its point, on its rank, in its step; the points are those of the documented table."""

import ast
from pathlib import Path

import pytest
from small_runs import small_run

import distdl
from distdl.engine.fault_injection import POINTS, fail_at, fault_point, forget
from distdl.parallel import OneProcess
from distdl.parallel.recovery import Action

EVERY_POINT = set(POINTS)
#: The recovery calls these points with the value of its action.
OF_A_RECOVERY = {(action.value, "before") for action in Action if action is not Action.CONTINUE}


def visits(steps=(1, 2, 3), times=2):
    """Visit a point several times in each step; return the steps in which the registered faults struck."""
    for step in steps:
        fault_point("step", step=step)
        for _ in range(times):
            fault_point("update", owner=step)


@pytest.mark.parametrize(
    ("settings", "struck"),
    [
        ({}, [1]),
        ({"nth": 4}, [2]),
        ({"nth": 7}, []),
        ({"nth": None}, [1, 1, 2, 2, 3, 3]),
        ({"step": 2}, [2]),
        ({"step": 2, "nth": 2}, [2]),
        ({"step": 2, "nth": 3}, []),
        ({"step": 3, "nth": None}, [3, 3]),
        ({"when": "after"}, []),
    ],
)
@pytest.mark.parametrize(("rank", "is_this_rank"), [(0, True), (1, False), (None, True)])
def test_a_fault_strikes_on_its_rank_in_its_step_at_its_visit(settings, struck, rank, is_this_rank):
    found = []
    fail_at("update", rank=rank, action=found.append, **settings)
    visits()
    assert found == (struck if is_this_rank else [])


def test_the_rank_of_a_fault_is_the_one_that_the_launcher_gave(monkeypatch):
    monkeypatch.setenv("PMI_RANK", "3")
    monkeypatch.setenv("PMI_SIZE", "4")
    found = []
    for rank in range(4):
        fail_at("update", rank=rank, action=lambda _, rank=rank: found.append(rank))
    visits()
    assert found == [3]


def test_an_error_that_an_action_raises_leaves_the_point():
    def no_memory(_owner):
        raise MemoryError("no memory")

    fail_at("update", rank=0, action=no_memory)
    found = []
    fail_at("update", rank=0, nth=2, action=found.append)
    with pytest.raises(MemoryError, match="no memory"):
        fault_point("update")
    fault_point("update", owner="the second visit")
    fault_point("update")
    assert found == ["the second visit"]


def test_a_forgotten_fault_does_not_strike():
    found = []
    fail_at("update", rank=0, action=found.append)
    forget()
    visits()
    assert found == []


def test_an_unknown_point_is_an_error():
    with pytest.raises(ValueError, match="no phase is called 'unknown': expected one of data, run-folder, "):
        fail_at("unknown", rank=0, action=print)
    with pytest.raises(ValueError, match="'update' has no point 'committed': expected one of before, after"):
        fail_at("update", rank=0, action=print, when="committed")


def calls_in_the_package():
    """Return the points that the source of the package names in its calls of `fault_point`."""
    package = Path(distdl.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fault_point":
                moments = [word.value.value for word in node.keywords if word.arg == "when"]
                if isinstance(node.args[0], ast.Constant):
                    yield node.args[0].value, moments[0] if moments else "before"


def test_the_package_calls_each_point_of_the_table_and_no_other():
    assert set(calls_in_the_package()) | OF_A_RECOVERY == EVERY_POINT


def test_a_run_reaches_the_points_in_the_documented_order(tmp_path):
    met = []
    for phase, when in EVERY_POINT - {("checkpoint-write", "before"), ("checkpoint-write", "after")}:
        fail_at(phase, when=when, rank=0, nth=None, action=lambda _, point=(phase, when): met.append(point))
    small_run(OneProcess(), tmp_path / "run", epochs=1)
    micro_batch = ["forward before", "backward after"]
    step = ["reduction before", "reduction after", "update before", "update after"]
    assert [" ".join(point) for point in met] == [
        *("data before", "data after", "run-folder before", "run-folder after", "training before"),
        *("step before", *8 * micro_batch, *step),
        *("step before", *8 * micro_batch, *step),
        *("step before", *6 * micro_batch, *step),
        *("validation before", "validation after", "validation committed"),
        *("checkpoint before", "checkpoint after", "checkpoint committed"),
        *("test before", "test after", "test committed"),
        *("finish before", "finish after"),
    ]


def test_the_owner_of_a_point_gives_its_numbers(tmp_path):
    """An action that changes them changes the run."""
    seen = {}

    def look(name, work):
        return lambda owner: seen.setdefault(name, work(owner))

    fail_at("update", rank=0, step=2, action=look("before", lambda state: state.weights_sha256()))
    fail_at("update", rank=0, step=2, when="after", action=look("after", lambda state: state.weights_sha256()))
    fail_at("step", rank=0, step=3, action=look("next", lambda state: (state.step, state.weights_sha256())))
    fail_at("backward", rank=0, step=2, when="after", nth=3, action=look("index", lambda owner: owner[0]))
    fail_at("backward", rank=0, step=2, when="after", nth=3, action=look("record", lambda owner: set(owner[1])))
    fail_at("reduction", rank=0, step=2, when="after", action=look("total", lambda total: int(total["counts"][1])))
    fail_at("validation", rank=0, when="after", action=look("validation", lambda sums: sums.samples))
    fail_at("test", rank=0, when="committed", action=look("test", lambda sums: sums.samples))
    expected = small_run(OneProcess(), tmp_path / "looked")
    assert seen["before"] != seen["after"]
    assert seen["next"] == (2, seen["after"])
    assert seen["index"] == 2
    assert seen["record"] >= {"gradient", "loss_sum", "counts"}
    assert seen["total"] == 32
    assert seen["validation"] == 9
    assert seen["test"] == 37
    forget()
    assert small_run(OneProcess(), tmp_path / "plain") == expected
    fail_at("update", rank=0, step=6, action=lambda state: state.network.parameters.fill(0))
    assert small_run(OneProcess(), tmp_path / "spoiled")[0] != expected[0]


def test_the_writer_thread_reaches_its_points_around_the_file(tmp_path):
    found = []
    inside = tmp_path / "run" / "checkpoints"
    for when in ("before", "after"):
        fail_at(
            "checkpoint-write",
            when=when,
            rank=0,
            nth=None,
            action=lambda _, when=when: found.append((when, sorted(path.name for path in inside.iterdir()))),
        )
    small_run(OneProcess(), tmp_path / "run", keep_checkpoints=1, max_steps=2, checkpoint_every=1)
    one, two = (f"step-{step:09d}.safetensors" for step in (1, 2))
    assert found == [("before", []), ("after", [one]), ("before", [one]), ("after", [two])]
