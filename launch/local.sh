#!/usr/bin/env bash
# Trains or precomputes on this machine: creates a virtual environment, installs, runs, and restarts after a crash.
#
#   launch/local.sh [FLAGS] train --config=FILE --workdir=FOLDER [FLAGS OF diffussm_jax.main]
#   launch/local.sh [FLAGS] precompute --source=IMAGES --out=FOLDER [FLAGS OF diffussm_jax.precompute]
#
#   --extra=none         extras of the package to install: none, or some of cuda12, cuda13, tpu, gcs, hub, lsun,
#                        separated by commas
#   --venv=.venv         virtual environment; created if missing
#   --python=python3     Python 3.11 or newer, to create the environment
#   --max_restarts=10    restarts after crashes; a run that saved and exited (code 75) is always restarted
#   --pause=5            seconds before a restart
#   --log=FILE           appends the output to FILE
#   --dry_run            prints the commands without running them
#
# Ctrl-C and SIGTERM are forwarded. The program saves, and this script exits with its exit code.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flag=([extra]=none [venv]=.venv [python]=python3 [max_restarts]=10 [pause]=5 [log]="" [dry_run]="")
switches="dry_run"
parse_flags "$@"
extra='(cuda12|cuda13|tpu|gcs|hub|lsun)'
check extra "none|$extra(,$extra)*" "none, or some of cuda12, cuda13, tpu, gcs, hub, lsun, separated by commas"
[[ ! ${flag[extra]} =~ (cuda12|cuda13|tpu).*(cuda12|cuda13|tpu) ]] ||
  die "--extra must name only one of cuda12, cuda13 and tpu, got '${flag[extra]}'"
check_number max_restarts
check_seconds pause
venv=${flag[venv]}
[[ ! -e $venv || -x $venv/bin/python ]] || die "--venv: '$venv' is there, but has no bin/python; name another folder"
[[ -e $venv ]] || check_program_exists "${flag[python]}"
check_program local "$venv/bin/python"

install() {
  local extras="" stamp="$venv/diffussm_jax-${flag[extra]}"
  [[ ${flag[extra]} == none ]] || extras="[${flag[extra]}]"
  if [[ ! -e $venv ]]; then
    [[ -n ${flag[dry_run]} ]] || "${flag[python]}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      die "--python: '${flag[python]}' is no Python 3.11 or newer"
    run "${flag[python]}" -m venv "$venv"
  fi
  if [[ ! $stamp -nt $root/setup.py ]]; then
    run "$venv/bin/python" -m pip install --quiet -e "$root$extras"
    run touch "$stamp" # repeating the command does not install again
  fi
}

# shellcheck disable=SC2329 # the traps call it
forward() { # SIGNAL: forwards it to the program, which saves and exits
  stopped=$1 interrupted=1
  [[ -z $child ]] || kill -s "$1" "$child" 2> /dev/null || true
}

attempt() {
  local code=0 now
  start "${program_command[@]}"
  interrupted=1
  while [[ -n $interrupted ]]; do # a signal interrupts `wait`, not the program
    interrupted="" now=0
    wait "$child" || now=$?
    ((now == 127)) || code=$now # 127: the previous `wait` already returned the exit code
  done
  child=""
  return "$code"
}

if [[ -n ${flag[dry_run]} ]]; then
  install
  quoted "${program_command[@]}"
  exit
fi
[[ -z ${flag[log]} ]] || exec > >(tee -ia "${flag[log]}") 2>&1
child=""
trap 'forward INT' INT
trap 'forward TERM' TERM
install
[[ $stopped != INT ]] || exit 130
[[ $stopped != TERM ]] || exit 143
code=0
supervise "${flag[max_restarts]}" "${flag[pause]}" || code=$?
[[ $code != 1 ]] || say "it ended with an error (exit code 1), which stands above${flag[log]:+ and in ${flag[log]}}"
exit "$code"
