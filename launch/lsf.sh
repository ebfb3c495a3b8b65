#!/usr/bin/env bash
# Train on a cluster with LSF: bsub < launch/lsf.sh, in the folder of the repository.
# Copy this file and change the lines marked with "<--".
#BSUB -J distdl
#BSUB -o distdl-%J.txt
#BSUB -n 8
#BSUB -R "span[ptile=4]"
#BSUB -W 1:00
#BSUB -Q "75"
set -u
cd "${LS_SUBCWD:-.}" || exit 2

# module load gcc openmpi                # <-- the site's own MPI: docs/cluster.md
export PYTHON=${PYTHON:-$PWD/.venv/bin/python}
training=(--run-dir runs/my-run --resume auto --dataset digits --epochs 60) # <-- the training
limit=58m                                # <-- two minutes less than the limit -W above

# blaunch starts processes under the control of LSF; without it, ssh does.
if command -v blaunch >/dev/null; then export RSH=blaunch; fi

# "timeout" warns all ranks with SIGUSR1: they write a checkpoint and end with code 75. Then -Q "75" queues the job
# again, and it continues.
job=(timeout --foreground --preserve-status -s USR1 -k 100 "$limit"
    launch/hosts.sh "${LSB_DJOB_HOSTFILE:?start this script with bsub}" --restarts 3 -- "${training[@]}")
if [ "${1-}" = --dry-run ]; then
    printf '%q ' "${job[@]}" && echo
    exit 0
fi
exec "${job[@]}"
