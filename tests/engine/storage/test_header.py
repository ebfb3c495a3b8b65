"""One parser reads all headers. It returns the values of a sealed header, or names the unusable field."""

import json
import re

import numpy as np
import pytest

from distdl.data.signature import Signature
from distdl.engine.storage.header import CheckpointHeader, RunProgress
from distdl.errors import DamagedFileError

PROGRESS = {
    "train_loss": 0.5,
    "validation_loss": 0.25,
    "validation_accuracy": None,
    "best_step": 3,
    "train_seconds": 1.5,
    "best_score": -0.25,
    "skipped_steps": 2,
    "plateau_cuts": 1,
    "test_step": 3,
}
ADDED_LATER = {"skipped_steps", "plateau_cuts", "test_step"}
RAW = {
    "step": 6,
    "config": {"seed": 0},
    "progress": PROGRESS,
    "log_bytes": {"metrics": 10, "timing": 0},
    "data_sha256": "0",
    "versions": {"numpy": "2"},
    "kernel_family": "SkylakeX",
}


def test_a_header_is_the_same_json_after_it_was_read():
    header = CheckpointHeader.parse(json.loads(json.dumps(RAW)), "x", {"step": np.array([6])})
    assert json.dumps(header.to_json()) == json.dumps(RAW)
    assert header.progress.best_score == -0.25


def test_the_json_of_a_progress_has_a_best_score_and_later_fields_only_if_there_are_any():
    always = {"train_loss", "validation_loss", "validation_accuracy", "best_step", "train_seconds"}
    assert RunProgress().to_json().keys() == always
    assert RunProgress(best_step=2, best_score=0.5).to_json().keys() == always | {"best_score"}
    for name in ADDED_LATER:
        assert RunProgress(**{name: 1}).to_json().keys() == always | {name}
    assert RunProgress.from_json(RunProgress().to_json()) == RunProgress()
    assert RunProgress.from_json({**RunProgress().to_json(), "best_score": "x", "other": 1}) == RunProgress()


def test_a_header_made_from_a_progress_does_not_change_with_it():
    header = CheckpointHeader.parse(RAW, "x")
    stored = header.to_json()
    header.progress.train_seconds = 9.0
    assert stored["progress"]["train_seconds"] == 1.5


SIGNATURE = Signature("classification", 2, ("cat", "dog"), (8, 8, 1), "uint8", (0.5,), (1.0,))


def test_a_header_has_its_signature_and_one_of_an_older_version_has_none():
    raw = RAW | {"signature": SIGNATURE.to_json()}
    header = CheckpointHeader.parse(json.loads(json.dumps(raw)), "x")
    assert header.signature == SIGNATURE
    assert json.dumps(header.to_json()) == json.dumps(raw)
    assert CheckpointHeader.parse(RAW, "x").signature is None


def test_a_header_has_its_fingerprint_and_one_of_an_older_version_has_none():
    raw = RAW | {"fingerprint": {"exp": "1f", "sum": "2e"}}
    header = CheckpointHeader.parse(json.loads(json.dumps(raw)), "x")
    assert header.fingerprint == raw["fingerprint"]
    assert json.dumps(header.to_json()) == json.dumps(raw)
    assert CheckpointHeader.parse(RAW, "x").fingerprint is None


UNUSABLE = [
    *(("signature", {"signature": value}) for value in ([], "x", {}, SIGNATURE.to_json() | {"outputs": 0})),
    *((name, {name: value}) for name in RAW for value in (None, [], True)),
    *(("fingerprint", {"fingerprint": value}) for value in ([], "x", {"exp": 1}, {"exp": None})),
    ("step", {"step": -1}),
    ("step", {"step": 7}),
    *(("log_bytes", {"log_bytes": {"metrics": length}}) for length in (-1, 1.5, True, "5", None)),
    ("log_bytes", {"log_bytes": {"../elsewhere": 5}}),
    ("versions", {"versions": {"numpy": ["2"]}}),
    *(("progress", {"progress": {**PROGRESS, name: value}}) for name in PROGRESS for value in ("x", [1], True)),
    *(
        ("progress", {"progress": {**PROGRESS, name: value}})
        for name in ("best_step", "skipped_steps", "plateau_cuts", "test_step")
        for value in (-1, 7)
    ),
    *(("progress", {"progress": {**PROGRESS, name: 1}}) for name in ("train_loss", "train_seconds", "best_score")),
    *(("progress", {"progress": {**PROGRESS, name: 2.0}}) for name in ("best_step", "skipped_steps")),
    *(
        ("progress", {"progress": {**PROGRESS, name: None}})
        for name in ("best_score", "skipped_steps", "train_seconds")
    ),
    *(
        ("progress", {"progress": {key: value for key, value in PROGRESS.items() if key != name}})
        for name in PROGRESS
        if name not in ADDED_LATER
    ),
]


@pytest.mark.parametrize(("name", "changed"), UNUSABLE, ids=[str(changed) for _, changed in UNUSABLE])
def test_an_unusable_field_is_a_damaged_file_and_named(name, changed):
    with pytest.raises(DamagedFileError, match=re.escape(f"here/file is damaged: its header has no {name!r}")):
        CheckpointHeader.parse({**RAW, **changed}, "here/file", {"step": np.array([6])})


@pytest.mark.parametrize("raw", [None, [], {}, "x", 1])
def test_another_value_in_place_of_a_header_is_a_damaged_file(raw):
    with pytest.raises(DamagedFileError, match="no 'step'"):
        CheckpointHeader.parse(raw, "x")
