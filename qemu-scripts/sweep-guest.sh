#!/usr/bin/env bash
# Figure 18 of the VMAR paper by its own method: a guest reads its disk past its own page cache, again and again.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

passes=6 seed=1 mode='' name='' work='' temporary=''

usage() {
    cat <<EOF
usage: qemu-scripts/sweep-guest.sh --mode raw|plain|vmar --image NAME [option...]

Boots a guest that reads from an image 3,000 random chunks of 1 MiB, then 350 MiB in sequence, one request at a time (fio,
O_DIRECT), all of it several times, and prints {"image","random_s","sequential_s","passes":{…},"accel"}: the medians of all times
but the first, which warms the host's page cache. Chunks with holes in the image file are left out. Nothing is slowed.

  --mode raw       the image file itself, by QEMU's block layer
  --mode plain     a qcow2 overlay over it
  --mode vmar      vmar serve, of this image in --library
  --images DIR     where NAME.raw is (default build/images)
  --library DIR    vmar's library
  --passes N       how often each is done, at least 2 (default $passes)
  --seed N         for the random chunks (default $seed)
  --workdir DIR    overlay and logs (default: a new directory below /tmp, removed when all went well)

VMAR_ACCEL=kvm|tcg chooses the accelerator, VMAR_BIN the vmar binary.
EOF
}

while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --*) [ $# -ge 2 ] || { usage >&2; exit 2; } ;;
    esac
    case $1 in
        --mode) mode=$2 ;;
        --image) name=$2 ;;
        --images) vm_images=$2 ;;
        --library) vm_library=$2 ;;
        --passes) passes=$2 ;;
        --seed) seed=$2 ;;
        --workdir) work=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
[[ $mode =~ ^(raw|plain|vmar)$ && -n $name && $passes =~ ^[0-9]+$ && $passes -ge 2 && $seed =~ ^[0-9]+$ ]] || { usage >&2; exit 2; }
[ "$mode" != vmar ] || [ -d "$vm_library" ] || die "vmar serve needs the library that $name is in: say --library, or set VMAR_LIBRARY"
[ -z "$vm_library" ] || vm_library=$(realpath "$vm_library")
images=$(realpath "$vm_images")
image=$images/$name.raw
[ -e "$image" ] || die "$image is not there: name another --image, or another --images"

# Only the result goes to the standard output: what is installed or built first is told beside it.
exec 3>&1 >&2
begin_guest sweep

# Chunks that the file has data for, and fio's lists of them ("fio version 2 iolog").
qemu-img map --output=json -f raw "$image" | jq -r '.[] | select(.data and (.zero | not)) | "\(.start) \(.start + .length)"' |
    awk -v mib=1048576 '{ for (at = int(($1 + mib - 1) / mib); (at + 1) * mib <= $2; at++) print at * mib }' >"$work/chunks"
[ -s "$work/chunks" ] || die "$image has no MiB without a hole: name another --image"
iolog() {
    echo "fio version 2 iolog"
    echo "/dev/vda add"
    echo "/dev/vda open"
    sed 's|.*|/dev/vda read & 1048576|'
    echo "/dev/vda close"
}
head -n 350 "$work/chunks" | iolog >"$work/sequential"
awk -v seed="$seed" '{ at[NR] = $1 } END { srand(seed); for (i = 0; i < 3000; i++) print at[int(rand() * NR) + 1] }' \
    "$work/chunks" | iolog >"$work/random"

guest_initramfs "$work/$name.initrd" qemu-scripts/sweep-guest.init fio "$work/random" "$work/sequential"
ln -sf "$cache/vmlinuz" "$work/$name.vmlinuz"
ln -sf "$image" "$work/$name.raw"
echo "console=ttyS0 panic=-1 quiet vmar.name=$name vmar.passes=$passes" >"$work/$name.cmdline"
vm_images=$work vm_record=''
probe_accel "$cache/vmlinuz"
vm_guard

# Also what others would read of it.
drop_cached "$images"/*.raw
dir=$work/vm
overlay=$image
vm_folder "$dir"
[ "$mode" = raw ] || { overlay=$dir/overlay.qcow2; vm_overlay "$mode" "$name" "$overlay"; }
vm_start "$mode" "$name" "$dir" "$overlay"
# The marker comes after the last pass.
vm_wait_up "$dir" $((300 * passes))
vm_wait_off "$dir" 60
vm_stop_all || die "vmar serve did not end well (logs: $dir)"

grep -a '^VMAR-SWEEP ' "$dir/serial.log" | tr -d '\r' | jq -Rn --arg image "$name" --arg mode "$mode" --arg accel "$VMAR_ACCEL" '
    def median: sort | (.[(length - 1) / 2 | floor] + .[length / 2 | floor]) / 2;
    reduce (inputs | split(" ")) as [$_, $list, $pass, $ms] ({}; .[$list] += [($ms | tonumber) / 1000])
    | {image: $image, mode: $mode, random_s: (.random[1:] | median), sequential_s: (.sequential[1:] | median), passes: ., accel: $accel}' >&3
rm -rf ${temporary:+"$temporary"}
