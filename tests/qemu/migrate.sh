#!/usr/bin/env bash
# Live migration under load: a guest runs fio with checksums, fsyncs and trims on its vmar disk and is moved from QEMU to QEMU,
# each with a vmar of its own, on one overlay. One migration is cancelled half-way; the old server and the old QEMU are
# killed with -9 as soon as the others have succeeded.
#
# Usage: tests/qemu/migrate.sh [--proxies [--with-disk]] [--seconds N] [--moves N] [--qemu BIN]
#   --proxies     through vmar migrate send and receive, with a library for each host: what QEMU sends and what the other one
#                 gets is compared by SHA-256. Once the link is cut half-way, and the guest goes on where it was
#   --with-disk   the hosts share no storage: the overlay goes with the VM, each time to a new one
#   --seconds N   load for so long, all moves included (default 180)
#   --moves N     migrations that succeed (default 3)
#   --qemu BIN    this qemu-system-x86_64; qemu-img is the one beside it
#
# VMAR_BIN names the binary (default: the one that the tests built).
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=180 moves=3 proxies='' with_disk=''
while [ $# -gt 0 ]; do
  case $1 in
    --proxies) proxies=1; shift ;;
    --with-disk) with_disk=1; shift ;;
    --seconds) seconds=$2; shift 2 ;;
    --moves) moves=$2; shift 2 ;;
    --qemu)
      [ -x "$2" ] && [ "$(basename "$2")" = qemu-system-x86_64 ] && [ -x "$(dirname "$2")/qemu-img" ] ||
        { echo "tests/qemu/migrate.sh: --qemu $2: name a qemu-system-x86_64 with a qemu-img beside it" >&2; exit 1; }
      PATH=$(realpath "$(dirname "$2")"):$PATH
      shift 2
      ;;
    *) echo "tests/qemu/migrate.sh: $1: see the head of the script" >&2; exit 1 ;;
  esac
done
[ -z "$with_disk" ] || [ -n "$proxies" ] || { echo "tests/qemu/migrate.sh: --with-disk needs --proxies" >&2; exit 1; }
export VMAR_BIN=${VMAR_BIN:-${CARGO_TARGET_DIR:-target}/debug/vmar}
[ -x "$VMAR_BIN" ] || cargo build --locked
VMAR_BIN=$(realpath "$VMAR_BIN")
work=$(mktemp -d -t vmar-migrate.XXXXXX)

fail() { echo "tests/qemu/migrate.sh: $* (logs: $work)" >&2; exit 1; }

# shellcheck source=qemu-scripts/common.sh
. qemu-scripts/common.sh
# shellcheck source=tests/qemu/guest.sh
. tests/qemu/guest.sh
guest_need
need fio:fio python3:python3 socat:socat
guest_kernel
guest_initramfs "$work/initrd" tests/qemu/init-fio fio
guest_image left "$work/initrd"
guest_image right "$work/initrd"
"$VMAR_BIN" library init "$work/library" >/dev/null
"$VMAR_BIN" --library "$work/library" image add "left=$work/left.raw" "right=$work/right.raw" >/dev/null 2>&1

far_library=$work/far-library
if [ -n "$proxies" ]; then
  # The other host's, with other numbers.
  "$VMAR_BIN" library init "$far_library" >/dev/null
  "$VMAR_BIN" --library "$far_library" image add "r=$work/right.raw" "l=$work/left.raw" >/dev/null 2>&1
fi

# Used by the functions of common.sh.
# shellcheck disable=SC2034
vm_images=$work vm_library=$work/library
vmar=$VMAR_BIN
probe_accel "$cache/vmlinuz"
vm_guard
overlay=$work/right.qcow2
vm_overlay vmar right "$overlay"
export RUST_LOG=info
major=$(qemu_major)
# Until 9.0 QEMU loses writes of an emulated guest that migrates, but not with memory that is not of whole 256 KiB: see choose_memory in
# qemu-scripts/migrate.sh.
ram=$((512 << 20))
[ "$VMAR_ACCEL" != tcg ] || [ "$major" -ge 9 ] || ram=$((ram + 8192))

# start DIR [incoming]: a vmar and a QEMU of their own, with a guest or ready to take one.
# shellcheck disable=SC2054 # QEMU's commas
start() {
  local dir=$1 accel=$VMAR_ACCEL left=100 reconnect='reconnect=1' server=() machine=()
  [ "$major" -lt 10 ] || reconnect='reconnect-ms=1000'
  [ "$accel" != tcg ] || accel=tcg,tb-size=256
  [ -z "${2:-}" ] || { server=(--incoming); machine=(-incoming "unix:$dir/migrate.sock"); }
  # Who goes through proxies does not run by itself.
  [ -z "${2:-}" ] || [ -z "$proxies" ] || machine+=(-S)
  vm_folder "$dir"
  vm_dirs+=("$dir")
  # The disk that the VM has, or will have.
  local file=$overlay
  if [ -n "${2:-}" ] && [ -n "$with_disk" ]; then
    file=$dir/disk.qcow2
    vm_overlay vmar right "$file"
  fi
  "$vmar" serve --library "$vm_library" --image right --overlay "$file" --socket-path "$dir/blk.sock" \
    --state-dir "$dir/state" "${server[@]}" >"$dir/vmar.log" 2>&1 </dev/null &
  echo $! >"$dir/vmar.pid"
  while [ ! -S "$dir/blk.sock" ]; do
    kill -0 "$(cat "$dir/vmar.pid")" 2>/dev/null || fail "vmar serve ended: $(tail -n 1 "$dir/vmar.log")"
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail "vmar serve shows no socket after 10 s"
    sleep 0.1
  done
  qemu-system-x86_64 -name vmar-migrate -nodefaults -display none -no-reboot \
    -machine q35,memory-backend=ram0 -object "memory-backend-memfd,id=ram0,size=$ram,share=on" -m "${ram}B" -smp 2 \
    -accel "$accel" -chardev "socket,id=disk0,path=$dir/blk.sock,$reconnect" -device vhost-user-blk-pci,chardev=disk0 \
    -kernel "$work/right.vmlinuz" -initrd "$work/right.initrd" \
    -append "$(cat "$work/right.cmdline") panic=-1 vmar.seconds=$seconds" -device virtio-rng-pci \
    -qmp "unix:$dir/qmp.sock,server=on,wait=off" -serial "file:$dir/serial.log" "${machine[@]}" \
    >"$dir/qemu.log" 2>&1 </dev/null &
  echo $! >"$dir/qemu.pid"
  left=200
  until [ -S "$dir/qmp.sock" ] && { [ -z "${2:-}" ] || [ -S "$dir/migrate.sock" ]; }; do
    kill -0 "$(cat "$dir/qemu.pid")" 2>/dev/null || fail "QEMU ended: $(tail -n 1 "$dir/qemu.log")"
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail "QEMU shows no monitor after 20 s"
    sleep 0.1
  done
}

# kill_9 DIR: both, without a word.
kill_9() {
  local what
  for what in vmar qemu; do
    kill -KILL "$(cat "$1/$what.pid")" 2>/dev/null || true
    wait "$(cat "$1/$what.pid")" 2>/dev/null || true
    rm -f "$1/$what.pid"
  done
}

# qmp DIR COMMAND [ARGUMENTS [FIELD]]: what it answers, or one field of it.
qmp() {
  python3 - "$1/qmp.sock" "${@:2}" <<'END'
import json, socket, sys
path, command, arguments, field = sys.argv[1:] + ["{}", ""][len(sys.argv) - 3:]
s = socket.socket(socket.AF_UNIX)
s.settimeout(60)
s.connect(path)
f = s.makefile("rw")
def ask(name, arguments):
    f.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
    f.flush()
    while True:
        answer = json.loads(f.readline())
        if "error" in answer:
            sys.exit(f"{name}: {answer['error']['desc']}")
        if "return" in answer:
            return answer["return"]
f.readline()
ask("qmp_capabilities", {})
answer = ask(command, json.loads(arguments))
print(answer.get(field, "") if field else json.dumps(answer))
END
}

says() { cat "$work"/vm*/serial.log 2>/dev/null | tr -d '\r' | grep -aE "^$1"; }
# What the log says of a server that should have nothing to say.
quiet() { ! grep -E 'ERROR|WARN|panicked' "$1/vmar.log" || fail "the server of $1 had something to say"; }

# move_state DIR: until the migration is over; prints how it ended.
move_state() {
  local state left=600
  while :; do
    state=$(qmp "$1" query-migrate '{}' status)
    case $state in completed | failed | cancelled) echo "$state"; return 0 ;; esac
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail "the migration does not end: $state"
    sleep 0.2
  done
}

# through DIR NEXT [CUT]: a migration from QEMU to QEMU through the two proxies; what passes is copied on both sides. With CUT the
# link ends after so many bytes. Sets sent and received to how the two ended.
capability='{"capabilities": [{"capability": "return-path", "state": true}]}'
through() {
  local dir=$1 next=$2 cut=${3:-} to=$2/link.sock left=600 sender receiver
  local -a there=() here=()
  if [ -n "$with_disk" ]; then
    here=(--with-disk "$overlay" --state-dir "$dir/state")
    there=(--with-disk "$next/disk.qcow2" --state-dir "$next/state")
  fi
  local -a copies=()
  rm -f "$next"/{source,tap,out,link,cut}.sock "$next"/{sent,got}
  # Between QEMU and each proxy: -r and -R keep what goes to one side.
  socat -r "$next/sent" "UNIX-LISTEN:$next/source.sock" "UNIX-CONNECT:$next/tap.sock,retry=50,interval=0.1" 2>"$next/socat-1.log" &
  copies+=("$!")
  socat -r "$next/got" "UNIX-LISTEN:$next/out.sock" "UNIX-CONNECT:$next/migrate.sock" 2>"$next/socat-2.log" &
  copies+=("$!")
  "$vmar" migrate receive --library "$far_library" --listen "unix:$next/link.sock" --destination "$next/out.sock" \
    --qmp "$next/qmp.sock" --records "$next/records" "${there[@]}" >"$next/receive.log" 2>&1 &
  receiver=$!
  until [ -S "$next/link.sock" ]; do
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail "the receiver does not listen: $(tail -n 1 "$next/receive.log")"
    sleep 0.1
  done
  if [ -n "$cut" ]; then
    to=$next/cut.sock
    python3 - "$to" "$next/link.sock" "$cut" <<'END' &
import socket, sys, threading
path, far, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
near, _ = listener.accept()
link = socket.socket(socket.AF_UNIX)
link.connect(far)
def pump(a, b):
    global left
    while left > 0 and (data := a.recv(min(65536, left))):
        b.sendall(data)
        left -= len(data)
    for s in (near, link):
        s.shutdown(socket.SHUT_RDWR)
threading.Thread(target=pump, args=(link, near), daemon=True).start()
pump(near, link)
END
    copies+=("$!")
    until [ -S "$to" ]; do sleep 0.1; done
  fi
  "$vmar" migrate send --library "$vm_library" --image right --vm right --source "$next/tap.sock" --link "unix:$to" \
    --records "$next/records-of-source" "${here[@]}" --json >"$next/send.json" 2>"$next/send.log" &
  sender=$!
  # A sender whose link is cut while the disk goes is never ready.
  until { [ -S "$next/source.sock" ] && grep -q ready "$next/send.log"; } || ! kill -0 "$sender" 2>/dev/null; do
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail "the sender is not ready: $(tail -n 1 "$next/send.log")"
    sleep 0.1
  done
  if kill -0 "$sender" 2>/dev/null; then
    qmp "$dir" migrate-set-capabilities "$capability" >/dev/null
    qmp "$dir" migrate "{\"uri\": \"unix:$next/source.sock\"}" >/dev/null
  fi
  sent=0 received=0
  wait "$sender" || sent=$?
  wait "$receiver" || received=$?
  kill "${copies[@]}" 2>/dev/null || true
  wait "${copies[@]}" 2>/dev/null || true
}

now=$work/vm0
mkdir -p "$now"
start "$now"
left=1500
until says VMAR-FIO-START >/dev/null; do
  left=$((left - 1))
  [ "$left" -gt 0 ] || fail "the guest has not begun: $(tail -n 1 "$now/serial.log")"
  ! says VMAR-BOOT-FAIL || fail "the guest failed"
  kill -0 "$(cat "$now/qemu.pid")" 2>/dev/null || fail "QEMU ended: $(tail -n 1 "$now/serial.log")"
  sleep 0.2
done
say "QEMU $(qemu-system-x86_64 --version | sed -n 's/.*version \([^ ]*\).*/\1/p'), $VMAR_ACCEL, $seconds s of load: $(says VMAR-FIO-START)"
sleep 5

# Cancelled while it runs: the source goes on as if nothing had been.
mkdir -p "$work/vm-cancelled"
start "$work/vm-cancelled" incoming
qmp "$now" migrate-set-parameters '{"max-bandwidth": 2000000}' >/dev/null
qmp "$now" migrate "{\"uri\": \"unix:$work/vm-cancelled/migrate.sock\"}" >/dev/null
left=100
until [ "$(qmp "$now" query-migrate '{}' status)" = active ]; do
  left=$((left - 1))
  [ "$left" -gt 0 ] || fail "the migration to be cancelled does not begin: $(qmp "$now" query-migrate)"
  sleep 0.1
done
sleep 3
qmp "$now" migrate_cancel >/dev/null
[ "$(move_state "$now")" = cancelled ] || fail "the migration is not cancelled"
[ "$(qmp "$now" query-status '{}' status)" = running ] || fail "the source does not go on"
kill_9 "$work/vm-cancelled"
grep -q 'connected' "$work/vm-cancelled/vmar.log" || fail "nobody had connected to the server of the cancelled migration"
say "cancelled: the source goes on"
sleep 5

if [ -n "$proxies" ]; then
  cut=$work/vm-cut
  mkdir -p "$cut"
  start "$cut" incoming
  qmp "$now" migrate-set-parameters '{"max-bandwidth": 4000000000, "downtime-limit": 300}' >/dev/null
  through "$now" "$cut" 3000000
  [ "$sent" = 1 ] && [ "$received" = 1 ] || fail "the link was cut: the sender ended with $sent, the receiver with $received"
  # With a disk the cut comes before the memory.
  [ -n "$with_disk" ] || [ "$(move_state "$now")" = failed ] || fail "the link was cut, and the migration is not failed"
  [ "$(qmp "$now" query-status '{}' status)" = running ] || fail "the link was cut, and the source does not go on"
  kill_9 "$cut"
  say "link cut: the source goes on: $(tail -n 1 "$cut/send.log")"
  sleep 5
fi

downtimes=()
for ((n = 1; n <= moves; n++)); do
  next=$work/vm$n
  mkdir -p "$next"
  start "$next" incoming
  qmp "$now" migrate-set-parameters '{"max-bandwidth": 4000000000, "downtime-limit": 300}' >/dev/null
  if [ -n "$proxies" ]; then
    through "$now" "$next"
    [ "$sent" = 0 ] && [ "$received" = 0 ] ||
      fail "migration $n: $(tail -n 1 "$next/send.log"); $(tail -n 1 "$next/receive.log")"
    [ -z "$with_disk" ] || { grep 'disk, pass' "$next/send.log"; overlay=$next/disk.qcow2; }
    cmp "$next/sent" "$next/got" || fail "migration $n: the destination's QEMU got another stream"
    say "$(stat -c %s "$next/sent") bytes, SHA-256 on both sides $(sha256sum <"$next/got" | cut -c1-16)…: $(jq -c .pages "$next/send.json")"
    rm -f "$next/sent" "$next/got"
  else
    qmp "$now" migrate "{\"uri\": \"unix:$next/migrate.sock\"}" >/dev/null
  fi
  state=$(move_state "$now")
  [ "$state" = completed ] || fail "migration $n: $state: $(qmp "$now" query-migrate)"
  left=100
  until [ "$(qmp "$next" query-status '{}' status)" = running ]; do
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail "the guest does not go on after migration $n"
    sleep 0.1
  done
  downtimes+=("$(qmp "$now" query-migrate '{}' downtime)")
  say "migration $n: downtime ${downtimes[-1]} ms, total $(qmp "$now" query-migrate '{}' total-time) ms"
  kill_9 "$now"
  quiet "$now"
  now=$next
  sleep 5
done
[ "$(says VMAR-FIO-END | wc -l)" = 0 ] || fail "the load ended before the last migration: give more --seconds"
left=$((seconds * 3 + 300))
until says VMAR-FIO-END >/dev/null; do
  kill -0 "$(cat "$now/qemu.pid")" 2>/dev/null || fail "QEMU ended: $(tail -n 1 "$now/qemu.log")"
  left=$((left - 1))
  [ "$left" -gt 0 ] || fail "the guest does not come to an end"
  sleep 1
done
vm_wait_off "$now" 120
vm_stop_all || fail "the last server did not end well"
quiet "$now"
says 'VMAR-FIO-(ROUND|ERROR)' || true
end=$(says VMAR-FIO-END)
say "$end"
case $end in *" errors 0 messages 0") ;; *) fail "the guest saw errors" ;; esac
! says VMAR-FIO-ERROR || fail "fio found errors"
verified=$(says VMAR-FIO-ROUND | awk '{ s += $4 } END { printf "%.0f", s }')
[ "$verified" -gt 0 ] || fail "nothing was verified"
qemu-img check -q "$overlay" || fail "qemu-img check of the overlay"
qemu-img convert -O raw "$overlay" "$work/after.raw"
sum=$(sha256sum "$work/after.raw" | cut -d' ' -f1)
[ "VMAR-SUM $sum" = "$(says VMAR-SUM)" ] || fail "the guest read $(says VMAR-SUM), the overlay holds $sum"
"$vmar" --library "$vm_library" image verify >/dev/null 2>&1 || fail "an image has changed"
rm -rf "$work"
say "$moves migrations, 1 cancelled, downtimes ${downtimes[*]} ms, $verified bytes verified, 0 errors, qemu-img check clean"
