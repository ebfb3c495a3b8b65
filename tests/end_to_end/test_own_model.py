"""A user's own model: it trains as ours do, and whatever is wrong with it is one line that names it."""

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from bad_inputs import TINY, changes, picture, without_launcher

from distdl import startup, train
from distdl.engine.own_model import check_same, layout_of
from distdl.errors import UserError
from distdl.launcher import read_launch
from distdl.nn import build_model

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

def net(input_shape, classes):
    import sizes
    start = nn.Normal(Settings().spread)
    layers = [nn.Flatten(), nn.Affine(sizes.HIDDEN, start), nn.ReLU(), nn.Affine(classes, start)]
    return nn.Sequential(layers, input_shape)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a model and a file that it imports; a plain start's environment."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - without_launcher(os.environ).keys():
        monkeypatch.delenv(name)
    for name in [name for name in os.environ if name.endswith("_NUM_THREADS")]:
        monkeypatch.setenv(name, os.environ[name])  # so that what a command sets is undone
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
        code = startup.run(train.main, [*TINY, "--max-steps=3", *arguments])
    return code, out.getvalue(), err.getvalue()


def receipt(*arguments):
    code, out, err = outcome(*arguments)
    assert (code, err) == (0, "")
    [line] = [line for line in out.splitlines() if line.startswith("weights sha256: ")]
    return line


def refusal(folder, *arguments):
    """The one line that refuses these arguments, of which nothing is left behind."""
    before, path = picture(folder), list(sys.path)
    code, out, err = outcome("--run-dir=new", *arguments)
    assert (code, out) == (USER, ""), (out, err)
    assert err.startswith("distdl: error: ")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    assert changes(before, picture(folder)) == []
    assert sys.path == path
    return err


def test_a_model_of_a_file_gives_the_receipt_of_the_same_model_of_ours(folder):
    before = picture(folder / "models")
    ours = receipt("--run-dir=ours")
    assert receipt("--run-dir=own", "--model=models/good.py:net") == ours
    assert receipt("--run-dir=whole", f"--model={folder}/models/good.py:net") == ours
    assert changes(before, picture(folder / "models")) == [], "no compiled files"
    assert "sizes" not in {name for name in sys.modules if name.startswith("own_model_")}


def test_a_file_in_deep_folders_gives_the_run_folder_a_name_that_a_folder_can_have(folder):
    deep = folder.joinpath(*["d" * 60] * 5)
    deep.mkdir(parents=True)
    (deep / "good.py").write_text(
        GOOD.replace("from sizes import HIDDEN", "").replace("import sizes", "").replace("sizes.HIDDEN", "100")
    )
    assert outcome(f"--model={deep}/good.py:net")[0] == 0
    [run_folder] = (folder / "runs").iterdir()
    assert run_folder.name.endswith("d-good.py-net")


def test_a_model_of_a_module_gives_the_receipt_of_the_same_model_of_ours(folder):
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


def test_a_run_of_an_own_model_is_resumed_by_the_same_command_alone(folder):
    own = "--model=models/good.py:net"
    whole = receipt("--run-dir=whole", own, "--max-steps=6")
    receipt("--run-dir=run", own)
    (folder / "models" / "other.py").write_text(GOOD)
    for flags in (["--model=models/other.py:net"], ["--model=mlp"]):
        said = refusal(folder, "--resume=run", "--max-steps=6", *flags)
        assert "--model is" in said
        assert "'models/good.py:net' in the checkpoint" in said
    assert receipt("--resume=run", "--max-steps=6", own) == whole


def test_code_that_a_config_file_names_is_not_run_unless_the_command_line_names_it_too(folder):
    """A run folder, or a config file, may have come from elsewhere."""
    (folder / "models" / "bad.py").write_text("open('written', 'w').close()\n" + GOOD)
    (folder / "given.toml").write_text('model = "models/bad.py:net"\n')
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = startup.run(train.main, ["--config=given.toml", "--max-steps=1", "--run-dir=new"])
    assert (code, out.getvalue()) == (USER, "")
    assert "a config file names the model 'models/bad.py:net'" in err.getvalue()
    assert "--model models/bad.py:net on the command line too" in err.getvalue()
    assert not (folder / "written").exists()
    assert outcome("--config=given.toml", "--model=models/bad.py:net", "--run-dir=run")[0] == 0
    assert (folder / "written").exists()
    (folder / "written").unlink()
    assert 'model = "models/bad.py:net"' in (folder / "run" / "config.toml").read_text()
    with redirect_stdout(out), redirect_stderr(err):
        assert startup.run(train.main, ["--resume=run", "--max-steps=4"]) == USER
    assert not (folder / "written").exists()


def test_a_run_of_a_script_is_resumed_by_the_script(folder):
    (folder / "given.toml").write_text('model = "__main__:network"\n')
    assert "resume the run by that script" in refusal(folder, "--config=given.toml", "--model=__main__:network")


#: What is wrong: the file's text, the name after the colon, and what the line must say.
WRONG = {
    "an error of syntax": ("def net(:\n", "net", ["wrong.py cannot be imported", "SyntaxError", "line 1"]),
    "an import that is not there": ("x = 1\nimport nowhere_at_all\n", "net", ["nowhere_at_all", "line 2 of wrong.py"]),
    "an error while it is imported": ("\n\nx = 1 / 0\n", "net", ["ZeroDivisionError", "line 3 of wrong.py"]),
    "an exit while it is imported": ("import sys\nsys.exit(0)\n", "net", ["SystemExit: 0", "line 2 of wrong.py"]),
    "bytes that are no text": ("x = '\udcff'\n", "net", ["wrong.py cannot be imported", "SyntaxError"]),
    "no such function": ("def nett(shape, classes): ...\n", "net", ["no function 'net'", "it has nett"]),
    "an empty file": ("", "net", ["no function 'net'", "write one", "function(input_shape, classes)"]),
    "no function but a number": ("net = 3\n", "net", ["net is a int", "function(input_shape, classes)"]),
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
    "another number of classes": (
        "from distdl import nn\ndef net(shape, classes): return nn.mlp(shape, 7)\n",
        "net",
        ["wrong.py:net puts out (7,)", "10 classes", "expected (10,)"],
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
def test_what_is_wrong_with_a_file_is_one_line_that_names_it(what, folder):
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
    "what is inside of a function": ("models/good.py:net.<locals>.x", ["file.py:function"]),
    "a file alone": ("models/good.py", ["unknown model", "file.py:function"]),
    "a NUL character": ("a\0b.py:net", ["names no function"]),
    "no text": ("a\udcff.py:net", ["names no function"]),
}


@pytest.mark.parametrize("what", NAMES)
def test_a_name_that_leads_to_no_function_is_one_line(what, folder):
    (folder / "folder.py").mkdir()
    name, words = NAMES[what]
    said = refusal(folder, f"--model={name}")
    assert [word for word in words if word not in said] == [], said


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder):
    os.mkfifo(folder / "pipe.py")
    assert "pipe.py is not a regular file" in refusal(folder, "--model=pipe.py:net")


def test_a_network_that_needs_larger_images_says_what_fits(folder):
    for model in ("alexnet", "vgg16", "googlenet", "resnet18"):
        said = refusal(folder, f"--model={model}")
        assert [word for word in (model, "28 to 64", "192", "8x8x1", "resize") if word not in said] == [], said
    said = refusal(folder, "--model=lenet")
    assert "conv2d_2 (Conv2d 16@5x5): input 4x4x6 is smaller" in said


def test_ranks_that_have_built_different_networks_are_told_apart():
    one, other = (layout_of(build_model(name, (28, 28, 1), 10)) for name in ("mlp", "logistic"))
    assert layout_of(build_model("mlp", (28, 28, 1), 10)) == one
    check_same("net.py:net", [one, one, one])
    with pytest.raises(UserError, match=r"net\.py:net of rank 2 is not that of rank 0: give every host the same files"):
        check_same("net.py:net", [one, one, other])


def test_flat_batch_norm_needs_more_than_one_sample(folder):
    (folder / "flat.py").write_text(
        "from distdl import nn\n"
        "def net(shape, classes):\n"
        "    inside = nn.Residual([nn.BatchNorm()])\n"
        "    return nn.Sequential([nn.Flatten(), nn.Affine(4), inside, nn.Affine(classes)], shape)\n"
    )
    assert "--micro-batch-size 1 " in refusal(folder, "--model=flat.py:net", "--micro-batch-size=1")
    assert outcome("--model=flat.py:net", "--micro-batch-size=2")[0] == 0
