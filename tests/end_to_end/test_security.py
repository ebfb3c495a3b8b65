"""A foreign file or folder, or a link in it, cannot make a run do anything outside its own folder."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from bad_inputs import changes, mnist_files, picture, without_launcher, write_files
from injected import write_checkpoints_at_once
from refusals import DAMAGED, USER, outcome
from refused_runs import RunShop, sealed
from small_runs import small_run

from distdl.engine.fault_injection import fail_at
from distdl.engine.storage import checkpoints, files, run_folder
from distdl.engine.storage.json_lines import JsonLines
from distdl.errors import UserError
from distdl.job.launched_by import read_launch
from distdl.parallel import OneProcess, shared

pytestmark = pytest.mark.skipif(read_launch().size > 1, reason="starts trainings of one process")

INSIDE = [*files.RUN_FILES, "checkpoints", "checkpoints/step-000000006.safetensors"]


@pytest.mark.parametrize("leads", ["to the old target", "to someone else's", "nowhere"])
@pytest.mark.parametrize("name", INSIDE)
def test_a_link_inside_a_run_folder_is_refused_and_not_followed(workshop, name, leads):
    shop = RunShop(workshop)
    path, elsewhere = shop.folder / name, workshop / "elsewhere"
    if not path.exists():  # hashes.jsonl and owner
        path.write_bytes(b"")
    if leads == "to the old target":
        shutil.move(path, elsewhere)
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if leads != "nowhere":
            elsewhere.write_text("two years of work")
    path.symlink_to(elsewhere)
    before = picture(workshop)
    for arguments in (["--resume=run"], ["--resume=auto", "--run-dir=run"], ["--resume=run", "--run-dir=other"]):
        code, out, err, _ = outcome([*shop.settings, "--epochs=3", "--record-hashes", *arguments])
        assert (code, out) == (USER, "")
        assert err.startswith(
            f"distdl: error: run/{name} is a symbolic link: distdl follows no link inside a run folder"
        )
        assert len(err.splitlines()) == 1
        assert changes(before, picture(workshop)) == []


@pytest.mark.parametrize("name", INSIDE)
def test_a_link_next_to_a_given_checkpoint_is_refused_and_not_followed(workshop, name):
    """A run that continues in another folder copies its logs and its best checkpoint there, but follows no link."""
    shop = RunShop(workshop)
    path, elsewhere = shop.folder / name, workshop / "elsewhere"
    if path.exists():
        shutil.move(path, elsewhere)
    else:
        elsewhere.write_bytes(b"two years of work\n" * 1000)
    path.symlink_to(elsewhere)
    before = picture(workshop)
    given = f"--resume={shop.newest.relative_to(workshop)}"
    for arguments in ([given, "--run-dir=other"], [given]):
        code, out, err, _ = outcome([*shop.settings, "--epochs=3", "--record-hashes", *arguments])
        assert (code, out) == (USER, "")
        assert err.startswith(
            f"distdl: error: run/{name} is a symbolic link: distdl follows no link inside a run folder"
        )
        assert changes(before, picture(workshop)) == []


@pytest.mark.parametrize("kind", ["folder", "pipe"])
@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "summary.json", "checkpoints/step-000000006.safetensors"])
def test_a_pipe_or_folder_in_place_of_a_file_of_a_run_is_refused_and_does_not_block(workshop, name, kind):
    shop = RunShop(workshop)
    (shop.folder / name).unlink()
    os.mkfifo(shop.folder / name) if kind == "pipe" else (shop.folder / name).mkdir()
    code, _, err, _ = outcome([*shop.settings, "--resume=run"])
    assert code == USER
    assert err.startswith(f"distdl: error: run/{name} is not a regular file")


def test_a_run_folder_that_is_itself_a_link_is_accepted(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "plain")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    small_run(OneProcess(), tmp_path / "link", max_steps=2)
    assert small_run(OneProcess(), tmp_path / "link", resume="auto") == expected
    assert checkpoints.steps_in(tmp_path / "scratch" / "checkpoints") == [2, 3, 6]
    named = tmp_path / "newest.safetensors"
    named.symlink_to(checkpoints.path_of_step(tmp_path / "scratch" / "checkpoints", 2))
    assert small_run(OneProcess(), tmp_path / "scratch", resume=str(named)) == expected


def test_a_link_that_replaces_the_checkpoints_during_training_is_not_followed(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    theirs = checkpoints.path_of_step(elsewhere, 1)
    theirs.write_text("theirs")

    def swap(_state):
        (folder / "checkpoints").rename(tmp_path / "moved")
        (folder / "checkpoints").symlink_to(elsewhere)

    write_checkpoints_at_once(monkeypatch)
    fail_at("step", rank=0, step=2, action=swap)
    with pytest.raises(UserError, match="cannot write the checkpoint after step"):
        small_run(OneProcess(), folder, checkpoint_every=1)
    assert [path.read_text() for path in elsewhere.iterdir()] == ["theirs"]
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        checkpoints.remove_later(folder / "checkpoints", 0)
    assert theirs.is_file()


def test_files_are_not_opened_through_a_link_even_if_it_comes_after_the_check(tmp_path):
    theirs, link = tmp_path / "theirs", tmp_path / "lock"
    theirs.write_text("two years of work")
    link.symlink_to(theirs)
    with pytest.raises(OSError, match="symbolic links"):
        JsonLines(link)
    with pytest.raises(OSError, match="symbolic links"):
        run_folder.lock_folder(tmp_path)
    with pytest.raises(UserError, match="symbolic links"):
        checkpoints.read(link, follow=False)
    (tmp_path / f"new{files.TEMPORARY_SUFFIX}").symlink_to(theirs)
    (tmp_path / "new").symlink_to(theirs)
    files.write_durably(tmp_path / "new", b"ours")
    assert theirs.read_text() == "two years of work"
    assert not (tmp_path / "new").is_symlink()
    assert (tmp_path / "new").read_text() == "ours"


def forged(header):
    """Yield invalid headers with a correct digest, and a word that the error must contain."""
    progress = header["progress"]
    for name in ("../../elsewhere", "/tmp/elsewhere", "..", "", "config"):
        yield {"log_bytes": {**header["log_bytes"], name: 5}}, "log_bytes"
    for length in (-1, 1.5, True, "5", None, [1]):
        yield {"log_bytes": {"metrics": length}}, "log_bytes"
    for best in ("../../elsewhere", -1, 10**30, 1.5, True, [1]):
        yield {"progress": {**progress, "best_step": best}}, "progress"
    for name in progress:
        for value in ("x", [1], {}, True):
            yield {"progress": {**progress, name: value}}, "progress"
        yield {"progress": {key: value for key, value in progress.items() if key != name}}, "progress"
    for step in (True, -1, 10**30, header["step"] + 1):
        yield {"step": step}, "step"
    yield {"versions": {"numpy": ["2"]}}, "versions"


def test_a_sealed_header_with_a_foreign_path_or_an_invalid_value_is_a_damaged_file(workshop):
    shop = RunShop(workshop)
    tensors, header = checkpoints.read(shop.newest).tensors, shop.metadata["header"]
    assert header["progress"]["best_step"] is not None
    cases = list(forged(header))
    assert len(cases) > 30
    for changed, word in cases:
        shop.newest.write_bytes(sealed({"header": {**header, **changed}}, tensors))
        before = picture(".")
        for arguments in ([f"--resume={shop.newest}", "--run-dir=new"], [f"--resume={shop.newest}", "--epochs=3"]):
            code, out, err, _ = outcome([*shop.settings, *arguments])
            assert (code, out) == (DAMAGED, ""), changed
            assert f"no {word!r}" in err
            assert len(err.splitlines()) == 1
            assert changes(before, picture(".")) == []


def test_impossible_sums_of_an_epoch_are_a_damaged_file(workshop):
    shop = RunShop(workshop)
    tensors, header = checkpoints.read(shop.newest).tensors, shop.metadata["header"]
    for counts, loss in (([0, -1], 0.0), ([-1, 0], 0.0), ([1, 0], 0.0), ([0, 8], 0.0), ([0, 0], float("nan"))):
        altered = {**tensors, "epoch.counts": tensors["epoch.counts"] * 0 + counts}
        altered["epoch.loss_sum"] = tensors["epoch.loss_sum"] * 0 + loss
        shop.newest.write_bytes(sealed({"header": header}, altered))
        code, _, err, _ = outcome([*shop.settings, f"--resume={shop.newest}", "--epochs=3"])
        assert (code, "sums of the epoch" in err) == (DAMAGED, True)


def test_no_umask_lets_other_users_write_files_of_a_run(tmp_path):
    before = os.umask(0)
    try:
        small_run(OneProcess(), tmp_path / "a" / "run", record_hashes=True)
        handle, path = shared._reserve(100, "a test")
        reserved = Path(path)
    finally:
        os.umask(before)
    mode = stat.S_IMODE(reserved.stat().st_mode)
    reserved.unlink()
    os.close(handle)
    assert mode == 0o600
    made = [tmp_path / "a", *(tmp_path / "a").rglob("*")]
    assert {path.name for path in made} >= {"run", "checkpoints", "lock", "metrics.jsonl", "summary.json"}
    for path in made:
        assert not path.stat().st_mode & stat.S_IWOTH, path


#: Records the files that a training run opens, removes and renames, and every event that no training needs.
AUDITED = """
import json, os, sys
from distdl import cli, train_command
from distdl import engine  # everything that a start imports
import safetensors.numpy, threadpoolctl

NEVER = ("pickle.", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "subprocess.", "os.system",
         "os.exec", "os.posix_spawn", "os.fork", "shutil.", "ftplib.", "urllib.", "os.chmod", "os.chown", "os.link",
         "os.symlink")
events = []

def note(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        events.append(["write" if writes else "read", str(path)])
    elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate"):
        events.append([event, str(arguments[0])])
    elif event.startswith(NEVER):
        events.append(["never", event + " " + repr(arguments)[:200]])

sys.addaudithook(note)
code = cli.run(train_command.main, sys.argv[1:])
noted, events = events, []
print(json.dumps(noted))
sys.exit(code)
"""


def test_a_training_opens_its_input_only_for_reading_starts_no_program_and_makes_no_connection(tmp_path):
    write_files(tmp_path / "data", mnist_files())
    (tmp_path / "mine.toml").write_text("epochs = 2\nbatch_size = 8\nmicro_batch_size = 4\nmodel = 'mlp'\n")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before = picture(tmp_path)
    mine = ["--config=mine.toml", "--dataset=mnist", "--data-dir=data", "--kernels=numpy"]  # numba unpickles its code
    given = {str(tmp_path / "mine.toml"), *map(str, (tmp_path / "data").iterdir())}
    for arguments in ([*mine, "--run-dir=run", "--max-steps=2"], [*mine, "--resume=run", "--run-dir=new"]):
        done = subprocess.run(
            [sys.executable, "-c", AUDITED, *arguments],
            cwd=tmp_path,
            env={**without_launcher(os.environ), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(temporary)},
            capture_output=True,
            text=True,
            timeout=120,  # prevents hanging
            check=False,
        )
        assert done.returncode == 0, done.stderr
        events = [tuple(event) for event in json.loads(done.stdout.splitlines()[-1])]
        assert [what for kind, what in events if kind == "never"] == []
        assert given <= {str(tmp_path / what) for kind, what in events if kind == "read"}
        own = "run" if "--run-dir=run" in arguments else "new"
        # Files in the run folder are named relative to an open folder. A number is a file opened before.
        names = {f"step-{step:09d}.safetensors" for step in range(9)} | set(files.RUN_FILES)
        names |= {f"{name}{files.TEMPORARY_SUFFIX}" for name in names}
        for kind, what in events:
            inside = what in names or what.isdecimal() or (Path(own) in (Path(what), *Path(what).parents))
            swept = kind == "os.remove" and what.startswith("/dev/shm/")  # the leftovers of a killed job
            ours = inside or swept or what.startswith(("/dev/shm/distdl-", str(temporary)))
            assert kind == "read" or ours, f"{kind} {what}"
    after = picture(tmp_path)
    assert {path: after[path] for path in before} == before
