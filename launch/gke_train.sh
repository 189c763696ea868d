#!/usr/bin/env bash
# Starts a training on a GKE cluster of TPUs, through XPK (pip install xpk).
#
#   launch/gke_train.sh --name mpt-7b --project P --zone Z --cluster my-cluster \
#       --type v5p-256 --image gcr.io/my-project/mpt_jax:1 --config configs/mpt_7b.py \
#       --storage my-bucket --workdir /data/mpt-7b
#
# --name NAME       of the workload
# --project, --zone of the cluster; default $PROJECT and $ZONE
# --cluster NAME    made by "xpk cluster create"
# --type TYPE       v4-N, v5litepod-N, v5p-N, v6e-N, tpu7x-N
# --slices N        so many slices of TYPE, as one job (multislice)
# --image IMAGE     built of launch/Dockerfile and pushed
# --storage NAME    made by "xpk storage attach", mounted in every pod
# --workdir DIR     in the storage's mount point; the same again resumes
# --config FILE.py  of the image
# --sparse-cores    v5p, v6e: these exchange parameters and gradients (launch/README.md)
# -- ARGUMENTS      for mpt_jax.train
# --restarts N      of the whole job, beside those of the trainer's supervisor (50)
# --dry-run         print the command only
source "$(dirname "$0")/common.sh"
name='' project=${PROJECT:-} zone=${ZONE:-} cluster='' type='' slices=1 image=''
storage='' config='' workdir='' sparse_cores='' restarts=50
parse "name project zone cluster type slices image storage config workdir restarts" \
  "sparse-cores" "$@"
check_name
check_place
check cluster "$cluster" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' my-cluster
check type "$type" '(v4|v5litepod|v5p|v6e|tpu7x)-[0-9x]+' v5p-256
check slices "$slices" '[1-9][0-9]{0,2}' 2
check image "$image" '[a-z0-9][A-Za-z0-9_./:@-]+' gcr.io/my-project/mpt_jax:1
check storage "$storage" '[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?' my-bucket
check_config
check workdir "$workdir" '(/[A-Za-z0-9._=-]+)+/?' /data/mpt-7b
check restarts "$restarts" '[0-9]{1,4}' 50

train=(python -m mpt_jax.train --config "$config" --workdir "$workdir" --supervise)
((${#rest[@]})) && train+=("${rest[@]}")
[[ $sparse_cores ]] && train=(env "LIBTPU_INIT_ARGS=$sparse_core_flags" "${train[@]}")
run xpk workload create "--workload=$name" "--cluster=$cluster" \
  "--project=$project" "--zone=$zone" "--tpu-type=$type" "--num-slices=$slices" \
  "--docker-image=$image" "--storage=$storage" "--max-restarts=$restarts" \
  "--command=$(quote "${train[@]}")"
