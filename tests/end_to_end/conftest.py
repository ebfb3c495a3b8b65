"""What several of these tests stand in."""

import os

import pytest
from bad_inputs import without_launcher


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """An empty working folder, a plain start's environment, and shared memory where leftovers are seen."""
    from distdl.parallel import shared

    folder = tmp_path / "workshop"
    (folder / "shm").mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(shared, "SHARED_MEMORY", folder / "shm")
    for name in os.environ.keys() - without_launcher(os.environ).keys():
        monkeypatch.delenv(name)
    for name in [name for name in os.environ if name.endswith("_NUM_THREADS")]:
        monkeypatch.setenv(name, os.environ[name])  # so that what a case sets is undone
    return folder
