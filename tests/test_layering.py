"""Imports point one way: bottom <- {nn, optim, schedules, data, parallel, job} <- engine <- inference <- commands.

Modules in braces never import each other, with one exception: parallel may use job. bench, search, doctor, export and
proof may use inference; their `__main__.py` files are commands.

The checker below reads sources without running them; the last tests feed it sources that break each rule.
"""

import ast
import graphlib
from pathlib import Path

import pytest

import distdl

PACKAGE = Path(distdl.__file__).parent
FILES = sorted(path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.py"))

ROOT = "distdl"  # distdl/__init__.py itself
#: The parts whose names `distdl` offers. It imports them for type checkers only: tests/end_to_end/test_library.py.
PUBLIC = {"library", "config", "data", "engine", "nn"}
BOTTOM = {"errors", "elementary", "rng", "arrays", "host_memory", "mapped_files", "regular_files", "json_files"}
BOTTOM |= {"transforms", "model_settings", "image_options"}
MIDDLE = {"nn", "optim", "schedules", "data", "parallel", "job"}
#: Packages that use the engine. bench, search, doctor, export and proof never import each other.
USES = {"inference", "bench", "search", "doctor", "export", "proof"}
#: Every other part is a command, the library or its form for scikit-learn, or `cli`, which only commands import.
BELOW_THE_COMMANDS = {ROOT, "config", "engine"} | BOTTOM | MIDDLE | USES

#: Modules that turn bytes from a file or a peer into running code.
PICKLES = {"pickle", "_pickle", "pickletools", "copyreg", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
PICKLES |= {"jsonpickle", "multiprocessing", "yaml", "code", "codeop"}
#: Modules that write files under the names that an archive gives them.
ARCHIVES = {"tarfile", "zipfile", "zipimport"}
#: Calls that do the same, or that let a shell or the interpreter read a text.
NEVER_CALLED = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("runpy.run_path", "runpy.run_module", "tempfile.mktemp"),
}
UNPACKING = {"extractall", "unpack_archive", "Unzip", "Untar"}
#: Methods of mpi4py's communicators that pickle; those with a capital send the bytes as they are.
PICKLING_METHODS = {
    *("send", "bsend", "ssend", "isend", "ibsend", "issend", "recv", "irecv", "sendrecv", "mrecv", "imrecv"),
    *("bcast", "gather", "scatter", "allgather", "alltoall", "reduce", "allreduce", "scan", "exscan"),
    *("ibcast", "igather", "iscatter", "iallgather", "ialltoall", "ireduce", "iallreduce"),
}
#: All of numpy.random that may be used: the raw words of a keyed stream.
KEYED_RANDOM = {"Philox"}


def may_import(unit, other):
    """Return whether the part `unit` of the package may import the part `other`."""
    if unit == ROOT:
        return other in PUBLIC
    if unit in BOTTOM:
        return other in BOTTOM | {ROOT}
    if unit == "config":
        return other in {ROOT, "errors", "transforms", "model_settings", "image_options"}
    if unit in MIDDLE:
        return other in BOTTOM | {ROOT, unit} | {"parallel": {"job"}, "job": {"config"}}.get(unit, set())
    if unit == "engine":
        return other in BELOW_THE_COMMANDS - USES
    if unit == "inference":
        return other in (BELOW_THE_COMMANDS - USES) | {unit}
    if unit in USES:
        return other in (BELOW_THE_COMMANDS - USES) | {unit, "inference"}
    return True


def unit_of(module):
    """Return the part of the package that a dotted module name belongs to: ``nn`` for ``distdl.nn.layers``."""
    return "__main__" if module.endswith(".__main__") else ([*module.split("."), ROOT])[1]


def imports_of(tree, path):
    """Yield every import as (line, module, names), with relative ones made absolute."""
    package = Path(path).parent.as_posix().split("/")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, []
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*above, *([node.module] if node.module else [])]), [a.name for a in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value, []


def violations(path, source):
    """Yield each violation of the rules in the `source` of the file `path` (such as ``distdl/nn/layers.py``)."""
    tree = ast.parse(source)
    module = path.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
    unit = unit_of(module)
    numpys, randoms = {"numpy"}, set()  # the names of numpy and numpy.random here
    for line, imported, names in imports_of(tree, path):
        where = f"{path}:{line}"
        top = imported.split(".")[0]
        if top == ROOT:
            units = {unit_of(f"{imported}.{name}") for name in names} if imported == ROOT else {unit_of(imported)}
            for other in sorted(units):
                part = other if is_part(other) else ROOT  # a name such as __version__
                if not may_import(unit, part):
                    yield f"{where}: {unit} may not import {part}"
        if top == "mpi4py" and path != "distdl/parallel/mpi.py":
            yield f"{where}: only distdl/parallel/mpi.py may import mpi4py"
        if top in PICKLES:
            yield f"{where}: {top} is never imported"
        for name in {f"{imported}.{name}" for name in names} & (NEVER_CALLED | {"numpy.load"}):
            yield f"{where}: {name} is not imported by name"
        if top in ARCHIVES:
            yield f"{where}: {top} is never imported: no archive is unpacked by name"
        if imported == "numpy.random":
            for name in sorted(set(names) - KEYED_RANDOM):
                yield f"{where}: numpy.random.{name} is not keyed"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            numpys |= {alias.asname for alias in node.names if alias.name == "numpy" and alias.asname}
            randoms |= {alias.asname for alias in node.names if alias.name == "numpy.random" and alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module == "numpy":
            randoms |= {alias.asname or alias.name for alias in node.names if alias.name == "random"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr not in KEYED_RANDOM:
            owner = ast.unparse(node.value)
            if owner in randoms | {f"{numpy}.random" for numpy in numpys}:
                yield f"{path}:{node.lineno}: numpy.random.{node.attr} is not keyed"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for wrong in dangers(path, node, numpys):
                yield f"{path}:{node.lineno}: {wrong}"


def dangers(path, call, numpys):
    """Yield the effects of a call that bytes of a file, a peer or a user must never have."""
    called, keywords = ast.unparse(call.func), {word.arg: word.value for word in call.keywords}
    owner, _, method = called.rpartition(".")

    def is_false(name):
        return isinstance(keywords.get(name), ast.Constant) and keywords[name].value is False

    if called in NEVER_CALLED and not (called == "__import__" and is_constant(call)):
        yield f"{called}() is never called"
    if method in UNPACKING:
        yield f"{method}() unpacks an archive by name"
    if "shell" in keywords and not is_false("shell"):
        yield "no shell is started"
    if (
        method in {"load", "open_memmap", "read_array"}
        and owner.split(".")[0] in numpys
        and not is_false("allow_pickle")
    ):
        yield "numpy.load without allow_pickle=False"
    if (
        path == "distdl/parallel/mpi.py"
        and method in PICKLING_METHODS
        and owner.lower().endswith(("comm", "comm_world"))
    ):
        yield f"{called}() pickles: mpi4py's methods with a capital do not"


def is_constant(call):
    """Return whether the first argument is a text in the source, which `imports_of` checks."""
    return bool(call.args) and isinstance(call.args[0], ast.Constant)


def is_part(name):
    return name in BELOW_THE_COMMANDS or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


@pytest.mark.parametrize("path", FILES)
def test_imports_point_one_way(path):
    assert list(violations(path, (PACKAGE.parent / path).read_text(encoding="utf-8"))) == []


def test_no_module_imports_itself_through_others():
    """Imports at the top of the files form no cycle; a package's face counts as a module of its own."""
    module_of = {path: path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in FILES}
    graph = {}
    for path, module in module_of.items():
        tree = ast.parse((PACKAGE.parent / path).read_text(encoding="utf-8"))
        top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        names = set()
        for _, name, parts in imports_of(top, path):
            inner = {f"{name}.{part}" for part in parts} & set(module_of.values())
            names |= inner if inner and len(inner) == len(parts) else inner | {name}
        graph[module] = names & set(module_of.values())
    assert sum(map(len, graph.values())) > 200
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_all_parts_of_the_package_are_checked():
    parts = {unit_of(path.removesuffix(".py").replace("/", ".")) for path in FILES}
    assert parts >= (BOTTOM | MIDDLE | {"config", "engine", "library", "train"})


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("distdl/__init__.py", "from distdl.errors import UserError", "distdl may not import errors"),
        ("distdl/errors.py", "from distdl.config import TrainConfig", "errors may not import config"),
        ("distdl/rng.py", "import distdl.nn", "rng may not import nn"),
        ("distdl/transforms.py", "from distdl.config import TrainConfig", "transforms may not import config"),
        ("distdl/config.py", "from distdl.optim import OPTIMIZERS", "config may not import optim"),
        ("distdl/config.py", "from distdl.rng import Key", "config may not import rng"),
        ("distdl/optim.py", "from distdl import schedules", "optim may not import schedules"),
        ("distdl/optim.py", "from . import errors, schedules", "optim may not import schedules"),
        ("distdl/nn/layers.py", "from distdl.data.split import split", "nn may not import data"),
        ("distdl/nn/layers.py", "from ..data.split import split", "nn may not import data"),
        ("distdl/nn/__init__.py", "from ..parallel import world", "nn may not import parallel"),
        ("distdl/data/sources/npz.py", "def f():\n    from distdl import config", "data may not import config"),
        ("distdl/parallel/tree.py", "import distdl.engine.prepare as run", "parallel may not import engine"),
        ("distdl/engine/prepare.py", "from distdl import train", "engine may not import train"),
        ("distdl/engine/prepare.py", "from distdl.library import load", "engine may not import library"),
        ("distdl/engine/prepare.py", "from distdl.cli import run", "engine may not import cli"),
        ("distdl/engine/timing/trace.py", "from distdl.bench import chart", "engine may not import bench"),
        ("distdl/engine/prepare.py", "from distdl.search import run", "engine may not import search"),
        ("distdl/bench/benchmark.py", "from distdl import cli", "bench may not import cli"),
        ("distdl/bench/benchmark.py", "from distdl.search import trials", "bench may not import search"),
        ("distdl/search/trials.py", "from distdl.bench import chart", "search may not import bench"),
        ("distdl/engine/prepare.py", "from distdl.inference import figures", "engine may not import inference"),
        ("distdl/engine/prepare.py", "from distdl.evaluate import parse", "engine may not import evaluate"),
        ("distdl/inference/figures.py", "from distdl.bench import tables", "inference may not import bench"),
        ("distdl/job/streams.py", "from distdl.parallel import world", "job may not import parallel"),
        ("distdl/nn/layers.py", "from distdl.job import streams", "nn may not import job"),
        (
            "distdl/data/sources/npz.py",
            "import importlib\nimportlib.import_module('distdl.engine')",
            "may not import engine",
        ),
        ("distdl/train.py", "from mpi4py import MPI", "only distdl/parallel/mpi.py may import mpi4py"),
        ("distdl/parallel/__init__.py", "import mpi4py.MPI", "only distdl/parallel/mpi.py may import mpi4py"),
        ("distdl/engine/storage/checkpoints.py", "import pickle", "pickle is never imported"),
        ("distdl/engine/storage/checkpoints.py", "from pickle import loads", "pickle is never imported"),
        ("distdl/parallel/mpi.py", "def f():\n    import marshal", "marshal is never imported"),
        ("distdl/verify.py", "__import__('dill')", "dill is never imported"),
        ("distdl/verify.py", "import multiprocessing.pool", "multiprocessing is never imported"),
        ("distdl/verify.py", "__import__(name)", "__import__() is never called"),
        ("distdl/data/sources/npz.py", "import tarfile", "no archive is unpacked by name"),
        ("distdl/data/sources/npz.py", "from zipfile import ZipFile", "no archive is unpacked by name"),
        ("distdl/data/sources/npz.py", "import shutil\nshutil.unpack_archive(path)", "unpack_archive() "),
        ("distdl/data/sources/npz.py", "archive.extractall(folder)", "unpacks an archive by name"),
        ("distdl/data/sources/npz.py", "pooch.retrieve(url, processor=pooch.Untar())", "unpacks an archive by name"),
        ("distdl/data/sources/npz.py", "import numpy as np\nnp.load(path)", "without allow_pickle=False"),
        ("distdl/data/sources/npz.py", "import numpy\nnumpy.load(path, None, True)", "without allow_pickle=False"),
        (
            "distdl/data/sources/npz.py",
            "import numpy as n\nn.load(p, allow_pickle=trust)",
            "without allow_pickle=False",
        ),
        ("distdl/data/sources/npz.py", "import numpy as np\nnp.lib.format.read_array(f)", "without allow_pickle=False"),
        ("distdl/config.py", "eval(text)", "eval() is never called"),
        ("distdl/config.py", "exec(text, {})", "exec() is never called"),
        ("distdl/config.py", "compile(text, '', 'eval')", "compile() is never called"),
        ("distdl/mpirun.py", "import os\nos.system(command)", "os.system() is never called"),
        ("distdl/mpirun.py", "import os\nos.popen(command)", "os.popen() is never called"),
        ("distdl/mpirun.py", "from os import system", "os.system is not imported by name"),
        ("distdl/data/sources/npz.py", "from numpy import load", "numpy.load is not imported by name"),
        ("distdl/mpirun.py", "import subprocess\nsubprocess.run(command, shell=True)", "no shell is started"),
        ("distdl/mpirun.py", "import subprocess\nsubprocess.Popen(command, shell=wanted)", "no shell is started"),
        ("distdl/verify.py", "import tempfile\ntempfile.mktemp()", "tempfile.mktemp() is never called"),
        ("distdl/parallel/mpi.py", "class C:\n    def f(self):\n        self._comm.bcast(1)", "bcast() pickles"),
        ("distdl/parallel/mpi.py", "from mpi4py import MPI\nMPI.COMM_WORLD.allgather(1)", "allgather() pickles"),
        ("distdl/data/split.py", "import numpy as np\nnp.random.seed(0)", "numpy.random.seed is not keyed"),
        ("distdl/data/split.py", "import numpy\nnumpy.random.default_rng()", "numpy.random.default_rng is not keyed"),
        ("distdl/data/split.py", "import numpy.random as r\nr.shuffle([])", "numpy.random.shuffle is not keyed"),
        ("distdl/data/split.py", "from numpy import random as r\nr.rand()", "numpy.random.rand is not keyed"),
        ("distdl/data/split.py", "from numpy.random import permutation", "numpy.random.permutation is not keyed"),
    ],
)
def test_the_checker_finds(path, source, said):
    found = list(violations(path, source))
    assert len(found) == 1, found
    assert said in found[0]
    assert found[0].startswith(f"{path}:")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("distdl/config.py", "from distdl.errors import UserError\nimport tomllib"),
        ("distdl/nn/layers.py", "from distdl.nn.initializers import He\nfrom ..rng import Key\nfrom . import losses"),
        (
            "distdl/engine/prepare.py",
            "import distdl\nfrom distdl import __version__, config\nfrom distdl.nn import MODELS",
        ),
        ("distdl/parallel/mpi.py", "from distdl.job import streams"),
        ("distdl/parallel/mpi.py", "from mpi4py import MPI"),
        ("distdl/bench/__main__.py", "from distdl import cli"),
        ("distdl/verify.py", "from distdl import cli\nfrom distdl.job.mpirun_command import environment_for"),
        ("distdl/evaluate.py", "from distdl.inference import figures"),
        ("distdl/rng.py", "import numpy as np\nnp.random.Philox(key=1).random_raw(2)"),
        ("distdl/data/split.py", "key.random.shuffle()"),
        ("distdl/data/sources/npz.py", "import numpy as np\nnp.load(path, allow_pickle=False)"),
        ("distdl/config.py", "import re, json\nre.compile('x')\njson.load(file)\nmodel.evaluate()"),
        ("distdl/mpirun.py", "import subprocess\nsubprocess.run(command, shell=False)"),
        ("distdl/parallel/mpi.py", "class C:\n    def f(self):\n        self._comm.Ibcast(1)\n        self.bcast(1)"),
    ],
)
def test_the_checker_passes(path, source):
    assert list(violations(path, source)) == []
