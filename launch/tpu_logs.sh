#!/usr/bin/env bash
# Follows what one worker prints. Ctrl-C ends the following, not the training.
#
#   launch/tpu_logs.sh --name mpt-7b --project P --zone Z
#
# --name NAME       as given to tpu_create.sh
# --project, --zone default $PROJECT and $ZONE
# --slice N         default 0
# --worker N        default 0, which prints the progress
# --dry-run         print the commands only
source "$(dirname "$0")/common.sh"
name='' project=${PROJECT:-} zone=${ZONE:-} slice=0 worker=0
parse "name project zone slice worker" "" "$@"
check_name
check_place
check slice "$slice" '[0-9]{1,3}' 0
check worker "$worker" '[0-9]{1,4}' 0

tpus ssh "--node=$slice" "--worker=$worker" \
  "--command=tail -n 100 -F mpt_jax/runs/launch/log"
