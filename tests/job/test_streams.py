"""Any stream accepts any line, and the names of files are the same texts in every locale."""

import io
import os
import subprocess
import sys

import pytest

from distdl.job import streams

LINE = "Käse · 8×8 – 日本 …\n"
PLAIN_LINE = "K\\xe4se | 8x8 - \\u65e5\\u672c ...\n"
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "surrogatepass", "backslashreplace"])
@pytest.mark.parametrize("prepared", [True, False], ids=["of a command", "of a script"])
def test_an_ascii_stream_gets_plain_characters(errors, prepared, monkeypatch):
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, encoding="ascii", errors=errors)
    if prepared:
        monkeypatch.setattr(sys, "stdout", stream)
        streams.prepare()
    elif errors == "backslashreplace":
        pytest.skip("it never fails")
    assert streams.write(stream, LINE) is None
    assert content.getvalue().decode() == PLAIN_LINE


@pytest.mark.parametrize(("encoding", "written"), [("utf-8", LINE), ("latin-1", "Käse · 8×8 - \\u65e5\\u672c ...\n")])
def test_another_stream_keeps_the_characters_that_it_has(encoding, written):
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, encoding=encoding)
    streams.write(stream, LINE)
    assert content.getvalue().decode(encoding) == written


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_byte_of_a_name_that_is_no_text_is_escaped(encoding, monkeypatch):
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, encoding=encoding)
    assert streams.write(stream, os.fsdecode(b"K\xe4se ")) is None
    monkeypatch.setattr(sys, "stdout", stream)
    streams.prepare()
    assert streams.write(stream, os.fsdecode(b"K\xe4se")) is None
    assert content.getvalue() == b"K\\xe4se K\\xe4se"


@pytest.mark.parametrize("argv", [["-m", "distdl.train"], ["-m", "distdl", "train"]], ids=" ".join)
def test_in_the_plain_locale_a_run_writes_the_same_files_and_prints_plain_characters(argv, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for number in range(24):
        folder = tmp_path / "Größen" / ("Käse" if number % 2 else "Öl")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * number).save(folder / f"ü{number}.png")
    flags = ["--dataset", "folder:Größen", "--model", "mlp", "--kernels", "numpy", "--epochs", "1", "--batch-size", "4"]
    flags += ["--micro-batch-size", "2"]
    files = {}
    for name, variables in {"utf8": {}, "c": C_LOCALE}.items():
        done = subprocess.run(
            [sys.executable, *argv, *flags, "--run-dir", name],
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "", **variables},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii() is (name == "c")
        assert (b"K\\xe4se, \\xd6l" if name == "c" else "Käse, Öl".encode()) in done.stdout
        written = ("config.toml", "metrics.jsonl")
        checkpoints = sorted((tmp_path / name / "checkpoints").iterdir())
        files[name] = [
            *((tmp_path / name / one).read_bytes() for one in written),
            *(path.read_bytes().partition(b'"class_names"')[2][:40] for path in checkpoints),
        ]
    assert files["c"] == files["utf8"]
