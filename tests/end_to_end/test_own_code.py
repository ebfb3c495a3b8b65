"""A user's model or dataset trains like a built-in one. An error in it is one line that names its place."""

import io
import json
import os
import sys
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import TINY, changes, picture, without_launcher

from distdl import cli, evaluate, train_command
from distdl.config import TrainConfig
from distdl.data.sources import Dataset
from distdl.engine import train as train_from_a_script
from distdl.engine.user_code import architecture_sha256, check_equal_networks, find_function, names_from_script
from distdl.errors import UserError
from distdl.job.launched_by import read_launch
from distdl.nn import build_model
from distdl.parallel import OneProcess

pytestmark = pytest.mark.skipif(read_launch().size > 1, reason="starts trainings of one process")

USER = 2

NEIGHBOUR = "HIDDEN = 100\n"
#: The same network as --model mlp.
GOOD = """\
from dataclasses import dataclass
from distdl import nn
from sizes import HIDDEN

@dataclass
class Settings:
    spread: float = 0.01

def net(input_shape, classes, hidden=None):
    import sizes
    start = nn.Normal(Settings().spread)
    layers = [nn.Flatten(), nn.Affine(hidden or sizes.HIDDEN, start), nn.ReLU(), nn.Affine(classes, start)]
    return nn.Sequential(layers, input_shape)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a working folder with a model and a file that it imports; remove the variables of launchers."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - without_launcher(os.environ).keys():
        monkeypatch.delenv(name)
    for name in [name for name in os.environ if name.endswith("_NUM_THREADS")]:
        monkeypatch.setenv(name, os.environ[name])  # so that pytest undoes the settings of a command
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("sizes", "package", "package.module"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "good.py").write_text(GOOD)
    (tmp_path / "models" / "sizes.py").write_text(NEIGHBOUR)
    return tmp_path


def outcome(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.run(train_command.main, [*TINY, "--max-steps=3", *arguments])
    return code, out.getvalue(), err.getvalue()


def receipt(*arguments):
    code, out, err = outcome(*arguments)
    assert (code, err) == (0, "")
    [line] = [line for line in out.splitlines() if line.startswith("weights sha256: ")]
    return line


def refusal(folder, *arguments):
    """Return the one line that refuses these arguments; check that the command leaves no files."""
    before, path = picture(folder), list(sys.path)
    code, out, err = outcome("--run-dir=new", *arguments)
    assert (code, out) == (USER, ""), (out, err)
    assert err.startswith("distdl: error: ")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    assert changes(before, picture(folder)) == []
    assert sys.path == path
    return err


def test_a_model_of_a_file_has_the_receipt_of_the_equal_built_in_model(folder):
    before = picture(folder / "models")
    ours = receipt("--run-dir=ours")
    assert receipt("--run-dir=own", "--model=models/good.py:net") == ours
    assert receipt("--run-dir=whole", f"--model={folder}/models/good.py:net") == ours
    assert changes(before, picture(folder / "models")) == [], "no compiled files"
    assert "sizes" not in {name for name in sys.modules if name.startswith("own_code_")}


def test_a_function_that_a_script_takes_from_a_file_has_the_name_of_the_file(folder):
    function = find_function("--model", "models/good.py:net").function
    config = names_from_script(TrainConfig(), function, None)
    assert config.model == f"{folder}/models/good.py:net"


def test_a_model_file_in_deep_folders_gives_a_run_folder_with_a_valid_name(folder):
    deep = folder.joinpath(*["d" * 60] * 5)
    deep.mkdir(parents=True)
    (deep / "good.py").write_text(
        GOOD.replace("from sizes import HIDDEN", "").replace("import sizes", "").replace("sizes.HIDDEN", "100")
    )
    assert outcome(f"--model={deep}/good.py:net")[0] == 0
    [run_folder] = (folder / "runs").iterdir()
    assert run_folder.name.endswith("d-good.py-net")


def test_a_model_of_a_module_has_the_receipt_of_the_equal_built_in_model(folder):
    package = folder / "package"
    package.mkdir()
    (package / "module.py").write_text(
        GOOD.replace("from sizes", "from .sizes").replace("import sizes", "from . import sizes")
    )
    (package / "sizes.py").write_text(NEIGHBOUR)
    sys.path.append(str(folder))
    before = picture(package)
    assert receipt("--run-dir=own", "--model=package.module:net") == receipt("--run-dir=ours")
    assert receipt("--run-dir=library", "--model=distdl.nn:mlp") == receipt("--run-dir=again")
    assert changes(before, picture(package)) == [], "no compiled files"


def test_a_run_with_user_code_is_resumed_only_by_the_same_command(folder):
    own = "--model=models/good.py:net"
    whole = receipt("--run-dir=whole", own, "--max-steps=6")
    receipt("--run-dir=run", own)
    (folder / "models" / "other.py").write_text(GOOD)
    for flags in (["--model=models/other.py:net"], ["--model=mlp"]):
        said = refusal(folder, "--resume=run", "--max-steps=6", *flags)
        assert "--model is" in said
        assert "'models/good.py:net' in the checkpoint" in said
    assert receipt("--resume=run", "--max-steps=6", own) == whole


def test_a_function_in_a_config_file_runs_only_if_the_command_line_names_it_too(folder):
    """A run folder or a config file may come from a stranger."""
    (folder / "models" / "bad.py").write_text("open('written', 'w').close()\n" + GOOD)
    (folder / "given.toml").write_text('model = "models/bad.py:net"\n')
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.run(train_command.main, ["--config=given.toml", "--max-steps=1", "--run-dir=new"])
    assert (code, out.getvalue()) == (USER, "")
    assert "a config file names the model 'models/bad.py:net'" in err.getvalue()
    assert "--model models/bad.py:net on the command line too" in err.getvalue()
    assert not (folder / "written").exists()
    assert outcome("--config=given.toml", "--model=models/bad.py:net", "--run-dir=run")[0] == 0
    assert (folder / "written").exists()
    (folder / "written").unlink()
    assert 'model = "models/bad.py:net"' in (folder / "run" / "config.toml").read_text()
    with redirect_stdout(out), redirect_stderr(err):
        assert cli.run(train_command.main, ["--resume=run", "--max-steps=4"]) == USER
    assert not (folder / "written").exists()


def test_a_run_of_a_script_is_resumed_by_the_script(folder):
    (folder / "given.toml").write_text('model = "__main__:network"\n')
    assert "resume the run with that script" in refusal(folder, "--config=given.toml", "--model=__main__:network")


#: The fault: the file's text, the name after the colon, and words of the message.
WRONG = {
    "an error of syntax": ("def net(:\n", "net", ["wrong.py cannot be imported", "SyntaxError", "line 1"]),
    "an import that fails": ("x = 1\nimport nowhere_at_all\n", "net", ["nowhere_at_all", "line 2 of wrong.py"]),
    "an error while it is imported": ("\n\nx = 1 / 0\n", "net", ["ZeroDivisionError", "line 3 of wrong.py"]),
    "an exit while it is imported": ("import sys\nsys.exit(0)\n", "net", ["SystemExit: 0", "line 2 of wrong.py"]),
    "bytes outside of UTF-8": ("x = '\udcff'\n", "net", ["wrong.py cannot be imported", "SyntaxError"]),
    "no such function": ("def nett(shape, classes): ...\n", "net", ["no function 'net'", "it has nett"]),
    "an empty file": ("", "net", ["no function 'net'", "write one", "function(input_shape, classes)"]),
    "no function but a number": ("net = 3\n", "net", ["net is an int", "function(input_shape, classes)"]),
    "other arguments": (
        "def net(shape):\n    return None\n",
        "net",
        ["raised TypeError", "function(input_shape, classes)"],
    ),
    "an error in the function": ("def net(shape, classes):\n    return shape[7]\n", "net", ["IndexError", "line 2 of"]),
    "an exit in the function": ("def net(shape, classes):\n    raise SystemExit\n", "net", ["SystemExit", "line 2 of"]),
    "nothing returned": ("def net(shape, classes): ...\n", "net", ["returned None", "nn.Sequential"]),
    "layers returned": ("def net(shape, classes): return [1]\n", "net", ["returned a list", "nn.Sequential"]),
    "the function's class": ("class net:\n  def __init__(self, *_): ...\n", "net", ["returned a net", "nn.Sequential"]),
    "a layer that does not fit": (
        "from distdl import nn\n\ndef net(shape, classes):\n    layers = [nn.Conv2d(4, 9)]\n"
        "    return nn.Sequential(layers, shape)\n",
        "net",
        ["conv2d_1", "8x8x1 is smaller than the 9x9 kernel", "line 5 of wrong.py"],
    ),
    "a layer that raises": (
        "from distdl import nn\n\nclass Own(nn.Layer):\n    def backward(self, dy): return dy[:, 99]\n\n"
        "def net(shape, classes):\n    layers = [nn.Flatten(), nn.Affine(9), Own(), nn.Affine(classes)]\n"
        "    return nn.Sequential(layers, shape)\n",
        "net",
        ["cannot be trained", "IndexError", "line 4 of wrong.py"],
    ),
    "a layer that is wrong for several samples": (
        "from distdl import nn\n\nclass Own(nn.Layer):\n"
        "    def forward(self, x, *, training, key): return x.sum(axis=0, keepdims=True)\n"
        "    def backward(self, dy): return dy\n\n"
        "def net(shape, classes): return nn.Sequential([nn.Flatten(), nn.Affine(classes), Own()], shape)\n",
        "net",
        ["cannot be trained", "for 2 samples its output is (1, 10), expected (2, 10)"],
    ),
    "a gradient of another shape": (
        "from distdl import nn\n\nclass Own(nn.Layer):\n"
        "    def backward(self, dy): return dy.mean(axis=0, keepdims=True)\n\n"
        "def net(shape, classes): return nn.Sequential([nn.Flatten(), nn.Affine(classes), Own()], shape)\n",
        "net",
        ["cannot be trained"],
    ),
    "a layer that fails in evaluation": (
        "from distdl import nn\n\nclass Own(nn.Layer):\n"
        "    def forward(self, x, *, training, key): return x if training else x[7]\n"
        "    def backward(self, dy): return dy\n\n"
        "def net(shape, classes): return nn.Sequential([nn.Flatten(), nn.Affine(classes), Own()], shape)\n",
        "net",
        ["cannot be trained", "IndexError", "line 4 of wrong.py"],
    ),
    "a layer without a backward": (
        "from distdl import nn\n\nclass Own(nn.Layer):\n"
        "    def forward(self, x, *, training, key): return 2 * x\n\n"
        "def net(shape, classes): return nn.Sequential([nn.Flatten(), nn.Affine(classes), Own()], shape)\n",
        "net",
        ["the layer Own has a forward of its own but no backward"],
    ),
    "initial values of another shape": (
        "from distdl import nn\nimport numpy as np\n"
        "def net(shape, classes):\n"
        "    affine = nn.Affine(classes, lambda key, shape, fan_in: np.zeros(3))\n"
        "    return nn.Sequential([nn.Flatten(), affine], shape)\n",
        "net",
        ["cannot be trained", "could not broadcast"],
    ),
    "nothing to train": (
        "from distdl import nn\ndef net(shape, classes): return nn.Sequential([nn.Flatten()], shape)\n",
        "net",
        ["wrong.py:net", "without parameters", "nothing to train"],
    ),
    "another number of classes": (
        "from distdl import nn\ndef net(shape, classes): return nn.mlp(shape, 7)\n",
        "net",
        ["wrong.py:net returns outputs (7,)", "10 classes", "expected (10,)"],
    ),
    "another input": (
        "from distdl import nn\ndef net(shape, classes): return nn.mlp((4, 4, 1), classes)\n",
        "net",
        ["inputs of 4x4x1", "images are 8x8x1", "input_shape"],
    ),
    "float64": (
        "from distdl import nn\ndef net(shape, classes): return nn.mlp(shape, classes, dtype='float64')\n",
        "net",
        ["float64", "float32", "dtype"],
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_one_line_that_names_it(what, folder):
    text, function, words = WRONG[what]
    (folder / "wrong.py").write_text(text, encoding="utf-8", errors="surrogateescape")
    said = refusal(folder, f"--model=wrong.py:{function}")
    assert [word for word in ["wrong.py", *words] if word not in said] == [], said


NAMES = {
    "no such file": ("nowhere.py:net", ["nowhere.py does not exist", "give the path"]),
    "a folder": ("folder.py:net", ["folder.py is not a regular file"]),
    "no such module": ("nowhere.models:net", ["no module nowhere.models", "PYTHONPATH"]),
    "no such module of a package": ("distdl.nowhere:net", ["no module distdl.nowhere"]),
    "no such function of a module": ("distdl.nn:mlpp", ["no function 'mlpp'", "distdl.nn"]),
    "a function with other arguments": ("distdl.nn:patches", ["distdl.nn:patches"]),
    "no function at all": ("models/good.py:", ["'models/good.py:'", "file.py:function"]),
    "no place": (":net", ["':net'", "file.py:function"]),
    "a path without py": ("models/good:net", ["'models/good:net'", "file.py:function"]),
    "no name of a function": ("models/good.py:net()", ["'models/good.py:net()'", "file.py:function"]),
    "a function inside of a function": ("models/good.py:net.<locals>.x", ["file.py:function"]),
    "a file alone": ("models/good.py", ["unknown model", "file.py:function"]),
    "a NUL character": ("a\0b.py:net", ["does not name a function"]),
    "a surrogate": ("a\udcff.py:net", ["does not name a function"]),
}


@pytest.mark.parametrize("what", NAMES)
def test_a_name_without_a_function_is_one_line(what, folder):
    (folder / "folder.py").mkdir()
    name, words = NAMES[what]
    said = refusal(folder, f"--model={name}")
    assert [word for word in words if word not in said] == [], said


def test_a_pipe_instead_of_a_file_does_not_block(folder):
    os.mkfifo(folder / "pipe.py")
    assert "pipe.py is not a regular file" in refusal(folder, "--model=pipe.py:net")


def test_a_network_for_larger_images_names_the_possible_sizes(folder):
    for model in ("alexnet", "vgg16", "googlenet", "resnet18"):
        said = refusal(folder, f"--model={model}")
        assert [word for word in (model, "28 to 64", "192", "8x8x1", "resize") if word not in said] == [], said
    said = refusal(folder, "--model=lenet")
    assert "conv2d_2 (Conv2d 16@5x5): input 4x4x6 is smaller" in said
    assert "--model lenet takes images of at least 12x12x1, not 8x8x1" in said
    assert "--resize 12x12" in said


def test_a_rank_with_a_different_network_is_named(monkeypatch):
    communicator, hashes = OneProcess(), []
    monkeypatch.setattr(communicator, "allgather_json", lambda own: [own, *hashes])
    mlp, other = (build_model(name, (28, 28, 1), 10) for name in ("mlp", "logistic"))
    hashes += [architecture_sha256(build_model("mlp", (28, 28, 1), 10))] * 2
    check_equal_networks(communicator, "net.py:net", mlp)
    hashes[1] = architecture_sha256(other)
    with pytest.raises(UserError, match=r"net\.py:net of rank 2 is not that of rank 0: give every host") as caught:
        check_equal_networks(communicator, "net.py:net", mlp)
    assert caught.value.agreed


def test_flat_batch_norm_needs_more_than_one_sample(folder):
    (folder / "flat.py").write_text(
        "from distdl import nn\n"
        "def net(shape, classes):\n"
        "    inside = nn.Residual([nn.BatchNorm()])\n"
        "    return nn.Sequential([nn.Flatten(), nn.Affine(4), inside, nn.Affine(classes)], shape)\n"
    )
    assert "--micro-batch-size 1 " in refusal(folder, "--model=flat.py:net", "--micro-batch-size=1")
    assert outcome("--model=flat.py:net", "--micro-batch-size=2")[0] == 0


def test_model_settings_are_the_keywords_of_the_function(folder):
    own = ["--model=models/good.py:net", "--model-settings=hidden=30"]
    assert receipt("--run-dir=own", *own) == receipt(
        "--run-dir=ours", "--model=mlp", "--model-settings=hidden=30,initializer=0.01"
    )
    assert 'model_settings = "hidden=30"' in (folder / "own" / "config.toml").read_text()
    said = refusal(folder, "--resume=own", own[0], "--model-settings=hidden=31")
    assert "--model-settings is 'hidden=31' here and 'hidden=30' in the checkpoint" in said
    said = refusal(folder, "--model=models/good.py:net", "--model-settings=width=30")
    assert [word for word in ("good.py:net raised TypeError", "'width'") if word not in said] == []


def test_an_mlp_has_the_depth_of_its_settings(folder):
    out = outcome("--run-dir=deep", "--model=mlp", "--model-settings=hidden=40-30-20,batch_norm,dropout=0.2")[1]
    parameters = 65 * 40 + 41 * 30 + 31 * 20 + 2 * (40 + 30 + 20) + 21 * 10
    assert f"mlp ({parameters:,} parameters)" in out


MODEL_SETTINGS = {
    "an unknown name": ("hiddn=3", ["setting of the model mlp 'hiddn'", "did you mean 'hidden'?"]),
    "no size": ("hidden=abc", ["hidden='abc'", "or by flag hidden=100-50"]),
    "a switch with a number": ("batch_norm=3", ["batch_norm=3", "true or false"]),
    "a ratio out of range": ("dropout=1.5", ["1.5", "below 1"]),
    "a word for a number": ("dropout=much", ["dropout='much'"]),
    "unknown initial values": ("initializer=hee", ["'hee'", "did you mean 'he'?"]),
    "a deviation of 0": ("initializer=0", ["initializer=0", "above 0"]),
    "twice the same": ("hidden=3,hidden=4", ["hidden is given twice"]),
    "no name": ("=3", ["does not name a setting", "name=value"]),
    "no value": ("hidden=3;4", ["such as hidden=100-50"]),
    "another dtype": ("dtype=float64", ["float32"]),
    "an argument that is no setting": ("input_shape=3", ["setting of the model mlp 'input_shape'", "hidden"]),
    "another name": ("name=3", ["setting of the model mlp 'name'", "hidden"]),
}


@pytest.mark.parametrize("what", MODEL_SETTINGS)
def test_wrong_model_settings_are_one_line(what, folder):
    text, words = MODEL_SETTINGS[what]
    said = refusal(folder, "--model=mlp", f"--model-settings={text}")
    assert [word for word in words if word not in said] == [], said


# --------------------------------------------------------------------------------------------------- datasets

DATA = """\
import numpy as np
from distdl.data.sources import Dataset, load
import sizes

def digits(data_dir):
    return load("digits", None)

def numbers(data_dir):
    # The center of the ink of each digit: row and column.
    images = load("digits", None).images
    ink = images.reshape(-1, 64).astype(np.float32)
    places = np.moveaxis(np.indices((8, 8)), 0, -1).reshape(64, 2)
    middles = ink @ places / ink.sum(axis=1)[:, None]
    return Dataset("middles", images, middles.astype(np.float32), 2, None)

def pixels(data_dir):
    # 1 for each pixel with ink.
    images = load("digits", None).images
    return Dataset("ink", images, (images[..., 0] > 8).astype(np.int64), 2, 1500)

def from_folder(data_dir):
    return load("digits", None) if data_dir.name == "here" else None

def wrong_type(data_dir): return 3
def wrong_labels(data_dir): return Dataset("x", load("digits", None).images, np.full(1797, 12), 10, None)
def fails(data_dir): return 1 / 0
"""
SEGMENTS = """\
from distdl import nn
def net(shape, classes): return nn.Sequential([nn.Conv2d(classes, 3, padding=1)], shape)
"""


@pytest.fixture
def data(folder):
    (folder / "data.py").write_text(DATA)
    (folder / "sizes.py").write_text(NEIGHBOUR)
    (folder / "segments.py").write_text(SEGMENTS)
    return folder


def test_a_dataset_of_a_file_has_the_receipt_of_the_equal_built_in_dataset(data):
    assert receipt("--run-dir=own", "--dataset=data.py:digits") == receipt("--run-dir=ours", "--dataset=digits")
    assert receipt("--run-dir=third", "--dataset=data.py:from_folder", "--data-dir=here") == receipt("--run-dir=again")


@pytest.mark.parametrize(
    ("task", "flags", "score"),
    [("numbers", [], "test loss"), ("pixels", ["--model=segments.py:net"], "test accuracy")],
)
def test_commands_train_resume_and_evaluate_regression_and_segmentation(task, flags, score, data):
    flags = [f"--dataset=data.py:{task}", *flags]
    whole = receipt("--run-dir=whole", *flags, "--epochs=1", "--max-steps=999")
    receipt("--run-dir=run", *flags)
    assert receipt("--resume=run", *flags, "--epochs=1", "--max-steps=999") == whole
    assert "--dataset data.py:" in refusal(data, "--resume=run")
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert cli.run(evaluate.main, ["run", *flags, "--json=scores.json"]) == 0, err.getvalue()
        assert cli.run(evaluate.main, ["run", *flags[1:]]) == USER
    assert score in out.getvalue()
    assert "if you trust that code, add --dataset data.py:" in err.getvalue()
    [member] = json.loads((data / "scores.json").read_text())["members"]
    assert member["loss"] == json.loads((data / "run" / "summary.json").read_text())["test_loss"]


def test_a_dataset_function_in_a_config_file_runs_only_if_the_command_line_names_it_too(data):
    (data / "bad.py").write_text("open('written', 'w').close()\n" + DATA)
    (data / "given.toml").write_text('dataset = "bad.py:digits"\n')
    said = refusal(data, "--config=given.toml")
    assert "a config file names the dataset 'bad.py:digits'" in said
    assert "--dataset bad.py:digits on the command line too" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("data.py:wrong_type", ["data.py:wrong_type returned an int", "a function(data_dir)"]),
        ("data.py:wrong_labels", ["data.py:wrong_labels", "labels 12 to 12", "0 to 9"]),
        ("data.py:fails", ["data.py:fails raised ZeroDivisionError", "of data.py"]),
        ("data.py:from_folder", ["AttributeError", "of data.py"]),
        ("data.py:nothing", ["no function 'nothing'", "it has digits"]),
        ("nowhere.py:digits", ["nowhere.py does not exist"]),
        ("data.py:", ["does not name a function"]),
        ("mine", ["unknown dataset 'mine'", "file.py:function"]),
        ("npz:", ["npz"]),
        ("npz:a\0b", ["does not name a file"]),
        ("folder:", ["does not name a file", "folder:PATH"]),
        ("folder:nowhere", ["'nowhere' cannot be read"]),
    ],
)
def test_a_wrong_dataset_is_one_line_that_names_it(name, words, data):
    said = refusal(data, f"--dataset={name}")
    assert [word for word in words if word not in said] == [], said


def test_evaluate_calls_only_the_function_of_the_training(data):
    (data / "same.py").write_text(GOOD.replace("nn.ReLU", "nn.Sigmoid"))
    receipt("--run-dir=ours", "--model=mlp")
    receipt("--run-dir=own", "--model=models/good.py:net", "--lr=0.002")
    for runs, model, said in (
        (["ours"], "same.py:net", "--model same.py:net: the runs were trained with mlp"),
        (["own"], "same.py:net", "the runs were trained with models/good.py:net"),
        (["own"], "mlp", "--model mlp: the runs were trained with"),
        (["ours", "own"], f"{data}/models/good.py:net", None),
    ):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.run(evaluate.main, [*runs, f"--model={model}"])
        assert (code, said is None or said in err.getvalue()) == (0 if said is None else USER, True), err.getvalue()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"build_network": lambda _shape, _classes: None}, "returned None; expected a function"),
        ({"build_network": build_model("mlp", (8, 8, 1), 10)}, "build_network is a Sequential; expected a function"),
        ({"build_network": lambda _, classes: build_model("mlp", (4, 4, 1), classes)}, "the images are 8x8x1"),
        ({"dataset": (np.zeros((9, 8, 8, 1)), np.zeros(9))}, "the dataset is a tuple, expected a distdl.data.sources"),
        ({"dataset": Dataset("x", np.zeros((9, 8, 8, 1), np.uint8), np.zeros(9, int), 10**30, None)}, "classes 1000"),
    ],
)
def test_wrong_arguments_of_a_script_are_an_error_before_the_run_starts(given, words, folder):
    with pytest.raises(UserError, match=words):
        train_from_a_script(TrainConfig(model="mlp", max_steps=1), **given)
    assert sorted(path.name for path in folder.iterdir()) == ["models"]


def test_the_dataset_of_the_documentation_trains(folder):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    code = text[text.index("    import numpy as np\n    from distdl") :].partition("    python -m distdl.train")[0]
    (folder / "data.py").write_text(textwrap.dedent(code))
    assert "weights sha256: " in receipt("--run-dir=run", "--dataset=data.py:middles")
