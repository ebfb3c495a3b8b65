"""Random numbers are a fixed function of their key: nothing is stored, and nothing else affects them."""

import hashlib
import itertools
import math
from collections import Counter

import numpy as np
import pytest

from distdl.rng import Key

MASK = 2**64 - 1


def philox_block(counter, key):
    """Philox4x64-10 as in the paper: four 64-bit words of counter and two of key give four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product2 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (product2 >> 64) ^ c1 ^ k0, product2 & MASK, (product0 >> 64) ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


def test_the_words_of_a_key_are_fixed_forever():
    """If this fails, every seed has another meaning, and old checkpoints cannot be resumed."""
    assert Key(0).of("dropout", 3).words(5).tolist() == [
        0x60D392ABA63D0004,
        0x8AA4418B69FCFFA7,
        0xBBA1D647D6EB8089,
        0xF2E192CD3DCA63CE,
        0x3B22A76674F205EF,
    ]
    assert Key(0).of("dropout", 3).half_words(3).tolist() == [0xA63D0004, 0x60D392AB, 0x69FCFFA7]
    assert Key(0).of("dropout", 3).permutation(5).tolist() == [4, 0, 1, 2, 3]


def test_the_words_are_those_of_published_philox_with_the_digest_of_the_path_as_key():
    known_answer = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox_block([0, 0, 0, 0], [0, 0]) == known_answer, "the vector that the authors of Philox published"

    digest = hashlib.blake2b(b"7/str:dropout/int:3", digest_size=16).digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]
    assert Key(7).of("dropout", 3).words(12).tolist() == [
        word
        for counter in (1, 2, 3)  # NumPy counts from 1
        for word in philox_block([counter, 0, 0, 0], key)
    ]

    numpys = np.random.Philox(key=int.from_bytes(digest, "little"))
    assert Key(7).of("dropout", 3).words(1001).tolist() == numpys.random_raw(1001).tolist()


METHODS = {
    "words": Key.words,
    "half_words": Key.half_words,
    "uniform": Key.uniform,
    "normal": Key.normal,
    "mask": lambda key, count: key.mask(count, 0.3),
    "permutation": Key.permutation,
}
DTYPES = {
    "words": np.uint64,
    "half_words": np.uint32,
    "uniform": np.float64,
    "normal": np.float64,
    "mask": np.bool_,
    "permutation": np.int64,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 1000, 1001])
def test_the_same_key_gives_the_same_numbers_each_time(method, count):
    key = Key(3).of("purpose", 1)
    first = METHODS[method](key, count)
    METHODS[method](key, 17)
    assert first.shape == (count,)
    assert first.dtype == DTYPES[method]
    assert METHODS[method](key, count).tobytes() == first.tobytes()
    assert METHODS[method](Key(3).of("purpose").of(1), count).tobytes() == first.tobytes()


def test_different_paths_give_different_numbers():
    keys = [
        *(Key(seed) for seed in (0, 1, -1, 2**70)),
        Key(0).of("a"),
        Key(0).of("a", 1),
        Key(0).of("a", "1"),
        Key(0).of("a1"),
        Key(0).of(1, "a"),
        Key(0).of("a", 1, 1),
        Key(0).of("a", 11),
        Key(0).of("a", -1),
        Key(0).of(""),
        Key(0).of("", ""),
        Key(0).of(0),
        Key(0).of(1),
        Key(1).of(0),
        Key(0).of("1"),
        Key(0).of("int:1"),
        Key(0).of("ä"),
        *(Key(0).of("step", step, index) for step in range(20) for index in range(20)),
    ]
    assert len(set(keys)) == len(keys)
    assert len({key.words(2).tobytes() for key in keys}) == len(keys)


@pytest.mark.parametrize("name", ["a/b", np.int64(3), True, 1.0, None], ids=repr)
def test_a_name_that_could_mean_another_stream_is_refused(name):
    with pytest.raises(AssertionError, match="no name of a stream"):
        Key(0).of("a", name)


@pytest.mark.parametrize("method", ["words", "half_words", "uniform", "mask"])
@pytest.mark.parametrize("few", [0, 1, 2, 5, 63])
def test_fewer_numbers_are_the_beginning_of_more(method, few):
    key = Key(5).of("prefix")
    assert METHODS[method](key, few).tolist() == METHODS[method](key, 64).tolist()[:few]


def test_uniforms_are_the_high_53_bits_of_each_word():
    key = Key(1).of("uniform")
    assert key.uniform(100).tolist() == [(word >> 11) / 2**53 for word in key.words(100).tolist()]


def test_uniforms_fill_zero_to_one_evenly():
    n = 200_000
    u = Key(0).of("uniform").uniform(n)
    assert u.min() >= 0
    assert u.max() < 1
    assert u.mean() == pytest.approx(1 / 2, abs=5 / math.sqrt(12 * n))
    assert u.var() == pytest.approx(1 / 12, rel=0.01)
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    assert chi_square(counts, n / 100) < upper_bound(99)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / math.sqrt(n)


def test_normals_are_those_of_box_and_muller_from_the_first_and_second_half_of_the_uniforms():
    key = Key(2).of("normal")
    u = key.uniform(10).tolist()
    radius, angle = [math.sqrt(-2 * math.log(1 - x)) for x in u[:5]], [2 * math.pi * x for x in u[5:]]
    expected = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    expected += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    assert key.normal(10).tolist() == pytest.approx(expected, rel=1e-12)
    assert key.normal(9).tolist() == key.normal(10).tolist()[:9]


def test_the_largest_word_still_gives_a_uniform_below_one(monkeypatch):
    monkeypatch.setattr(Key, "words", lambda self, count: np.full(count, MASK, np.uint64))
    assert Key(0).uniform(1)[0] == 1 - 2.0**-53
    assert np.isfinite(Key(0).normal(2)).all()


def test_normals_have_the_moments_and_tails_of_the_bell_curve():
    n = 400_000
    x = Key(0).of("normal").normal(n)
    assert x.mean() == pytest.approx(0, abs=5 / math.sqrt(n))
    assert x.var() == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    assert (x**3).mean() == pytest.approx(0, abs=5 * math.sqrt(15 / n))
    assert (x**4).mean() == pytest.approx(3, abs=5 * math.sqrt(96 / n))
    for beyond in (1.0, 2.0, 3.0, 4.0):
        expected = math.erfc(beyond / math.sqrt(2))
        share = (np.abs(x) > beyond).mean()
        assert share == pytest.approx(expected, abs=5 * math.sqrt(expected / n)), beyond
    assert abs(np.corrcoef(x[: n // 2], x[n // 2 :])[0, 1]) < 5 / math.sqrt(n / 2), "sine and cosine of one angle"


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.85, 0.999])
def test_masks_are_true_with_the_given_probability(probability):
    n = 200_000
    mask = Key(0).of("mask").mask(n, probability)
    spread = math.sqrt(probability * (1 - probability) / n)
    assert mask.mean() == pytest.approx(probability, abs=5 * spread)


def test_masks_of_zero_are_never_true_and_masks_of_one_always():
    key = Key(0).of("mask")
    assert not key.mask(100_000, 0.0).any()
    assert not key.mask(100_000, 1e-12).any(), "below the precision of 2**-32"
    assert key.mask(100_000, 1.0).all()
    assert key.mask(100_000, 1 - 2.0**-53).all()


def test_masks_compare_each_half_word_with_the_probability():
    key = Key(0).of("mask")
    half_words = key.half_words(1001).tolist()
    for probability in (1e-6, 0.25, 0.6, 1 - 2.0**-40):
        assert key.mask(1001, probability).tolist() == [word < int(probability * 2**32) for word in half_words]
    smallest = min(half_words)
    assert key.mask(1001, (smallest + 1) / 2**32).sum() == 1
    assert key.mask(1001, smallest / 2**32).sum() == 0


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 1797])
def test_a_permutation_holds_every_number_once(count):
    assert sorted(Key(0).of("order", 2).permutation(count).tolist()) == list(range(count))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_permutation_is_equally_frequent(count):
    keys = 200 * math.factorial(count)
    seen = Counter(tuple(Key(0).of("order", epoch).permutation(count).tolist()) for epoch in range(keys))
    counts = [seen[order] for order in itertools.permutations(range(count))]
    assert sum(counts) == keys
    assert chi_square(counts, 200) < upper_bound(len(counts) - 1)


def test_a_permutation_keeps_one_number_at_its_position_on_average():
    fixed = [int((Key(0).of("order", epoch).permutation(50) == np.arange(50)).sum()) for epoch in range(2000)]
    assert np.mean(fixed) == pytest.approx(1, abs=5 / math.sqrt(2000))


def test_keys_and_numpys_global_generator_do_not_affect_each_other():
    results = []
    for seed in (0, 1):
        np.random.seed(seed)  # noqa: NPY002
        before = repr(np.random.get_state())  # noqa: NPY002
        results.append([method(Key(0).of("a"), 10).tolist() for method in METHODS.values()])
        assert repr(np.random.get_state()) == before  # noqa: NPY002
    assert results[0] == results[1]


def chi_square(counts, expected):
    return sum((count - expected) ** 2 / expected for count in counts)


def upper_bound(degrees):
    """Return the mean of the chi-square distribution plus five standard deviations."""
    return degrees + 5 * math.sqrt(2 * degrees)
