"""The working folder of several of these tests."""

import os

import pytest
from bad_inputs import without_launcher


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """Return an empty working folder; set a plain environment and a separate folder for shared memory."""
    from distdl.parallel import shared

    folder = tmp_path / "workshop"
    (folder / "shm").mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(shared, "SHARED_MEMORY", folder / "shm")
    for name in os.environ.keys() - without_launcher(os.environ).keys():
        monkeypatch.delenv(name)
    for name in [name for name in os.environ if name.endswith("_NUM_THREADS")]:
        monkeypatch.setenv(name, os.environ[name])  # undoes the settings of a case
    return folder
