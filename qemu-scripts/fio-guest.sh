#!/usr/bin/env bash
# The same fio jobs in a guest on QEMU's own disk and in a guest on vmar's, in turns.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

seconds=10 rounds=3

usage() {
    cat <<EOF
usage: qemu-scripts/fio-guest.sh [--seconds S] [--rounds N] [--json FILE] [--workdir DIR]

Each round boots a guest with a plain -drive (QEMU's qcow2 overlay over the raw image) and one with vmar serve, on fresh
overlays of the same image, and runs fio on the disk: 4k random reads at queue depth 1 and 32, sequential reads of 1 MiB
at 4, 4k random writes and 70/30 reads and writes at 32. The image, 96 MiB, is in the page cache: what is compared is the way to it.

  --seconds S      for each job (default $seconds)
  --rounds N       so many of both (default $rounds)
  --json FILE      write what was measured there too
  --workdir DIR    image, overlays and logs (default: a new directory below /tmp, removed when all went well)

VMAR_ACCEL=kvm|tcg chooses the accelerator, VMAR_BIN the vmar binary. With an emulated CPU (tcg) most of the time goes into
the guest: only the ratios count. The plain disk is served by QEMU's main loop (no iothread), vmar's by its own process.
EOF
}

json='' work='' temporary=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --*) [ $# -ge 2 ] || { usage >&2; exit 2; } ;;
    esac
    case $1 in
        --seconds) seconds=$2 ;;
        --rounds) rounds=$2 ;;
        --json) json=$(realpath "$2") ;;
        --workdir) work=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
[[ $seconds =~ ^[1-9][0-9]*$ && $rounds =~ ^[1-9][0-9]*$ ]] || { usage >&2; exit 2; }

begin_guest fio
guest_initramfs "$work/initrd" qemu-scripts/fio-guest.init fio
# Most of what the right image holds is read from the left one.
rm -rf "$work/library" "$work"/{left,right}.raw
guest_image left "$work/initrd"
guest_image right "$work/initrd"
{ "$vmar" library init "$work/library" && "$vmar" image add "left=$work/left.raw" "right=$work/right.raw" \
    --library "$work/library"; } >"$work/library.log" 2>&1 || die "no library: $(tail -n 1 "$work/library.log")"
vm_images=$work vm_library=$work/library vm_append="vmar.seconds=$seconds" vm_record=''
probe_accel "$cache/vmlinuz"
vm_guard

# run MODE ROUND: one guest from start to end; a line on file 7 for each job.
run() {
    local mode=$1 round=$2 dir=$work/$1 name iops
    vm_folder "$dir"
    vm_overlay "$mode" right "$dir/overlay.qcow2"
    cat "$work"/{left,right}.raw >/dev/null
    vm_start "$mode" right "$dir" "$dir/overlay.qcow2"
    # The marker comes after the last job.
    vm_wait_up "$dir" $((600 + 15 * seconds))
    vm_wait_off "$dir" 60
    vm_stop_all || die "vmar serve did not end well (logs: $dir)"
    qemu-img check -q "$dir/overlay.qcow2" || die "qemu-img check: the overlay of $dir has errors"
    while read -r _ name iops; do
        echo "$round $mode $name $iops" >&7
    done < <(grep -a '^VMAR-FIO ' "$dir/serial.log" | tr -d '\r')
}

say "5 jobs of $seconds s each, plain and vmar, rounds: $rounds ($VMAR_ACCEL)"
exec 7>"$work/results"
for ((round = 1; round <= rounds; round++)); do
    for mode in plain vmar; do
        say "  round $round, $mode"
        run "$mode" "$round"
    done
done
exec 7>&-

result=$(jq -Rn --arg accel "$VMAR_ACCEL" --argjson seconds "$seconds" --argjson rounds "$rounds" '
    def median: sort | (.[(length - 1) / 2 | floor] + .[length / 2 | floor]) / 2;
    [inputs | split(" ") | {round: (.[0] | tonumber), mode: .[1], job: .[2], iops: (.[3] | tonumber)}] as $all
    | {$accel, $seconds, $rounds, jobs: [$all | map(.job) | unique_by(. as $j | $all | map(.job) | index($j)) | .[] as $job
        | [$all[] | select(.job == $job)]
        | {job: $job, plain: [.[] | select(.mode == "plain").iops], vmar: [.[] | select(.mode == "vmar").iops]}
        | . + {plain_median: (.plain | median), vmar_median: (.vmar | median),
            ratios: [.plain, .vmar] | transpose | map(.[1] / .[0])}
        | . + {ratio: (.vmar_median / .plain_median)}]}' "$work/results")
[ -z "$json" ] || printf '%s\n' "$result" >"$json"

jq -r '
    def pad(n): tostring | (" " * ([n - length, 0] | max)) + .;
    def left(n): tostring | . + (" " * ([n - length, 0] | max));
    def hundredths: . * 100 | round / 100;
    "", "\("job, median IOPS" | left(24))\(["plain", "vmar", "vmar/plain", "of each round"] | map(pad(14)) | join(""))",
    (.jobs[] | (.job | left(24)) + ([(.plain_median, .vmar_median | round), (.ratio | hundredths),
        "\(.ratios | min | hundredths)-\(.ratios | max | hundredths)"] | map(pad(14)) | join("")))' <<<"$result"
rm -rf ${temporary:+"$temporary"}
