"""Imports point one way: bottom <- {nn, optim, schedules, data, parallel} <- engine <- benchmark <- the commands.

The checker below reads sources without running them; the last tests feed it sources that break each rule.
"""

import ast
from pathlib import Path

import pytest

import distdl

PACKAGE = Path(distdl.__file__).parent
FILES = sorted(path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.py"))

ROOT = "distdl"  # distdl/__init__.py itself
BOTTOM = {"errors", "rng", "arrays", "launcher", "processes"}
MIDDLE = {"nn", "optim", "schedules", "data", "parallel"}
#: Whatever is in none of these is a command, and stands on top.
BELOW_THE_COMMANDS = {ROOT, "config", "engine", "benchmark"} | BOTTOM | MIDDLE

#: Modules that turn bytes from a file or a peer into running code.
PICKLES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
#: All of numpy.random that may be used: the raw words of a keyed stream.
KEYED_RANDOM = {"Philox"}


def may_import(unit, other):
    """Whether the part `unit` of the package may import the part `other`."""
    if unit == ROOT:
        return False
    if unit in BOTTOM:
        return other in BOTTOM | {ROOT}
    if unit == "config":
        return other in {ROOT, "errors"}
    if unit in MIDDLE:
        return other in BOTTOM | {ROOT, unit}
    if unit == "engine":
        return other in BELOW_THE_COMMANDS - {"benchmark"}
    if unit == "benchmark":
        return other in BELOW_THE_COMMANDS
    return True


def unit_of(module):
    """The part of the package that a dotted module name belongs to: ``nn`` for ``distdl.nn.layers``."""
    return ([*module.split("."), ROOT])[1]


def imports_of(tree, path):
    """Every import as (line, module, names), with relative ones made absolute."""
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
    """What in the `source` of the file `path` (such as ``distdl/nn/layers.py``) breaks the rules."""
    tree = ast.parse(source)
    module = path.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
    unit = unit_of(module)
    numpys, randoms = {"numpy"}, set()  # what numpy and numpy.random are called here
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


def is_part(name):
    return name in BELOW_THE_COMMANDS or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


@pytest.mark.parametrize("path", FILES)
def test_imports_point_one_way(path):
    assert list(violations(path, (PACKAGE.parent / path).read_text(encoding="utf-8"))) == []


def test_all_parts_of_the_package_are_looked_at():
    parts = {unit_of(path.removesuffix(".py").replace("/", ".")) for path in FILES}
    assert parts >= (BOTTOM | MIDDLE | {"config", "engine", "train"})


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("distdl/__init__.py", "from distdl.errors import UserError", "distdl may not import errors"),
        ("distdl/errors.py", "from distdl.config import TrainConfig", "errors may not import config"),
        ("distdl/rng.py", "import distdl.nn", "rng may not import nn"),
        ("distdl/config.py", "from distdl.optim import OPTIMIZERS", "config may not import optim"),
        ("distdl/config.py", "from distdl.rng import Key", "config may not import rng"),
        ("distdl/optim.py", "from distdl import schedules", "optim may not import schedules"),
        ("distdl/optim.py", "from . import errors, schedules", "optim may not import schedules"),
        ("distdl/nn/layers.py", "from distdl.data.split import split", "nn may not import data"),
        ("distdl/nn/layers.py", "from ..data.split import split", "nn may not import data"),
        ("distdl/nn/__init__.py", "from ..parallel import world", "nn may not import parallel"),
        ("distdl/data/sources.py", "def f():\n    from distdl import config", "data may not import config"),
        ("distdl/parallel/tree.py", "import distdl.engine.run as run", "parallel may not import engine"),
        ("distdl/engine/run.py", "from distdl import train", "engine may not import train"),
        ("distdl/engine/run.py", "from distdl.startup import run", "engine may not import startup"),
        ("distdl/engine/trace.py", "from distdl.benchmark import chart", "engine may not import benchmark"),
        ("distdl/benchmark/run.py", "from distdl import startup", "benchmark may not import startup"),
        (
            "distdl/data/sources.py",
            "import importlib\nimportlib.import_module('distdl.engine')",
            "may not import engine",
        ),
        ("distdl/train.py", "from mpi4py import MPI", "only distdl/parallel/mpi.py may import mpi4py"),
        ("distdl/parallel/__init__.py", "import mpi4py.MPI", "only distdl/parallel/mpi.py may import mpi4py"),
        ("distdl/engine/checkpoint.py", "import pickle", "pickle is never imported"),
        ("distdl/engine/checkpoint.py", "from pickle import loads", "pickle is never imported"),
        ("distdl/parallel/mpi.py", "def f():\n    import marshal", "marshal is never imported"),
        ("distdl/verify.py", "__import__('dill')", "dill is never imported"),
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
        ("distdl/engine/run.py", "import distdl\nfrom distdl import __version__, config\nfrom distdl.nn import MODELS"),
        ("distdl/parallel/mpi.py", "from mpi4py import MPI"),
        ("distdl/verify.py", "from distdl import startup\nfrom distdl.mpirun import environment_for"),
        ("distdl/rng.py", "import numpy as np\nnp.random.Philox(key=1).random_raw(2)"),
        ("distdl/data/split.py", "key.random.shuffle()"),
    ],
)
def test_the_checker_passes(path, source):
    assert list(violations(path, source)) == []
