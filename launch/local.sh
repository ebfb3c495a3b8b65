#!/usr/bin/env bash
# Train with several ranks on this machine, from any folder: launch/local.sh -n 4 -- --epochs 3
set -eu

usage() {
    cat <<'EOF'
usage: launch/local.sh -n RANKS [flags] [-- flags of distdl.train]

Train with RANKS ranks on this machine, with the MPI of the Python environment.

  -n RANKS         number of ranks to start
  --restarts N     start a failed job again from its last checkpoint, up to N
                   times, for example if a rank or mpirun was killed. A wrong
                   flag, a damaged file (exit codes 2, 3) or a signal ends the
                   job without a restart.
  --doctor         run distdl.doctor first; stop if the job will not work
  --dry-run        print the command line instead of running it
  --module MODULE  Python module that every rank runs instead of distdl.train
  -h, --help       print this text

The Python is $PYTHON if set, or that of the active virtual environment, or that
of .venv in the repository, or python3. Relative paths start from the current
folder.

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
elif [ -e "$repository/.venv/bin/python" ] || [ -L "$repository/.venv/bin/python" ]; then
    python=$repository/.venv/bin/python
else
    python=python3
fi

# A Python that cannot be executed, or cannot import distdl, is named with the remedy.
case $python in
*/*)
    [ -e "$python" ] || [ ! -L "$python" ] ||
        fail "$python is a link to a file that does not exist or is not accessible: create this environment again"
    [ ! -e "$python" ] || [ -x "$python" ] || fail "$python has no execute permission: chmod +x $python"
    ;;
esac
command -v "$python" >/dev/null ||
    fail "no Python called $python: install Python 3.11 or newer, or set PYTHON to one"
# -P: no file of the current folder, such as numpy.py, replaces a module.
code=0
"$python" -P -c 'import importlib.util, sys, distdl.mpirun
needed = ("mpi4py", "numpy", "safetensors", "threadpoolctl")
sys.exit(not all(map(importlib.util.find_spec, needed)))' 2>/dev/null || code=$?
case $code in
0) ;;
2) fail "$python is older than Python 3.11: install a newer one, or set PYTHON to one" ;;
126 | 127) fail "$python cannot be executed here (wrong kind of machine, or a file system without execution): set PYTHON to another one" ;;
*)
    install="$python -m pip install '${repository}[mpich]'"
    if [ ! -e "$repository/pyproject.toml" ]; then # a copy of this script elsewhere
        install="$python -m pip install 'distdl-mpi[mpich]'"
    elif [ ! -w "$repository" ]; then # pip builds inside the folder
        install="cp -r '$repository' /tmp/distdl && $python -m pip install '/tmp/distdl[mpich]' (pip cannot build in $repository, which is read-only)"
    fi
    fail "$python cannot import distdl and its dependencies: run $install, or set PYTHON to a Python that has them"
    ;;
esac

exec "$python" -P -m distdl.mpirun "$@"
