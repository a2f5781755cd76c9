#!/usr/bin/env bash
# A real kernel under QEMU on disks from vmar: two small guests of different images at once, one of them through vmar and
# one plain; the guest reads its whole disk, mounts it, writes, shuts down; plain QEMU then goes on with the overlay.
#
# The guest is a Debian cloud kernel with a busybox initramfs. VMAR_BIN names the binary (default: the one that the tests
# built).
set -euo pipefail
cd "$(dirname "$0")/../.."
export VMAR_BIN=${VMAR_BIN:-${CARGO_TARGET_DIR:-target}/debug/vmar}
[ -x "$VMAR_BIN" ] || cargo build --locked
VMAR_BIN=$(realpath "$VMAR_BIN")
work=$(mktemp -d -t vmar-qemu.XXXXXX)
passed=0

fail() { echo "tests/qemu/run.sh: $* (logs: $work)" >&2; exit 1; }
pass() { passed=$((passed + 1)); echo "ok $passed - $*"; }

echo "preparing the guest in $work"
# shellcheck source=qemu-scripts/common.sh
. qemu-scripts/common.sh
# shellcheck source=tests/qemu/guest.sh
. tests/qemu/guest.sh
guest_need
guest_kernel
guest_initramfs "$work/initrd" tests/qemu/init
guest_image left "$work/initrd"
guest_image right "$work/initrd"

vmar() { "$VMAR_BIN" --library "$work/library" "$@"; }
vmar library init "$work/library"
vmar image add "left=$work/left.raw" "right=$work/right.raw" 2>/dev/null >&2
shared=$(vmar image show right --json | tr -d ' \n' | sed -n 's/.*"redirected_blocks":\([0-9]*\).*/\1/p')
[ "${shared:-0}" -gt 1000 ] || fail "the two images share only ${shared:-no} blocks"
pass "the two images share $shared blocks"

vm_images=$work
# Used by the functions of common.sh.
# shellcheck disable=SC2034
vm_library=$work/library vm_memory=256
vmar=$VMAR_BIN
probe_accel "$cache/vmlinuz"
vm_guard

# says DIR PATTERN
says() { grep -qaE "$2" "$1/serial.log" || fail "the guest of $1 does not say $2: $(tail -n 3 "$1/serial.log" | tr '\r\n' '  ')"; }

for name in left right; do
  mkdir -p "$work/$name"; vm_folder "$work/$name"
  vm_overlay vmar "$name" "$work/$name.qcow2"
  sum=$(sha256sum "$work/$name.raw" | cut -d' ' -f1)
  vm_append="vmar.sum=$sum vmar.write=1"
  vm_start vmar "$name" "$work/$name" "$work/$name.qcow2"
done
mkdir -p "$work/plain"; vm_folder "$work/plain"
vm_overlay plain left "$work/plain.qcow2"
sum=$(sha256sum "$work/left.raw" | cut -d' ' -f1)
vm_append="vmar.sum=$sum"
vm_start plain left "$work/plain" "$work/plain.qcow2"
for dir in left right plain; do
  vm_wait_up "$work/$dir" 300
  vm_wait_off "$work/$dir" 60
  says "$work/$dir" '^VMAR-DISK-OK'
  says "$work/$dir" '^VMAR-FILES-OK'
  pass "$dir: the guest read its whole disk and its files right, beside two others"
done
vm_stop_all || fail "a server did not end well"
for name in left right; do
  qemu-img check -q "$work/$name.qcow2" || fail "qemu-img check of $name.qcow2"
  pass "$name: qemu-img check is clean after the guest wrote"
  mkdir -p "$work/again-$name"; vm_folder "$work/again-$name"
  vm_append="vmar.expect=1"
  vm_start plain "$name" "$work/again-$name" "$work/$name.qcow2"
  vm_wait_up "$work/again-$name" 300
  vm_wait_off "$work/again-$name" 60
  says "$work/again-$name" '^VMAR-FILES-OK'
  says "$work/again-$name" '^VMAR-WRITTEN-OK'
  vm_stop_all || fail "QEMU did not end well"
  pass "$name: plain QEMU goes on with the overlay and finds what was written"
done

# A disk that grows while its guest runs, and whose server is replaced by another one.
dir=$work/grow overlay=$work/grow.qcow2
mkdir -p "$dir"; vm_folder "$dir"
vmar overlay create "$overlay" --image left --max-size 256M >/dev/null
vm_append="vmar.grow=1"
vm_serve_more=(--control "$dir/control")
vm_start vmar left "$dir" "$overlay"
vm_serve_more=()
# hears PATTERN: waits until the guest says so.
hears() {
  local left=600
  until grep -qaE "$1" "$dir/serial.log" 2>/dev/null; do
    left=$((left - 1))
    [ $left -gt 0 ] || fail "the guest of $dir does not say $1: $(tail -n 3 "$dir/serial.log" | tr '\r\n' '  ')"
    sleep 0.2
  done
}
hears '^VMAR-GROW-WAIT 196608'
vmar control "$dir/control" resize 128M
hears '^VMAR-GROWN 262144'
pass "the guest sees its disk grow, finds zeros there and uses the new room"
old=$(cat "$dir/vmar.pid")
"$VMAR_BIN" --library "$work/library" serve --image left --overlay "$overlay" --state-dir "$dir/state" \
  --take-over "$dir/control" --control "$dir/control" \
  >"$dir/successor.log" 2>&1 </dev/null 9>&- &
echo $! >"$dir/vmar.pid"
left=300
while kill -0 "$old" 2>/dev/null; do
  left=$((left - 1)); [ $left -gt 0 ] || fail "the old server does not end"
  sleep 0.1
done
wait "$old" || fail "the old server did not end well"
left=300
until vmar control "$dir/control" status --json 2>/dev/null | jq -e '.connected' >/dev/null; do
  left=$((left - 1)); [ $left -gt 0 ] || fail "QEMU does not come back: $(tail -n 1 "$dir/successor.log")"
  sleep 0.1
done
vmar control "$dir/control" resize 200M
hears '^VMAR-GROWN-AGAIN 409600'
vm_wait_off "$dir" 60
vm_stop_all || fail "a server did not end well"
qemu-img check -q "$overlay" || fail "qemu-img check of $overlay"
pass "the guest goes on with the server that took over, and its disk grows again"
vmar image verify >/dev/null 2>&1 || fail "an image has changed"
pass "the images are as they were"
# A minute of what is to be shown for ten (tests/qemu/kill.sh alone). Ends by itself, whatever happens, in some minutes.
tests/qemu/kill.sh --seconds 60 || fail "killed under load: see above"
pass "a guest under load does not notice that its server is killed again and again"
# The same of what is to be shown for longer (tests/qemu/lifecycle.sh alone).
tests/qemu/lifecycle.sh --seconds 45 || fail "the library changed under load: see above"
pass "guests read right and notice nothing while images are added, removed, updated, renamed and remapped"
# A move through the proxies, and a few cuts of what tests/qemu/cuts.sh alone does a hundred times.
tests/qemu/migrate.sh --proxies --seconds 60 --moves 1 || fail "moved under load: see above"
pass "a guest under load moves through vmar migrate, byte for byte, and goes on when the link is cut"
tests/qemu/cuts.sh --cuts 6 --last 4 || fail "links were cut: see above"
pass "wherever the link is cut, the guest runs at one side at most, and goes on"
tests/qemu/snapshot.sh --seconds 30 || fail "kept and brought back: see above"
pass "a guest under load is kept in three stores, and goes on from one that is left"
rm -rf "$work"
echo "$passed passed, 0 failed"
