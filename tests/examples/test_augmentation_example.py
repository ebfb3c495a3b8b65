"""The example of augmentation leaves its picture, and ends with the same figures on any number of ranks."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from distdl.mpirun import mpirun_command

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "augmentation.py")
SHORT = ["--epochs", "10"]
SECONDS = 120

pytestmark = pytest.mark.usefixtures("needs_mpirun")


@pytest.fixture(scope="module")
def finished(run_program, tmp_path_factory):
    """What one process has printed, and the folder it ran in."""
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install 'distdl-mpi[plots]'")
    folder = tmp_path_factory.mktemp("augmentation")
    done = run_program([sys.executable, EXAMPLE, *SHORT], cwd=folder, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_the_picture_shows_every_transform_and_no_two_draws_are_alike(finished):
    from matplotlib.image import imread

    stdout, folder = finished
    picture = imread(folder / "runs" / "augmentation.png")
    height, width = picture.shape[:2]
    texts = [line.split(":")[0] for line in stdout.splitlines() if line.endswith("are others than before")]
    assert texts == [
        *("rotate=20", "shift=1", "scale=0.3", "crop=1", "flip", "brightness=0.5"),
        "rotate=10,scale=0.1,crop=1",
    ]
    rows = np.split(picture[: height - height % 7], 7)
    columns = [np.split(row[:, : width - width % 9], 9, axis=1) for row in rows]
    drawn = [{column.tobytes() for column in row[1:]} for row in columns]
    assert [len(row) for row, text in zip(drawn, texts, strict=True) if text not in {"flip", "crop=1"}] == [8] * 5


def test_each_transform_changes_a_share_of_the_pixels(finished):
    shares = [int(share) for share in re.findall(r"(\d+)% of the pixels", finished[0])]
    assert len(shares) == 7
    assert all(10 < share < 95 for share in shares)


def test_it_ends_with_two_accuracies_that_two_ranks_find_too(finished, run_job, tmp_path):
    last = finished[0].splitlines()[-1]
    found = re.fullmatch(
        r"right of 1,464 test images, learned from 300: ([0-9.]+)% without augmentation, ([0-9.]+)% with crop=1", last
    )
    assert found, last
    plain, augmented = map(float, found.groups())
    assert plain != augmented
    assert min(plain, augmented) > 50
    done = run_job(mpirun_command(2, [sys.executable, EXAMPLE, *SHORT]), cwd=tmp_path, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == last


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "picture.jpeg"], "--out picture.jpeg: expected a file name that ends in .png"),
        (["--dataset", "mnits"], "invalid choice: 'mnits'"),
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
    ],
)
def test_what_is_wrong_ends_in_one_line(run_program, tmp_path, arguments, said):
    pytest.importorskip("matplotlib")
    done = run_program([sys.executable, EXAMPLE, *arguments], cwd=tmp_path, timeout=SECONDS)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.rglob("*.*")], "nothing has been drawn or trained"
