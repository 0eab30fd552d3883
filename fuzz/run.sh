#!/usr/bin/env bash
# Runs every target for some seconds, two at a time. They start from the committed corpus and
# write to a directory that is removed again; an input that breaks one is kept in `artifacts`.
# usage: fuzz/run.sh SECONDS [SEED]
#
# The same seed takes the same way, as far as the time reaches: a check that must pass should not
# find something by chance that the change before it could not know. Longer runs take other seeds.
set -euo pipefail
cd "$(dirname "$0")"

export SECONDS_EACH=$1 SEED=${2:-1}
work=$(mktemp -d)
export work
trap 'rm -rf "$work"' EXIT

# The targets and all that they link are safe Rust, so there is nothing for a sanitizer, and
# without one the stable compiler will do.
export FLAGS="--dev --sanitizer none"

run_one() {
  local target=$1 log=$work/$1.log options=()
  case $target in
    metadata | request_body | response | results) options+=(-dict=dictionaries/json) ;;
    policies_yml | settings) options+=(-dict=dictionaries/yaml) ;;
  esac
  mkdir "$work/$target"
  # shellcheck disable=SC2086 # the flags are words
  if cargo fuzz run $FLAGS "$target" "$work/$target" "corpus/$target" -- \
    -seed="$SEED" -max_total_time="$SECONDS_EACH" -max_len=16384 -timeout=10 "${options[@]}" >"$log" 2>&1; then
    printf '%s: %s, %s\n' "$target" "$(grep -o '^Done .*' "$log")" \
      "$(grep -o 'cov: [0-9]* ft: [0-9]*' "$log" | tail -n 1)"
  else
    tail -n 60 "$log"
    printf '%s: FAILED\n' "$target"
    return 1
  fi
}
export -f run_one

# shellcheck disable=SC2086
cargo fuzz build $FLAGS
cargo fuzz list | xargs -P 2 -I '{}' bash -c 'run_one {}'
