"""The command as a user runs it: in one process, under mpirun, and with invalid settings."""

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
from distdl.bench.settings import BenchSettings, Interconnect
from distdl.inference import figures
from distdl.job.mpirun_command import mpirun_command
from distdl.nn import build_model
from distdl.parallel import OneProcess

TINY = BenchSettings(
    model="mlp", input_shape=(8, 8, 1), batch_size=16, micro_batch_size=4, steps=2, repetitions=2, layers=True
)
TINY_FLAGS = ["--model=mlp", "--input=8x8x1", "--batch-size=16", "--micro-batch-size=4", "--steps=2"]
TIMEOUT_SECONDS = 120
#: Matplotlib prints this before the first chart on a machine, if the machine is slow.
FIRST_CHART = "Matplotlib is building the font cache; this may take a moment.\n"


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
    groups = [one for one in ET.parse(folder / "scaling.svg").iter() if (one.get("id") or "").startswith("measured-")]
    dots = [one for group in groups for one in group.iter() if one.tag.endswith("}use")]
    found = json.loads((folder / "bench.json").read_text())
    assert len(dots) == sum(one["setup"]["kind"] != "share" for one in found["scaling"])
    return found


def check_results(found, printed, ranks):
    for kind in ("strong", "weak"):
        ours = [one for one in found["scaling"] if one["setup"]["kind"] == kind]
        assert [one["setup"]["ranks"] for one in ours] == ranks
        for one in ours:
            assert len(one["samples"]) == 2
            assert all(len(sample["compute_seconds"]) == one["setup"]["ranks"] for sample in one["samples"])
            assert all(rate > 0 for rate in one["samples_per_second"])
            assert sum(one["shares"].values()) == pytest.approx(1)
        assert f"{kind} scaling, batch 16" in printed
        assert f"{kind} scaling, PREDICTED" in printed
        assert found["projection"]["speedups"][kind][0] == [1, 1.0]
    assert found["projection"]["note"] == "predicted, not measured"
    assert found["projection"]["speedups"]["strong"][-1][0] == 4, "one micro-batch per rank"
    assert found["projection"]["speedups"]["weak"][-1][0] == 1024
    assert {one["ranks"] for one in found["communication"]} == set(ranks) - {1}
    agreeing = set(ranks) - {1} if "Open MPI" in found["environment"]["communicator"] else set()
    assert {one["ranks"] for one in found["agreements"] if one["seconds"] > 0} == agreeing
    assert [part["name"] for part in found["layers"]["parts"]][-1] == "affine_2"
    assert found["environment"]["versions"]["numpy"]
    strong = [one for one in found["scaling"] if one["setup"]["kind"] == "strong"]
    assert len({sample["weights_sha256"] for one in strong for sample in one["samples"]}) == 1


def test_one_process_measures_one_rank(tmp_path):
    done = run([sys.executable, "-m", "distdl.bench", *flags_of_a_run("out")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr in {"", FIRST_CHART}
    check_results(results(tmp_path / "out"), done.stdout, [1])
    check_trace(tmp_path / "trace.json", ranks=1)


def test_ranks_are_measured_in_worlds_of_the_first_ranks(tmp_path, run_job):
    done = run_job(bench_on(3, flags_of_a_run("out")), cwd=tmp_path, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "out")
    check_results(found, done.stdout, [1, 2, 3])
    check_trace(tmp_path / "trace.json", ranks=3)
    assert done.stdout.count("same bits: strong scaling ended with the same weights on 1, 2, 3 ranks") == 1
    cores = len(os.sched_getaffinity(0))
    assert {one["setup"]["ranks"] for one in found["scaling"] if one["oversubscribed"]} == {
        count for count in (1, 2, 3) if count > cores
    }


def test_without_out_the_results_go_to_a_new_folder_under_runs(tmp_path):
    for _ in range(2):
        argv = [sys.executable, "-m", "distdl.bench", *TINY_FLAGS, "--repetitions=1", "--scaling=strong"]
        assert run(argv, tmp_path).returncode == 0
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(folder.name.endswith("mlp-bench") or "mlp-bench-" in folder.name for folder in folders)


def test_layers_alone_need_no_scaling(tmp_path, capsys):
    settings = BenchSettings(**{**vars(TINY), "scaling": "none", "dataset": "digits", "out": tmp_path / "out"})
    benchmark(settings, OneProcess())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bench.json"]
    printed = capsys.readouterr().out
    assert "digits 8x8x1" in printed
    assert "affine_1" in printed
    assert "scaling" not in printed


def test_without_matplotlib_the_benchmark_completes_and_says_how_to_get_the_chart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    benchmark(replace(TINY, layers=False, scaling="strong", out=tmp_path / "out"), OneProcess())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bench.json"]
    line = "no scaling.svg: drawing it needs matplotlib (pip install 'distdl-mpi[plots]')"
    assert capsys.readouterr().out.splitlines().count(line) == 1


#: The network of --model mlp with batch normalization. Each measurement must reset its running moments too.
OWN_MODEL = """\
from distdl import nn

def net(input_shape, classes):
    layers = [nn.Flatten(), nn.Affine(20), nn.BatchNorm(), nn.ReLU(), nn.Affine(classes)]
    return nn.Sequential(layers, input_shape)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_user_s_own_model_is_measured_like_a_built_in_one(tmp_path, run_job, ranks):
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
    # Only rank 1 meets the next two. The launchers set PMI_RANK and OMPI_COMM_WORLD_RANK.
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
def test_a_model_that_fails_on_one_rank_ends_all_ranks(tmp_path, run_job, name, said):
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
    "an output that is a file": (["--out", "file"], "exists and is not an empty folder"),
    "an output that is in use": (["--out", "used"], "exists and is not an empty folder"),
    "an output below a file": (["--out", "file/deeper"], "cannot be written"),
    "a trace that is a folder": (["--trace", "used"], "is a folder"),
    "an unknown model": (["--model", "perceptron"], "unknown model 'perceptron'"),
    "no file of a model": (["--model", "nowhere.py:net"], "nowhere.py does not exist"),
    "a model that raises": (["--model", "raises.py:net"], "raises.py:net raised ValueError: too few (line 1 of"),
    "a model of other outputs": (["--model", "seven.py:net"], "returns outputs (7,) for a sample, expected (10,)"),
    "no samples": (["--batch-size", "-3"], "--batch-size must be at least 1"),
    "images too small": (["--model", "deep_convnet", "--input", "1x1x1"], "is smaller than the"),
    "images too large": (["--input", "100000x100000x3"], "--input 100000x100000x3 is too large"),
    "no such data": (["--dataset", "mnist", "--data-dir", "nowhere"], "the data folder 'nowhere' cannot be read"),
}
#: Cases that two ranks report too: rank 0 alone meets the error, every rank meets it, or it compares the ranks.
ALSO_ON_TWO_RANKS = ("an output that is in use", "a model that raises", "more ranks than there are")


@pytest.mark.parametrize(("case", "ranks"), [*((case, 1) for case in BAD), *((case, 2) for case in ALSO_ON_TWO_RANKS)])
def test_invalid_settings_are_refused_in_one_line_with_exit_code_2(tmp_path, request, case, ranks):
    flags, said = BAD[case]
    (tmp_path / "file").write_text("x")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    for name, text in BAD_MODELS.items():
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    if ranks == 1:
        done = run([sys.executable, "-m", "distdl.bench", *flags], tmp_path)
    else:
        run_job = request.getfixturevalue("run_job")
        done = run_job(bench_on(ranks, flags), cwd=tmp_path, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("distdl: ")]
    assert len(errors) == 1, done.stderr
    assert said in errors[0]
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.mpi(min_size=2)
def test_a_job_is_usable_after_a_benchmark(communicator, shared_tmp_path):
    settings = BenchSettings(**{**vars(TINY), "out": shared_tmp_path / "out", "interconnect": Interconnect(1e-5, 1e9)})
    folder = benchmark(settings, communicator)
    assert (folder is None) == (communicator.rank != 0)
    assert communicator.allgather_json(communicator.rank) == list(range(communicator.size))


def test_the_network_names_its_parts_and_calls_the_watch_after_each():
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
        assert len(first.backward) == 1, "no gradient of the images is computed or counted"
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
