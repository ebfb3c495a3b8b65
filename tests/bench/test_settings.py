"""Flags become settings, or are refused in one line."""

import pytest

from distdl.bench import __main__ as bench
from distdl.bench import settings as settings_module
from distdl.bench.settings import BenchSettings, Interconnect, parse_interconnect, parse_shape, rank_counts
from distdl.errors import UserError
from distdl.parallel import REDUCTIONS


def test_the_settings_list_all_reductions():
    assert set(settings_module.REDUCTIONS) == set(REDUCTIONS)


@pytest.mark.parametrize(
    ("text", "latency", "bandwidth"),
    [
        ("10us,10Gbit", 1e-5, 1.25e9),
        ("10 us, 10 Gbit/s", 1e-5, 1.25e9),
        ("1.5ms,100Mbit", 1.5e-3, 1.25e7),
        ("500ns,12.5GB", 5e-7, 1.25e10),
        ("0us,1TB/s", 0.0, 1e12),
    ],
)
def test_an_interconnect_is_latency_and_bandwidth(text, latency, bandwidth):
    assert parse_interconnect(text) == Interconnect(pytest.approx(latency), pytest.approx(bandwidth))


@pytest.mark.parametrize("text", ["", "10us", "10,10", "10us,0Gbit", "-1us,10Gbit", "10us,10", "nanus,1GB", "1us;1GB"])
def test_no_other_text_is_an_interconnect(text):
    with pytest.raises(UserError, match="expected latency and bandwidth"):
        parse_interconnect(text)


@pytest.mark.parametrize("text", ["28", "28x28", "28x28x1x1", "-1x2x3", "axbxc", "2.5x3x1", "", "1x2x99999999"])
def test_no_other_text_is_a_shape(text):
    with pytest.raises(UserError, match="expected height x width x channels"):
        parse_shape(text)


def test_the_numbers_of_ranks_double_and_end_with_all():
    assert [rank_counts(None, size) for size in (1, 2, 3, 4, 7)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4), (1, 2, 4, 7)]
    with pytest.raises(UserError, match=r"--ranks 8 is more than the 4 ranks of this job: start it with mpirun -n 8"):
        rank_counts([2, 8], 4)


def test_flags_become_settings():
    flags = ["--model", "mlp", "--input", "8x8x3", "--ranks", "2,1", "--network", "1us,1GB", "--steps", "3", "--layers"]
    assert bench.parse(flags) == BenchSettings(
        model="mlp", input_shape=(8, 8, 3), ranks=(1, 2), interconnect=Interconnect(1e-6, 1e9), steps=3, layers=True
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--repetitions", "-1"], "--repetitions must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--micro-batch-size", "x"], "--micro-batch-size"),
        (["--input", "0x8x1"], "--input must be at least 1"),
        (["--ranks", "0"], "--ranks must be at least 1"),
        (["--ranks", "1;2"], "expected numbers with commas"),
        (["--model", "simple_convet"], "did you mean 'simple_convnet'?"),
        (["--model", "models/net:net"], "does not name a function: give file.py:function or package.module:function"),
        (["--model", "net.py:net()"], "does not name a function"),
        (["--optimizer", "adma"], "did you mean 'adam'?"),
        (["--reduction", "ring"], "expected one of allreduce, tree"),
        (["--scaling", "week"], "did you mean 'weak'?"),
        (["--dataset", "imagenet"], "unknown dataset"),
        (["--dataset", "digits", "--input", "8x8x1"], "exclude each other"),
        (["--batch-size", "8"], "--micro-batch-size 16 is larger than --batch-size 8"),
        (["--batch-size", "20"], "is not a multiple of"),
        (["--scaling", "none"], "leaves nothing to measure"),
        (["--scaling", "none", "--layers", "--network", "10us,10Gbit"], "--network has no effect with --scaling none"),
        (["--data-dir", "there"], "--data-dir has no effect without --dataset mnist"),
        (["--data-dir", "there", "--dataset", "digits"], "--data-dir has no effect without --dataset mnist"),
        (["--network", "fast"], "expected latency and bandwidth"),
        (["--nonsense"], "unknown flag --nonsense: --help lists all flags"),
    ],
)
def test_invalid_flags_are_refused_in_one_line(flags, said):
    with pytest.raises(UserError) as raised:
        bench.parse(flags)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
