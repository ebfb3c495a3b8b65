"""No rank acts on work that another rank does not agree to, and a recovery joins each agreement exactly once."""

import pytest

from distdl.errors import DamagedFileError, PeerLost, UserError
from distdl.parallel import OneProcess, commit, committed, from_rank_0, on_rank_0, recover, together


class Group(OneProcess):
    """Ranks whose agreements have the given `outcomes`: a bool, or an error to raise. Records this rank's flags."""

    def __init__(self, outcomes, numbers=(0, 1, 2, 3), flags=None):
        super().__init__()
        self.outcomes, self.numbers = outcomes, list(numbers)
        self.flags = [] if flags is None else flags

    @property
    def world_ranks(self):
        return self.numbers

    def agree(self, flag):
        self.flags.append(flag)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def shrink(self):
        return Group(self.outcomes, self.numbers[:-1], self.flags)


def refused(group, work):
    """Do work whose agreement fails: it must end with a failure that all ranks know."""
    with pytest.raises(PeerLost) as caught:
        work(group)
    assert caught.value.agreed
    assert group.flags == [True]


def failing(error):
    def work():
        raise error

    return work


def agreed(error):
    error.agreed = True
    return error


@pytest.mark.parametrize(
    "work",
    [
        commit,
        lambda group: together(group, lambda: "done"),
        lambda group: together(group, failing(UserError("a folder"))),
        lambda group: on_rank_0(group, lambda: "done"),
        lambda group: from_rank_0(group, lambda: "done"),
    ],
    ids=["commit", "together", "together, with an error", "on_rank_0", "from_rank_0"],
)
def test_work_that_the_ranks_do_not_agree_to_ends_as_a_failure_known_to_all(work):
    refused(Group([False]), work)


@pytest.mark.parametrize("error", [None, agreed(UserError("a folder"))])
def test_a_block_that_the_ranks_do_not_agree_to_ends_as_a_failure_known_to_all(error):
    def work(group):
        with committed(group):
            if error is not None:
                raise error

    refused(Group([False]), work)


def test_work_that_the_ranks_agree_to_gives_its_result():
    for work in (together, on_rank_0, from_rank_0):
        group = Group([True])
        assert work(group, lambda: "done") == "done"
        assert group.flags == [True]
    with pytest.raises(DamagedFileError, match="a file") as caught:
        together(Group([True]), failing(DamagedFileError("a file")))
    assert caught.value.agreed


def test_an_error_that_all_ranks_raise_is_raised_after_the_agreement():
    group = Group([True])
    with pytest.raises(UserError, match="a folder"), committed(group):
        raise agreed(UserError("a folder"))
    assert group.flags == [True]


@pytest.mark.parametrize(
    "error", [PeerLost("lost"), agreed(PeerLost("lost")), UserError("on this rank alone"), RuntimeError("a defect")]
)
def test_an_error_of_one_rank_and_a_failure_are_raised_without_an_agreement(error):
    group = Group([])
    with pytest.raises(type(error)) as caught, committed(group):
        raise error
    assert caught.value is error
    assert group.flags == []


class Member:
    """A rank in a recovery that has nothing to take."""

    position = (0,)

    def __init__(self, communicator):
        self.communicator, self.rebuilt = communicator, []

    def rebuild(self):
        self.rebuilt.append(list(self.communicator.world_ranks))


@pytest.mark.parametrize(
    ("lost", "outcomes", "flags"),
    [
        pytest.param(PeerLost("lost"), [False, True], [False, True], id="a failure in the work: vote no first"),
        pytest.param(agreed(PeerLost("lost")), [True], [True], id="a failure in an agreement: no vote"),
        pytest.param(
            PeerLost("lost"),
            [agreed(PeerLost("another")), True],
            [False, True],
            id="that vote reports another",
        ),
        pytest.param(PeerLost("lost"), [False, False, True], [False, True, True], id="the last agreement fails once"),
        pytest.param(
            PeerLost("lost"),
            [False, agreed(PeerLost("another")), True],
            [False, True, True],
            id="the last agreement reports another failure",
        ),
    ],
)
def test_a_recovery_joins_each_agreement_of_its_groups_once(lost, outcomes, flags):
    """All ranks of a group must call `agree` equally often: MPI matches these calls by their order alone."""
    member = Member(Group(outcomes))
    done = []
    recovery = recover(member, lost, done.append)
    assert member.communicator.flags == flags
    assert member.communicator.outcomes == []
    groups = flags.count(True)
    assert member.rebuilt == [[0, 1, 2], [0, 1]][:groups]
    assert recovery.lost_ranks == [2, 3][-groups:]
    assert [action.value for action in done].count("shrink") == groups
