#!/usr/bin/env bash
# Asks Google Cloud for TPUs, as a queued resource: it waits until they are there.
#
#   launch/tpu_create.sh --name mpt-7b --project P --zone us-west4-a --type v5litepod-256
#
# --name NAME       of the queued resource and of its nodes
# --project, --zone default $PROJECT and $ZONE
# --type TYPE       accelerator type: v4-N, v5litepod-N (v5e), v5p-N, v6e-N
# --slices N        so many slices of TYPE, as one job (multislice)
# --spot            cheaper, and may be taken away: see tpu_babysit.sh
# --runtime VERSION of the VM's image; default: the one of the TPU's generation
# --dry-run         print the commands only
#
# TPU7x and later are not served by this API: use gke_train.sh.
source "$(dirname "$0")/common.sh"
name='' project=${PROJECT:-} zone=${ZONE:-} type='' slices=1 spot='' runtime=''
parse "name project zone type slices runtime" "spot" "$@"
check_name
check_place
check type "$type" '(v4|v5litepod|v5p|v6e)-[0-9]+' v5litepod-256
check slices "$slices" '[1-9][0-9]{0,2}' 2

if [[ ! $runtime ]]; then # cloud.google.com/tpu/docs/runtimes
  case $type in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
  esac
fi
check runtime "$runtime" '[a-z0-9.-]+' v2-alpha-tpuv6e

request=("--accelerator-type=$type" "--runtime-version=$runtime")
if ((slices > 1)); then
  request+=("--node-count=$slices" "--node-prefix=$name")
else
  request+=("--node-id=$name")
fi
[[ $spot ]] && request+=(--spot)
tpus create "${request[@]}"
