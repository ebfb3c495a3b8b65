"""Recovery without processes: every order of events and every moment of death of a few ranks, exhaustively.

The model assumes only the promises of the MPI standard:

- A collective call can complete on a rank once all ranks of the group have entered it (a broadcast: once its root has).
  It can fail on any rank once a rank of the group has died or revoked the group.
- An agreement or a shrink is decided once all living ranks have entered it, equally for all of them. A rank that
  entered it and died may count or not.
- MPI matches the agreements and shrinks of a group by their order alone.

In the model, a rank that dies has always entered its next call. This covers the other case: if it has not entered the
call, the other ranks have no further possibilities.
"""

from dataclasses import dataclass, replace

import pytest

from distdl.errors import PeerLost
from distdl.parallel import CompletedRecovery, OneProcess, Survivors, recover
from distdl.parallel.recovery import Action, Recovery

AGREEMENTS = {"commit", Action.VOTE_NO, Action.AGREE, Action.SHRINK}


@dataclass(frozen=True)
class Rank:
    """`steps`: the steps it has taken, in order; `call`: the call it has entered, the n-th of its kind on `group`."""

    alive: bool = True
    group: int = 0
    call: object = "work"
    calls: int = 1
    agreements: int = 0
    recovering: tuple | None = None
    steps: tuple = ()
    shown: int = -1
    coordinator: int = 0

    @property
    def finished(self):
        return self.call == "end"


@dataclass(frozen=True)
class World:
    ranks: tuple
    groups: tuple  #: (members, revoked, results of its agreements)
    deaths: int


class Model:
    def __init__(self, ranks, steps, deaths, first_steps, recovery=Recovery):
        self.steps, self.deaths, self.recovery = steps, deaths, recovery
        everyone = tuple(range(ranks))
        # Ranks at different positions start with a failure that all of them have seen.
        unequal = len(set(first_steps)) > 1
        start = []
        for taken in first_steps:
            rank = Rank(steps=tuple(range(taken)))
            start.append(self.enter(replace(rank, recovering=(Action.VOTE_NO, 0)), Action.VOTE_NO) if unequal else rank)
        self.start = World(tuple(start), ((everyone, unequal, ()),), 0)

    def enter(self, rank, call):
        """Let a rank enter its next call."""
        if call in AGREEMENTS:
            return replace(rank, call=call, agreements=rank.agreements + 1)
        shown = len(rank.steps) if call is Action.COMPARE else rank.shown
        return replace(rank, call=call, calls=rank.calls + 1, shown=shown)

    def next_of(self, rank):
        """Let a rank that is not recovering start its next step, or end."""
        if len(rank.steps) == self.steps:
            return replace(rank, call="end", recovering=None)
        return self.enter(replace(rank, recovering=None), "work")

    def recovery_of(self, rank):
        recovery = self.recovery(agreed=True)
        recovery.action, recovery.source = rank.recovering
        return recovery

    def go_by(self, rank, recovery):
        rank = replace(rank, recovering=(recovery.action, recovery.source))
        return self.next_of(rank) if recovery.action is Action.CONTINUE else self.enter(rank, recovery.action)

    def after_failure(self, rank, *, agreed):
        if rank.recovering is None:
            return self.go_by(rank, self.recovery(agreed=agreed))
        recovery = self.recovery_of(rank)
        recovery.failed(agreed=agreed)
        return self.go_by(rank, recovery)

    def successors(self, world):
        for number, rank in enumerate(world.ranks):
            if not rank.alive:
                continue
            if world.deaths < self.deaths:
                yield self.put(world, number, replace(rank, alive=False), deaths=world.deaths + 1)
            if rank.finished:
                continue
            step = self.agreement if rank.call in AGREEMENTS else self.collective
            yield from step(world, number, rank)

    def put(self, world, number, rank, *, groups=None, deaths=None):
        ranks = (*world.ranks[:number], rank, *world.ranks[number + 1 :])
        return World(ranks, groups or world.groups, world.deaths if deaths is None else deaths)

    def collective(self, world, number, rank):
        members, revoked, _ = world.groups[rank.group]
        others = [world.ranks[member] for member in members]
        if revoked or not all(other.alive for other in others):
            groups = list(world.groups)
            groups[rank.group] = (members, True, groups[rank.group][2])
            yield self.put(world, number, self.after_failure(rank, agreed=False), groups=tuple(groups))
        needed = others
        if rank.call is Action.TAKE:
            needed = [others[rank.recovering[1]]]
        # A rank leaves the group for the next one together with all living ranks, so no rank waits for it here.
        if all(other.group == rank.group and other.calls >= rank.calls for other in needed):
            yield self.put(world, number, self.completed(world, number, rank, others))

    def completed(self, world, number, rank, others):
        if rank.call == "work":
            return self.enter(rank, "commit")
        recovery = self.recovery_of(rank)
        if rank.call is Action.COMPARE:
            recovery.compared([[other.shown] for other in others])
            return self.go_by(rank, recovery)
        if rank.call is Action.TAKE:
            ahead = others[recovery.source].steps
            rank = replace(rank, steps=max(rank.steps, ahead, key=len))
        if rank.call is Action.REBUILD:
            members = world.groups[rank.group][0]
            assert number in members
            rank = replace(rank, coordinator=members[0])
        recovery.completed()
        return self.go_by(rank, recovery)

    def agreement(self, world, number, rank):
        members, revoked, decided = world.groups[rank.group]
        turn = rank.agreements - 1
        if turn < len(decided):
            yield self.put(world, number, self.decided(rank, decided[turn], world))
            return
        entered = {
            member: world.ranks[member]
            for member in members
            if world.ranks[member].group == rank.group and world.ranks[member].agreements == rank.agreements
        }
        if any(world.ranks[member].alive and member not in entered for member in members):
            return
        kinds = {other.call is Action.SHRINK for other in entered.values() if other.alive}
        assert len(kinds) == 1, "an agreement met a shrink"
        dead = [member for member in members if not world.ranks[member].alive]
        if rank.call is Action.SHRINK:
            unnoticed = [member for member in dead if member in entered and world.ranks[member].call is Action.SHRINK]
            for counted in {(), tuple(unnoticed)}:
                survivors = tuple(member for member in members if member not in dead or member in counted)
                groups = list(world.groups)
                groups[rank.group] = (members, revoked, (*decided, len(groups)))
                groups.append((survivors, False, ()))
                yield World(world.ranks, tuple(groups), world.deaths)
            return
        all_yes = all(other.call is not Action.VOTE_NO for other in entered.values())
        outcomes = {False} if not all_yes else {True} if not dead else {False, len(entered) == len(members)}
        for outcome in outcomes:
            groups = list(world.groups)
            groups[rank.group] = (members, revoked, (*decided, outcome))
            yield World(world.ranks, tuple(groups), world.deaths)

    def decided(self, rank, outcome, world):
        if rank.call == "commit":
            if not outcome:
                return self.after_failure(rank, agreed=True)
            return self.next_of(replace(rank, steps=(*rank.steps, len(rank.steps))))
        recovery = self.recovery_of(rank)
        if rank.call is Action.SHRINK:
            recovery.completed()
            return self.go_by(replace(rank, group=outcome, calls=0, agreements=0), recovery)
        if rank.call is Action.AGREE and not outcome:
            recovery.failed(agreed=True)
        else:
            recovery.completed()
        return self.go_by(rank, recovery)

    def check_end(self, world):
        """Assert that all living ranks have reached the same end."""
        living = {number: rank for number, rank in enumerate(world.ranks) if rank.alive}
        assert living
        for number, rank in living.items():
            assert rank.finished, f"rank {number} waits forever: {world}"
            assert rank.steps == tuple(range(self.steps)), "every step is taken once, in order"
        assert len({rank.group for rank in living.values()}) == 1
        (group,) = {rank.group for rank in living.values()}
        members = world.groups[group][0]
        assert set(living) <= set(members)
        if group > 0:
            assert {rank.coordinator for rank in living.values()} == {min(members)}


def explore(model):
    """Visit every state; every path ends, because a rank only enters calls and never leaves one."""
    seen, stack, ends = {model.start}, [model.start], 0
    while stack:
        world = stack.pop()
        following = list(model.successors(world))
        # A state in which ranks can only die is also an end: no rank has to die.
        if all(after.deaths > world.deaths for after in following):
            model.check_end(world)
            ends += 1
        for after in following:
            if after not in seen:
                seen.add(after)
                stack.append(after)
    return len(seen), ends


@pytest.mark.parametrize(
    ("ranks", "steps", "deaths", "first_steps"),
    [
        (2, 2, 1, (0, 0)),
        (3, 2, 2, (0, 0, 0)),
        (4, 1, 2, (0, 0, 0, 0)),
        (2, 2, 1, (0, 1)),
        (2, 2, 1, (1, 0)),
        (3, 2, 2, (0, 1, 0)),
        (3, 2, 1, (1, 0, 1)),
    ],
)
def test_the_survivors_take_every_step_once_for_any_deaths_at_any_time(ranks, steps, deaths, first_steps):
    states, ends = explore(Model(ranks, steps, deaths, first_steps))
    assert states > 100
    assert ends > 1


class NeverVotesNo(Recovery):
    """Shrinks at once, although others may still wait for its vote in the agreement before."""

    def failed(self, *, agreed):
        super().failed(agreed=True)


class NeverTakes(Recovery):
    """Never sees that its position differs."""

    def compared(self, positions):
        super().compared(positions[:1])


@pytest.mark.parametrize(("faulty", "first_steps"), [(NeverVotesNo, (0, 0, 0)), (NeverTakes, (0, 1, 0))])
def test_the_model_finds_the_fault_of_a_wrong_recovery(faulty, first_steps):
    with pytest.raises(AssertionError):
        explore(Model(3, 2, 2, first_steps, faulty))


class Shrinking(OneProcess):
    """A group that loses ranks by a script: the outcome of each agreement on it."""

    def __init__(self, ranks, script):
        super().__init__()
        self.size, self.numbers, self.script = len(ranks), ranks, script

    @property
    def world_ranks(self):
        return self.numbers

    def agree(self, flag):
        outcome = self.script.pop(0)
        if isinstance(outcome, PeerLost):
            raise outcome
        assert flag is outcome
        return flag

    def shrink(self):
        return Shrinking(self.numbers[:-1], self.script)


def agreed_failure():
    lost = PeerLost("lost")
    lost.agreed = True
    return lost


def test_work_starts_again_on_the_survivors_until_all_agree():
    tried = []

    def work(communicator):
        tried.append(communicator.world_ranks)
        if len(tried) == 2:
            raise PeerLost("in the middle")  # this rank must vote no, so that no rank waits
        return len(tried)

    survivors = Survivors(Shrinking([0, 1, 2, 3], [agreed_failure(), False, True]))
    assert survivors.run(work) == 3
    assert tried == [[0, 1, 2, 3], [0, 1, 2], [0, 1]]
    assert survivors.communicator.world_ranks == [0, 1]
    assert [recovery.lost_ranks for recovery in survivors.recoveries] == [[2, 3]]
    assert survivors.communicator.script == []


def test_work_without_a_failure_runs_once():
    communicator = OneProcess()
    survivors = Survivors(communicator)
    assert survivors.run(lambda _: "done") == "done"
    assert (survivors.communicator, survivors.recoveries) == (communicator, [])


def test_the_first_survivors_of_a_communicator_report_its_recovery_at_start():
    communicator = Shrinking([0, 1, 2, 3], [True, agreed_failure(), True])
    communicator.recovery_at_start = at_start = CompletedRecovery([4], 0.5)
    survivors = Survivors(communicator)
    survivors.run(lambda _: None)
    survivors.run(lambda _: None)
    assert survivors.recoveries[0] is at_start
    assert [recovery.lost_ranks for recovery in survivors.recoveries] == [[4], [3]]
    assert Survivors(communicator).recoveries == []


class Member:
    """A rank at the first of the `positions`; the others are at the rest."""

    def __init__(self, communicator, positions):
        self.communicator, self.positions, self.position, self.done = communicator, positions, positions[0], []
        type(communicator).allgather_json = lambda _, position: [position, *positions[1:]]

    def catch_up(self, source):
        self.done.append(f"take from {source}")

    def rebuild(self):
        self.done.append("rebuild")


@pytest.mark.parametrize(
    ("positions", "done"),
    [
        ([[3, 2], [3, 2]], ["rebuild"]),
        ([[3, 2], [4, 0], [4, 1], [4, 1]], ["take from 2", "rebuild"]),
    ],
)
def test_the_lowest_rank_at_the_latest_position_gives_its_state(positions, done):
    class Group(Shrinking):
        def shrink(self):
            return Group(self.numbers[:-1], self.script)

    member = Member(Group([0, 1, 2, 3, 4], [False, True]), positions)
    recovery = recover(member, PeerLost("lost"))
    assert member.done == done
    assert isinstance(recovery, CompletedRecovery)
    assert recovery.lost_ranks == [4]
