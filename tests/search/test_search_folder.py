"""The folder of a search."""

import json
from dataclasses import replace

import pytest

from distdl.config import TrainConfig
from distdl.errors import UserError
from distdl.search.folder import SEARCH, SearchFolder, choose_folder, read_results
from distdl.search.settings import Range, SearchSettings

SETTINGS = SearchSettings(
    ranges=(Range("lr", 1e-4, 1e-1, "log"),), config=TrainConfig(model="mlp", epochs=1), trials=2, rounds=1
).checked()


def test_undo_removes_a_new_search_and_nothing_of_an_earlier_one(tmp_path):
    above = tmp_path / "above"
    new = SearchFolder(above / "search", ours=False)
    new.write(SEARCH, b"{}")
    new.undo()
    new.close()
    assert not above.exists()
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / SEARCH).write_text("{}")
    earlier = SearchFolder(tmp_path / "earlier", ours=False)
    earlier.undo()
    earlier.close()
    assert (tmp_path / "earlier" / SEARCH).read_text() == "{}"


def test_a_resume_accepts_an_empty_folder_or_a_search_and_refuses_other_files(tmp_path):
    settings = replace(SETTINGS, out=tmp_path, resume=True)
    assert choose_folder(settings) == tmp_path
    (tmp_path / "letter").write_text("x")
    with pytest.raises(UserError, match="holds no search, but other files"):
        choose_folder(settings)
    (tmp_path / SEARCH).write_text("{}")
    assert choose_folder(settings) == tmp_path


def test_a_search_is_continued_with_the_same_settings_only(tmp_path):
    ours = SETTINGS.to_json()
    (tmp_path / SEARCH).write_text(json.dumps(ours))
    assert read_results(tmp_path, SETTINGS, ours) == []
    with pytest.raises(UserError, match="seed is 3 here and 0 there; give the same"):
        read_results(tmp_path, SETTINGS, {**ours, "seed": 3})
