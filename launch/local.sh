#!/usr/bin/env bash
# Train with several ranks on this machine, from whatever folder: launch/local.sh -n 4 -- --epochs 3
set -eu

usage() {
    cat <<'EOF'
usage: launch/local.sh -n RANKS [--restarts N] [--dry-run] [--module MODULE] [-- FLAGS OF THE TRAINER]

Train with RANKS ranks on this machine, with the MPI of the Python environment.

  -n RANKS         how many ranks to start
  --restarts N     start a job that fails again, up to N times, from its last checkpoint:
                   a rank or mpirun was killed, the host failed. Not after a wrong flag
                   or a damaged file (exit codes 2, 3), nor after a signal, which is
                   passed on to the ranks and ends it all
  --dry-run        print the command line instead of running it
  --module MODULE  run another module on every rank than distdl.train
  -h, --help       print this

The Python is $PYTHON if set, else that of the activated virtual environment, else that of
.venv in the repository, else python3. Relative paths mean the folder you are in.

  launch/local.sh -n 4 -- --dataset mnist --epochs 3
  launch/local.sh -n 4 --restarts 5 -- --run-dir my-run --epochs 20
EOF
}

fail() {
    echo "launch/local.sh: $1" >&2
    exit 2
}

case ${1-} in
-h | --help)
    usage
    exit 0
    ;;
esac

repository=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")
if [ -n "${PYTHON-}" ]; then
    python=$PYTHON
elif [ -n "${VIRTUAL_ENV-}" ]; then
    python=$VIRTUAL_ENV/bin/python
elif [ -x "$repository/.venv/bin/python" ]; then
    python=$repository/.venv/bin/python
else
    python=python3
fi

command -v "$python" >/dev/null ||
    fail "no Python called $python: install Python 3.11 or newer, or set PYTHON to one"
"$python" -c 'import importlib.util, sys, distdl.mpirun
needed = ("mpi4py", "numpy", "safetensors", "threadpoolctl")
sys.exit(not all(map(importlib.util.find_spec, needed)))' 2>/dev/null ||
    fail "$python cannot import distdl and what it needs: run $python -m pip install '${repository}[mpich]', or set PYTHON to a Python that has it"

exec "$python" -m distdl.mpirun "$@"
