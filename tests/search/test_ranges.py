"""Flags become settings, or are refused in one line before anything is loaded or written."""

import re

import pytest

from distdl.config import TrainConfig
from distdl.errors import UserError
from distdl.search.__main__ import parse
from distdl.search.settings import SEARCHABLE, WITHOUT_EFFECT, Range, SearchSettings, parse_range


def flags(text):
    return text.split()


def test_a_command_line_becomes_settings():
    settings = parse(
        flags(
            "--range lr=1e-6:1e-2:log --range batch-size=16:64 --trials 8 --keep .5 --seed 3 -- --model mlp --epochs 4"
        )
    )
    assert settings.ranges == (Range("lr", 1e-6, 1e-2, "log"), Range("batch_size", 16, 64))
    assert type(settings.ranges[1].low) is int
    assert (settings.method, settings.rounds, settings.trials, settings.share, settings.seed) == (
        "random",
        3,
        8,
        0.5,
        3,
    )
    assert (settings.config.model, settings.config.epochs) == ("mlp", 4)


def test_only_numbers_that_affect_the_weights_can_be_searched():
    assert SEARCHABLE.items() >= {"lr": False, "weight_decay": False, "batch_size": True}.items()
    assert not SEARCHABLE.keys() & {"seed", "epochs", "max_steps", "log_every", "balance", "optimizer", "data_dir"}


def test_the_names_without_effect_are_settings():
    assert set(TrainConfig.__dataclass_fields__) >= set(WITHOUT_EFFECT)


LR = "--range lr=1e-3:1e-1:log "


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "there is nothing to search: give --range"),
        ("--range lr", "'lr': expected a setting with its lowest and highest value"),
        ("--range lr=1e-3", "expected a setting with its lowest and highest value"),
        ("--range lr=1:2:3:4", "expected a setting with its lowest and highest value"),
        ("--range lr=low:high", "expected a setting with its lowest and highest value"),
        ("--range lr=1:2:lag", "unknown scale of --range lr 'lag': expected one of linear, log; did you mean 'log'?"),
        ("--range learnrate=1:2", "unknown setting to search 'learnrate'"),
        ("--range weight-decy=0:1", "did you mean 'weight_decay'?"),
        ("--range optimizer=1:2", "unknown setting to search 'optimizer'"),
        ("--range seed=1:2", "unknown setting to search 'seed'"),
        ("--range lr=2:1", "2 is not below 1; give the lower end first"),
        ("--range lr=1:1", "1 is not below 1"),
        ("--range weight-decay=0:1:log", "a logarithmic scale begins above 0"),
        ("--range lr=nan:1", "expected two finite numbers"),
        ("--range lr=1:inf", "expected two finite numbers"),
        ("--range lr=0:1", "the ranges contain invalid values: --lr must be above 0"),
        ("--range batch-size=1.5:8", "batch-size is a whole number; give whole ends"),
        (
            "--range batch-size=8:64",
            "the ranges contain invalid values: --micro-batch-size 16 is larger than --batch-size 8",
        ),
        (LR + "--range lr=1e-3:1e-2", "--range lr is given 2 times"),
        (
            "--range lr-step-factor=.1:.9",
            "lr-step-factor has no effect with --schedule constant: give -- --schedule",
        ),
        (
            "--range lr-step-epochs=1:9 -- --schedule cosine",
            "lr-step-epochs has no effect with --schedule cosine",
        ),
        (LR + "--trials 0", "--trials must be at least 1"),
        (LR + "--trials 1", "--trials 1 leaves no range to narrow for --rounds 3"),
        (LR + "--trials some", "--trials must be a whole number, not 'some'"),
        (LR + "--rounds 0", "--rounds must be at least 1"),
        (LR + "--keep 0", "--keep must be above 0 and below 1"),
        (LR + "--keep 1", "--keep must be above 0 and below 1"),
        (LR + "--keep nan", "--keep must be above 0 and below 1"),
        (LR + "--seed -1", "--seed must be at least 0"),
        (LR + "--method halfing", "unknown method 'halfing': expected one of halving, random; did you mean 'halving'?"),
        (LR + "--method halving -- --epochs 2", "--epochs 2 cannot be divided into --rounds 3 with --keep 0.5"),
        (LR + "--ranks-per-trial 0", "--ranks-per-trial must be at least 1"),
        (LR + "--resume", "--resume continues the search in --out"),
        (LR + "--trails 3", "unknown flag --trails: did you mean --trials?"),
        (LR + "-- --lr 0.1", "--lr is searched by --range lr=0.001:0.1:log, and given after --"),
        (LR + "-- --run-dir x", "--run-dir is set by distdl.search itself"),
        (LR + "-- --max_steps=4", "--max_steps is set by distdl.search itself"),
        (LR + "-- --modle mlp", "unknown flag --modle: did you mean --model?"),
        (LR + "-- --dataset digit", "unknown dataset 'digit'"),
    ],
)
def test_invalid_flags_are_refused_in_one_line(line, said):
    with pytest.raises(UserError) as raised:
        parse(flags(line))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_config_file_with_max_steps_is_refused(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(TrainConfig(model="mlp", max_steps=5).checked().to_toml())
    with pytest.raises(UserError, match=r"max_steps = 5 of the config: .* leave it out of the file"):
        parse(flags(f"{LR}-- --config {file} --epochs 1"))
    file.write_text(TrainConfig(model="mlp", lr=0.3).checked().to_toml())
    assert parse(flags(f"{LR}-- --config {file}")).config.model == "mlp", "a range wins over the file, as a flag does"


def test_the_step_factor_can_be_searched_with_a_step_schedule():
    assert parse(flags("--range lr-step-factor=.1:.9 -- --schedule step")).ranges[0].name == "lr_step_factor"


def test_a_range_is_printed_as_it_was_given():
    for text in ("lr=1e-06:0.01:log", "batch-size=16:64", "weight-decay=0.123456789:0.5"):
        assert str(parse_range(text)) == text


def test_halving_doubles_the_epochs_up_to_those_of_the_config():
    ranges = (Range("lr", 1e-3, 1e-1, "log"),)
    settings = SearchSettings(ranges=ranges, config=TrainConfig(epochs=20), method="halving", rounds=4).checked()
    assert settings.epochs == [3, 5, 10, 20]
    assert SearchSettings(ranges=ranges, config=TrainConfig(epochs=20), rounds=4).checked().epochs == [20] * 4


def test_settings_from_a_script_are_checked_too():
    for ranges in ((Range("lr", 2, 1),), (Range("lr", 0, 1),), (Range("nothing", 0, 1),), ()):
        with pytest.raises(UserError, match=re.compile("range|setting")):
            SearchSettings(ranges=ranges).checked()
