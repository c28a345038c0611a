#!/usr/bin/env bash
# Trains or precomputes on a Cloud TPU slice: requests it, waits for it, installs the code on all workers, runs the
# command on them, follows their output, restarts after a preemption or a crash, and deletes the slice at the end.
#
#   launch/tpu_pod.sh [FLAGS] train --config=FILE --workdir=gs://BUCKET/FOLDER [FLAGS OF diffussm_jax.main]
#   launch/tpu_pod.sh [FLAGS] precompute --source=IMAGES --out=gs://BUCKET/FOLDER [FLAGS OF diffussm_jax.precompute]
#
#   --name=NAME                 name of the slice and of its queued resource
#   --zone=ZONE                 such as us-central2-b
#   --accelerator_type=TYPE     such as v4-32, v5litepod-16, v5p-8 or v6e-16; not with --existing
#   --runtime_version=VERSION   image of the machines; default: Google's image for the type
#   --project=PROJECT           default: gcloud's project
#   --service_account=ADDRESS   of the slice; default: the project's Compute Engine account; not with --existing
#   --spot                      requests a Spot slice: cheaper, may be preempted, is then deleted and requested again
#   --existing                  uses the existing slice NAME, and neither creates nor deletes a slice
#   --keep                      keeps the slice at the end
#   --extras=tpu,gcs,hub        extras of the package to install
#   --max_restarts=10           restarts after crashes; preemptions and saved runs (exit code 75) do not count
#   --grace=120                 seconds to save when this script is stopped
#   --poll=30                   seconds between polls of the state, and before a restart
#   --log=NAME.log              appends the output of the workers to this file
#   --dry_run                   prints the commands without running them
#
# The script copies HEAD of this repository, without uncommitted changes. On Ctrl-C and SIGTERM the program saves, and
# the script cleans up.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flag=([name]="" [zone]="" [accelerator_type]="" [runtime_version]="" [project]="" [service_account]="" [spot]=""
  [existing]="" [keep]="" [extras]="tpu,gcs,hub" [max_restarts]=10 [grace]=120 [poll]=30 [log]="" [dry_run]="")
switches="spot existing keep dry_run"
parse_flags "$@"
check name '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' "lower-case letters, digits and hyphens, beginning with a letter"
check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-central2-b"
[[ -z ${flag[project]} ]] || check project '([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]' "the ID of a project"
if [[ -n ${flag[existing]} ]]; then
  for name in accelerator_type runtime_version service_account spot; do
    [[ -z ${flag[$name]} ]] || die "--$name does not go with --existing, which makes no slice"
  done
else
  check accelerator_type 'v[234]-[1-9][0-9]*|v5litepod-[1-9][0-9]*|v5p-[1-9][0-9]*|v6e-[1-9][0-9]*' \
    "a type and a number, such as v4-32, v5litepod-16, v5p-8 or v6e-16"
  case ${flag[accelerator_type]} in # https://cloud.google.com/tpu/docs/runtimes
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
  flag[runtime_version]=${flag[runtime_version]:-$version}
  check runtime_version 'tpu-ubuntu[0-9]+-base|v[0-9]+(-alpha)?-tpuv[0-9][a-z0-9-]*' \
    "an image without a framework, such as tpu-ubuntu2204-base or v2-alpha-tpuv6e"
  [[ -z ${flag[service_account]} ]] || check service_account '[a-z0-9-]+@[a-z0-9.-]+\.gserviceaccount\.com' \
    "the address of a service account, such as trainer@my-project.iam.gserviceaccount.com"
fi
check extras '[a-z0-9]+(,[a-z0-9]+)*' "extras of the package, separated by commas"
check_number max_restarts
check_number grace
check_seconds poll
check_program cloud .venv/bin/python
check_program_exists gcloud git
git -C "$root" rev-parse --quiet --verify HEAD > /dev/null ||
  die "$root is no git repository with a commit, whose HEAD could be copied"
[[ $program != train ]] || git -C "$root" cat-file -e "HEAD:$config_file" 2> /dev/null ||
  die "--config: '$config_file' is not committed, and only HEAD is copied to the workers"
name=${flag[name]} log=${flag[log]:-${flag[name]}.log}
[[ $log == /* ]] || log=$PWD/$log
archive=${log%.log}.tar.gz
[[ -d $(dirname "$log") ]] || die "--log: there is no folder '$(dirname "$log")'"

place=("--zone=${flag[zone]}" --quiet)
[[ -z ${flag[project]} ]] || place+=("--project=${flag[project]}")
queue=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)
ssh_flags=("--ssh-flag=-o ServerAliveInterval=30" "--ssh-flag=-o ConnectTimeout=20") # finds lost machines in minutes
queue_state=("${queue[@]}" describe "$name" "${place[@]}" "--format=value(state.state)")
node_state=("${vm[@]}" describe "$name" "${place[@]}" "--format=value(state,networkEndpoints.len())")
delete=("${queue[@]}" delete "$name" "${place[@]}" --force)
session=$(date +%s)-$$
child="" owned="" installed="" running="" run_id="" now="" workers=1 answers=0 number=0

ask() { # COMMAND...: sets `now` to the state printed by describe, NOT_FOUND, or UNKNOWN after twenty failures
  local i answer
  for ((i = 0; i < 20; i++)); do
    answer=$("$@" 2>&1) || true
    if [[ $answer == *NOT_FOUND* ]]; then
      now=NOT_FOUND
      return
    elif [[ $answer =~ (^|$'\n')([A-Z_]+([[:space:]]+[0-9]+)?)$ ]]; then
      now=${BASH_REMATCH[2]}
      return
    fi
    pause "${flag[poll]}"
  done
  say "gcloud does not tell the state of $name: $answer"
  now=UNKNOWN
}

ready() { # whether the slice can be used; sets `workers`, its number of machines
  local before=""
  while true; do
    ask "${node_state[@]}"
    if [[ $now =~ ^READY[[:space:]]+([1-9][0-9]*)$ ]]; then
      workers=${BASH_REMATCH[1]}
      return
    fi
    [[ $now == "$before" ]] || say "the slice $name is ${now%%[[:space:]]*}"
    before=$now
    case ${now%%[[:space:]]*} in
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING) pause "${flag[poll]}" ;; # will become ready
      *) return 1 ;;
    esac
  done
}

patiently() { # COMMAND...: runs it so that a signal is handled at once; copies its output to the log
  local code=0
  # shellcheck disable=SC2016 # expanded by the inner shell
  start bash -o pipefail -c '"$@" 2>&1 | tee -a "$0"' "$log" "$@"
  wait "$child" || code=$?
  child=""
  return "$code"
}

fail() { # MESSAGE
  say "$1"
  exit 1
}

create() {
  local before=""
  local command=("${queue[@]}" create "$name" "--node-id=$name" "--accelerator-type=${flag[accelerator_type]}"
    "--runtime-version=${flag[runtime_version]}" "${place[@]}")
  [[ -z ${flag[service_account]} ]] || command+=("--service-account=${flag[service_account]}")
  [[ -z ${flag[spot]} ]] || command+=(--spot)
  if [[ -n ${flag[dry_run]} ]]; then
    quoted "${command[@]}"
    echo "# Again and again, until the state is ACTIVE; FAILED and SUSPENDED end it:"
    quoted "${queue_state[@]}"
    return
  fi
  ask "${queue_state[@]}"
  [[ $now == NOT_FOUND ]] ||
    fail "the queued resource $name is there already, and is $now; give another --name, or --existing"
  owned=1
  patiently "${command[@]}" || fail "gcloud could not create the queued resource $name"
  while true; do
    ask "${queue_state[@]}"
    [[ $now == "$before" ]] || say "the queued resource $name is $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | NOT_FOUND | UNKNOWN)
        fail "there is no slice to be had: the queued resource $name is $now"
        ;;
    esac
    pause "${flag[poll]}"
  done
}

# on_workers ID ACTION ARGUMENTS...: runs tpu_worker.sh on all workers. Returns 0 if all returned 0; 255 if one did not
# answer or its machine was restarted; else the code of the first worker to fail, which is the cause: the others exit
# because they lose it.
on_workers() {
  local code codes command
  command="bash diffussm_jax/launch/tpu_worker.sh $2 $1 $(quoted "${@:3}")"
  [[ $2 != install ]] || command="mkdir -p diffussm_jax && tar -xzf diffussm_jax.tar.gz -C diffussm_jax && $command"
  local ssh=("${vm[@]}" ssh "$name" --worker=all "${place[@]}" "${ssh_flags[@]}" "--command=$command")
  if [[ -n ${flag[dry_run]} ]]; then
    quoted "${ssh[@]}"
    return
  fi
  patiently "${ssh[@]}" || true # gcloud returns the exit code of one worker
  mapfile -t codes < <(grep -ao "\[launch $1 worker [^ ]* exit [0-9]*\]" "$log" | tr -d ']' |
    awk '!seen[$4]++ {print $6}') # one per worker, in the order of their exits
  answers=${#codes[@]}
  if ((answers < workers)); then
    say "$answers of $workers workers answered"
    return 255
  fi
  [[ " ${codes[*]} " != *" 255 "* ]] || return 255
  for code in "${codes[@]}"; do
    ((code == 0)) || return "$code"
  done
}

install() {
  run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
  local scp=("${vm[@]}" scp "$archive" "$name:diffussm_jax.tar.gz" --worker=all "${place[@]}")
  if [[ -n ${flag[dry_run]} ]]; then quoted "${scp[@]}"; else patiently "${scp[@]}" || return; fi
  number=$((number + 1))
  on_workers "install-$session-$number" install "${flag[extras]}"
}

lost() { # whether the slice was preempted; deletes it, so that the next attempt requests another
  if ready || [[ $now == UNKNOWN ]]; then return 1; fi
  if [[ -n ${flag[existing]} ]]; then
    say "--existing makes no new slice; give the same command again when $name is back"
    exit 75
  fi
  patiently "${delete[@]}" || say "gcloud could not delete the queued resource $name"
  owned="" installed="" run_id=""
}

attempt() {
  local code=0
  [[ -n ${flag[existing]} || -n $owned ]] || create
  if [[ -z $installed ]]; then
    if ! ready || ! install; then
      ! lost || return 75
      say "the code could not be installed"
      return 255 # not 1, because the network may have failed
    fi
    installed=1
  fi
  if [[ -z $run_id ]]; then
    number=$((number + 1))
    run_id=run-$session-$number
  fi
  running=1
  on_workers "$run_id" run "${program_command[@]}" || code=$?
  running=""
  if ((code == 255)); then
    ! lost || return 75
    ((answers == workers)) || return 255 # the connection was lost: the same ID follows the running program
  fi
  run_id=""
  return "$code"
}

# shellcheck disable=SC2329 # the trap calls it
cleanup() {
  local code=$? interrupted=$child # it still follows the workers while they stop
  trap - EXIT
  trap '' INT TERM
  [[ -z $running ]] || say "stopping $program, which has ${flag[grace]} seconds to save"
  [[ -z $running ]] || on_workers "stop-$session" stop "${flag[grace]}" || say "some workers did not stop"
  [[ -z $interrupted ]] || kill -TERM -- "-$interrupted" 2> /dev/null || true
  rm -f "$archive"
  if [[ -n $owned && -n ${flag[keep]} ]]; then
    say "the slice is kept, and costs money until you delete it: $(quoted "${delete[@]}")"
  elif [[ -n $owned ]]; then
    say "deleting the slice $name"
    "${delete[@]}" || say "NOT deleted, and it costs money until it is: $(quoted "${delete[@]}")"
  fi
  exit "$code"
}

if [[ -n ${flag[dry_run]} ]]; then
  [[ -n ${flag[existing]} ]] || create
  quoted "${node_state[@]}"
  install
  on_workers run-1 run "${program_command[@]}"
  [[ -n ${flag[existing]} || -n ${flag[keep]} ]] || quoted "${delete[@]}"
  exit
fi
git -C "$root" diff --quiet HEAD || say "changes that are not committed are not copied"
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
touch "$log"
code=0
supervise "${flag[max_restarts]}" "${flag[poll]}" || code=$?
if ((code == 1)); then
  say "it ended with an error (exit code 1); the last lines of $log:"
  tail -n 20 "$log" >&2
fi
exit "$code"
