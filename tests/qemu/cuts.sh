#!/usr/bin/env bash
# Whose the VM is, with real QEMUs: a guest that counts is moved from place to place by vmar migrate send and receive, over a link
# that is cut each time. It must never run at both sides, and go on at one of them: by itself, or after what the logs say to do
# where a cut comes between the two sides' words. At the end its disk must hold what it counted.
#
# Usage: tests/qemu/cuts.sh [--cuts N] [--last N] [--kill] [--settle SECONDS] [--seed N] [--qemu BIN]
#   --cuts N      cuts after a random number of the link's bytes (default 100)
#   --last N      cuts in the last 200 KB of them, every other one while the VM is given away (default 20)
#   --kill        not the link is cut: one of the two proxies, by turns, is killed with -9 there
#   --settle S    how long both QEMUs are looked at after each (default 2)
#   --seed N      where and how the cuts come (default: a random one, which is told)
#   --qemu BIN    this qemu-system-x86_64; qemu-img is the one beside it
#
# VMAR_BIN names the binary (default: the one that the tests built).
set -euo pipefail
cd "$(dirname "$0")/../.."

cuts=100 last=20 settle=2 seed=$RANDOM kill=()
while [ $# -gt 0 ]; do
  case $1 in
    --cuts) cuts=$2; shift 2 ;;
    --last) last=$2; shift 2 ;;
    --kill) kill=(--kill); shift ;;
    --settle) settle=$2; shift 2 ;;
    --seed) seed=$2; shift 2 ;;
    --qemu)
      [ -x "$2" ] && [ "$(basename "$2")" = qemu-system-x86_64 ] && [ -x "$(dirname "$2")/qemu-img" ] ||
        { echo "tests/qemu/cuts.sh: --qemu $2: name a qemu-system-x86_64 with a qemu-img beside it" >&2; exit 1; }
      PATH=$(realpath "$(dirname "$2")"):$PATH
      shift 2
      ;;
    *) echo "tests/qemu/cuts.sh: $1: see the head of the script" >&2; exit 1 ;;
  esac
done
export VMAR_BIN=${VMAR_BIN:-${CARGO_TARGET_DIR:-target}/debug/vmar}
[ -x "$VMAR_BIN" ] || cargo build --locked
VMAR_BIN=$(realpath "$VMAR_BIN")
work=$(mktemp -d -t vmar-cuts.XXXXXX)

fail() { echo "tests/qemu/cuts.sh: $* (logs: $work)" >&2; exit 1; }

# shellcheck source=qemu-scripts/common.sh
. qemu-scripts/common.sh
# shellcheck source=tests/qemu/guest.sh
. tests/qemu/guest.sh
guest_need
need python3:python3 setpriv:util-linux
guest_kernel
guest_initramfs "$work/initrd" tests/qemu/init-cuts
# The base image: noise, and room for the numbers.
base_mib=8 image_mib=24 slots=2048
head -c "${base_mib}M" /dev/urandom >"$work/guest.raw"
truncate -s "${image_mib}M" "$work/guest.raw"
sum=$(head -c "${base_mib}M" "$work/guest.raw" | md5sum | cut -d' ' -f1)
for library in here there; do
  "$VMAR_BIN" library init "$work/$library" >/dev/null
  "$VMAR_BIN" --library "$work/$library" image add "guest=$work/guest.raw" >/dev/null 2>&1
done
overlay=$work/guest.qcow2
"$VMAR_BIN" overlay create "$overlay" --image guest --library "$work/here" >/dev/null

probe_accel "$cache/vmlinuz"
accel=$VMAR_ACCEL reconnect='reconnect=1' words="console=ttyS0 quiet panic=-1 vmar.sum=$sum vmar.base=$((base_mib * 16))"
words+=" vmar.first=$((base_mib * 256)) vmar.slots=$slots"
[ "$accel" != tcg ] || { accel=tcg,tb-size=64; words+=' no_timer_check'; }
[ "$(qemu_major)" -lt 10 ] || reconnect='reconnect-ms=1000'
say "QEMU $(qemu-system-x86_64 --version | sed -n 's/.*version \([^ ]*\).*/\1/p'), $VMAR_ACCEL, seed $seed"

# Whatever ends this, its processes end with it: each is tied to the one that started it. Logs of a failure stay.
cuts_py='' interrupted=''
tidy_up() {
  [ -z "$cuts_py" ] || { kill -KILL "$cuts_py"; wait "$cuts_py"; } 2>/dev/null || true
  [ -z "$interrupted" ] || rm -rf "$work"
}
trap tidy_up EXIT
trap 'interrupted=1; exit 130' INT
trap 'interrupted=1; exit 143' TERM HUP
RUST_LOG=info setpriv --pdeathsig KILL -- python3 -B tests/qemu/cuts/cuts.py --work "$work" --vmar "$VMAR_BIN" \
  --overlay "$overlay" --libraries "$work"/{here,there} --kernel "$cache/vmlinuz" --initrd "$work/initrd" --append "$words" \
  --accel "$accel" --reconnect "$reconnect" --memory 256 --slots "$slots" --first $((base_mib * 256)) \
  --cuts "$cuts" --last "$last" --settle "$settle" --seed "$seed" "${kill[@]}" &
cuts_py=$!
status=0
wait "$cuts_py" || status=$?
cuts_py=
[ "$status" = 0 ] || fail "see above"
for library in here there; do
  "$VMAR_BIN" --library "$work/$library" image verify >/dev/null 2>&1 || fail "an image has changed"
done
say "qemu-img check clean, the images are as they were"
rm -rf "$work"
