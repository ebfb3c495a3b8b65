#!/usr/bin/env bash
# Train on several hosts that ssh reaches, with MPICH or Open MPI: launch/hosts.sh HOSTFILE -- --epochs 3
set -eu

usage() {
    cat <<'EOF'
usage: launch/hosts.sh HOSTFILE [flags] [-- flags of distdl.train]

Train on the hosts of HOSTFILE (launch/hostfile.example describes it). First check
that ssh reaches each host without a password, and that each has the same Python
with the same versions. Then distdl.doctor examines the job, and it starts.

  --check          only check the hosts and run distdl.doctor
  --restarts N     start a failed job again from its last checkpoint, up to N times
  --dry-run        print the command line instead of running it; check nothing
  -h, --help       print this text

The Python is $PYTHON, or that of the active virtual environment, or that of .venv
in the repository. Every host needs it at the same path, for example on a shared
file system. $RSH replaces ssh by a program with the same arguments, HOST COMMAND,
such as blaunch (LSF) or pbs_tmrsh (PBS). Options of ssh belong in ~/.ssh/config.
EOF
}

fail() {
    echo "launch/hosts.sh: $1" >&2
    exit 2
}

hostfile='' words=() check='' dry_run=''
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --check) check=yes ;;
    --dry-run) dry_run=yes ;;
    --restarts) words+=(--restarts "${2-}") && shift ;;
    --) shift && break ;;
    -*) fail "unknown flag $1: --help lists all flags; flags of distdl.train go after --" ;;
    *)
        [ -z "$hostfile" ] || fail "unexpected word $1: give one HOSTFILE"
        hostfile=$1
        ;;
    esac
    shift
done
[ -n "$hostfile" ] || fail "no HOSTFILE: copy launch/hostfile.example"
[ -r "$hostfile" ] || fail "cannot read $hostfile: expected a file with one host per line"

repository=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")
if [ -n "${PYTHON-}" ]; then
    python=$PYTHON
elif [ -n "${VIRTUAL_ENV-}" ]; then
    python=$VIRTUAL_ENV/bin/python
else
    python=$repository/.venv/bin/python
fi
command -v "$python" >/dev/null || fail "no Python called $python: set PYTHON to one that every host has"

# "n1 slots=2", "n1:2" and two lines "n1" all mean two ranks on n1.
declare -A ranks=()
names=() total=0
while read -r name rest || [ -n "$name" ]; do
    name=${name%%#*}
    [ -n "$name" ] || continue
    count=1
    if [[ $name == *:* ]]; then count=${name##*:} name=${name%%:*}; fi
    if [[ $rest =~ slots=([0-9]+) ]]; then count=${BASH_REMATCH[1]}; fi
    [[ $name =~ ^[A-Za-z0-9._-]+$ && $count =~ ^[1-9][0-9]*$ ]] ||
        fail "$hostfile: cannot read the line '$name $rest': expected HOST, HOST:RANKS or HOST slots=RANKS"
    [ -n "${ranks[$name]-}" ] || names+=("$name")
    ranks[$name]=$((${ranks[$name]-0} + count)) total=$((total + count))
done <"$hostfile"
[ $total -gt 0 ] || fail "$hostfile names no host: expected one host per line"
hosts=$(for name in "${names[@]}"; do printf ',%s:%s' "$name" "${ranks[$name]}"; done)
hosts=${hosts#,}

rsh=(ssh -o BatchMode=yes -o ConnectTimeout=10)
if [ -n "${RSH-}" ]; then
    rsh=("$RSH")
    export HYDRA_LAUNCHER=rsh HYDRA_LAUNCHER_EXEC=$RSH # MPICH
    export PRTE_MCA_plm_ssh_agent=$RSH OMPI_MCA_plm_rsh_agent=$RSH # Open MPI 5, 4
fi
if [ -n "$check" ]; then
    job=("$python" -P -m distdl.mpirun -n "$total" --hosts "$hosts" -- doctor)
else
    job=("$python" -P -m distdl.mpirun -n "$total" --hosts "$hosts" --doctor "${words[@]}" -- "$@")
fi
if [ -n "$dry_run" ]; then
    printf '%q ' "${job[@]}" && echo
    exit 0
fi

# Every host is asked at the same time, and has 30 seconds for its answer.
versions='import distdl; from importlib.metadata import version as v; print(distdl.__version__, v("numpy"), v("mpi4py"))'
ours=$("$python" -P -c "$versions") || fail "$python cannot import distdl: install it with $python -m pip install distdl-mpi"
command=$(printf '%q ' env ${PYTHONPATH:+"PYTHONPATH=$PYTHONPATH"} "$python" -P -c "$versions")
answers=$(mktemp -d)
trap 'rm -rf "$answers"' EXIT
for name in "${names[@]}"; do
    (timeout 30 "${rsh[@]}" "$name" "$command" >"$answers/$name" 2>"$answers/$name.err" </dev/null || echo $? >"$answers/$name.rc") &
done
wait
bad=''
for name in "${names[@]}"; do
    code=$(cat "$answers/$name.rc" 2>/dev/null || echo 0)
    said=$(tail -n 1 "$answers/$name.err")
    case $code in
    0) [ "$(cat "$answers/$name")" = "$ours" ] && continue
        echo "launch/hosts.sh: $name has $(cat "$answers/$name"), this host has $ours (distdl, NumPy, mpi4py): install the same versions" >&2 ;;
    124) echo "launch/hosts.sh: $name does not answer within 30 s: try ${rsh[*]} $name true" >&2 ;;
    255) echo "launch/hosts.sh: $name cannot be reached ($said): try ${rsh[*]} $name true" >&2 ;;
    *) echo "launch/hosts.sh: $name cannot run distdl ($said): it needs $python with distdl, as here" >&2 ;;
    esac
    bad=yes
done
[ -z "$bad" ] || exit 2
echo "distdl, NumPy, mpi4py $ours on ${names[*]}"
rm -rf "$answers"
exec "${job[@]}"
