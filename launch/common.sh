# shellcheck shell=bash
# Shared functions of the scripts in this folder. Source it, do not run it.
#
# A script declares `flag` (flags and defaults), `switches` (flags without a value) and, unless they are train and
# precompute, its two `commands`. It calls parse_flags, which sets `program` to the command, and `program_flags` to
# the arguments after it.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
declare -A flag
commands=(train precompute) switches="" program="" program_flags=() stopped=""

die() { # MESSAGE: an error in the input
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; } # the comment at the top of the script

quoted() { # COMMAND...: prints it on one line, quoted for a shell
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

run() { # COMMAND...: runs it; prints it in a dry run
  if [[ -n ${flag[dry_run]} ]]; then quoted "$@"; else "$@"; fi
}

parse_flags() { # ARGUMENTS...
  local name allowed
  allowed=$(printf '%s\n' "${!flag[@]}" | sort | sed 's/^/--/' | paste -sd' ' -)
  while (($#)); do
    name=${1%%=*} name=${name#--}
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      "${commands[0]}" | "${commands[1]}")
        program=$1 program_flags=("${@:2}")
        return
        ;;
      --*)
        [[ $name =~ ^[a-z_]+$ && -v flag[$name] ]] ||
          die "unknown flag '$1'; allowed are $allowed, then ${commands[0]} or ${commands[1]}"
        if [[ " $switches " == *" $name "* ]]; then
          [[ $1 != *=* ]] || die "--$name takes no value, got '$1'"
          flag[$name]=1
        else
          [[ $1 == *=?* ]] || die "--$name needs a value: --$name=VALUE"
          flag[$name]=${1#*=}
        fi
        ;;
      *) die "unknown command '$1'; allowed are ${commands[0]} and ${commands[1]}" ;;
    esac
    shift
  done
  die "no command is given; allowed are ${commands[0]} and ${commands[1]}"
}

check() { # NAME REGEX ALLOWED: checks the value of a flag
  [[ -n ${flag[$1]} ]] || die "--$1 is missing; it must be $3"
  [[ ${flag[$1]} =~ ^($2)$ ]] || die "--$1 must be $3, got '${flag[$1]}'"
}

check_number() { check "$1" '0|[1-9][0-9]*' "a whole number"; }

check_positive() { check "$1" '[1-9][0-9]*' "a whole number above 0"; }

check_seconds() { check "$1" '[0-9]+(\.[0-9]+)?' "a number of seconds"; }

check_program_exists() { # NAME...: checks the PATH, except in a dry run
  local name
  for name in "$@"; do
    [[ -n ${flag[dry_run]} ]] || command -v "$name" > /dev/null ||
      die "$name is not on the PATH; install it first, or use --dry_run"
  done
}

check_place() { # FLAG VALUE WHERE read|write: checks a path that a program reads or writes
  [[ -n $2 ]] || die "$1 needs a value: $1=PATH"
  if [[ $2 == *://* ]]; then
    [[ $2 =~ ^gs://[a-z0-9][a-z0-9._-]*/.+$ ]] || die "$1 must be gs://BUCKET/PATH or a local path, got '$2'"
  elif [[ $3 == local || ($4 == read && ($2 == tfds:* || $2 == digits)) ]]; then
    return
  elif [[ $3 == shared ]]; then
    [[ $2 == /* ]] || die "$1 must be gs://BUCKET/FOLDER or an absolute path that all nodes share, got '$2'"
  elif [[ $4 == write ]]; then
    die "$1 must be gs://BUCKET/FOLDER, since the disks of the machines vanish with them, got '$2'"
  else
    [[ $2 == /* ]] || die "$1 must be gs://BUCKET/PATH, or an absolute path on the machines, got '$2'"
  fi
}

# check_program WHERE PYTHON: checks program_flags, and sets `program_command` and `config_file` (the config of train).
# WHERE is local (this machine), shared (nodes with a shared file system) or cloud (machines with ephemeral disks).
check_program() {
  local argument name value config="" workdir="" source="" out="" distributed="" base=$root
  [[ $1 == local ]] && base=$PWD
  for argument in "${program_flags[@]}"; do
    [[ $argument == --?* ]] || die "'$argument' behind $program is no flag; its flags are written --name=value"
    name=${argument%%=*} value=""
    [[ $argument == *=* ]] && value=${argument#*=}
    case $program$name in
      train--config) config=$value ;;
      train--workdir) workdir=$value && check_place "$name" "$value" "$1" write ;;
      train--config.data.path) check_place "$name" "$value" "$1" read ;;
      precompute--source) source=$value && check_place "$name" "$value" "$1" read ;;
      precompute--out) out=$value && check_place "$name" "$value" "$1" write ;;
      precompute--image_size)
        [[ $value =~ ^[1-9][0-9]*$ ]] || die "--image_size must be a whole number above 0, got '$value'"
        ;;
      *--distributed) distributed=$value ;;
    esac
  done
  config_file=${config%%:*}
  if [[ $program == train ]]; then
    [[ -n $config ]] || die "train needs --config=FILE, such as --config=configs/imagenet256.py:XL"
    [[ -n $workdir ]] || die "train needs --workdir=FOLDER"
    [[ $1 != cloud || $config_file != /* ]] ||
      die "--config must be a path from the root of the repository, got '$config_file'"
    [[ $config_file == /* ]] && base=""
    [[ -f ${base:+$base/}$config_file ]] || die "--config: there is no file '$config_file' in ${base:-/}"
    program_command=("$2" -m diffussm_jax.main "${program_flags[@]}")
  else
    [[ -n $source ]] || die "precompute needs --source=IMAGES"
    [[ -n $out ]] || die "precompute needs --out=FOLDER"
    program_command=("$2" -m diffussm_jax.precompute "${program_flags[@]}")
    [[ $1 == local || -n $distributed ]] || program_command+=(--distributed=auto) # train has it by default
  fi
}

pause() { # SECONDS: sleeps; unlike plain sleep, a trap interrupts it
  sleep "$1" > /dev/null 2>&1 &
  wait $!
}

# start COMMAND...: runs it in the background, as `child`, in its own process group. So Ctrl-C reaches only this script,
# which decides what signal to send, and the command does not ignore SIGINT as other background processes do.
start() {
  set -m
  "$@" < /dev/null &
  # shellcheck disable=SC2034 # the scripts use it
  child=$!
  set +m
}

# supervise MAX_RESTARTS SECONDS: calls `attempt` until its exit code is final, and returns it. 75: the program saved,
# run it again. 1: an error that would repeat, final. 130: stopped by the user, final. Others: a crash, run it again up
# to MAX_RESTARTS times. Nothing is run after a trap has set `stopped`.
supervise() {
  local code restarts=0
  while true; do
    code=0
    attempt || code=$?
    [[ -z $stopped ]] || return "$code"
    case $code in
      0 | 1 | 130) return "$code" ;;
      75) say "it saved and left (exit code 75); running it again" ;;
      *)
        if ((restarts == $1)); then
          say "it crashed with exit code $code after $restarts restarts; giving up"
          return "$code"
        fi
        restarts=$((restarts + 1))
        say "it crashed with exit code $code; restart $restarts of $1"
        ;;
    esac
    pause "$2"
    [[ -z $stopped ]] || return "$code"
  done
}
