#!/usr/bin/env bash
# Trains or precomputes on this machine: makes a virtual environment, installs, runs, and runs again after a crash.
#
#   launch/local.sh [FLAGS] train --config=FILE --workdir=FOLDER [FLAGS OF diffussm_jax.main]
#   launch/local.sh [FLAGS] precompute --source=IMAGES --out=FOLDER [FLAGS OF diffussm_jax.precompute]
#
#   --extra=none         what to install beside the package: none, or some of cuda12, cuda13, tpu, gcs, hub, lsun,
#                        separated by commas
#   --venv=.venv         the virtual environment; it is made when there is none
#   --python=python3     what makes it: Python 3.11 or newer
#   --max_restarts=10    after crashes; a run that saved and left (exit code 75) is always run again
#   --pause=5            seconds before it is run again
#   --log=FILE           appends what is printed to it
#   --dry_run            prints the commands and runs none
#
# Ctrl-C and SIGTERM are passed on; the program saves, and this script leaves with its exit code.

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
    run touch "$stamp" # so that the same command again does not install again
  fi
}

# shellcheck disable=SC2329 # the traps call it
forward() { # SIGNAL: to the program, which saves and leaves
  stopped=$1 interrupted=1
  [[ -z $child ]] || kill -s "$1" "$child" 2> /dev/null || true
}

attempt() {
  local code=0 now
  start "${program_command[@]}"
  interrupted=1
  while [[ -n $interrupted ]]; do # a signal ends `wait`, not the program
    interrupted="" now=0
    wait "$child" || now=$?
    ((now == 127)) || code=$now # 127: the `wait` before this one had its exit code already
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
