#!/usr/bin/env bash
# Train with PBS (OpenPBS, PBS Pro, Torque). Copy this file, change the two marked places, then, in the folder of the
# repository:
#
#   PBS_NODEFILE=x bash launch/pbs.sh --dry-run      print the command that the job runs
#   qsub launch/pbs.sh                               submit the job
#
# Before the time limit all ranks stop after the same step, with a checkpoint. Then the job submits the next one, which
# continues with the same bits.

# 1. CHANGE the resources: one rank per core (mpiprocs = ncpus), and the time limit also in `limit` below.
#PBS -l select=2:ncpus=4:mpiprocs=4
#PBS -l walltime=04:00:00
#PBS -N distdl -j oe
limit=238m # two minutes less than the time limit
this=launch/pbs.sh # the job submits this file again: CHANGE it if you rename the file

# 2. CHANGE the flags of distdl.train.
training=(--run-dir my-run --resume auto --dataset digits --epochs 20)
# module load openmpi           # the site's own MPI, see docs/cluster.md

set -u
cd "${PBS_O_WORKDIR:-.}" || exit 2
if command -v pbs_tmrsh >/dev/null; then export RSH=pbs_tmrsh; fi # like ssh, but under the control of PBS

# `timeout` sends SIGUSR1 to mpirun at the limit: the ranks stop, with exit code 75.
job=(timeout --foreground --preserve-status -s USR1 -k 100 "$limit"
    launch/hosts.sh "${PBS_NODEFILE:?start this script with qsub}" --restarts 3 -- "${training[@]}")
printf '%q ' "${job[@]}"
echo
[[ ${1-} != --dry-run ]] || exit 0
for file in launch/hosts.sh "$this"; do
    [[ -r $file ]] && continue
    echo "pbs.sh: no $file in $PWD: submit the job in the folder of the repository, and set this= to this file" >&2
    exit 2
done
"${job[@]}"
code=$?
if [[ $code == 75 ]]; then qsub "$this"; fi
exit $code
