#!/usr/bin/env bash
# Gives TPUs back, with all that is on their disks, after asking. gs:// stays as it is.
#
#   launch/tpu_delete.sh --name mpt-7b --project P --zone Z
#
# --name NAME       as given to tpu_create.sh
# --project, --zone default $PROJECT and $ZONE
# --yes             do not ask
# --dry-run         print the commands only
source "$(dirname "$0")/common.sh"
name='' project=${PROJECT:-} zone=${ZONE:-} yes=''
parse "name project zone" "yes" "$@"
check_name
check_place

if [[ ! $yes && ! $dry_run ]]; then
  [[ -t 0 ]] || die "nobody is there to ask; --yes deletes $name without"
  read -r -p "Delete $name in $project, $zone, with all of its disks? Type its name: " answer
  [[ $answer == "$name" ]] || die "nothing is deleted"
fi
tpus delete --force --quiet
