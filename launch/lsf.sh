#!/usr/bin/env bash
# Train with LSF. Copy this file, change the two marked places, then, in the folder of the repository:
#
#   LSB_DJOB_HOSTFILE=x bash launch/lsf.sh --dry-run      print the command that the job runs
#   bsub < launch/lsf.sh                                  submit the job
#
# Before the time limit all ranks stop after the same step, with a checkpoint and exit code 75. Then LSF queues the job
# again (-Q), and it continues with the same bits.

# 1. CHANGE the resources: one rank per core, and the time limit also in `limit` below.
#BSUB -n 8 -R "span[ptile=4]"
#BSUB -W 4:00
#BSUB -J distdl -o distdl-%J.log -Q "75"
limit=238m # two minutes less than the time limit

# 2. CHANGE the flags of distdl.train.
training=(--run-dir my-run --resume auto --dataset digits --epochs 20)
# module load openmpi           # the site's own MPI, see docs/cluster.md

set -u
cd "${LS_SUBCWD:-.}" || exit 2
if command -v blaunch >/dev/null; then export RSH=blaunch; fi # like ssh, but under the control of LSF

# `timeout` sends SIGUSR1 to mpirun at the limit.
job=(timeout --foreground --preserve-status -s USR1 -k 100 "$limit"
    launch/hosts.sh "${LSB_DJOB_HOSTFILE:?start this script with bsub}" --restarts 3 -- "${training[@]}")
printf '%q ' "${job[@]}"
echo
[[ ${1-} != --dry-run ]] || exit 0
if [[ ! -r launch/hosts.sh ]]; then
    echo "lsf.sh: no launch/hosts.sh in $PWD: submit the job in the folder of the repository" >&2
    exit 2
fi
exec "${job[@]}"
