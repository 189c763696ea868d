#!/usr/bin/env bash
# What the tpu_*.sh scripts call on each worker, inside the code that tpu_setup.sh put
# there. Not for your machine.
#
#   on_worker.sh setup            install, with a Python of its own
#   on_worker.sh start ARGUMENTS  mpt_jax.train ARGUMENTS, in the background; the bucket
#                                 of --workdir gs://.. is mounted, and the trainer gets
#                                 the folder
#   on_worker.sh state            running, exit CODE, or none
#   on_worker.sh stop             SIGTERM, and wait until all is saved
#
# --dry-run, first          print what setup or start would do
source "$(dirname "$0")/common.sh"
cd "$(dirname "$0")/.."
runs=runs/launch
[[ ${1:-} == --dry-run ]] && dry_run=yes && shift

# Cloud Storage FUSE, where the image has none. Source: its documentation, "Install".
install_gcsfuse() {
  local key=/etc/apt/keyrings/gcsfuse.asc apt=https://packages.cloud.google.com/apt
  sudo mkdir -p "${key%/*}"
  curl -fsS "$apt/doc/apt-key.gpg" | sudo tee $key >/dev/null
  echo "deb [signed-by=$key] $apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq update
  sudo apt-get -qq install -y gcsfuse
}

# mount_bucket gs://BUCKET/FOLDER: sets $folder to where that is on this machine.
mount_bucket() {
  local path=${1#gs://}
  local bucket=${path%%/*}
  local at=$HOME/buckets/$bucket
  folder=$HOME/buckets/${path%/}
  mountpoint --quiet "$at" && return
  run mkdir -p "$at"
  # Nothing is remembered: what another worker has written is seen at once.
  run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$bucket" "$at"
}

alive() { [[ -f $runs/pid ]] && kill -0 "$(<$runs/pid)" 2>/dev/null; }

case ${1:-} in
  setup)
    # The images of Cloud TPU have Python 3.10; uv brings one that mpt_jax runs on.
    run python3 -m pip install --quiet --user uv
    run "$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.13 .venv
    run "$HOME/.local/bin/uv" pip install --quiet --python .venv/bin/python \
      -c constraints.txt ./launch/editdistance -e '.[tpu]'
    command -v gcsfuse >/dev/null || run install_gcsfuse
    ;;
  start)
    shift
    train=(.venv/bin/python -m mpt_jax.train)
    for word in "$@"; do
      if [[ ${last:-} == --workdir && $word == gs://* ]]; then
        mount_bucket "$word"
        word=$folder
      fi
      train+=("$word") last=$word
    done
    if [[ $dry_run ]]; then
      run "${train[@]}"
      exit 0
    fi
    alive && die "a training is running already (process $(<$runs/pid))"
    mkdir -p $runs
    rm -f $runs/exit
    # A session of its own: the connection's end is not the training's. It alone gets
    # the signals of stop, hence the trap.
    # shellcheck disable=SC2016  # expanded by the inner shell
    setsid nohup bash -c '
      runs=$1 && shift
      "$@" &
      trap "kill -TERM $!" TERM
      while kill -0 $! 2>/dev/null; do
        wait $! || true  # ends at a signal, too
      done
      code=0
      wait $! || code=$?
      echo "$code" >"$runs/exit"
    ' train "$runs" "${train[@]}" >>$runs/log 2>&1 </dev/null &
    echo $! >$runs/pid
    ;;
  state)
    if alive; then
      echo running
    elif [[ -f $runs/exit ]]; then
      echo "exit $(<$runs/exit)"
    elif [[ -f $runs/pid ]]; then
      echo "exit 1" # killed with the machine
    else
      echo none
    fi
    ;;
  stop)
    alive || exit 0
    kill -TERM "$(<$runs/pid)"
    while alive; do sleep 1; done
    echo "exit $(<$runs/exit)"
    ;;
  --help) usage ;;
  *) die "expected setup, start, state or stop (see --help)" ;;
esac
