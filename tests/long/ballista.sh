#!/usr/bin/env bash
# A cluster on loopback, with an executor killed in the middle of a job: README.md beside this file.
#
#   tests/long/ballista.sh [--library LIB] [--blocks N] [--binaries DIR] [--workdir DIR]
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

library='' blocks=2500000 binaries=$repo/target/release workdir=
while [ $# -gt 0 ]; do
  case $1 in
    --library) library=$2 ;;
    --blocks) blocks=$2 ;;
    --binaries) binaries=$2 ;;
    --workdir) workdir=$2 ;;
    *) sed -n '2,4s/^# \?//p' "$0" >&2; exit 2 ;;
  esac
  shift 2
done
images=8 port=${VMAR_INDEX_PORT:-50250}
die() { echo "ballista.sh: $*" >&2; exit 1; }
for name in vmar vmar-index; do
  [ -x "$binaries/$name" ] ||
    die "$binaries/$name is not there; build it with 'cargo build --release --features cluster' or name another --binaries"
done
[ -n "$workdir" ] || workdir=$(mktemp -d)
mkdir -p "$workdir"
url=df://127.0.0.1:$port
scheduler='' executors=()

# Ends every process that this script started, and no other.
stop_cluster() {
  for pid in "${executors[@]}" $scheduler; do
    kill -9 "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  scheduler='' executors=()
}
trap stop_cluster EXIT

start_cluster() {
  local n at
  RUST_LOG=warn,ballista_scheduler=info "$binaries/vmar-index" scheduler --bind "127.0.0.1:$port" --executor-timeout 10 \
    >"$workdir/scheduler.log" 2>&1 &
  scheduler=$!
  until (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    kill -0 "$scheduler" 2>/dev/null || die "the scheduler did not start: $(tail -1 "$workdir/scheduler.log")"
    sleep 0.1
  done
  for n in 0 1; do
    at=$((port + 10 + n))
    rm -rf "$workdir/executor$n" && mkdir "$workdir/executor$n"
    RUST_LOG=warn,ballista_executor=info "$binaries/vmar-index" executor --scheduler "127.0.0.1:$port" \
      --bind "127.0.0.1:$at" --work-dir "$workdir/executor$n" --memory 1G --tasks 1 \
      >"$workdir/executor$n.log" 2>&1 &
    executors+=($!)
    until grep -qs "Starting poll work loop" "$workdir/executor$n.log"; do
      kill -0 "${executors[$n]}" 2>/dev/null || die "executor $n did not start: $(tail -1 "$workdir/executor$n.log")"
      sleep 0.1
    done
  done
}

# Tasks in the log of an executor, of a stage or of all: begun, and finished. Their names are JOB/STAGE.ATTEMPT/PARTITION.ATTEMPT.
begun() { grep -c "Received task.*/${2:-[0-9]*}\.[0-9]*/" "$1" || true; }
ended() { grep -c "Finished task.*/${2:-[0-9]*}\.[0-9]*/" "$1" || true; }

# Highest resident set of a process so far, in MiB.
peak() { awk '/VmHWM/ { print int($2 / 1024) }' "/proc/$1/status" 2>/dev/null || true; }

# Runs vmar-index with these arguments; says how long it took, and how much memory this and the executors had at most.
measure() {
  local what=$1 began mine=0 theirs='' now pid
  shift
  began=$(date +%s%N)
  "$binaries/vmar-index" "$@" >"$workdir/run.log" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    now=$(peak "$pid") && mine=${now:-$mine}
    sleep 0.1
  done
  wait "$pid" || die "$what failed: $(tail -1 "$workdir/run.log")"
  for pid in "${executors[@]}"; do theirs="$theirs $(peak "$pid")"; done
  printf '%-34s %6.1f s, %5s MiB%s\n' "$what" "$(bc <<<"scale=3; ($(date +%s%N) - $began) / 1000000000")" "$mine" \
    "${theirs:+, executors$theirs MiB}"
}

# The maps of two directories are the same, and as many.
same_maps() {
  local map count=0
  for map in "$1"/*.map; do
    cmp "$map" "$2/${map##*/}" || die "$map: differs"
    count=$((count + 1))
  done
  [ "$count" -eq "$(find "$2" -name '*.map' | wc -l)" ] || die "$1 and $2 differ in number"
  echo "  $count maps are byte for byte the same"
}

# A comparison that always says yes would prove nothing: one byte changed, one map missing, one too many.
comparison_can_fail() {
  local other=$workdir/other change victim at byte
  for change in byte missing more; do
    rm -rf "$other" && cp -r "$1" "$other"
    victim=$(find "$other" -name '*.map' | sort | tail -1)
    case $change in
      byte)
        at=$(($(stat -c %s "$victim") / 2))
        byte=$(od -An -tu1 -j "$at" -N 1 "$victim")
        # shellcheck disable=SC2059 # an escape of printf's own
        printf "\\x$(printf %02x $((byte ^ 1)))" | dd of="$victim" bs=1 seek="$at" conv=notrunc status=none
        ;;
      missing) rm "$victim" ;;
      more) cp "$victim" "$other/more.map" ;;
    esac
    if (same_maps "$1" "$other") >/dev/null 2>&1; then die "the comparison does not see: $change"; fi
  done
  echo "  and the comparison sees a byte that differs, a map that is missing, one too many"
}

# True while executor 1 is in the middle of a task of this stage, and has finished so many of them.
at_work() {
  finished=$(ended "$log" "$1") running=$(($(begun "$log" "$1") - finished))
  [ "$finished" -ge "$2" ] && [ "$running" -gt 0 ]
}

seconds_since() { bc <<<"scale=1; ($(date +%s%N) - $1) / 1000000000"; }

# The job again, and executor 1 killed while it works on this stage, after it has finished so many tasks of it.
killed() {
  local stage=$1 after=$2 out=$3 log=$workdir/executor1.log pid finished running began others
  shift 3
  stop_cluster
  start_cluster
  began=$(date +%s%N)
  "$binaries/vmar-index" "$@" --out "$out" >"$workdir/run.log" 2>&1 &
  pid=$!
  while true; do
    kill -0 "$pid" 2>/dev/null || die "the job ended before there was anything to kill: take more --blocks"
    if at_work "$stage" "$after"; then
      # Held, it cannot end its task between the look at the log and its death.
      kill -STOP "${executors[1]}"
      sleep 0.05
      if at_work "$stage" "$after"; then break; fi
      kill -CONT "${executors[1]}"
    fi
    sleep 0.02
  done
  kill -9 "${executors[1]}"
  wait "${executors[1]}" 2>/dev/null || true
  others=$(ended "$workdir/executor0.log")
  echo "killed -9 after $(seconds_since "$began") s: $finished tasks of stage $stage done, in the middle of $(
    grep 'Received task' "$log" | tail -1 | sed 's/.*: //')"
  wait "$pid" || die "the job failed: $(tail -1 "$workdir/run.log")"
  others=$(($(ended "$workdir/executor0.log") - others))
  [ "$others" -gt 0 ] || die "the other executor had nothing left to do"
  echo "  finished after $(seconds_since "$began") s: $others tasks by the other executor since; $(
    grep -c 'once more' "$workdir/run.log" || true) times asked for once more"
  grep -o 'Removing executor.*\|Reset [0-9]* tasks.*' "$workdir/scheduler.log" | cut -c1-150 | sed 's/^/  scheduler: /' ||
    die "the scheduler did not notice"
}

echo "==> images whose bytes vmar can compare: vmar library remap, embedded, cluster"
real=$workdir/real
if [ -n "$library" ]; then
  cp -a "$library" "$real"
else
  "$binaries/vmar-index" synthesize --raw --images 4 --blocks $((blocks / 10)) --out "$workdir/raw"
  "$binaries/vmar" library init "$real"
  "$binaries/vmar" --library "$real" image add "a=$workdir/raw/0.raw" "b=$workdir/raw/1.raw" "c=$workdir/raw/2.raw" \
    "d=$workdir/raw/3.raw" >"$workdir/add.log" 2>&1 || die "image add: $(tail -1 "$workdir/add.log")"
fi
start_cluster
for policy in bridge least-fragmented paper; do
  "$binaries/vmar" --library "$real" library remap --policy $policy >"$workdir/remap.log" 2>&1 ||
    die "remap: $(tail -1 "$workdir/remap.log")"
  measure "$policy, embedded" run --library "$real" --policy $policy --out "$workdir/real-embedded-$policy"
  same_maps "$real/maps" "$workdir/real-embedded-$policy"
  measure "$policy, cluster" run --library "$real" --policy $policy --out "$workdir/real-cluster-$policy" --cluster "$url"
  same_maps "$real/maps" "$workdir/real-cluster-$policy"
done
comparison_can_fail "$real/maps"
killed 1 1 "$workdir/real-killed" run --library "$real" --policy paper --cluster "$url" --partitions 64
same_maps "$real/maps" "$workdir/real-killed"
same_maps "$workdir/real-embedded-paper" "$workdir/real-killed"

echo "==> $images runs of $blocks blocks: embedded, cluster, cluster with an executor killed"
large=$workdir/large
"$binaries/vmar-index" synthesize --images $images --blocks "$blocks" --out "$large"
stop_cluster
measure "embedded" run --library "$large" --out "$workdir/embedded"
measure "embedded, 256 MiB" run --library "$large" --out "$workdir/small" --memory 256M --spill "$workdir"
same_maps "$workdir/embedded" "$workdir/small"
start_cluster
measure "cluster" run --library "$large" --out "$workdir/cluster" --cluster "$url"
same_maps "$workdir/embedded" "$workdir/cluster"
# Stage 1 reads the runs, stage 2 sorts by content; a last one puts it in order of images.
reads=$(begun "$workdir/executor1.log" 1) sorts=$(begun "$workdir/executor1.log" 2)
for at in "1 1" "1 $((reads / 2))" "2 $((sorts / 2))"; do
  # shellcheck disable=SC2086 # two words
  killed $at "$workdir/killed" run --library "$large" --cluster "$url"
  same_maps "$workdir/embedded" "$workdir/killed"
  rm -r "$workdir/killed"
done
echo "vmar-index on a Ballista cluster of a scheduler and two executor processes on loopback, one killed with -9 in the middle:" \
  "same maps as the embedded run, byte for byte."
