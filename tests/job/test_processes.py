"""What `/proc` tells of other processes."""

import os
import signal
import subprocess
import time

from distdl.job.processes import look_at, stopped_ranks


def test_stopped_ranks_of_a_host_are_named():
    launcher = look_at(os.getpid())
    child = subprocess.Popen(["sleep", "600"])
    try:
        assert stopped_ranks(launcher) == stopped_ranks(None) == ""
        child.send_signal(signal.SIGSTOP)
        while look_at(child.pid).state != "T":
            time.sleep(0.01)
        assert stopped_ranks(launcher) == f"; stopped on host {os.uname().nodename}: process {child.pid}"
    finally:
        child.kill()
        child.wait()
