#!/usr/bin/env bash
# Keeps a training going until it is done: waits for the TPUs, starts the training, and
# does both again after a preemption. It resumes from its newest checkpoint.
#
#   launch/tpu_babysit.sh --name mpt-7b --project P --zone Z --type v5litepod-256 --spot \
#       --recreate --source gs://my-bucket/src --config configs/mpt_7b.py \
#       --workdir gs://my-bucket/mpt-7b
#
# --name, --project, --zone, --type, --slices, --spot, --runtime   as of tpu_create.sh
# --source                                                         as of tpu_setup.sh
# --config, --workdir, --sparse-cores, -- ARGUMENTS                as of tpu_train.sh
# --recreate        delete what is left of preempted TPUs and ask for new ones;
#                   without it, this ends with code 1 when they are gone
# --every SECONDS   between two looks (60)
# --dry-run         print the commands of each situation only
#
# Ends with the trainer's code where another attempt would end the same: 0 done, 2 a
# mistake in the config, 77 diverged.
source "$(dirname "$0")/common.sh"
name='' project=${PROJECT:-} zone=${ZONE:-} type='' slices=1 spot='' runtime=''
source='' config='' workdir='' sparse_cores='' recreate='' every=60
parse "name project zone type slices runtime source config workdir every" \
  "spot recreate sparse-cores" "$@"
check_name
check_place
check_run
check every "$every" '[0-9]{1,5}' 60

here=$(dirname "$0")
place=(--name "$name" --project "$project" --zone "$zone")
[[ $dry_run ]] && place+=(--dry-run)
request=(--type "$type" --slices "$slices")
[[ $runtime ]] && request+=(--runtime "$runtime")
[[ $spot ]] && request+=(--spot)
training=(--config "$config" --workdir "$workdir")
[[ $sparse_cores ]] && training+=(--sparse-cores)
((${#rest[@]})) && training+=(-- "${rest[@]}")

create() { "$here/tpu_create.sh" "${place[@]}" "${request[@]}"; }
delete() { "$here/tpu_delete.sh" "${place[@]}" --yes; }
setup() { "$here/tpu_setup.sh" "${place[@]}" --source "$source"; }
train() { "$here/tpu_train.sh" "${place[@]}" "${training[@]}"; }
tpu_state() { tpus describe "--format=value(state.state)"; }
training_state() {
  tpus ssh --node=0 --worker=0 "--command=mpt_jax/launch/on_worker.sh state"
}
say() { echo "$(date '+%F %T') $name: $*"; }

if [[ $dry_run ]]; then
  echo "# which state are the TPUs in?"
  tpu_state
  echo "# none:"
  create
  echo "# preempted (with --recreate):"
  delete
  create
  echo "# ACTIVE: and the training?"
  training_state
  echo "# never started:"
  setup
  train
  echo "# ended by itself:"
  train
  exit 0
fi
# A mistake in any flag shows before anything is done.
place+=(--dry-run)
(create && setup && train) >/dev/null || exit 2
unset 'place[${#place[@]}-1]'

while true; do
  # No such thing: an answer, too; so is being offline, and then create fails as well.
  state=$(tpu_state 2>/dev/null) || state=NONE
  case $state in
    ACTIVE)
      found=$(training_state) || found=unreachable
      case $found in
        running) ;;
        none)
          say "installing and starting"
          { setup && train; } || say "that failed; once more in $every s"
          ;;
        'exit 0' | 'exit 2' | 'exit 77')
          say "the training ended with code ${found#exit }"
          exit "${found#exit }"
          ;;
        exit*)
          say "the training ended ($found): starting it again"
          train || say "that failed; once more in $every s"
          ;;
        *) say "the training's state: $found" ;;
      esac
      ;;
    NONE)
      say "asking for TPUs"
      create || say "that failed; once more in $every s"
      ;;
    SUSPENDED | FAILED)
      if [[ ! $recreate ]]; then
        say "the TPUs are gone ($state); --recreate would ask for new ones"
        exit 1
      fi
      say "the TPUs are gone ($state): asking for new ones"
      delete || say "that failed; once more in $every s"
      ;;
    *) say "$state" ;;
  esac
  sleep "$every"
done
