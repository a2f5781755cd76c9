#!/usr/bin/env bash
# A guest under load is kept in three stores and brought back: fio runs with checksums on its vmar disk all the time, so memory and disk have
# to be of one instant. Then the host dies, one store is lost, and so is every pack that may be; two new VMs start from what is left.
#
# Usage: tests/qemu/snapshot.sh [--seconds N] [--qemu BIN]
#   --seconds N   load for so long (default 40)
#   --qemu BIN    this qemu-system-x86_64; qemu-img is the one beside it
#
# VMAR_BIN names the binary (default: the one that the tests built).
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=40
while [ $# -gt 0 ]; do
  case $1 in
    --seconds) seconds=$2; shift 2 ;;
    --qemu) PATH=$(realpath "$(dirname "$2")"):$PATH; shift 2 ;;
    *) echo "tests/qemu/snapshot.sh: $1: see the head of the script" >&2; exit 1 ;;
  esac
done
export VMAR_BIN=${VMAR_BIN:-${CARGO_TARGET_DIR:-target}/debug/vmar}
[ -x "$VMAR_BIN" ] || cargo build --locked
VMAR_BIN=$(realpath "$VMAR_BIN")
work=$(mktemp -d -t vmar-snapshot.XXXXXX)

fail() { echo "tests/qemu/snapshot.sh: $* (logs: $work)" >&2; exit 1; }

# shellcheck source=qemu-scripts/common.sh
. qemu-scripts/common.sh
# shellcheck source=tests/qemu/guest.sh
. tests/qemu/guest.sh
guest_need
need fio:fio jq:jq
guest_kernel
guest_initramfs "$work/initrd" tests/qemu/init-fio fio
guest_image right "$work/initrd"
"$VMAR_BIN" library init "$work/library" >/dev/null
"$VMAR_BIN" --library "$work/library" image add "right=$work/right.raw" >/dev/null 2>&1
# Used by the functions of common.sh.
# shellcheck disable=SC2034
vm_images=$work vm_library=$work/library vm_record=''
vmar=$VMAR_BIN
probe_accel "$cache/vmlinuz"
vm_guard
major=$(qemu_major)
# As in qemu-scripts/migrate/vm.sh: QEMU before 9.0 loses writes of emulated guests that migrate.
ram=$((384 << 20))
[ "$VMAR_ACCEL" != tcg ] || [ "$major" -ge 9 ] || ram=$((ram + 8192))

# start DIR [WORD...]: a vmar and a QEMU of their own on DIR/disk.qcow2.
# shellcheck disable=SC2054 # QEMU's commas
start() {
  local dir=$1 accel=$VMAR_ACCEL left=200 reconnect='reconnect=1'
  shift
  [ "$major" -lt 10 ] || reconnect='reconnect-ms=1000'
  [ "$accel" != tcg ] || accel=tcg,tb-size=128
  vm_folder "$dir"
  vm_dirs+=("$dir")
  vm_serve right "$dir" "$dir/disk.qcow2"
  qemu-system-x86_64 -name vmar-kept -nodefaults -display none -no-reboot \
    -machine q35,memory-backend=ram0 -object "memory-backend-memfd,id=ram0,size=$ram,share=on" -m "${ram}B" -smp 2 \
    -accel "$accel" -chardev "socket,id=disk0,path=$dir/blk.sock,$reconnect" -device vhost-user-blk-pci,chardev=disk0 \
    -kernel "$work/right.vmlinuz" -initrd "$work/right.initrd" \
    -append "$(cat "$work/right.cmdline") panic=-1 vmar.seconds=$seconds" -device virtio-rng-pci \
    -qmp "unix:$dir/qmp.sock,server=on,wait=off" -serial "file:$dir/serial.log" "$@" >"$dir/qemu.log" 2>&1 </dev/null &
  echo $! >"$dir/qemu.pid"
  until [ -S "$dir/qmp.sock" ]; do
    kill -0 "$(cat "$dir/qemu.pid")" 2>/dev/null || fail "QEMU ended: $(tail -n 1 "$dir/qemu.log")"
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail "QEMU shows no monitor after 20 s"
    sleep 0.1
  done
}

says() { tr -d '\r' <"$1/serial.log" 2>/dev/null | grep -aE "^$2"; }
hears() {
  local dir=$1 what=$2 left=$3
  until says "$dir" "$what" >/dev/null; do
    kill -0 "$(cat "$dir/qemu.pid")" 2>/dev/null || fail "QEMU of $dir ended: $(tail -n 1 "$dir/serial.log")"
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail "the guest of $dir does not say $what: $(tail -n 1 "$dir/serial.log")"
    sleep 0.5
  done
}

stores=(--store "$work/store-1" --store "$work/store-2" --store "$work/store-3")
snapshot() { "$vmar" --library "$vm_library" snapshot "$@" 2>>"$work/snapshot.log" || fail "snapshot $1: $(tail -n 1 "$work/snapshot.log")"; }

first=$work/vm
mkdir -p "$first"
vm_overlay vmar right "$first/disk.qcow2"
start "$first"
hears "$first" VMAR-FIO-START 600
say "QEMU $(qemu-system-x86_64 --version | sed -n 's/.*version \([^ ]*\).*/\1/p'), $VMAR_ACCEL, $seconds s of load"
sleep 5
for name in one two; do
  said=$(snapshot save "$name" --qmp "$first/qmp.sock" --overlay "$first/disk.qcow2" --state-dir "$first/state" "${stores[@]}" --json)
  jq -e '.about.kernel.known.btf' <<<"$said" >/dev/null || fail "the guest's kernel was not found: $(jq -c .about.kernel <<<"$said")"
  say "$name: $(jq -c '{stood_ms, seconds, written_bytes, new_packs}' <<<"$said")"
  sleep 4
done
grep -q VMAR-FIO-START "$first/serial.log"
! says "$first" VMAR-FIO-END >/dev/null || fail "the load ended before the second snapshot: give more --seconds"

# The host dies.
for what in vmar qemu; do
  kill -KILL "$(cat "$first/$what.pid")"
  wait "$(cat "$first/$what.pid")" 2>/dev/null || true
  rm -f "$first/$what.pid"
done
rm -rf "$work/store-1" "$first/disk.qcow2"
left=(--store "$work/store-2" --store "$work/store-3")
snapshot show two "${left[@]}" --json | jq -r '.packs[] | select(.once).id' >"$work/once"
[ -s "$work/once" ] || fail "no pack is in one store only"
while read -r id; do rm -f "$work"/store-?/packs/"$id.pack"; done <"$work/once"

for name in one two; do
  dir=$work/vm-$name
  mkdir -p "$dir"
  snapshot restore "$name" --overlay "$dir/disk.qcow2" --state-dir "$dir/state" "${left[@]}" >/dev/null
  start "$dir" -incoming defer
done
lost=0
for name in one two; do
  said=$(snapshot restore "$name" --qmp "$work/vm-$name/qmp.sock" "${left[@]}" --json)
  say "$name is back: $(jq -c '{seconds, lost_pages}' <<<"$said")"
  lost=$((lost + $(jq .lost_pages <<<"$said")))
done
[ "$lost" -gt 0 ] || fail "no page was lost: the packs that may be were not needed"
for name in one two; do
  dir=$work/vm-$name
  hears "$dir" VMAR-FIO-END $((seconds * 8 + 600))
  vm_wait_off "$dir" 120
  end=$(says "$dir" VMAR-FIO-END)
  says "$dir" 'VMAR-FIO-ERROR' && fail "fio found errors in $name"
  case $end in *" errors 0 messages 0") ;; *) fail "the guest of $name saw errors: $end" ;; esac
  say "$name: $end"
done
vm_stop_all || fail "a server did not end well"
for name in one two; do
  dir=$work/vm-$name
  qemu-img check -q "$dir/disk.qcow2" || fail "qemu-img check of the overlay of $name"
  qemu-img convert -O raw "$dir/disk.qcow2" "$work/after.raw"
  [ "VMAR-SUM $(sha256sum "$work/after.raw" | cut -d' ' -f1)" = "$(says "$dir" VMAR-SUM)" ] || fail "the guest of $name read another disk"
done

# An empty store in the place of the lost one is filled from the others.
! "$vmar" snapshot check "${stores[@]}" >"$work/check.log" 2>&1 || fail "check does not miss the lost store"
snapshot repair "${stores[@]}" >"$work/repair.log"
snapshot check "${stores[@]}" >"$work/check.log"
for name in one two; do
  snapshot restore "$name" --overlay "$work/again-$name.qcow2" --state-dir "$work/vm-$name/state" --store "$work/store-1" >/dev/null
done
snapshot delete one two "${stores[@]}" >/dev/null
[ -z "$(find "$work"/store-?/packs "$work"/store-?/snapshots -type f)" ] || fail "something is left when all is deleted"
rm -rf "$work"
say "kept under load, brought back twice from one store of three without the pages that may be lost ($lost), and the lost store is healed"
