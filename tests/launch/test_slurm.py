"""`launch/slurm.sbatch` and both MPIs on a real Slurm of two nodes: every job ends with the receipt of one process.

A few jobs always run; DISTDL_FAULTS=full runs the rest.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from slurm_cluster import cluster, why_not

from distdl.job.mpirun_command import find_mpirun, mpirun_command
from distdl.errors import UserError
