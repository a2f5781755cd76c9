#!/usr/bin/env bash
# Boots one VM, waits for its boot marker and says how long it took.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<EOF
usage: qemu-scripts/boot.sh --name NAME [--mode plain|vmar] [option...]

  --name NAME       the image: NAME.raw in the images' directory, and NAME in vmar's library
  --image FILE      the same by path: /dir/NAME.raw
  --mode MODE       plain: QEMU's own qcow2 overlay over the raw (default); vmar: through vmar serve
  --images DIR      where the images are (default \$VMAR_IMAGES_DIR, else build/images)
  --library DIR     vmar's library (default \$VMAR_LIBRARY)
  --overlay FILE    use this overlay; made if it is not there, kept at the end
  --boot HOW        kernel: QEMU loads the kernel (default); disk: through the boot loader
  --prefetch FILE   vmar serve prefetches what this trace tells of; may be given several times
  --append WORDS    more for the kernel command line, such as vmar.poweroff=1
  --memory MIB      the guest's memory (default $vm_memory)
  --until WHAT      up: stop the VM at its marker (default); off: wait until it powers off; ctrl-c: let it run
  --timeout S       for the marker and for the power-off (default 300)
  --workdir DIR     logs go here (default: a new directory below /tmp)
  --json FILE       write the result there too

VMAR_ACCEL=kvm|tcg chooses the accelerator, VMAR_BIN the vmar binary. Exit status 0: the marker came.
EOF
}

mode=plain name='' overlay='' until=up timeout=300 dir='' json=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --*) [ $# -ge 2 ] || { usage >&2; exit 2; } ;;
    esac
    case $1 in
        --name) name=$2 ;;
        --image) name=$(basename "$2" .raw); vm_images=$(dirname "$2") ;;
        --mode) mode=$2 ;;
        --images) vm_images=$2 ;;
        --library) vm_library=$2 ;;
        --overlay) overlay=$2 ;;
        --boot) vm_boot=$2 ;;
        --prefetch) vm_serve_more+=(--prefetch "$2") ;;
        --append) vm_append=$2 ;;
        --memory) vm_memory=$2 ;;
        --until) until=$2 ;;
        --timeout) timeout=$2 ;;
        --workdir) dir=$2 ;;
        --json) json=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
[ -n "$name" ] || { usage >&2; exit 2; }
case $until in up | off | ctrl-c) ;; *) usage >&2; exit 2 ;; esac
[ -e "$vm_images/$name.raw" ] || die "$vm_images/$name.raw is not there: build it with images/build.sh $name"
[ "$mode" != vmar ] || [ -n "$vm_library" ] || die "--mode vmar needs --library (or VMAR_LIBRARY)"

need_qemu
need jq:jq
[ "$mode" != vmar ] || need_vmar
probe_accel "$vm_images/$name.vmlinuz"
dir=${dir:-$(mktemp -d -t vmar-boot.XXXXXX)}
vm_folder "$dir"
dir=$(cd "$dir" && pwd)
vm_guard
if [ -z "$overlay" ]; then
    overlay=$dir/overlay.qcow2
    rm -f "$overlay"
fi
[ -e "$overlay" ] || vm_overlay "$mode" "$name" "$overlay"

say "$name: booting ($mode, $VMAR_ACCEL, from $vm_boot), logs in $dir"
vm_start "$mode" "$name" "$dir" "$overlay"
vm_wait_up "$dir" "$timeout"
say "$name: up after $(as_seconds "$vm_boot_ms") s (by the guest's clock $vm_guest_s s)"
case $until in
    off)
        vm_wait_off "$dir" "$timeout"
        say "$name: powered off"
        ;;
    ctrl-c)
        say "$name: runs until it powers off or Ctrl-C"
        while kill -0 "$(cat "$dir/qemu.pid")" 2>/dev/null; do sleep 1; done
        ;;
esac
grep -aE '^VMAR-(DATA|WRITE)-' "$dir/serial.log" | tr -d '\r' || true
vm_stop_all
if [ -n "$json" ]; then
    jq -n --arg name "$name" --arg mode "$mode" --arg accel "$VMAR_ACCEL" --arg boot "$vm_boot" --arg logs "$dir" \
        --argjson boot_ms "$vm_boot_ms" --argjson guest_seconds "$vm_guest_s" \
        '{$name, $mode, $accel, $boot, $boot_ms, $guest_seconds, $logs}' >"$json"
fi
