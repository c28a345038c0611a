#!/usr/bin/env bash
# tpu_pod.sh calls this on each worker of a slice, through ssh:
#
#   tpu_worker.sh install ID EXTRAS      creates the virtual environment and installs the package
#   tpu_worker.sh run ID COMMAND...      starts the command, follows its output, and waits for it
#   tpu_worker.sh stop ID SECONDS        stops running commands with SIGTERM, and with SIGKILL after SECONDS
#
# Its last line is [launch ID worker HOST exit CODE]. tpu_pod.sh reads it, because gcloud returns the exit code of one
# worker only. The command survives a broken connection: gcloud reconnects and calls the same `run`, which continues to
# follow the output.

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
    # TPU images have Python 3.10. uv installs a newer one, without root and python3-venv.
    rm -rf .venv
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --python=3.12 --seed .venv
  fi
  .venv/bin/python -m pip install --quiet -e ".[$1]"
}

runs_now() { ! flock --nonblock "$1/lock" true; } # FOLDER: the command holds its lock while it runs

stop() { # SECONDS: stops all commands that were started here
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

begin() { # FOLDER COMMAND...: starts it in its own session, which survives a broken connection
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

follow() { # FOLDER: returns the command's exit code, or 255 if it vanished, as after a restart of the machine
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
    if mkdir "$runs/$id" 2> /dev/null; then # fails if gcloud has reconnected
      stop 120 # a previous attempt, because only one process can use a TPU
      begun=1
      begin "$runs/$id" "$@"
    fi
    follow "$runs/$id"
    ;;
  *) exit 2 ;;
esac
