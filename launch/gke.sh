#!/usr/bin/env bash
# Trains or precomputes on a TPU slice in GKE: fills in gke.yaml and applies it with kubectl.
#
#   launch/gke.sh [FLAGS] train --config=FILE --workdir=gs://BUCKET/FOLDER [FLAGS OF diffussm_jax.main]
#   launch/gke.sh [FLAGS] precompute --source=IMAGES --out=gs://BUCKET/FOLDER [FLAGS OF diffussm_jax.precompute]
#
#   --name=NAME                      name of the Job and its service
#   --image=IMAGE                    image with the package installed and configs/ in its working directory
#   --accelerator=ACCELERATOR        such as tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice
#   --topology=TOPOLOGY              such as 2x2x4 or 4x4
#   --chips_per_host=4               chips per host of the node pool's machine type
#   --service_account=NAME           Kubernetes service account with write access to the bucket
#   --namespace=default
#   --spot                           uses Spot nodes: cheaper, may be preempted
#   --grace=300                      seconds to save after SIGTERM
#   --max_restarts=10                restarts after crashes; preemptions and exit code 75 do not count
#   --dry_run                        prints the yaml without applying it

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flag=([name]="" [image]="" [accelerator]="" [topology]="" [chips_per_host]=4 [service_account]="" [namespace]=default
  [spot]="" [grace]=300 [max_restarts]=10 [dry_run]="")
switches="spot dry_run"
parse_flags "$@"
label='[a-z]([-a-z0-9]{0,61}[a-z0-9])?' letters="lower-case letters, digits and hyphens, beginning with a letter"
check name "$label" "$letters"
check namespace "$label" "$letters"
check service_account "$label" "$letters"
check image '[a-z0-9][A-Za-z0-9._:/@-]+' "the name of a container image"
check accelerator 'tpu-?[a-z0-9-]+' \
  "a TPU of GKE, such as tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice"
check topology '[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?' "two or three numbers, such as 4x4 or 2x2x4"
check chips_per_host '1|4|8' "1, 4 or 8"
check_positive grace
check_number max_restarts
chips=$((${flag[topology]//x/*}))
((chips % flag[chips_per_host] == 0)) ||
  die "--topology=${flag[topology]} has $chips chips, which --chips_per_host=${flag[chips_per_host]} does not divide"
check_program cloud python
check_program_exists kubectl

json() { # WORDS...: prints them as a JSON list of strings
  local word list=""
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || die "a flag of $program has a control character: ${word@Q}"
    word=${word//\\/\\\\}
    list+=${list:+, }\"${word//\"/\\\"}\"
  done
  printf '[%s]' "$list"
}

fill() {
  local text name hosts=$((chips / flag[chips_per_host]))
  local -A value=([NAME]=${flag[name]} [NAMESPACE]=${flag[namespace]} [IMAGE]=${flag[image]} [GRACE]=${flag[grace]}
    [ACCELERATOR]=${flag[accelerator]} [TOPOLOGY]=${flag[topology]} [CHIPS_PER_HOST]=${flag[chips_per_host]}
    [SERVICE_ACCOUNT]=${flag[service_account]} [HOSTS]=$hosts [BACKOFF_LIMIT]=$((flag[max_restarts] * hosts))
    [SPOT_SELECTOR]=${flag[spot]:+'cloud.google.com/gke-spot: "true"'})
  text=$(sed '/^#/d' "$root/launch/gke.yaml")
  for name in "${!value[@]}"; do
    text=${text//"\${$name}"/"${value[$name]}"}
  done
  printf '%s\n' "${text/"\${COMMAND}"/"$(json "${program_command[@]}")"}" # last, because it may contain ${NAME} itself
}

filled=$(fill)
if [[ -n ${flag[dry_run]} ]]; then
  printf '%s\n' "$filled"
  exit
fi
printf '%s\n' "$filled" | kubectl apply -f -
say "follow it with: kubectl logs --namespace=${flag[namespace]} --follow --all-pods job/${flag[name]}"
say "end it with: kubectl delete --namespace=${flag[namespace]} job/${flag[name]} service/${flag[name]}"
