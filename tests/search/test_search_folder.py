"""The folder of a search."""

import json
from dataclasses import asdict, replace

import pytest

from distdl.config import TrainConfig
from distdl.errors import DamagedFileError, UserError
from distdl.search.folder import RESULTS, SEARCH, SearchFolder, choose_folder, read_results
from distdl.search.procedure import TrialResult, trials_of_round
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


def test_saved_results_are_read_again_and_a_line_of_another_kind_is_damage(tmp_path):
    ours = SETTINGS.to_json()
    outcome = {"steps": 6, "validation_loss": 0.5, "validation_accuracy": 0.9, "test_accuracy": None}
    results = [
        TrialResult(**asdict(trial), **outcome, weights_sha256="0" * 64) for trial in trials_of_round(SETTINGS, 1, [])
    ]
    folder = SearchFolder(tmp_path, ours=False)
    folder.write(SEARCH, json.dumps(ours).encode())
    folder.save(results)
    folder.close()
    assert read_results(tmp_path, SETTINGS, ours) == results
    for line in ("[1]", "{}"):
        (tmp_path / RESULTS).write_text(f"{line}\n")
        with pytest.raises(DamagedFileError, match=r"results.jsonl is damaged: line 1"):
            read_results(tmp_path, SETTINGS, ours)
