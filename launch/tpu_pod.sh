#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs, from a workstation:
#
#   launch/tpu_pod.sh --name=mhc --zone=us-east5-a --type=v5p-1024 --spot \
#     --workdir=gs://BUCKET/runs/27b -- --config=configs/paper_27b.py \
#     --config.data.path=gs://BUCKET/tokens
#
# First launch/preflight.py looks at mesh, memory and text on this machine.
# Uses the slice of that name, or queues for a new one; copies the current
# commit to its workers, installs it, starts launch/train.py on all of them and
# shows the log of worker 0. When a worker dies or the slice is preempted it
# restarts, on a new slice if necessary, and training resumes from the last
# checkpoint in --workdir. The run belongs to the slice, not to this terminal:
# after an interrupt, the same command finds and follows it; one with another
# commit or other flags stops it and starts its own.
#
#   --name, --zone   of the slice          --type             v5p-1024, ...
#   --workdir        gs:// folder
#                                          --runtime-version  default: by --type
#   --project        default: gcloud's     --spot             may be preempted
#   --retries=20     restarts at most      --dry-run          print the commands
#   --               then flags of launch/train.py; --max_time ends one attempt,
#                    after which the run resumes
#
# Nothing is mounted: every worker reads and writes the bucket, which the service
# account of the slice must be allowed to.
#
# gcloud must be logged in; for more than one worker, `ssh-add
# ~/.ssh/google_compute_engine`. Capacity with other terms (a reservation, a
# network): create the slice yourself, under the same --name.
set -euo pipefail
exec 3>&1 # where a dry run prints, also from within $(...)

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

note() { printf '[tpu_pod] %s\n' "$*" >&2; }

# The arguments as one line of shell. Not printf %q: its $'...' is bash's own,
# and the functions below would be unreadable in a dry run.
quoted() {
  local word line='' quote="'" escaped="'\\''"
  for word; do
    if [[ -z $word || $word =~ [^a-zA-Z0-9_./:=,@%+-] ]]; then
      word=\'${word//$quote/"$escaped"}\'
    fi
    line+=" $word"
  done
  printf '%s' "${line# }"
}

run() {
  if [[ $dry ]]; then printf '+ %s\n' "$(quoted "$@")" >&3; else "$@"; fi
}

# --- The functions up to the next line are sent to the workers. ---

setup() { # COMMIT
  mkdir -p ~/mhc/"$1"
  tar -xzf ~/"mhc-$1.tar.gz" -C ~/mhc/"$1"
  cd ~/mhc/"$1"
  if [ -e .venv/installed ]; then return; fi
  # By uv, since the Python of TPU VMs may be older than 3.12. Newer ones have
  # it but forbid --user without the variable.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --clear --seed --python 3.12 .venv
  .venv/bin/python -m pip install --quiet -c constraints.txt '.[train,tpu,gcs]'
  touch .venv/installed
}

# One run per slice, which holds ~/mhc/lock: unlike a process id, a lock is not
# reused after a reboot. Its shell holds it, not the processes that it starts.
start() { # ID COMMIT FLAGS...
  cd ~/mhc
  exec 9>> lock
  if ! flock --nonblock 9; then
    kill -TERM "$(cat pid)" || true
    flock --timeout 120 9 || kill -KILL "$(cat pid)" || true
    flock --timeout 30 9
  fi
  rm -f pid status
  echo "$1" > id
  cd "$2"
  shift 2
  # The platforms by name: a worker without its TPU must not train on its CPU.
  # The status: a stopped run has been saved but has not finished.
  # shellcheck disable=SC2016
  JAX_PLATFORMS=tpu,cpu setsid bash -c \
    '"$@" 9>&- & echo $! > ../pid; wait $!; echo $? > ../status' _ \
    .venv/bin/python launch/train.py --distributed --stop_status=143 "$@" \
    < /dev/null >> ../train.log 2>&1 &
}

alive() { # ID
  cd ~/mhc 2> /dev/null && [ "$(cat id 2> /dev/null)" = "$1" ] &&
    ! flock --shared --nonblock lock true
}

follow() { # shows the log until the run ends, and returns its status
  cd ~/mhc
  flock --shared lock true < /dev/null > /dev/null 2>&1 &
  tail -c 4000 -F --pid=$! train.log 2> /dev/null
  exit "$(cat status 2> /dev/null || echo 1)"
}

# --- The functions below run on the workstation. ---

tpu() { run gcloud compute tpus "$@" "${where[@]}" --quiet; }

on() { # WORKER FUNCTION ARGUMENTS...
  local worker=$1
  shift
  # A worker that was preempted does not close its connections.
  tpu tpu-vm ssh "$name" --worker="$worker" \
    --ssh-flag=-oServerAliveInterval=30 \
    --command="set -eu; $(declare -f "$1"); $(quoted "$@")"
}

state() { tpu "$1" describe "$name" --format="value($2)" 2> /dev/null || true; }

create() {
  local options=(--node-id="$name" --accelerator-type="$type")
  options+=(--runtime-version="$runtime")
  if [[ $spot ]]; then options+=(--spot); fi
  tpu queued-resources create "$name" "${options[@]}"
}

# Waits for the slice, without limit: a queue for hundreds of chips is long.
acquire() {
  local node queue seen=/
  while :; do
    node=$(state tpu-vm state)
    if [[ $node == READY ]]; then return; fi
    queue=$(state queued-resources state.state)
    case $node/$queue in
      /) create || return ;;
      PREEMPTED/ | TERMINATED/) tpu tpu-vm delete "$name" || return ;;
      PREEMPTED/* | TERMINATED/* | */FAILED | */SUSPENDED)
        # A new request needs its name.
        tpu queued-resources delete "$name" --force || return
        ;;
    esac
    if [[ $dry ]]; then return; fi
    if [[ $node/$queue != "$seen" ]]; then
      note "waiting: slice ${node:-none}, request ${queue:-none}"
      seen=$node/$queue
    fi
    sleep 20
  done
}

# One attempt at the run: 0 when it has finished.
attempt() {
  local status
  acquire || return
  if ! on 0 alive "$id" || [[ $dry ]]; then
    tpu tpu-vm scp "$archive" "$name:mhc-$commit.tar.gz" --worker=all || return
    on all setup "$commit" || return
    on all start "$id" "$commit" "${flags[@]}" || return
  fi
  # Following worker 0 suffices: when one dies, JAX ends the others. But the end
  # of a connection is not the end of the run.
  while :; do
    status=0
    on 0 follow || status=$?
    if ((status == 0)) || ! on 0 alive "$id"; then return "$status"; fi
    sleep 10
  done
}

name='' zone='' type='' workdir='' project='' runtime='' spot='' dry=''
retries=20
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --runtime-version=*) runtime=${1#*=} ;;
    --retries=*) retries=${1#*=} ;;
    --spot) spot=1 ;;
    --dry-run) dry=1 ;;
    --name | --zone | --type | --workdir | --project | --runtime-version | \
      --retries)
      (($# > 1)) || fail "$1 has no value"
      set -- "$1=$2" "${@:3}"
      continue
      ;;
    -h | --help)
      sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
      exit
      ;;
    --)
      shift
      break
      ;;
    *) fail "$1 is not an option of tpu_pod.sh: flags of train.py go after --" ;;
  esac
  shift
done
for option in name zone type workdir; do
  [[ ${!option} ]] || fail "--$option is missing (--help lists the options)"
done
[[ $workdir == gs://?* ]] ||
  fail "--workdir=$workdir must be a gs:// folder: workers share no disk"
[[ $retries =~ ^[0-9]{1,4}$ ]] || fail "--retries=$retries must be a number"
if [[ -z $runtime ]]; then
  case $type in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "--runtime-version is missing, without default for --type=$type" ;;
  esac
fi
[[ $dry ]] || command -v gcloud > /dev/null ||
  fail 'gcloud is not on PATH: https://cloud.google.com/sdk/docs/install'
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
commit=$(git -C "$repo" rev-parse --short=12 HEAD 2> /dev/null) ||
  fail "$repo has no commit: run from a clone, whose commit the workers get"

# What cannot work is refused here, not on a slice that was waited for.
python=$repo/.venv/bin/python
if [[ ! -x $python ]]; then
  note 'no preflight, which needs the Python that make .venv/installed sets up'
elif [[ -f $repo/launch/preflight.py ]]; then
  status=0
  JAX_PLATFORMS=cpu "$python" "$repo/launch/preflight.py" \
    --topology="$type" "$@" >&2 || status=$?
  if ((status == 2)); then exit 2; fi
fi

where=(--zone="$zone")
if [[ $project ]]; then where+=(--project="$project"); fi
flags=(--workdir="$workdir" "$@")
id=$commit-$(quoted "${flags[@]}" | cksum | tr ' ' -)

if [[ $(git -C "$repo" --no-optional-locks status --porcelain) ]]; then
  note "uncommitted changes are not copied: the workers get commit $commit"
fi
# Made once, so that a restart next week is still this commit.
scratch=/tmp
if [[ -z $dry ]]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
fi
archive=$scratch/mhc-$commit.tar.gz
run git -C "$repo" archive --format=tar.gz --output="$archive" HEAD
trap 'note "stopped watching: the run continues on the slice, and the
same command follows it"; exit 130' INT

failures=0 pause=30
while :; do
  SECONDS=0 status=0
  attempt || status=$?
  if [[ $dry ]]; then
    printf '# If it fails: the same commands, up to %s retries, after 30, 60, ' \
      "$retries"
    printf '... at most 600 s.\n# train.py resumes from the last checkpoint '
    printf 'in %s.\n' "$workdir"
    exit
  fi
  if ((status == 0)); then break; fi
  # The status of a usage error; later, it may also be a disk or a bucket.
  if ((status == 2 && failures == 0 && SECONDS < 600)); then
    note 'exit status 2 is a usage error: not retried'
    exit 2
  fi
  failures=$((failures + 1))
  if ((failures > retries)); then
    note "gave up after $retries retries; the slice is kept, and billed"
    exit 1
  fi
  note "ended with status $status: retry $failures of $retries in $pause s," \
    'from the last checkpoint'
  sleep "$pause"
  pause=$((pause < 300 ? 2 * pause : 600))
done
note 'finished. The slice is kept, and billed; to delete it:'
quoted gcloud compute tpus queued-resources delete "$name" --force "${where[@]}"
echo
