#!/usr/bin/env bash
# Classes of guest memory, beside what the guest's own kernel says of its pages: README.md beside this file.
#
#   tests/long/introspect.sh [--images DIR] [--classify PROGRAM] [--workdir DIR] [--keep] [TRIAL...]
#
# TRIAL is NAME:MEMORY[:KERNEL[:MACHINE[:CPU[:WORD]]]]: an image of DIR (as images/build.sh makes them), maybe a kernel of
# another suite of Debian (SUITE or SUITE=PACKAGE) instead of its own, and a word for it. Without any, those of README.md.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$repo"
# shellcheck source=qemu-scripts/common.sh
. qemu-scripts/common.sh
# shellcheck source=tests/qemu/private-apt.sh
. tests/qemu/private-apt.sh

images=${VMAR_IMAGES_DIR:-$repo/build/images} classify=${CARGO_TARGET_DIR:-$repo/target}/release/examples/classify workdir='' keep='' trials=()
while [ $# -gt 0 ]; do
  case $1 in
    --images) images=$2; shift ;;
    --classify) classify=$2; shift ;;
    --workdir) workdir=$2; shift ;;
    --keep) keep=1 ;;
    -*) sed -n '2,7s/^# \?//p' "$0" >&2; exit 2 ;;
    *) trials+=("$1") ;;
  esac
  shift
done
fail() { echo "introspect.sh: $*" >&2; exit 1; }
[ -d "$images" ] || fail "$images is not there: make images with images/build.sh, or name their directory with --images"
[ -x "$classify" ] || fail "$classify is not there; build it with 'cargo build --release --example classify'"
[ ${#trials[@]} -gt 0 ] || trials=(web:1G web:2G:bullseye mail:1G web13:2G::::hugetlb_free_vmemmap=on web13:4G web:4G::pc 'web13:1G::q35:max,la57=on')
[ -n "$workdir" ] || workdir=$(mktemp -d)
mkdir -p "$workdir"
work=$(cd "$workdir" && pwd)
# shellcheck source=tests/qemu/guest.sh
. tests/qemu/guest.sh
guest_need
need python3:python3 jq:jq
probe_accel "$images/$(basename "${trials[0]%%:*}").vmlinuz"

qemu=''
end_guest() {
  [ -n "$qemu" ] || return 0
  kill -KILL "$qemu" 2>/dev/null || true
  wait "$qemu" 2>/dev/null || true
  qemu=''
}
trap end_guest EXIT

# other_kernel SUITE[=PACKAGE] IMAGE: $work/SUITE.vmlinuz and .initrd, a kernel for cloud machines of another suite. It is
# unpacked, not installed, and boots the image's own user space.
other_kernel() {
  local suite=${1%%=*} package=${1#*=} folder=$work/apt-${1//=/-}
  cache=$work/kernel-${1//=/-}
  [ ! -e "$cache/initrd" ] || return 0
  mkdir -p "$cache/deb"
  private_apt_setup "$folder" deb "$suite"
  if [ "$package" = "$suite" ]; then
    package=$(apt-cache "${apt_options[@]}" show "linux-image-cloud-amd64/$suite" |
      sed -n 's/^Depends: *\(linux-image-[^ ,]*\).*/\1/p' | head -n 1)
  fi
  [ -n "$package" ] || fail "$suite has no kernel for cloud machines"
  (cd "$cache/deb" && apt-get "${apt_options[@]}" download "$package" 2>/dev/null) || fail "cannot download $package of $suite"
  rm -rf "$cache/root"
  dpkg -x "$cache"/deb/linux-image-*.deb "$cache/root"
  # From Debian 13 on the files of a kernel are in /usr.
  [ -e "$cache/root/lib" ] || ln -s usr/lib "$cache/root/lib"
  cp "$cache"/root/boot/vmlinuz-* "$cache/vmlinuz"
  guest_initramfs "$cache/initrd" tests/qemu/init-root
}

# in_guest SOCKET SECONDS COMMAND: a command for the root shell at the guest's second serial port; prints what it prints.
# With QMP=SOCKET2 the guest is stopped as soon as the command has ended.
in_guest() {
  python3 - "$@" "${QMP:-}" <<'END'
import json, socket, sys, time
path, seconds, command, qmp = sys.argv[1], float(sys.argv[2]), sys.argv[3], sys.argv[4]
monitor = None
def connect(path):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(30)
    s.connect(path)
    return s
def ask(name):
    monitor.write(json.dumps({"execute": name}) + "\n")
    monitor.flush()
    while "return" not in (answer := json.loads(monitor.readline())):
        if "error" in answer:
            sys.exit(f"{name}: {answer['error']['desc']}")
if qmp:
    m = connect(qmp)
    monitor = m.makefile("rw")
    monitor.readline()
    ask("qmp_capabilities")
s = connect(path)
s.settimeout(2)
# Whatever an earlier call left at the prompt is thrown away. The marks are this call's own, and put together by the shell, so
# that its echo of the command has none.
s.sendall(b"\x03")
time.sleep(0.5)
mark = str(time.time_ns()).encode()
begin, end = b"BEGIN-" + mark, b"END-" + mark
s.sendall(b"\n echo VMAR-''" + begin + b"; " + command.encode() + b"; echo VMAR-''" + end + b" $?\n")
begin, end = b"VMAR-" + begin, b"VMAR-" + end
seen, ends = b"", time.monotonic() + seconds
while end not in seen:
    if time.monotonic() > ends:
        sys.exit(f"the guest does not answer: {seen[-300:]!r}")
    try:
        data = s.recv(65536)
    except TimeoutError:
        continue
    if not data:
        sys.exit("the guest has gone")
    seen += data
if monitor:
    ask("stop")
# Stopped, the guest says no more: the rest of the line came with the mark, or never.
while not monitor and not seen.rpartition(end)[2].count(b"\n"):
    seen += s.recv(65536)
body = seen.rpartition(begin)[2].replace(b"\r", b"")
text, _, status = body.rpartition(end)
sys.stdout.write(text.decode(errors="replace").strip("\n") + "\n")
sys.exit(0 if status.split()[:1] in ([], [b"0"]) else f"in the guest: {command}: {body[-300:]!r}")
END
}

# Reading what the kernel says of each page takes a while: twice, to see which pages move meanwhile. The guest is stopped right after.
look='for disk in /dev/vdb /dev/vdc; do dd if=/proc/kpageflags of=$disk bs=256k oflag=direct 2>/dev/null; done; cat /proc/meminfo'
# Memory of a process, tmpfs, huge pages, files read, and last, so that it is not flushed yet, a file written.
load='cd /proc/sys/vm && echo 0 >dirty_writeback_centisecs && echo 95 >dirty_ratio && echo 90 >dirty_background_ratio
(exec perl -e "\$a = chr(65) x 60000000; \$b = join q(), map { rand } 1..300000; sleep 100000") >/dev/null 2>&1 &
dd if=/dev/urandom of=/dev/shm/vmar bs=1M count=48 2>/dev/null
echo 4 >/proc/sys/vm/nr_hugepages
find /usr/lib /usr/share -xdev -type f -size -4000k | head -n 6000 | xargs cat >/dev/null
dd if=/dev/urandom of=/var/tmp/vmar bs=1M count=40 2>/dev/null && sleep 5'

# state LABEL: stops the guest, classifies, lets it go on.
state() {
  local label=$1 status=''
  QMP=$dir/qmp.sock in_guest "$dir/shell.sock" 300 "$look" >"$dir/$label.meminfo" || fail "$trial, $label: cannot look"
  local -a what=("$dir/ram" --machine "$machine" --before "$dir/before.raw" --compare "$dir/flags.raw" --meminfo "$dir/$label.meminfo")
  "$classify" "${what[@]}" >"$dir/$label.txt" 2>&1 || status=1
  cat "$dir/$label.txt"
  "$classify" "${what[@]}" --json >"$dir/$label.json" || status=1
  [ -z "$keep" ] || { cp --sparse=always "$dir/ram" "$dir/$label.ram"; cp --sparse=always "$dir/flags.raw" "$dir/$label.flags"
    cp --sparse=always "$dir/before.raw" "$dir/$label.before"; }
  [ -z "$status" ] || fail "$trial, $label: the classes are not what the guest says"
}

resume() {
  python3 - "$dir/qmp.sock" <<'END'
import json, socket, sys
s = socket.socket(socket.AF_UNIX)
s.settimeout(30)
s.connect(sys.argv[1])
f = s.makefile("rw")
f.readline()
for name in ("qmp_capabilities", "cont"):
    f.write(json.dumps({"execute": name}) + "\n")
    f.flush()
    while "return" not in json.loads(f.readline()):
        pass
END
}

run_trial() {
  local name memory kernel cpu word left=300
  local -a boot
  trial=$1
  IFS=: read -r name memory kernel machine cpu word <<<"$trial"
  machine=${machine:-q35}
  dir=$work/${trial//[:,=]/-}
  rm -rf "$dir" && mkdir -p "$dir"
  [ -e "$images/$name.raw" ] || fail "$images has no image $name"
  boot=(-kernel "$images/$name.vmlinuz" -initrd "$images/$name.initrd")
  if [ -n "$kernel" ]; then
    other_kernel "$kernel"
    boot=(-kernel "$cache/vmlinuz" -initrd "$cache/initrd")
  fi
  truncate -s 64M "$dir/before.raw" "$dir/flags.raw"
  qemu-system-x86_64 -name vmar-introspect -nodefaults -display none -no-reboot \
    -machine "$machine,memory-backend=ram0" -object "memory-backend-file,id=ram0,size=$memory,share=on,mem-path=$dir/ram" \
    -m "$memory" -smp 2 -accel "$VMAR_ACCEL" ${cpu:+-cpu "$cpu"} "${boot[@]}" \
    -append "$(cat "$images/$name.cmdline") systemd.debug_shell=ttyS1 $word" \
    -drive "file=$images/$name.raw,format=raw,if=virtio,snapshot=on" -drive "file=$dir/before.raw,format=raw,if=virtio" \
    -drive "file=$dir/flags.raw,format=raw,if=virtio" \
    -device virtio-rng-pci -serial "file:$dir/serial.log" -serial "unix:$dir/shell.sock,server=on,wait=off" \
    -qmp "unix:$dir/qmp.sock,server=on,wait=off" >"$dir/qemu.log" 2>&1 </dev/null &
  qemu=$!
  # The shell is there before the services are.
  until in_guest "$dir/shell.sock" 60 'systemctl is-active -q multi-user.target' >/dev/null 2>&1; do
    kill -0 "$qemu" 2>/dev/null || fail "$trial: QEMU ended: $(tail -n 1 "$dir/qemu.log")"
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail "$trial: the guest does not come up: $(tail -n 1 "$dir/serial.log")"
    sleep 2
  done
  say "$trial: $(in_guest "$dir/shell.sock" 30 'uname -r'), idle"
  state idle
  resume
  in_guest "$dir/shell.sock" 600 "$load" >/dev/null || fail "$trial: no load"
  say "$trial: after load"
  state loaded
  end_guest
  rm -f "$dir/ram"
}

for trial in "${trials[@]}"; do
  run_trial "$trial"
done
[ -n "$keep" ] || rm -rf "$work"
say "${#trials[@]} guests, twice each: the classes are what the guests say"
