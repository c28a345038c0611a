#!/usr/bin/env bash
# Submits training or precomputing to a Slurm cluster. The job saves before its time limit and on preemption, and
# requeues itself until it is done.
#
#   launch/slurm.sh [FLAGS] train --config=FILE --workdir=FOLDER [FLAGS OF diffussm_jax.main]
#   launch/slurm.sh [FLAGS] precompute --source=IMAGES --out=FOLDER [FLAGS OF diffussm_jax.precompute]
#
#   --nodes=1
#   --gpus_per_node=8
#   --cpus_per_gpu=8
#   --time=24:00:00         time limit per submission: minutes, HH:MM:SS or D-HH:MM:SS
#   --partition=NAME        default: the cluster's
#   --account=NAME          default: the user's
#   --job_name=diffussm
#   --venv=.venv            virtual environment with the package, on a file system shared by all nodes
#   --logs=logs             folder of the job's log, also shared
#   --grace=120             seconds before the time limit at which the job gets SIGTERM and saves
#   --max_restarts=10       restarts after crashes; time limits and preemptions do not count
#   --dry_run               prints the batch script without submitting it
#
# This repository must be on the shared file system too. Paths are absolute or gs://; --config, --venv and --logs may be
# relative to the root of the repository.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flag=([nodes]=1 [gpus_per_node]=8 [cpus_per_gpu]=8 [time]=24:00:00 [partition]="" [account]="" [job_name]=diffussm
  [venv]=.venv [logs]=logs [grace]=120 [max_restarts]=10 [dry_run]="")
switches="dry_run"
parse_flags "$@"
for name in nodes gpus_per_node cpus_per_gpu grace; do check_positive "$name"; done
check_number max_restarts
check time '([0-9]+-)?[0-9]+(:[0-5][0-9]){0,2}' "minutes, HH:MM:SS or D-HH:MM:SS"
for name in partition account job_name; do
  [[ -z ${flag[$name]} ]] || check "$name" '[A-Za-z0-9][A-Za-z0-9_.,-]*' "a name of letters, digits, _, . and -"
done
for name in venv logs; do
  [[ ${flag[$name]} == /* ]] || flag[$name]=$root/${flag[$name]}
  [[ ${flag[$name]} != *[[:space:]%]* ]] || die "--$name must have neither spaces nor %, got '${flag[$name]}'"
done
python=${flag[venv]}/bin/python logs=${flag[logs]}
check_program shared "$python"
check_program_exists sbatch
[[ -n ${flag[dry_run]} || -x $python ]] ||
  die "--venv: there is no '$python'; python3 -m venv makes it, then install the package into it"

# After the first process of a training run has exited, the others hang or still write the checkpoint: they get ten
# minutes. The processes of precompute may finish at very different times.
patience=600
[[ $program == train ]] || patience=0

batch_script() {
  cat << END
#!/usr/bin/env bash
#SBATCH --job-name=${flag[job_name]}
#SBATCH --nodes=${flag[nodes]}
#SBATCH --ntasks-per-node=${flag[gpus_per_node]}
#SBATCH --gpus-per-node=${flag[gpus_per_node]}
#SBATCH --cpus-per-task=${flag[cpus_per_gpu]}
#SBATCH --time=${flag[time]}
#SBATCH --output=$logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@${flag[grace]}
END
  [[ -z ${flag[partition]} ]] || echo "#SBATCH --partition=${flag[partition]}"
  [[ -z ${flag[account]} ]] || echo "#SBATCH --account=${flag[account]}"
  cat << END

set -uo pipefail
trap : TERM # the processes get it too and save; this script waits for them
cd $(quoted "$root") || exit 1
notes=$logs/${flag[job_name]}-\$SLURM_JOB_ID
END
  cat << 'END'
rm -f "$notes.code"

# JAX finds the other processes through Slurm's variables, and uses GPU number SLURM_LOCALID. So there is one process
# per GPU, and each sees all GPUs of its node (no binding). The exit code of the job is that of the first process to
# fail, the cause: the others exit because they lose it. srun would return the highest code.
# shellcheck disable=SC2016 # expanded by the inner shell
END
  cat << END
srun --kill-on-bad-exit=0 --wait=$patience --gpu-bind=none bash -c '
  trap : TERM INT
  code=0
  "\$@" || code=\$?
  ((code == 0)) || (set -o noclobber && echo "\$code" > "\$0") 2> /dev/null
  exit "\$code"
' "\$notes.code" $(quoted "${program_command[@]}")
code=\$?
max_restarts=${flag[max_restarts]}
END
  cat << 'END'
if [[ -s $notes.code ]]; then
  code=$(cat "$notes.code")
elif ((code == 1)); then
  code=255 # an error of srun, such as a lost node; no process exited with 1
fi
rm -f "$notes.code"

case $code in
  0)
    rm -f "$notes.crashes"
    exit 0
    ;;
  75) echo "It saved and left (exit code 75); job $SLURM_JOB_ID is queued again." ;;
  1 | 130)
    echo "It ended with exit code $code, and is not run again."
    exit "$code"
    ;;
  *)
    echo "$code" >> "$notes.crashes"
    crashes=$(wc -l < "$notes.crashes")
    if ((crashes > max_restarts)); then
      echo "It crashed with exit code $code after $max_restarts restarts; giving up."
      exit "$code"
    fi
    echo "It crashed with exit code $code; job $SLURM_JOB_ID is queued again, restart $crashes of $max_restarts."
    ;;
esac
scontrol requeue "$SLURM_JOB_ID" || echo "scontrol could not requeue job $SLURM_JOB_ID; submit it again to go on."
exit "$code"
END
}

if [[ -n ${flag[dry_run]} ]]; then
  batch_script
  exit
fi
mkdir -p "$logs"
batch_script | sbatch --parsable
