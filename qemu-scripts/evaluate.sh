#!/usr/bin/env bash
# Measures what section 4 of the VMAR paper measures, on this machine, and draws it: one command, one page.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<EOF
usage: qemu-scripts/evaluate.sh [--quick] [option...]

Boots many VMs from different images by three schemes: pre-copy (the raw file, on the local disk), on-demand (a qcow2 overlay
over the raw file on slow storage) and vmar (over the same slow storage). Two ways:
  replayed   recorded boots and application loads against real servers (vmar serve, qemu-storage-daemon): the I/O path alone,
             up to a hundred VMs (cargo bench --bench storm)
  guests     real VMs in QEMU (qemu-scripts/storm.sh), their CPU time told apart from waiting
Ends with report.html, its figures as CSV and SVG files, and everything that was measured, in --out. What is there already
stays and is not measured again: a run that was interrupted goes on where it was.

  --quick         replayed boots of few VMs, two guests: about a quarter of an hour on two cores. Without it, about two hours
  --images DIR    where the images are (default \$VMAR_IMAGES_DIR, else build/images); if there are none, the corpus is built
                  there (images/corpus.sh --apps), which takes another hour. Image files are dropped from the page cache
  --traces DIR    recorded boots of these images (default: traces in --out, recorded if missing: a minute an image)
  --out DIR       where the results go (default build/evaluation, with --quick build/evaluation-quick)
  --runs N        repetitions of each point (default 3)
  --compute S     seconds that a replayed guest computes until it is up, on average: recorded pauses are scaled to that
                  (default 1; an emulated processor is 10 to 20 times slower than a real one)
  --rate BYTES    bytes a second of the slow storage (default: the rate at which one cold on-demand boot takes twice the hot
                  one, measured first, for guests and for replayed boots)
  --readahead KIB of the disk with the images, as long as this runs (default 128, Linux's own default)
  --no-guests     only replayed boots
  --report        measure nothing, only make the report anew of what is there

Needs root: for control groups (throttled disk, limited memory), and to install what is missing.
EOF
}

quick='' traces='' out='' runs=3 compute=1 rate='' readahead=128 guests=1 report_only=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --quick) quick=1; shift; continue ;;
        --no-guests) guests=''; shift; continue ;;
        --report) report_only=1; shift; continue ;;
        --*) [ $# -ge 2 ] || { usage >&2; exit 2; } ;;
        *) usage >&2; exit 2 ;;
    esac
    case $1 in
        --images) vm_images=$2 ;;
        --traces) traces=$2 ;;
        --out) out=$2 ;;
        --runs) runs=$2 ;;
        --compute) compute=$2 ;;
        --rate) rate=$2 ;;
        --readahead) readahead=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
[ "$(id -u)" -eq 0 ] || die "must run as root: it makes control groups"
command_line="qemu-scripts/evaluate.sh${quick:+ --quick} --runs $runs --compute $compute${rate:+ --rate $rate}"
here=$repo/qemu-scripts/evaluate
out=${out:-$repo/build/evaluation${quick:+-quick}}
mkdir -p "$out/raw"
out=$(cd "$out" && pwd)
if [ -z "$report_only" ]; then
    # Two that measure at once would measure each other.
    exec 8>"$out/.lock"
    flock -n 8 || die "$out: another run measures there; wait for its end, or name another --out"
fi

need_qemu
need jq:jq fincore:util-linux flock:util-linux qemu-storage-daemon:qemu-system-common
# What is measured is what this tree builds, always: an older binary would go unnoticed.
build_vmar
vmar=${CARGO_TARGET_DIR:-$repo/target}/release/vmar
export VMAR_BIN=$vmar

# ---------------------------------------------------------------------------------------------------------------------
# Images, traces, libraries

if ! compgen -G "$vm_images/*.raw" >/dev/null; then
    "$repo/images/corpus.sh" --apps --out "$vm_images"
fi
vm_images=$(cd "$vm_images" && pwd)
# Those of the corpus in an order in which neighbours differ, then whatever else is there; applications apart.
order=(web db13 cache python mail web13 java php13 monitor ruby13 node13 db python13 mariadb13 db13-used)
boots=() apps=()
for raw in "$vm_images"/*.raw; do
    name=$(basename "$raw" .raw)
    case " ${order[*]} " in *" $name "*) continue ;; esac
    if [[ $name =~ ^app[0-9]+$ ]]; then apps+=("$name"); else order+=("$name"); fi
done
for name in "${order[@]}"; do
    [ ! -e "$vm_images/$name.raw" ] || boots+=("$name")
done
[ ${#boots[@]} -ge 2 ] || die "$vm_images has ${#boots[@]} images: at least 2 are needed to share something"
[ ${#apps[@]} -gt 0 ] || say "note: no image app1 … in $vm_images (images/corpus.sh --apps): loading applications is not measured"
images=("${boots[@]}" "${apps[@]}")

traces=${traces:-$out/traces}
# record NAME...: with the options before a "--". Only the application images load theirs; all others just boot.
record() {
    local options=() missing=() name
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    for name in "$@"; do
        [ -e "$traces/$name.trace" ] || missing+=("$name")
    done
    [ ${#missing[@]} -eq 0 ] || "$repo/qemu-scripts/record-boots.sh" "${options[@]}" --images "$vm_images" --out "$traces" "${missing[@]}"
}
if [ -z "$report_only" ]; then
    record -- "${boots[@]}"
    record --app -- "${apps[@]}"
fi
[ -d "$traces/lib" ] || die "$traces/lib is not there: run it without --report, which records the boots"

# Copies of the library that the traces were recorded with, each with maps of a policy.
for policy in bridge paper; do
    [ ! -e "$out/lib-$policy/ready" ] || continue
    rm -rf "$out/lib-$policy"
    cp -a "$traces/lib" "$out/lib-$policy"
    say "block maps by policy $policy"
    "$vmar" library remap --policy "$policy" --library "$out/lib-$policy" >"$out/remap-$policy.log" 2>&1 ||
        die "$(tail -n 1 "$out/remap-$policy.log")"
    touch "$out/lib-$policy/ready"
done

# ---------------------------------------------------------------------------------------------------------------------
# The machine as it is measured

bench() {
    local found
    say "building the program that replays boots (cargo bench --bench storm --no-run)"
    found=$(cd "$repo" && cargo bench --quiet --no-run --bench storm --message-format=json |
        jq -r 'select(.executable and .target.name == "storm") | .executable' | tail -n 1)
    [ -x "$found" ] || die "cargo bench --bench storm --no-run made no program"
    storm=$found
}

host_disk=$(lsblk -no PKNAME,KNAME "$(findmnt -n -o SOURCE -T "$vm_images")" 2>/dev/null | awk 'NR == 1 { print $1 }')
knob=/sys/block/$host_disk/queue/read_ahead_kb
job_pid=''
cleanup() {
    local root
    if [ -n "$job_pid" ]; then
        kill -TERM -- "-$job_pid" 2>/dev/null && wait "$job_pid" || true
    fi
    [ -z "${before:-}" ] || echo "$before" >"$knob"
    for root in $(findmnt -n -o TARGET -t cgroup,cgroup2); do
        rmdir "$root/vmar-evaluate.$$" 2>/dev/null || true
    done
}
set_up_machine() {
    trap cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    if [ -w "$knob" ]; then
        before=$(cat "$knob")
        echo "$readahead" >"$knob"
    else
        say "note: the readahead of the disk with $vm_images cannot be set; it stays as it is"
        readahead=unknown
    fi
    bench
    probe_accel "$vm_images/${boots[0]}.vmlinuz"
}

# throttled RATE COMMAND...: with its reads of the images' disk limited together; 0: without a limit.
throttled() {
    local limit=$1 number root group
    shift
    [ "$limit" -gt 0 ] || { "$@"; return; }
    number=$(lsblk -no MAJ:MIN "/dev/$host_disk" | head -n 1 | tr -d ' ')
    root=$(findmnt -n -o TARGET -t cgroup -O blkio | head -n 1 || true)
    if [ -n "$root" ]; then
        group=$root/vmar-evaluate.$$
        mkdir -p "$group"
        echo "$number $limit" >"$group/blkio.throttle.read_bps_device"
    else
        root=$(findmnt -n -o TARGET -t cgroup2 | head -n 1 || true)
        [ -n "$root" ] || die "no control groups are mounted: storage cannot be slowed"
        group=$root/vmar-evaluate.$$
        mkdir -p "$group"
        echo "$number rbps=$limit" >"$group/io.max" ||
            die "the cgroup controller 'io' is not enabled: echo +io > $root/cgroup.subtree_control"
    fi
    (echo "$BASHPID" >"$group/cgroup.procs" && exec "$@")
}

# ---------------------------------------------------------------------------------------------------------------------
# Measurements. Each is a file raw/KEY.json: {series, run, points: [{figure, metric, x}], result}.

paths() {
    local name
    for name in "$@"; do
        echo "$traces/$name.trace"
    done
}

# jobs, each a line of words: KEY SERIES RUN POINTS COMMAND... ; POINTS: FIGURE:METRIC:X,...
jobs=()
job() {
    jobs+=("$*")
}

replay() { # SCHEME OPTION...
    local scheme=$1 library=lib-bridge series=$1
    shift
    if [ "$series" = vmar-paper ]; then library=lib-paper scheme=vmar; fi
    "$storm" --library "$out/$library" --scheme "$scheme" --dir "$out" "$@" 2>>"$out/storm.log"
}

guest() { # SCHEME NAME...
    local scheme=$1 limit=$guest_rate mode=plain json=$out/guest.json work
    shift
    work=$(mktemp -d -t vmar-eval.XXXXXX)
    case $scheme in
        pre-copy) limit=0 ;;
        vmar) mode=vmar ;;
    esac
    # Many emulated guests at slow storage: services may take longer than the 90 s after which systemd gives them up.
    throttled "$limit" "$repo/qemu-scripts/storm.sh" --mode "$mode" --images "$vm_images" --library "$out/lib-bridge" \
        --append systemd.default_timeout_start_sec=1800 --timeout 3600 --workdir "$work" --json "$json" "$@" >>"$out/storm.log" 2>&1 ||
        die "the storm of guests failed: $(tail -n 1 "$out/storm.log") (log: $out/storm.log)"
    rm -rf "$work"
    cat "$json"
}

sweep_guest() { # SCHEME OPTION...
    local mode=$1
    shift
    case $mode in
        pre-copy) mode=raw ;;
        on-demand) mode=plain ;;
    esac
    "$repo/qemu-scripts/sweep-guest.sh" --mode "$mode" --images "$vm_images" --library "$out/lib-bridge" "$@" 2>>"$out/storm.log"
}

# copy_image RATE NAME: what pre-copy does before a VM can boot; from storage of this rate, to the local disk.
copy_image() {
    local rate=$1 image=$vm_images/$2.raw began
    drop_cached "$image"
    began=$(date +%s%N)
    throttled "$rate" cp --sparse=always --reflink=never "$image" "$out/copy.raw"
    jq -n --argjson ns $(($(date +%s%N) - began)) --argjson rate "$rate" --arg image "$2" \
        --argjson bytes "$(du --block-size=1 "$image" | cut -f1)" '{image: $image, mean_s: ($ns / 1e9), bytes: $bytes, rate: $rate}'
    rm -f "$out/copy.raw"
}

run_jobs() {
    local at=0 line key series run points began
    for line in "${jobs[@]}"; do
        at=$((at + 1))
        read -r key series run points line <<<"$line"
        [ ! -e "$out/raw/$key.json" ] || continue
        say "[$at of ${#jobs[@]}] $key"
        began=$(date +%s)
        # In a process group of its own, and waited for: so a signal ends it at once, with all that it started.
        set -m
        # shellcheck disable=SC2086 # options are words without blanks
        $line >"$out/result.json" &
        job_pid=$!
        set +m
        wait "$job_pid" || die "$key: $(tail -n 1 "$out/storm.log") (log: $out/storm.log)"
        job_pid=''
        jq -c --arg series "$series" --argjson run "$run" --arg points "$points" --argjson took $(($(date +%s) - began)) '{
            series: $series, run: $run, took_s: $took,
            points: [$points | split(",")[] | split(":") | {figure: .[0], metric: .[1], x: (.[2] | tonumber? // .)}],
            result: .}' "$out/result.json" >"$out/raw/$key.new"
        mv "$out/raw/$key.new" "$out/raw/$key.json"
    done
}

# Seconds of a hot boot; VMs come twice as fast as one boots, so that a cold one has no disk to itself.
measure_time() {
    hot_s=$(jq '.result.mean_s * 100 | round / 100' "$out/raw/calibration-hot.json")
    interval=$(jq -n --argjson hot "$hot_s" '$hot / 2 * 10 | round / 10')
}

# A cold boot is to take twice the hot one: what a cold one reads, in the time of a hot one.
calibrate() {
    local cold=$out/raw/calibration-cold.json hot=$out/raw/calibration-hot.json few=("${boots[@]:0:4}")
    jobs=()
    # shellcheck disable=SC2046
    job calibration-cold on-demand 0 none:mean_s:0 replay on-demand --compute "$compute" --one-by-one --vms ${#few[@]} \
        $(paths "${few[@]}")
    # shellcheck disable=SC2046
    job calibration-hot on-demand 0 none:mean_s:0 replay on-demand --compute "$compute" --one-by-one --vms ${#few[@]} --warm \
        $(paths "${few[@]}")
    [ -z "$guests" ] || job calibration-guest on-demand 0 none:guest_boot:0 guest pre-copy "${boots[0]}"
    guest_rate=0 guest_interval=0
    run_jobs
    measure_time
    replay_rate=${rate:-$(jq -n --slurpfile cold "$cold" --slurpfile hot "$hot" \
        '$cold[0].result | .read_bytes / .vms / $hot[0].result.mean_s / 1e5 | round * 1e5')}
    if [ -n "$guests" ]; then
        guest_rate=${rate:-$(jq '.result | .disk.read_bytes / (.vms[0].boot_ms / 1e3) / 1e5 | round * 1e5' \
            "$out/raw/calibration-guest.json")}
        guest_interval=$(jq '.result.vms[0].boot_ms / 2e3 | round' "$out/raw/calibration-guest.json")
        echo "$(jq -n "$guest_rate / 1e6") MB/s; a VM every $guest_interval s on average" >"$out/guests.txt"
    fi
    say "a hot boot takes $hot_s s replayed; storage: $replay_rate bytes a second, a VM every $interval s${guests:+; for guests $guest_rate bytes a second, $guest_interval s}"
}

schemes=(on-demand vmar pre-copy)
# shellcheck source=qemu-scripts/evaluate/jobs.sh
. "$here/jobs.sh"

if [ -z "$report_only" ]; then
    set_up_machine
    calibrate
    jobs=()
    list_jobs
    run_jobs
fi

# ---------------------------------------------------------------------------------------------------------------------
# The report

version() {
    "$1" --version 2>/dev/null | head -n 1
}
fact() {
    jq -cn --arg name "$1" --arg value "$2" '[$name, $value]'
}
facts() {
    fact "Machine" "$(nproc) processors ($(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)), $(awk '/MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo) of memory, Linux $(uname -r)"
    fact "Accelerator of the guests" "${VMAR_ACCEL:-see the guests: $(jq -rs '[.[].result.accel | values][0] // "none"' "$out"/raw/*.json)}"
    fact "Versions" "$(version "$vmar"); $(version qemu-system-x86_64); $(version qemu-storage-daemon)"
    fact "Commit" "$(git -C "$repo" describe --always --dirty 2>/dev/null || echo unknown)"
    fact "Command" "$command_line"
    fact "Images" "${images[*]}"
    fact "A hot replayed boot" "$hot_s s, of which it computes $compute s; in a storm a VM comes every $interval s on average"
    fact "Slow storage, replayed" "$(jq -rs '[.[].result.rate | values | . / 1e6] | group_by(.) | max_by(length)[0] // "-"' "$out"/raw/r*.json) MB/s"
    [ ! -e "$out/guests.txt" ] || fact "Slow storage, guests" "$(cat "$out/guests.txt")"
    fact "Readahead of the host's disk" "$readahead KiB"
}
[ -e "$out/raw/calibration-hot.json" ] || die "nothing was measured in $out yet: run it without --report"
measure_time
facts | jq -s '.' >"$out/facts.json"
jq --slurpfile facts "$out/facts.json" --argjson interval "$interval" '
    .facts = $facts[0] | (.claims[] | .of, .against | .x | select(. == "interval")) = $interval' \
    "$here/figures.json" >"$out/figures.json"
jq -c -f "$here/points.jq" "$out"/raw/*.json >"$out/points.jsonl"
"$vmar" report "$out" --library "$out/lib-bridge" --out "$out/report.html" --csv "$out/figures"
say "report: $out/report.html"
