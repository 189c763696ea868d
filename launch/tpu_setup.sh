#!/usr/bin/env bash
# Puts the last commit of this folder on every worker and installs it there.
#
#   launch/tpu_setup.sh --name mpt-7b --project P --zone Z --source gs://my-bucket/src
#
# --name NAME       as given to tpu_create.sh
# --project, --zone default $PROJECT and $ZONE
# --source gs://..  a folder that the workers can read; the code goes through it
# --dry-run         print the commands only
source "$(dirname "$0")/common.sh"
name='' project=${PROJECT:-} zone=${ZONE:-} source=''
parse "name project zone source" "" "$@"
check_name
check_place
check source "$source" 'gs://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9._=-]+)*' gs://my-bucket/src

archive=${source%/}/mpt_jax.tar.gz
cd "$(dirname "$0")/.."
upload() {
  git archive --format=tar.gz HEAD | gcloud storage cp - "$archive"
}
if [[ $dry_run ]]; then
  echo "git archive --format=tar.gz HEAD | gcloud storage cp - $archive"
else
  upload
fi
on_all_workers "mkdir -p mpt_jax && gcloud storage cat $archive | tar -xz -C mpt_jax \
&& mpt_jax/launch/on_worker.sh setup"
