#!/usr/bin/env bash
# Makes an image of a machine that was used: boots one through vmar, lets it work, and merges its overlay with its base.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<EOF
usage: qemu-scripts/capture.sh --name NAME --as NEW [option...]

Boots the image NAME through vmar with a fresh overlay, runs in the guest what NAME.use.tar says (images/build.sh makes it
for NAME=ROLE,use=...), waits until the guest has powered off, and writes overlay and image together: NEW.raw, beside it
NEW.vmlinuz, NEW.initrd, NEW.cmdline and NEW.info. NAME.raw stays as it is.

  --images DIR   where NAME.raw is and NEW.raw goes (default \$VMAR_IMAGES_DIR, else build/images)
  --use FILE     another tar: its program "run" is what the guest does
  --memory MIB   the guest's memory (default $vm_memory)
  --timeout S    for the boot, and for the guest's work (default 1800)
  --workdir DIR  library, overlay and logs (default: a new directory below /tmp); the overlay is removed at the end
EOF
}

name='' new='' use='' timeout=1800 dir=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --*) [ $# -ge 2 ] || { usage >&2; exit 2; } ;;
    esac
    case $1 in
        --name) name=$2 ;;
        --as) new=$2 ;;
        --images) vm_images=$2 ;;
        --use) use=$2 ;;
        --memory) vm_memory=$2 ;;
        --timeout) timeout=$2 ;;
        --workdir) dir=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
[ -n "$name" ] && [ -n "$new" ] || { usage >&2; exit 2; }
use=${use:-$vm_images/$name.use.tar}
[ -e "$vm_images/$name.raw" ] || die "$vm_images/$name.raw is not there: build it with images/build.sh"
[ -e "$use" ] || die "$use is not there: build $name with use=..., images/build.sh --help says how, or say --use"
[ ! -e "$vm_images/$new.raw" ] || die "$vm_images/$new.raw is there already: choose another name"

need_qemu
need_vmar
probe_accel "$vm_images/$name.vmlinuz"
dir=${dir:-$(mktemp -d -t vmar-capture.XXXXXX)}
vm_folder "$dir"
dir=$(cd "$dir" && pwd)
vm_guard

began=$SECONDS
vm_library=$dir/library
rm -rf "$vm_library" "$dir/overlay.qcow2"
{ "$vmar" library init "$vm_library" &&
    "$vmar" image add "$name=$(realpath "$vm_images/$name.raw")" --library "$vm_library"; } >"$dir/index.log" 2>&1 ||
    die "could not index $name: $(tail -n 1 "$dir/index.log")"
vm_overlay vmar "$name" "$dir/overlay.qcow2"

say "$name: booting ($VMAR_ACCEL), logs in $dir"
# Read by vm_start; the commas are QEMU's.
# shellcheck disable=SC2034,SC2054
vm_devices=(-drive "if=none,id=use0,file=$use,format=raw,readonly=on"
    -device "virtio-blk-pci,drive=use0,serial=vmar-use")
# shellcheck disable=SC2034
vm_append=vmar.use=1 vm_record=
vm_start vmar "$name" "$dir" "$dir/overlay.qcow2"
vm_wait_up "$dir" "$timeout"
say "$name: up after $(as_seconds "$vm_boot_ms") s, at work"
vm_wait_off "$dir" "$timeout"
worked=$(($(now_ms) - $(cat "$dir/began") - vm_boot_ms))
vm_stop_all || die "the VM or its vmar did not end well (logs: $dir)"
grep -qa '^VMAR-USE-OK ' "$dir/serial.log" || die "the guest did not do its work to the end (its words: $dir/serial.log)"
say "$name: powered off after $(as_seconds "$worked") s of work"

rm -f "$vm_images/$new.raw.part"
"$vmar" overlay commit "$dir/overlay.qcow2" --to "$vm_images/$new.raw.part" --library "$vm_library" \
    --state-dir "$dir/state" >"$dir/commit.log" 2>&1 ||
    die "could not merge the overlay with its image: $(tail -n 1 "$dir/commit.log")"
for part in vmlinuz initrd cmdline; do
    cp "$vm_images/$name.$part" "$vm_images/$new.$part"
done
{
    [ ! -e "$vm_images/$name.info" ] || grep -v -e '^name=' -e '^build_seconds=' "$vm_images/$name.info"
    printf '%s=%s\n' name "$new" captured_from "$name" build_seconds $((SECONDS - began))
} >"$vm_images/$new.info"
# The raw comes last: where it is, the image is complete.
mv "$vm_images/$new.raw.part" "$vm_images/$new.raw"
rm -rf "$dir/overlay.qcow2" "$vm_library"
say "$new: $vm_images/$new.raw, $(du -m "$vm_images/$new.raw" | cut -f1) MiB, in $((SECONDS - began)) s"
