#!/usr/bin/env bash
# kill -9 at random, under load: a guest runs fio with checksums, fsyncs and trims on its vmar disk while the backend is killed
# every 1-5 s and started again at once. QEMU reconnects once a second; the guest must not notice.
#
# Usage: tests/qemu/kill.sh [--minutes N] [--seconds N] [--qemu BIN]
#   --minutes N   load for so long (default 10)
#   --seconds N   the same in seconds
#   --qemu BIN    this qemu-system-x86_64; qemu-img is the one beside it
#
# VMAR_BIN names the binary (default: the one that the tests built).
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=600
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) seconds=$(($2 * 60)); shift 2 ;;
    --seconds) seconds=$2; shift 2 ;;
    --qemu)
      [ -x "$2" ] && [ "$(basename "$2")" = qemu-system-x86_64 ] && [ -x "$(dirname "$2")/qemu-img" ] ||
        { echo "tests/qemu/kill.sh: --qemu $2: name a qemu-system-x86_64 with a qemu-img beside it" >&2; exit 1; }
      PATH=$(realpath "$(dirname "$2")"):$PATH
      shift 2
      ;;
    *) echo "tests/qemu/kill.sh: $1: see the head of the script" >&2; exit 1 ;;
  esac
done
export VMAR_BIN=${VMAR_BIN:-${CARGO_TARGET_DIR:-target}/debug/vmar}
[ -x "$VMAR_BIN" ] || cargo build --locked
VMAR_BIN=$(realpath "$VMAR_BIN")
work=$(mktemp -d -t vmar-kill.XXXXXX)

fail() { echo "tests/qemu/kill.sh: $* (logs: $work)" >&2; exit 1; }

# shellcheck source=qemu-scripts/common.sh
. qemu-scripts/common.sh
# shellcheck source=tests/qemu/guest.sh
. tests/qemu/guest.sh
guest_need
need fio:fio
guest_kernel
guest_initramfs "$work/initrd" tests/qemu/init-fio fio
guest_image left "$work/initrd"
guest_image right "$work/initrd"
"$VMAR_BIN" library init "$work/library" >/dev/null
"$VMAR_BIN" --library "$work/library" image add "left=$work/left.raw" "right=$work/right.raw" >/dev/null 2>&1

# Used by the functions of common.sh.
# shellcheck disable=SC2034
vm_images=$work vm_library=$work/library vm_memory=512 vm_append="vmar.seconds=$seconds"
vmar=$VMAR_BIN
probe_accel "$cache/vmlinuz"
vm_guard
dir=$work/vm overlay=$work/right.qcow2
mkdir -p "$dir" "$work/servers"
vm_folder "$dir"
vm_overlay vmar right "$overlay"
export RUST_LOG=info
vm_start vmar right "$dir" "$overlay"
said() { grep -aE "^$1" "$dir/serial.log" 2>/dev/null | tr -d '\r'; }
lives() { kill -0 "$(cat "$dir/qemu.pid")" 2>/dev/null || fail "QEMU ended: $(tail -n 1 "$dir/qemu.log")"; }

# QEMU 7.2 does not take up a connection again that broke before the guest's driver was there.
left=600
until said VMAR-FIO-START >/dev/null; do
  left=$((left - 1))
  [ "$left" -gt 0 ] || fail "the guest has not begun: $(tail -n 1 "$dir/serial.log")"
  lives
  ! said VMAR-BOOT-FAIL || fail "the guest failed"
  sleep 0.2
done
say "QEMU $(qemu-system-x86_64 --version | sed -n 's/.*version \([^ ]*\).*/\1/p'), $VMAR_ACCEL, $seconds s of load: $(said VMAR-FIO-START)"

# again: the server once more, with the arguments of vm_serve. Its socket takes the place of the old one.
again() {
  "$vmar" serve --library "$vm_library" --image right --overlay "$overlay" --socket-path "$dir/blk.sock" \
    --state-dir "$dir/state" --record "$dir/trace" >"$dir/vmar.log" 2>&1 </dev/null &
  echo $! >"$dir/vmar.pid"
}

kills=0 served=0 replayed=0
# What the last server had to do before it was killed.
account() {
  local n=0
  cp "$dir/vmar.log" "$work/servers/$kills.log"
  grep -q ' connected$' "$dir/vmar.log" || return 0
  [ "${1:-}" = last ] || served=$((served + 1))
  n=$(sed -n 's/.* \([0-9]*\) requests in flight are started again.*/\1/p' "$dir/vmar.log" | awk '{ s += $1 } END { print s + 0 }')
  replayed=$((replayed + n))
}
began=$(now_ms)
until said VMAR-FIO-END >/dev/null; do
  # 1 to 5 seconds.
  sleep $((RANDOM % 4 + 1)).$((RANDOM % 1000 + 1000))
  # It may have come to its end meanwhile, and be off.
  ! said VMAR-FIO-END >/dev/null || break
  lives
  [ $(($(now_ms) - began)) -lt $(((seconds * 3 + 300) * 1000)) ] || fail "the guest does not come to an end"
  kill -0 "$(cat "$dir/vmar.pid")" 2>/dev/null || fail "vmar ended by itself: $(tail -n 1 "$dir/vmar.log")"
  pid=$(cat "$dir/vmar.pid")
  kill -KILL "$pid"
  { wait "$pid" || true; } 2>/dev/null
  account
  kills=$((kills + 1))
  again
done
# Counted from the start of the VM.
vm_wait_up "$dir" $((seconds * 3 + 900))
vm_wait_off "$dir" 60
vm_stop_all || fail "the last server did not end well"
account last
said 'VMAR-FIO-(ROUND|ERROR)'
end=$(said VMAR-FIO-END)
say "$end"
verified=$(said VMAR-FIO-ROUND | awk '{ s += $4 } END { printf "%.0f", s }')
case $end in *" errors 0 messages 0") ;; *) fail "the guest saw errors" ;; esac
! said 'VMAR-FIO-ERROR' || fail "fio found errors"
[ "$verified" -gt 0 ] || fail "nothing was verified"
[ "$replayed" -gt 0 ] || fail "no server found a request to start again: the test shows nothing"
qemu-img check -q "$overlay" || fail "qemu-img check of the overlay"
qemu-img convert -O raw "$overlay" "$work/after.raw"
sum=$(sha256sum "$work/after.raw" | cut -d' ' -f1)
[ "VMAR-SUM $sum" = "$(said VMAR-SUM)" ] || fail "the guest read $(said VMAR-SUM), the overlay holds $sum"
"$VMAR_BIN" --library "$work/library" image verify >/dev/null 2>&1 || fail "an image has changed"
say "$kills kills with -9, $served of them of a server at work, $replayed requests started again by their successors;" \
  "$verified bytes verified, 0 errors in fio, 0 in dmesg; qemu-img check clean; the disk reads the same outside"
rm -rf "$work"
