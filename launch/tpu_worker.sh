#!/usr/bin/env bash
# What tpu_pod.sh calls on each worker of a slice, through ssh:
#
#   tpu_worker.sh install ID EXTRAS      makes the virtual environment and installs the package
#   tpu_worker.sh run ID COMMAND...      starts the command, follows what it prints, and waits for it
#   tpu_worker.sh stop ID SECONDS        lets what runs save and leave; kills it after so many seconds
#
# Its last line is [launch ID worker HOST exit CODE]. tpu_pod.sh reads it, since gcloud returns the exit code of one
# worker only. The command does not depend on the connection: gcloud connects again after a broken one and calls the
# same `run`, which then goes on following.

set -euo pipefail

action=$1 id=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
runs=$HOME/.diffussm_jax_runs
answer() { printf '\n[launch %s worker %s exit %s]\n' "$id" "$(hostname)" "$1"; } # EXIT CODE
trap 'answer "$?"' EXIT

install() { # EXTRAS
  cd "$root"
  if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
    # The images for TPUs have Python 3.10; uv brings a newer one, and needs neither root nor python3-venv.
    rm -rf .venv
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --python=3.12 --seed .venv
  fi
  .venv/bin/python -m pip install --quiet -e ".[$1]"
}

runs_now() { ! flock --nonblock "$1/lock" true; } # FOLDER: its lock is held as long as the command runs

stop() { # SECONDS: everything that was started here
  local folder pid
  for folder in "$runs"/*/; do
    if [[ -e $folder/pid ]] && runs_now "$folder"; then
      read -r _ pid < "$folder/pid"
      kill -TERM "$pid" || true
      flock --wait "$1" "$folder/lock" true || kill -KILL "$pid" || true
      flock --wait 10 "$folder/lock" true
    fi
  done
}

begin() { # FOLDER COMMAND...: in a session of its own, which a broken connection does not end
  local folder=$1
  : > "$folder/log"
  exec 9> "$folder/lock"
  flock 9
  # shellcheck disable=SC2016 # expanded by the inner shell
  setsid bash -c '
    folder=$1 code=0
    shift
    "$@" > "$folder/log" 2>&1 9>&- &
    echo "$$ $!" > "$folder/pid"
    wait $! || code=$?
    echo "$code" > "$folder/code"
  ' bash "$@" < /dev/null > /dev/null 2>&1 &
  exec 9>&-
}

follow() { # FOLDER: returns the command's exit code, or 255 when it vanished, as by a restart of the machine
  local supervisor lines=20
  [[ -z $begun ]] || lines=+1
  for ((i = 0; i < 100; i++)); do
    [[ ! -s $1/pid ]] || break
    sleep 0.1
  done
  if [[ -s $1/pid ]] && runs_now "$1"; then
    read -r supervisor _ < "$1/pid"
    tail --pid="$supervisor" --sleep-interval=0.5 --lines="$lines" --follow "$1/log"
  else
    tail --lines="$lines" "$1/log" || true
  fi
  [[ -s $1/code ]] || return 255
  return "$(cat "$1/code")"
}

case $action in
  install) install "$1" ;;
  stop) stop "$1" ;;
  run)
    cd "$root"
    begun=""
    mkdir -p "$runs"
    if mkdir "$runs/$id" 2> /dev/null; then # not when gcloud has connected again
      stop 120 # what an attempt before this one left, since only one process can use a TPU
      begun=1
      begin "$runs/$id" "$@"
    fi
    follow "$runs/$id"
    ;;
  *) exit 2 ;;
esac
