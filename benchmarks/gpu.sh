#!/usr/bin/env bash
# Runs all GPU benchmarks of docs/bench.md: bash benchmarks/gpu.sh h200
# Results go to benchmarks/NAME_*.csv, timings for "auto" into the package. A failure does not stop the other benchmarks
# and is reported at the end. PYTHON: the interpreter, .venv's by default.
set -uo pipefail
name=${1:?usage: bash benchmarks/gpu.sh NAME}
python=${PYTHON:-.venv/bin/python}
cd "$(dirname "$0")/.." || exit
export XLA_PYTHON_CLIENT_PREALLOCATE=false # PyTorch, where its CUDA build is installed, needs memory too
failed=()

bench() { # FILE WHAT FLAGS..: FILE - writes no file
  local file=$1
  shift
  echo "== bench $*"
  if [[ $file != - ]]; then set -- "$@" "--csv=benchmarks/${name}_$file.csv"; fi
  "$python" -m diffussm_jax.bench "$@" || failed+=("$*")
}

bench errors errors
bench ssm ssm --dtype=bfloat16 --shapes=64x1024x1152x64,64x4096x1152x64 --repeats=20
bench - ssm --dtype=bfloat16 --write_table # block, step and sample then use the fastest method
bench - ssm --dtype=float32 --write_table
bench xl step --sizes=XL --image_sizes=256 --batch_size=256
bench step step --sizes=S,L,XL
bench block block --sizes=S,L,XL
bench sample sample --sizes=XL --image_sizes=256,512 --batch_size=16
bench mixers ssm --mixers=all --dtype=bfloat16 --shapes=16x1024x1152
bench lengths lengths --models=diffussm:XL,dit:XL/1+attention=cudnn,dit:XL/2+attention=cudnn --dtype=bfloat16 --batch_size=8
bench scaling ssm --dtype=bfloat16 "--plot=benchmarks/${name}_scaling.png"

if ((${#failed[@]})); then
  printf 'failed: bench %s\n' "${failed[@]}" >&2
  exit 1
fi
