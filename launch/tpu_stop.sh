#!/usr/bin/env bash
# Stops a training: every worker saves the same step and exits. The TPUs stay.
#
#   launch/tpu_stop.sh --name mpt-7b --project P --zone Z
#
# --name NAME       as given to tpu_create.sh
# --project, --zone default $PROJECT and $ZONE
# --dry-run         print the commands only
source "$(dirname "$0")/common.sh"
name='' project=${PROJECT:-} zone=${ZONE:-}
parse "name project zone" "" "$@"
check_name
check_place

on_all_workers "mpt_jax/launch/on_worker.sh stop"
