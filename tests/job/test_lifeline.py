"""The parts of the lifeline; `tests/launch/test_killed_launcher.py` kills real launchers."""

import os
import socket

import pytest

from distdl.job.lifeline import server_is_gone
from distdl.job.processes import ancestors


def test_the_server_of_a_living_launcher_answers_and_that_of_a_dead_one_does_not():
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"prterun-host-1@0.0;tcp4://127.0.0.1:{server.getsockname()[1]}"
        assert not server_is_gone({"PMIX_SERVER_URI41": uri})
    assert server_is_gone({"PMIX_SERVER_URI41": uri})


@pytest.mark.parametrize("environment", [{}, {"PMI_RANK": "0"}, {"PMIX_SERVER_URI4": "usock:/tmp/pmix"}])
def test_without_the_name_of_a_server_none_is_missing(environment):
    assert not server_is_gone(environment)


def test_ancestors_lead_from_the_parent_to_the_first_process():
    chain = list(ancestors())
    assert chain[0].pid == os.getppid()
    assert [one.parent for one in chain[:-1]] == [one.pid for one in chain[1:]]
