#!/usr/bin/env bash
# Stops what up.sh started, by the process ids in its folder, last started first:   tests/slurm/down.sh DIR
# Exit code 1 when a daemon is left.
set -uo pipefail
dir=$(cd "${1:?say which: down.sh DIR}" && pwd) || exit 1
export SLURM_CONF="$dir/etc/slurm.conf"
timeout 20 scancel --user="$(id -un)" 2>/dev/null && sleep 6 # KillWait

left=0
for file in $(ls -r "$dir"/run/*.pid 2>/dev/null); do
  pid=$(cat "$file")
  kill "$pid" 2>/dev/null
  for _ in $(seq 150); do
    kill -0 "$pid" 2>/dev/null || continue 2
    sleep 0.2
  done
  echo "down.sh: still there: process $pid of $file" >&2
  left=1
done
exit "$left"
