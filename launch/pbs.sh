#!/usr/bin/env bash
# Train on a cluster with PBS (OpenPBS, PBS Pro, Torque): qsub launch/pbs.sh, in the folder of the repository.
# Copy this file and change the lines marked with "<--".
#PBS -N distdl
#PBS -j oe
#PBS -l select=2:ncpus=4:mpiprocs=4
#PBS -l walltime=01:00:00
set -u
cd "${PBS_O_WORKDIR:-.}" || exit 2

# module load gcc openmpi                # <-- the site's own MPI: docs/cluster.md
export PYTHON=${PYTHON:-$PWD/.venv/bin/python}
training=(--run-dir runs/my-run --resume auto --dataset digits --epochs 60) # <-- the training
limit=58m                                # <-- two minutes less than the walltime above

# pbs_tmrsh starts processes under the control of PBS; without it, ssh does.
if command -v pbs_tmrsh >/dev/null; then export RSH=pbs_tmrsh; fi

# "timeout" warns all ranks with SIGUSR1: they write a checkpoint and end with code 75.
job=(timeout --foreground --preserve-status -s USR1 -k 100 "$limit"
    launch/hosts.sh "${PBS_NODEFILE:?start this script with qsub}" --restarts 3 -- "${training[@]}")
if [ "${1-}" = --dry-run ]; then
    printf '%q ' "${job[@]}" && echo
    exit 0
fi
"${job[@]}"
code=$?
if [ $code = 75 ]; then qsub launch/pbs.sh; fi # the next job continues
exit $code
