"""The command as a person runs it: alone, under mpirun, and given what cannot be measured."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from distdl.bench.benchmark import benchmark
from distdl.bench.layers import Stopwatch
from distdl.bench.measure import Bench, Setup, measure_scaling
from distdl.bench.settings import Network, Settings
from distdl.job.mpirun_command import mpirun_command
from distdl.nn import build_model
from distdl.parallel import OneProcess

TINY = Settings(
    model="mlp", input_shape=(8, 8, 1), batch_size=16, micro_batch_size=4, steps=2, repetitions=2, layers=True
)
TINY_FLAGS = ["--model=mlp", "--input=8x8x1", "--batch-size=16", "--micro-batch-size=4", "--steps=2"]
TIMEOUT_SECONDS = 120


def flags_of_a_run(folder):
    flags = [*TINY_FLAGS, "--repetitions=2", "--layers", "--communication", "--network=10us,10Gbit"]
    return [*flags, f"--out={folder}", "--trace=trace.json"]


def check_trace(path, ranks):
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {event["pid"] for event in events} == set(range(ranks))
    assert {event["args"]["step"] for event in events} == {4, 5}  # after the three of the warm-up


def run(argv, folder):
    return subprocess.run(
        argv,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def bench_on(ranks, flags):
    return mpirun_command(ranks, [sys.executable, "-m", "distdl.bench", *flags])


def results(folder):
    assert {path.name for path in folder.iterdir()} == {"bench.json", "scaling.svg"}
    dots = [element for element in ET.parse(folder / "scaling.svg").iter() if element.get("class") == "point"]
    found = json.loads((folder / "bench.json").read_text())
    assert len(dots) == sum(one["setup"]["kind"] != "share" for one in found["scaling"])
    return found


def check_results(found, said, ranks):
    for kind in ("strong", "weak"):
        ours = [one for one in found["scaling"] if one["setup"]["kind"] == kind]
        assert [one["setup"]["ranks"] for one in ours] == ranks
        for one in ours:
            assert len(one["samples"]) == 2
            assert all(len(sample["compute_seconds"]) == one["setup"]["ranks"] for sample in one["samples"])
            assert all(rate > 0 for rate in one["samples_per_second"])
            assert sum(one["shares"].values()) == pytest.approx(1)
        assert f"{kind} scaling, batch 16" in said
        assert f"{kind} scaling, PREDICTED" in said
        assert found["projection"]["speedups"][kind][0] == [1, 1.0]
    assert found["projection"]["note"] == "predicted, not measured"
    assert found["projection"]["speedups"]["strong"][-1][0] == 4, "one micro-batch a rank"
    assert found["projection"]["speedups"]["weak"][-1][0] == 1024
    assert {one["ranks"] for one in found["communication"]} == set(ranks) - {1}
    agreeing = set(ranks) - {1} if "Open MPI" in found["environment"]["communicator"] else set()
    assert {one["ranks"] for one in found["agreements"] if one["seconds"] > 0} == agreeing
    assert [part["name"] for part in found["layers"]["parts"]][-1] == "affine_2"
    assert found["environment"]["versions"]["numpy"]
    strong = [one for one in found["scaling"] if one["setup"]["kind"] == "strong"]
    assert len({sample["weights_sha256"] for one in strong for sample in one["samples"]}) == 1


def test_one_process_measures_itself(tmp_path):
    done = run([sys.executable, "-m", "distdl.bench", *flags_of_a_run("out")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    check_results(results(tmp_path / "out"), done.stdout, [1])
    check_trace(tmp_path / "trace.json", ranks=1)


@pytest.mark.parametrize(("ranks", "sweep"), [(2, [1, 2]), (3, [1, 2, 3])])
def test_ranks_are_measured_in_worlds_of_some_of_them(tmp_path, run_job, ranks, sweep):
    done = run_job(bench_on(ranks, flags_of_a_run("out")), cwd=tmp_path, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "out")
    check_results(found, done.stdout, sweep)
    check_trace(tmp_path / "trace.json", ranks)
    numbers = ", ".join(map(str, sweep))
    assert done.stdout.count(f"same bits: strong scaling ended with the same weights on {numbers} ranks") == 1
    cores = len(os.sched_getaffinity(0))
    assert {one["setup"]["ranks"] for one in found["scaling"] if one["oversubscribed"]} == {
        count for count in sweep if count > cores
    }


def test_without_out_a_new_folder_under_runs_is_made(tmp_path):
    for _ in range(2):
        argv = [sys.executable, "-m", "distdl.bench", *TINY_FLAGS, "--repetitions=1", "--scaling=strong"]
        assert run(argv, tmp_path).returncode == 0
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(folder.name.endswith("mlp-bench") or "mlp-bench-" in folder.name for folder in folders)


def test_without_steps_a_measurement_takes_as_many_as_fill_a_second_after_a_warm_up():
    settings = replace(TINY, steps=None).checked()
    bench = Bench(settings, OneProcess(), [1])
    assert bench.steps >= 5
    assert bench.warm_up_steps == max(3, round(bench.steps / 3))
    bench.steps = 7
    (measured,) = measure_scaling(bench, [Setup("strong", 1, 16, 4)], lambda _: None)
    assert [len(sample.step_seconds) for sample in measured.samples] == [7, 7]


def test_layers_alone_need_no_scaling(tmp_path, capsys):
    settings = Settings(**{**vars(TINY), "scaling": "none", "dataset": "digits", "out": tmp_path / "out"})
    benchmark(settings, OneProcess())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bench.json"]
    said = capsys.readouterr().out
    assert "digits 8x8x1" in said
    assert "affine_1" in said
    assert "scaling" not in said


#: The network of --model mlp, with batch normalization, whose running moments have to begin anew too.
OWN_MODEL = """\
from distdl import nn

def net(input_shape, classes):
    layers = [nn.Flatten(), nn.Affine(20), nn.BatchNorm(), nn.ReLU(), nn.Affine(classes)]
    return nn.Sequential(layers, input_shape)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_of_ones_own_is_measured_as_ours_are(tmp_path, run_job, ranks):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "own.py").write_text(OWN_MODEL)
    flags = [*flags_of_a_run("out"), "--model=models/own.py:net"]
    if ranks == 1:
        done = run([sys.executable, "-m", "distdl.bench", *flags], tmp_path)
    else:
        done = run_job(bench_on(ranks, flags), cwd=tmp_path, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "out")
    check_results(found, done.stdout, list(range(1, ranks + 1)))
    assert [part["name"] for part in found["layers"]["parts"]][1:3] == ["affine_1", "batchnorm_1"]
    assert found["settings"]["model"] == "models/own.py:net"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["own.py"], "no compiled files"


BAD_MODELS = {
    "raises.py": "def net(shape, classes): raise ValueError('too few')\n",
    "seven.py": "from distdl import nn\ndef net(shape, classes): return nn.mlp(shape, 7)\n",
    # The two that only one rank meets; PMI_RANK and OMPI_COMM_WORLD_RANK are the launchers'.
    "there.py": "import os\nif os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK')) == '1': nowhere\n"
    "from distdl.nn import mlp\n",
    "differs.py": "import os\nfrom distdl.nn import mlp, logistic\n"
    "if os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK')) == '1': mlp = logistic\n",
}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("there.py:mlp", "there.py cannot be imported: NameError: name 'nowhere' is not defined (line 2 of there.py)"),
        ("differs.py:mlp", "the network differs.py:mlp of rank 1 is not that of rank 0: give every host the same"),
    ],
)
def test_a_model_that_is_wrong_on_one_rank_ends_all(tmp_path, run_job, name, said):
    for file, text in BAD_MODELS.items():
        (tmp_path / file).write_text(text)
    assert run([sys.executable, "-m", "distdl.bench", *TINY_FLAGS, f"--model={name}"], tmp_path).returncode == 0
    done = run_job(bench_on(2, [*TINY_FLAGS, f"--model={name}", "--out=out"]), cwd=tmp_path, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("distdl: ")]
    assert len(errors) == 1, done.stderr
    assert said in errors[0]
    assert not (tmp_path / "out").exists()


BAD = {
    "more ranks than there are": (["--ranks", "1,64"], "--ranks 64 is more than the"),
    "an output that is a file": (["--out", "file"], "exists and is no empty folder"),
    "an output that is in use": (["--out", "used"], "exists and is no empty folder"),
    "an output below a file": (["--out", "file/deeper"], "cannot be written"),
    "a trace that is a folder": (["--trace", "used"], "is a folder"),
    "an unknown model": (["--model", "perceptron"], "unknown model 'perceptron'"),
    "no file of a model": (["--model", "nowhere.py:net"], "nowhere.py does not exist"),
    "a model that raises": (["--model", "raises.py:net"], "raises.py:net raised ValueError: too few (line 1 of"),
    "a model of other outputs": (["--model", "seven.py:net"], "puts out (7,) for a sample, expected (10,)"),
    "no samples": (["--batch-size", "-3"], "--batch-size must be at least 1"),
    "pictures too small": (["--model", "deep_convnet", "--input", "1x1x1"], "is smaller than the"),
    "pictures too large": (["--input", "100000x100000x3"], "--input 100000x100000x3 is too large"),
    "no such data": (["--dataset", "mnist", "--data-dir", "nowhere"], "the data folder 'nowhere' cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_measured_is_one_line_and_exit_2(tmp_path, run_job, case):
    flags, said = BAD[case]
    (tmp_path / "file").write_text("x")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    for name, text in BAD_MODELS.items():
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    alone = run([sys.executable, "-m", "distdl.bench", *flags], tmp_path)
    for done in (alone, run_job(bench_on(2, flags), cwd=tmp_path, timeout=TIMEOUT_SECONDS)):
        assert done.returncode == 2, done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("distdl: ")]
        assert len(errors) == 1, done.stderr
        assert said in errors[0]
        assert "Traceback" not in done.stderr
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.mpi(min_size=2)
def test_every_measurement_begins_anew_and_idle_ranks_wait(communicator):
    bench = Bench(TINY, communicator, (1, 2))
    setups = [Setup("strong", 1, 16, 4), Setup("strong", 2, 16, 4)]
    measured = measure_scaling(bench, setups, lambda text: None)
    for one in measured:
        assert len(one.samples) == (2 if communicator.rank < one.setup.ranks else 0)
    receipts = {sample.weights_sha256 for one in measured for sample in one.samples}
    assert len(receipts) == (1 if communicator.rank < 2 else 0)


@pytest.mark.mpi(min_size=2)
def test_a_benchmark_inside_of_a_job_leaves_it_usable(communicator, shared_tmp_path):
    settings = Settings(**{**vars(TINY), "out": shared_tmp_path / "out", "network": Network(1e-5, 1e9)})
    folder = benchmark(settings, communicator)
    assert (folder is None) == (communicator.rank != 0)
    assert communicator.allgather_json(communicator.rank) == list(range(communicator.size))


def test_the_network_names_its_parts_and_the_watch_hears_each_of_them():
    import numpy as np

    for model in ("mlp", "simple_convnet", "deep_convnet"):
        network = build_model(model, (12, 12, 1), 10)
        network.watch = watch = Stopwatch()
        network.backward(np.ones_like(network.forward(np.ones((3, 12, 12, 1), np.float32))))
        parts = network.parts(3)
        assert [name for direction, name in watch.seconds if direction == "forward" and name] == [
            name for name, _, _ in parts
        ]
        backward = [name for direction, name in watch.seconds if direction == "backward" and name]
        assert backward == [name for name, _, _ in reversed(parts)][: len(backward)]
        assert all(second >= 0 for seconds in watch.seconds.values() for second in seconds)
        with_weights = {name.split(".")[0] for name, _ in network.named_parameters()}
        assert with_weights <= set(backward)
        for name, _, products in parts:
            assert bool(products.forward) == (name in with_weights)
            inner = {product.K for product in products.forward}
            weights = {
                view.size // view.shape[-1] for full, view in network.named_parameters() if full == f"{name}.weight"
            }
            assert inner == weights, "K of the forward product is the fan-in"
        first = next(products for name, _, products in parts if name in with_weights)
        assert len(first.backward) == 1, "no gradient by the pictures is computed, and none is counted"
        last = parts[-1][2] if parts[-1][2].forward else parts[-2][2]
        assert sum(one.operations for one in last.backward) == 2 * sum(one.operations for one in last.forward)


def test_help_needs_neither_numpy_nor_mpi():
    code = (
        "import sys\nfrom distdl.bench import __main__ as bench\n"
        "try:\n    bench.main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'mpi4py'} & set(sys.modules)))"
    )
    done = run([sys.executable, "-c", code], Path.cwd())
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")
    assert "--communication" in done.stdout
