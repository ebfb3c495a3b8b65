"""Shares follow measured speeds soon, but not noise. A slow rank is tried again."""

import itertools
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distdl.engine.timing import balance
from distdl.engine.timing.balance import Balance, BalancedDealer, Dealer
from distdl.parallel import contiguous_shards

EVEN = {2: (4, 4), 3: (2, 3, 3), 4: (2, 2, 2, 2)}


def play(decisions, seconds_at, steps, leaves=8):
    """Take steps in which rank r takes ``seconds_at(step)[r]`` per micro-batch; return the loads of each step."""
    played = []
    for step in range(steps):
        loads = decisions.shares(leaves)
        played.append(loads)
        seconds = seconds_at(step)
        decisions.observe([seconds[rank] if load else None for rank, load in enumerate(loads)])
    return played


def changes(played):
    return [step for step in range(1, len(played)) if played[step] != played[step - 1]]


def test_a_rank_that_takes_twice_as_long_soon_gets_a_smaller_share_and_keeps_it():
    played = play(Balance(2, 8), lambda _: [1.0, 2.0], 200)
    assert played[0] == (4, 4)
    assert played[balance.LEAST_STEPS + 1] == (5, 3)
    assert set(played[balance.LEAST_STEPS + 1 :]) == {(5, 3)}


def test_shares_become_equal_again_when_speeds_do():
    played = play(Balance(4, 8), lambda step: [1.0, 1.0, 4.0 if 20 <= step < 60 else 1.0, 1.0], 120)
    assert played[19] == EVEN[4]
    assert played[59][2] < 2
    assert played[119] == EVEN[4]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_noise_changes_no_share(ranks):
    chance = random.Random(1)
    played = play(Balance(ranks, 8), lambda _: [chance.uniform(0.9, 1.1) for _ in range(ranks)], 2000)
    assert set(played) == {EVEN[ranks]}


def test_strong_noise_changes_shares_rarely_and_only_by_one():
    chance = random.Random(1)
    played = play(Balance(3, 8), lambda _: [chance.uniform(0.8, 1.25) for _ in range(3)], 2000)
    assert {tuple(sorted(loads)) for loads in played} == {(2, 3, 3)}
    assert len(changes(played)) < 60


def test_noise_added_to_a_real_difference_changes_shares_little():
    chance = random.Random(2)
    played = play(Balance(2, 64), lambda _: [chance.gauss(1.0, 0.1), chance.gauss(2.0, 0.2)], 1000, leaves=64)
    slow = [loads[1] for loads in played[50:]]
    assert min(slow) >= 18
    assert max(slow) <= 25
    assert len(changes(played)) < 60


@pytest.mark.parametrize("when", [1, 2, 5, 50])
def test_a_single_slow_step_does_not_change_the_shares_for_long(when):
    played = play(Balance(2, 8), lambda step: [1.0, 1000.0 if step == when else 1.0], 100)
    assert min(loads[1] for loads in played) >= 3
    assert played[80:] == [(4, 4)] * 20


def test_the_time_of_the_first_step_is_ignored():
    assert changes(play(Balance(2, 8), lambda step: [1.0, 1000.0 if step == 0 else 1.0], 50)) == []


def test_shares_change_at_most_every_few_steps():
    chance = random.Random(3)
    found = changes(play(Balance(3, 64), lambda _: [10 ** chance.uniform(-1, 1) for _ in range(3)], 1000, leaves=64))
    assert len(found) > 20  # the speeds vary enough
    assert min(b - a for a, b in itertools.pairwise(found)) >= balance.LEAST_STEPS


def test_a_gain_of_a_few_percent_changes_no_share():
    assert changes(play(Balance(2, 1000), lambda _: [1.0, 1.08], 100, leaves=1000)) == []
    assert changes(play(Balance(2, 1000), lambda _: [1.0, 1.16], 100, leaves=1000)) != []


def test_a_rank_without_work_is_tried_and_gets_work_again_when_it_has_recovered():
    played = play(Balance(2, 8), lambda step: [1.0, 30.0 if step < 1000 else 1.0], 2000)
    assert played[60] == (8, 0)
    tried = [step for step in range(60, 1000) if played[step][1]]
    assert len(tried) > 2
    assert {played[step] for step in tried} == {(7, 1)}
    recovered = next(step for step in range(1000, 2000) if played[step][1])
    assert set(played[recovered + 50 :]) == {(4, 4)}


@pytest.mark.parametrize("slowness", [10.0, 100.0, 1000.0])
def test_trials_cost_at_most_a_few_percent_of_the_time(slowness):
    decisions = Balance(2, 8)
    play(decisions, lambda _: [1.0, slowness], 100)
    later = play(decisions, lambda _: [1.0, slowness], 20_000)
    seconds = sum(max(loads[0], slowness * loads[1]) for loads in later)
    assert any(loads[1] for loads in later)
    assert seconds <= 8 * len(later) * (1 + 1.5 * balance.COST_OF_TRIALS)


def test_ranks_on_trial_are_tried_in_the_same_step():
    decisions = Balance(4, 8)
    play(decisions, lambda _: [1.0, 50.0, 1.0, 50.0], 60)
    later = play(decisions, lambda _: [1.0, 50.0, 1.0, 50.0], 2500)
    tried = {loads for loads in later if loads[1] or loads[3]}
    assert tried == {(3, 1, 3, 1)}


def test_a_smaller_batch_with_two_ranks_on_trial_is_dealt_once():
    """The batch has fewer micro-batches than ranks on trial, so one of these gets none."""
    decisions = Balance(4, 8)
    both_on_trial = 0
    for _ in range(1500):
        loads = decisions.shares(8)
        both_on_trial += loads[1] > 0 and loads[3] > 0 and decisions.loads[1] == decisions.loads[3] == 0
        for count in range(8):
            smaller = decisions.shares(count)
            assert (sum(smaller), min(smaller) >= 0) == (count, True), smaller
        decisions.observe([seconds if load else None for seconds, load in zip((1, 50, 1, 50), loads, strict=True)])
    assert both_on_trial > 1


def test_a_rank_without_a_measurement_is_assumed_to_be_fast():
    """As after a first epoch that is only a ragged batch: rank 0 had no work."""
    decisions = Balance(2, 2)
    for _ in range(20):
        decisions.observe([None, 1.0])
    assert decisions.shares(2) == (1, 1)


@given(
    st.integers(1, 6),
    st.integers(6, 40),
    st.lists(
        st.tuples(st.lists(st.none() | st.floats(1e-6, 1e3), min_size=6, max_size=6), st.sampled_from([1, 1, 60, 300])),
        max_size=20,
    ),
    st.integers(0, 40),
)
def test_each_micro_batch_is_dealt_once_for_all_measurements(ranks, leaves, measured, ragged):
    """Each list of seconds is measured in several consecutive steps. Trials start after 50 steps or more."""
    decisions = Balance(ranks, leaves)
    for seconds, steps in measured:
        for _ in range(steps):
            loads = decisions.shares(leaves)
            for count, dealt in ((leaves, loads), (ragged, decisions.shares(ragged))):
                assert sum(dealt) == count
                assert min(dealt) >= 0
            decisions.observe([one if load else None for one, load in zip(seconds[:ranks], loads, strict=True)])


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def ranks_with_a_clock(ranks, leaves):
    clocks = [Clock() for _ in range(ranks)]
    return clocks, [BalancedDealer(rank, ranks, leaves, clock) for rank, clock in enumerate(clocks)]


def one_step(clocks, dealers, seconds, leaves=8, ragged=False):
    """Compute and sum a step as the trainer does; return the shards, and the new shares by each rank's decision."""
    shards = dealers[0].shards(leaves)
    assert all(dealer.shards(leaves) == shards for dealer in dealers)
    step = SimpleNamespace(micro_batch_size=2, samples=2 * leaves - ragged, shards=shards)
    total = {"seconds": 0.0, "timed": 0}
    for rank, dealer in enumerate(dealers):
        clocks[rank].now += 1000.0  # it waited, or did the rest of a step
        dealer.begin(step)
        for leaf in shards[rank]:
            smaller = ragged and leaf == leaves - 1
            clocks[rank].now += 0.01 if smaller else seconds[rank]
            record = {}
            dealer.micro_batch_done(step, leaf, record)
            total = {name: total[name] + record[name] for name in total}
    step.total = total
    for dealer in dealers:
        dealer.end(step)
    return shards, [dealer.new_shares for dealer in dealers]


def test_all_ranks_decide_on_the_same_shares():
    clocks, dealers = ranks_with_a_clock(3, 8)
    told = [one_step(clocks, dealers, [1.0, 3.0, 1.0])[1] for _ in range(10)]
    assert [step for step, said in enumerate(told) if said[0]] == [balance.LEAST_STEPS - 1]
    assert told[balance.LEAST_STEPS - 1] == [(4, 1, 3)] * 3 or told[balance.LEAST_STEPS - 1] == [(3, 1, 4)] * 3


def test_a_smaller_last_micro_batch_does_not_count_as_speed():
    clocks, dealers = ranks_with_a_clock(2, 8)
    told = [one_step(clocks, dealers, [1.0, 1.0], ragged=True)[1] for _ in range(30)]
    assert told == [[None, None]] * 30


def test_a_ragged_batch_is_dealt_by_the_measured_speeds():
    clocks, dealers = ranks_with_a_clock(2, 8)
    for _ in range(10):
        one_step(clocks, dealers, [1.0, 3.0])
    assert [len(shard) for shard in dealers[0].shards(4)] == [3, 1]
    assert [len(shard) for shard in dealers[0].shards(1)] == [1, 0]


def test_the_record_of_an_epoch_counts_the_micro_batches_of_each_rank():
    clocks, dealers = ranks_with_a_clock(2, 8)
    computed = [0, 0]
    for _ in range(10):
        shards, _ = one_step(clocks, dealers, [1.0, 2.0])
        computed = [count + len(shard) for count, shard in zip(computed, shards, strict=True)]
    assert dealers[1].epoch_record() == {"shares": computed}
    assert dealers[1].epoch_record() == {"shares": [0, 0]}


def test_without_balance_shards_are_contiguous_and_nothing_is_measured():
    dealer = Dealer(3)
    assert dealer.shards(8) == contiguous_shards(8, 3)
    assert dealer.fields == ()
    assert dealer.new_shares is None
    assert dealer.epoch_record() == {}
