#!/usr/bin/env bash
# What a guest must be able to do with a disk from vmar: write, shut down, go on without vmar, and live beside a VM that
# never had it. Ends with a table; exit status 0 when every line of it passed.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<EOF
usage: qemu-scripts/check-guest.sh [--name NAME] [--images DIR] [--library DIR] [--workdir DIR] [--timeout S]

  --name NAME      the image to use (default web)
  --images DIR     where NAME.raw is (default \$VMAR_IMAGES_DIR, else build/images)
  --library DIR    a library that has it (default: a new one in the working directory, with only this image)
  --workdir DIR    overlays and logs (default: a new directory below /tmp)
  --timeout S      for each marker and each power-off (default 400)
EOF
}

name=web dir='' timeout=400
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --*) [ $# -ge 2 ] || { usage >&2; exit 2; } ;;
    esac
    case $1 in
        --name) name=$2 ;;
        --images) vm_images=$2 ;;
        --library) vm_library=$2 ;;
        --workdir) dir=$2 ;;
        --timeout) timeout=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
raw=$vm_images/$name.raw
[ -e "$raw" ] || die "$raw is not there: build it with images/build.sh $name"
need_qemu
need_vmar
probe_accel "$vm_images/$name.vmlinuz"
dir=${dir:-$(mktemp -d -t vmar-check.XXXXXX)}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
vm_guard

results=() failures=0
# check WHAT COMMAND...: in a subshell, so that whatever fails fails one line and not the script. (Inside a condition the
# shell would go on after an error, so the status is taken without one.)
check() {
    local what=$1 log=$dir/check-$((${#results[@]} + 1)).log began=$SECONDS status
    shift
    say "... $what"
    set +e
    (set -e; vm_dirs=(); vm_guard; "$@") >"$log" 2>&1
    status=$?
    set -e
    if [ "$status" -eq 0 ]; then
        results+=("pass  $what ($((SECONDS - began)) s)")
    else
        results+=("FAIL  $what: $(tail -n 1 "$log") (log: $log)")
        failures=$((failures + 1))
    fi
}

said() {
    grep -qa "^$2 $name" "$1/serial.log" || die "the guest did not say $2 (serial port: $1/serial.log)"
}

# start MODE HOW FOLDER OVERLAY [WORDS]
start() {
    vm_boot=$2
    vm_append=${5:-}
    vm_folder "$dir/$3"
    vm_start "$1" "$name" "$dir/$3" "$4"
}

written=$dir/written.qcow2

prepare() {
    if [ -z "$vm_library" ]; then
        rm -rf "$dir/library"
        "$vmar" library init "$dir/library"
        "$vmar" image add "$name=$raw" --library "$dir/library"
    fi
}

write_and_shut_down() {
    vm_overlay vmar "$name" "$written"
    start vmar kernel write "$written" vmar.poweroff=1
    vm_wait_up "$dir/write" "$timeout"
    vm_wait_off "$dir/write" "$timeout"
    vm_stop_all
    said "$dir/write" VMAR-WRITE-OK
}

image_check() {
    qemu-img check "$written"
}

again_without_vmar() {
    start plain "$1" "plain-$1" "$written"
    vm_wait_up "$dir/plain-$1" "$timeout"
    said "$dir/plain-$1" VMAR-DATA-OK
    # As a crash would end it, but for the guest's own sync: the next boot replays the journal.
    vm_stop_all
}

disk_boot_through_vmar() {
    vm_overlay vmar "$name" "$dir/disk.qcow2"
    start vmar disk disk "$dir/disk.qcow2"
    vm_wait_up "$dir/disk" "$timeout"
    vm_stop_all
    qemu-img check "$dir/disk.qcow2"
}

side_by_side() {
    vm_overlay vmar "$name" "$dir/with.qcow2"
    vm_overlay plain "$name" "$dir/without.qcow2"
    start vmar kernel with "$dir/with.qcow2" vmar.write=1
    start plain kernel without "$dir/without.qcow2" vmar.write=1
    vm_wait_up "$dir/with" "$timeout"
    vm_wait_up "$dir/without" "$timeout"
    local vm left
    for vm in with without; do
        left=$timeout
        until grep -qa '^VMAR-WRITE-' "$dir/$vm/serial.log"; do
            left=$((left - 1))
            [ "$left" -gt 0 ] || die "the guest has not written after $timeout s (logs: $dir/$vm)"
            sleep 1
        done
        said "$dir/$vm" VMAR-WRITE-OK
        kill -0 "$(cat "$dir/$vm/qemu.pid")" || die "the VM $vm vmar does not run any more"
    done
    vm_stop_all
    qemu-img check "$dir/with.qcow2"
    qemu-img check "$dir/without.qcow2"
}

base_unchanged() {
    [ "$(sha256sum <"$raw")" = "$digest" ] || die "$raw is not what it was"
}

digest=$(sha256sum <"$raw")
say "checking with $name ($VMAR_ACCEL), logs in $dir"
check "a library with the image" prepare
vm_library=${vm_library:-$dir/library}
check "through vmar: boots, writes, shuts down, vmar ends with status 0" write_and_shut_down
check "qemu-img check: the overlay is clean" image_check
check "plain QEMU boots the same overlay by -kernel, the data is right" again_without_vmar kernel
check "plain QEMU boots the same overlay from disk, the data is right" again_without_vmar disk
check "qemu-img check: the overlay is still clean" image_check
check "through vmar: boots from disk by the boot loader" disk_boot_through_vmar
check "one VM with vmar and one without, same base, same time" side_by_side
check "the base image is what it was" base_unchanged

say ""
printf '%s\n' "${results[@]}"
say ""
say "$((${#results[@]} - failures)) passed, $failures failed"
[ "$failures" -eq 0 ]
