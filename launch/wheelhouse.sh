#!/usr/bin/env bash
# Installs the package on a machine without network: `collect` downloads the wheels into a folder on a machine with
# network, and `install` installs them from a copy of that folder.
#
#   launch/wheelhouse.sh [FLAGS] collect
#   launch/wheelhouse.sh [FLAGS] install
#
#   --folder=wheelhouse      folder of the wheels; collect creates it
#   --interpreter=python3    collect: Python whose pip is used; default: the version of --python if it is installed
#                            install: Python that creates the environment
#   --dry_run                prints the commands without running them
#
# Flags of collect, which describe the machine without network:
#
#   --python=3.12            its version of Python
#   --platform=manylinux_2_28_x86_64
#                            its version of glibc (`ldd --version` prints it) and its architecture
#   --extra=none             extras of the package, separated by commas, such as cuda12,hub
#   --have=FILE              output of `pip list --format=freeze` on it: those packages are not collected, and the
#                            others fit their versions; a line with a name only stands for any version
#   --without=none           requirements of the package to leave out, separated by commas
#
# Flag of install:
#
#   --venv=.venv             virtual environment; created if missing, after --have on top of the packages of
#                            --interpreter
#
# The wheel of the package itself is built from this checkout.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

commands=(collect install) switches="dry_run"
if [[ ${*: -1} == install ]]; then
  flag=([folder]=wheelhouse [interpreter]=python3 [venv]=.venv [dry_run]="")
else
  flag=([folder]=wheelhouse [interpreter]="" [python]=3.12 [platform]=manylinux_2_28_x86_64 [extra]=none [have]=""
    [without]=none [dry_run]="")
fi
parse_flags "$@"
((${#program_flags[@]} == 0)) || die "'${program_flags[0]}' stands behind $program; flags stand before it"
folder=${flag[folder]} python=${flag[interpreter]}

fail() { # MESSAGE
  say "$1"
  exit 1
}

requirements() { # prints the requirements in setup.py with --extra and without --without, one a line
  "$python" -c '
import re, runpy, sys, types

def key(requirement):
    return re.sub("[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()

def choose(flag, names, allowed):
    chosen = [] if names == "none" else names.split(",")
    for name in chosen:
        if name not in allowed:
            found = ", ".join(sorted(allowed))
            sys.exit(f"error: {flag} must be none, or some of {found}, separated by commas; got {name!r}")
    return chosen

package = {}
sys.modules["setuptools"] = types.SimpleNamespace(setup=package.update, find_packages=lambda **_: [])
runpy.run_path(sys.argv[1])
extras = choose("--extra", sys.argv[2], package["extras_require"])
lines = package["install_requires"] + [line for extra in extras for line in package["extras_require"][extra]]
without = choose("--without", sys.argv[3], [key(line) for line in package["install_requires"]])
print(*[line for line in lines if key(line) not in without], sep="\n")
' "$root/setup.py" "${flag[extra]}" "${flag[without]}"
}

check_have() { # sets `present`, the names in --have
  local line name
  [[ -f ${flag[have]} ]] || die "--have: there is no file '${flag[have]}'"
  while read -r line || [[ -n $line ]]; do
    [[ -n $line && $line != "#"* ]] || continue
    [[ $line =~ ^[A-Za-z0-9][A-Za-z0-9._-]*(==[^ ]+)?$ ]] ||
      die "--have: '$line' is neither NAME==VERSION nor NAME; pip list --format=freeze writes such lines"
    name=${line%%==*} name=${name,,}
    present+=" ${name//[._]/-}"
  done < "${flag[have]}"
}

check_collect() { # also sets `python`, `required`, and `only`, the kinds of wheels
  local number architecture version
  check python '3\.(1[1-9]|[2-9][0-9])' "a version from 3.11 on, such as 3.12"
  check platform 'manylinux_2_(1[7-9]|[2-9][0-9])_(x86_64|aarch64)' \
    "manylinux_2_NUMBER_x86_64 or manylinux_2_NUMBER_aarch64, with a number from 17 on"
  number=${BASH_REMATCH[2]} architecture=${BASH_REMATCH[3]}
  [[ ! -e $folder ]] || die "--folder: '$folder' is there already; delete it, or name another folder"
  [[ -z ${flag[have]} ]] || check_have
  if [[ -z $python ]]; then
    python=python${flag[python]}
    "$python" -m pip --version > /dev/null 2>&1 || python=python3
  fi
  command -v "$python" > /dev/null || die "--interpreter: $python is not on the PATH"
  only=(--only-binary=:all: --implementation=cp "--python-version=${flag[python]}")
  for (( ; number >= 17; number--)); do only+=("--platform=manylinux_2_${number}_$architecture"); done
  only+=("--platform=manylinux2014_$architecture") # to which pip adds its predecessors
  required=$(requirements) || exit 2
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  [[ $version == "${flag[python]}" ]] || # https://github.com/pypa/pip/issues/11664
    say "pip of Python $version does not see what only Python ${flag[python]} needs; --interpreter names another"
}

collect() {
  local partial=$folder.partial wanted constraint=() build=() wheel name size
  local source=$partial/source
  mapfile -t wanted <<< "$required"
  [[ -z ${flag[have]} ]] || constraint=("--constraint=${flag[have]}")
  [[ $required != *tensorflow-datasets* ]] || build=(promise) # it has no wheel, and is pure Python
  run rm -rf "$partial"
  run mkdir -p "$source"
  # A copy, because setuptools would also pack what is left in build/ of the checkout.
  for name in setup.py pyproject.toml README.md LICENSE diffussm_jax; do run cp -R "$root/$name" "$source"; done
  run "$python" -m pip wheel --quiet --no-deps "--wheel-dir=$partial" "$source" "${build[@]}"
  run "$python" -m pip download "--dest=$partial" "--find-links=$partial" "${only[@]}" "${constraint[@]}" \
    "${wanted[@]}" ||
    fail "the wheels could not be collected${flag[have]:+; without its line in --have, a package is collected too}"
  run rm -r "$source"
  [[ -z ${flag[have]} ]] || run cp "${flag[have]}" "$partial/have.txt"
  if [[ -n ${flag[dry_run]} ]]; then
    [[ -z ${flag[have]} ]] || echo "# The wheels of the packages in ${flag[have]} are deleted."
    quoted mv "$partial" "$folder"
    return
  fi
  for wheel in "$partial"/*.whl; do
    name=${wheel##*/} name=${name%%-*} name=${name,,} name=${name//[._]/-}
    [[ " $present " != *" $name "* || $name == diffussm-jax ]] || rm "$wheel"
  done
  mv "$partial" "$folder" # it gets its name when it is complete
  read -r size _ < <(du -sk "$folder")
  build=("$folder"/*.whl)
  say "${#build[@]} wheels, $((size / 1024)) MiB, are in $folder"
}

install() {
  local venv=${flag[venv]} system=()
  [[ -d $folder ]] || die "--folder: there is no folder '$folder'; collect creates it"
  [[ ! -e $venv || -x $venv/bin/python ]] ||
    die "--venv: '$venv' is there, but has no bin/python; name another folder"
  [[ -e $venv ]] || check_program_exists "$python"
  if [[ ! -e $venv ]]; then
    [[ ! -e $folder/have.txt ]] || system=(--system-site-packages)
    run "$python" -m venv "${system[@]}" "$venv"
  fi
  # pip need not look for requirements: all of them are in the folder, except those that were left out.
  run "$venv/bin/python" -m pip install --quiet --no-index --no-deps "$folder"/*.whl
  run "$venv/bin/python" -P -c "import diffussm_jax.main" || fail "the package is installed, but cannot be imported"
  run touch "$venv/diffussm_jax-none" # local.sh does not install again
}

present="" required="" only=()
[[ $program == install ]] || check_collect
"$program"
