# shellcheck shell=bash disable=SC2154  # the scripts declare name, project, ...
# What the scripts here share: flags, checks, quoting, --dry-run. Sourced, never run.
set -euo pipefail
dry_run='' help=''

# Prints the comment at the head of the script: its --help.
usage() {
  sed -n '2,/^[^#]/ { s/^# \{0,1\}//; t show; b; :show p; }' "$0"
}

die() { # one line, and the exit code of a user's mistake
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# parse "FLAGS WITH VALUES" "SWITCHES" "$@": --some-flag VALUE, or =VALUE, sets $some_flag;
# what follows -- is $rest. The script declares them all, with their defaults.
parse() {
  local flags=" $1 " switches=" $2 dry-run help " flag value
  shift 2
  rest=()
  while (($#)); do
    flag=${1#--}
    case $1 in
      --)
        shift
        rest=("$@")
        break
        ;;
      --*=*)
        flag=${flag%%=*} value=${1#*=}
        [[ $flags == *" $flag "* ]] || die "unknown flag --$flag (see --help)"
        ;;
      --*)
        if [[ $switches == *" $flag "* ]]; then
          value=yes
        elif [[ $flags == *" $flag "* ]]; then
          (($# > 1)) || die "--$flag: expected a value"
          value=$2
          shift
        else
          die "unknown flag $1 (see --help)"
        fi
        ;;
      *) die "unexpected argument $(quote "$1") (see --help)" ;;
    esac
    printf -v "${flag//-/_}" '%s' "$value"
    shift
  done
  if [[ $help ]]; then
    usage
    exit 0
  fi
}

# check FLAG VALUE PATTERN EXAMPLE: the value is there and nothing but what it may be.
check() {
  [[ $2 ]] || die "--$1 is missing, as in --$1 $4"
  [[ $2 =~ ^$3$ ]] || die "--$1: got $(quote "$2"), expected something like $4"
}

check_place() {
  check project "$project" '[a-z][a-z0-9.:-]{4,61}[a-z0-9]' my-project
  check zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' us-central2-b
}

check_name() {
  check name "$name" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' mpt-7b
}

check_config() {
  check config "$config" '[A-Za-z0-9_./-]+\.py(:[A-Za-z0-9_.,=-]+)?' configs/mpt_7b.py
}

check_run() {
  check_config
  check workdir "$workdir" 'gs://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9._=-]+)*/?' \
    gs://my-bucket/mpt-7b
}

# What libtpu is told with --sparse-cores; see README.md.
sparse_core_flags='--xla_tpu_prefer_async_allgather_to_allreduce=true'
offload=--xla_tpu_enable_sparse_core_collective_offload
for each in all_gather 2d_all_gather 3d_all_gather reduce_scatter nd_reduce_scatter; do
  sparse_core_flags+=" ${offload}_$each=true"
done

# The words as a shell reads them back: as they are where that is safe, else quoted.
quote() {
  local word out=''
  for word in "$@"; do
    if ! [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    out+="${out:+ }$word"
  done
  printf '%s' "$out"
}

# Runs a command, or prints it with --dry-run.
run() {
  if [[ $dry_run ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

tpus() { # gcloud's commands for queued TPUs, of this project and zone
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$name" \
    "--project=$project" "--zone=$zone" "$@"
}

on_all_workers() { # a command line for the shell of every worker of every slice
  tpus ssh --node=all --worker=all "--command=$1"
}
