#!/usr/bin/env bash
# Train on several hosts that ssh reaches, with MPICH or Open MPI: launch/hosts.sh HOSTFILE -- --epochs 3
set -eu

usage() {
    cat <<'EOF'
usage: launch/hosts.sh HOSTFILE [flags] [-- flags of distdl.train]

Train on the hosts of HOSTFILE: one per line, such as n1:4 for four ranks on n1
(launch/hostfile.example). First check that ssh reaches each host without a
password, and that each has the same Python with the same versions. Then
distdl.doctor examines the job, and it starts.

  --check          only check the hosts and run distdl.doctor; flags of distdl.train
                   may follow: it examines their --run-dir
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
    --restarts)
        [[ ${2-} =~ ^[0-9]+$ ]] || fail "--restarts needs a whole number, not '${2-}': --restarts 5"
        words+=(--restarts "$2") && shift
        ;;
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
[ -r "$hostfile" ] && [ ! -d "$hostfile" ] || fail "cannot read $hostfile: expected a file with one host per line"

repository=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")
if [ -n "${PYTHON-}" ]; then
    python=$PYTHON
elif [ -n "${VIRTUAL_ENV-}" ]; then
    python=$VIRTUAL_ENV/bin/python
else
    python=$repository/.venv/bin/python
fi
command -v "$python" >/dev/null || fail "no Python called $python: set PYTHON to one that every host has"

# "n1 slots=2", "n1:2" and two lines "n1" all mean two ranks on n1. Open MPI's max_slots changes nothing here.
form='^([A-Za-z0-9._-]+)(:([0-9]{1,6})|[[:space:]]+slots=([0-9]{1,6})([[:space:]]+max[_-]slots=[0-9]+)?)?$'
declare -A ranks=()
names=() total=0 number=0
while read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line#$'\xef\xbb\xbf'} # Windows editors start a file with a mark, and end lines with a carriage return
    line=${line%%#*}
    line=${line%"${line##*[![:space:]]}"}
    [ -n "$line" ] || continue
    if ! [[ $line =~ $form && $line != -* ]]; then
        remedy=''
        [[ $line != *@* ]] || remedy='; the name of a user belongs in ~/.ssh/config'
        [[ $line != *:*:* ]] || remedy='; give an IPv6 address a name in ~/.ssh/config'
        fail "$hostfile, line $number: cannot read '$line': expected HOST, HOST:RANKS or HOST slots=RANKS$remedy"
    fi
    name=${BASH_REMATCH[1]} count=${BASH_REMATCH[3]}${BASH_REMATCH[4]}
    count=$((10#${count:-1}))
    [ $count -gt 0 ] || fail "$hostfile, line $number: '$line' has no rank: expected 1 or more; to leave out the host, remove the line"
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
    folder=() previous=''
    for word in "$@"; do
        case $previous in --run-dir) folder=(--run-dir "$word") ;; esac
        case $word in --run-dir=*) folder=("$word") ;; esac
        previous=$word
    done
    job=("$python" -P -m distdl.mpirun -n "$total" --hosts "$hosts" -- doctor "${folder[@]}")
else
    job=("$python" -P -m distdl.mpirun -n "$total" --hosts "$hosts" --doctor "${words[@]}" -- "$@")
fi
if [ -n "$dry_run" ]; then
    printf '%q ' "${job[@]}" && echo
    exit 0
fi

command -v "${rsh[0]}" >/dev/null ||
    fail "no program ${rsh[0]} on this host: install an ssh client, or set RSH to a program such as blaunch, without options"

# Every host is asked at the same time, and has 30 seconds for its answer: the last line, after any greeting.
versions='import distdl; from importlib.metadata import version as v; print(distdl.__version__, v("numpy"), v("mpi4py"))'
ours=$("$python" -P -c "$versions" 2>/dev/null) ||
    fail "$python cannot import distdl, NumPy and mpi4py: run $python -m pip install 'distdl-mpi[mpich]', or set PYTHON"
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
    answer=$(tail -n 1 "$answers/$name")
    said=$(tail -n 1 "$answers/$name.err")
    case $code in
    0) [ "$answer" = "$ours" ] && continue
        echo "launch/hosts.sh: $name has ${answer:-given no answer}, this host has $ours (distdl, NumPy, mpi4py): install the same versions" >&2 ;;
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
