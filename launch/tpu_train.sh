#!/usr/bin/env bash
# Starts a training on every worker, in the background: it outlives this connection.
#
#   launch/tpu_train.sh --name mpt-7b --project P --zone Z --config configs/mpt_7b.py \
#       --workdir gs://my-bucket/mpt-7b -- --config.optim.lr=1e-4
#
# --name NAME       as given to tpu_create.sh; all of its slices are one job
# --project, --zone default $PROJECT and $ZONE
# --config FILE.py  of the code that tpu_setup.sh put there
# --workdir gs://.. checkpoints, metrics, logs; the same again resumes. Of a bucket with
#                   a hierarchical namespace, which every worker mounts
# --sparse-cores    v5p, v6e: these exchange parameters and gradients (launch/README.md)
# -- ARGUMENTS      for mpt_jax.train
# --dry-run         print the commands only
source "$(dirname "$0")/common.sh"
name='' project=${PROJECT:-} zone=${ZONE:-} config='' workdir='' sparse_cores=''
parse "name project zone config workdir" "sparse-cores" "$@"
check_name
check_place
check_run

start=(mpt_jax/launch/on_worker.sh start --config "$config" --workdir "$workdir")
[[ $sparse_cores ]] && start=(env "LIBTPU_INIT_ARGS=$sparse_core_flags" "${start[@]}")
start+=(--supervise)
((${#rest[@]})) && start+=("${rest[@]}")
on_all_workers "$(quote "${start[@]}")"
