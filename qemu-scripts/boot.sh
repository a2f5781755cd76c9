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
  --app             let the guest load its application when it is up, and wait for that, too
  --packet          give the VM a network, and ask it for a packet when it can be reached (images that know how)
  --memory MIB      the guest's memory (default $vm_memory)
  --until WHAT      up: stop the VM at its marker (default); off: wait until it powers off; ctrl-c: let it run
  --timeout S       for the marker and for the power-off (default 300)
  --workdir DIR     logs go here (default: a new directory below /tmp)
  --json FILE       write the result there too

JSON: boot_ms (host's clock, from its start to its boot marker), guest_seconds (the guest's, which a busy host
can mislead), packet_ms (to its packet; null: none came), cpu; app_ms (from boot marker to the end of the load; null: no
application), app_guest_seconds, app_cpu. Of cpu and app_cpu, over that time: qemu_ms and server_ms (CPU of the processes),
vcpu_ms (CPU of the virtual CPU's thread), runqueue_ms (it could run and had no processor), idle_ms (the rest: it waited for
the disk or a timer).

VMAR_ACCEL=kvm|tcg chooses the accelerator, VMAR_BIN the vmar binary. Exit status 0: the marker came.
EOF
}

mode=plain name='' overlay='' until=up timeout=300 dir='' json='' app='' packet=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --app) app=1; shift; continue ;;
        --packet) packet=1; shift; continue ;;
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

if [ -n "$app" ] && ! has_app "$name"; then
    say "note: $name has no application to load"
    app=''
fi
vm_app=$app
[ -z "$packet" ] || vm_listen "$dir/packets"

say "$name: booting ($mode, $VMAR_ACCEL, from $vm_boot), logs in $dir"
vm_start "$mode" "$name" "$dir" "$overlay"
vm_wait_up "$dir" "$timeout"
cpu=$(vm_cpu "$dir")
boot_cpu=$(cpu_json "$vm_boot_ms" "0 0 0 0" "$cpu")
say "$name: up after $(as_seconds "$vm_boot_ms") s (by the guest's clock $vm_guest_s s)"
vm_app_ms=null vm_app_s=null app_cpu=null
if [ -n "$app" ]; then
    vm_wait_app "$dir" "$timeout"
    app_cpu=$(cpu_json "$vm_app_ms" "$cpu" "$(vm_cpu "$dir")")
    say "$name: application loaded in $(as_seconds "$vm_app_ms") s (by the guest's clock $vm_app_s s)"
fi
[ -z "$packet" ] || ! has_packet "$name" || vm_wait_packets 20 "$dir"
packet_ms=$(vm_packet_ms "$dir")
[ -z "$packet" ] || say "$name: $([ "$packet_ms" = null ] && echo "no packet came" ||
    echo "its packet came after $(as_seconds "$packet_ms") s")"
jq -rn --argjson boot "$boot_cpu" --argjson app "$app_cpu" '
    def row: "vCPU busy \(.vcpu_ms / 1000) s, waiting for a processor \(.runqueue_ms // 0 | . / 1000) s, idle (disk, timers) \(
        .idle_ms / 1000) s; QEMU \(.qemu_ms / 1000) s, vmar \(.server_ms / 1000) s of CPU";
    "  boot: \($boot | row)", ($app | if . then "  load: \(row)" else empty end)'
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
        --argjson packet_ms "$packet_ms" --argjson cpu "$boot_cpu" --argjson app_ms "$vm_app_ms" \
        --argjson app_guest_seconds "$vm_app_s" --argjson app_cpu "$app_cpu" \
        '{$name, $mode, $accel, $boot, $boot_ms, $guest_seconds, $packet_ms, $cpu, $app_ms, $app_guest_seconds, $app_cpu,
            $logs}' >"$json"
fi
