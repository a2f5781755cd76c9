#!/usr/bin/env bash
# A storm over a library that is in use: guests of different images check what they read with fio, while images are added,
# removed, updated, renamed and remapped under them. Not one byte may be wrong, and no guest may notice.
#
# Usage: tests/qemu/lifecycle.sh [--minutes N] [--seconds N] [--guests N] [--seed N] [--qemu BIN] [--break]
#   --minutes N   load for so long (default 10)
#   --seconds N   the same in seconds
#   --guests N    so many guests, each on an image of its own (default 3)
#   --seed N      the same changes in the same order (default: another one each time; it is printed)
#   --qemu BIN    this qemu-system-x86_64; qemu-img is the one beside it
#   --break       shows that the test can fail: no storm, but one block of an image that others read from is replaced, behind
#                 vmar's back, by a block of another image; passes if each guest that reads it says so (30 s of load)
#
# VMAR_BIN names the binary (default: the one that the tests built).
#
# The images are a family: 64 MiB partitions, made of regions that fio writes here and checks there. Each region is there in
# several versions ("tags"), and an image is made of regions, or of runs of blocks of them, of one version or another:
#
#   MiB      blocks of   checked by
#   0-12     4 KiB       fio's headers (offset, CRC-32C); in runs of 1 to 48 blocks of different versions
#   12-24    64 KiB      fio's headers
#   24-32    12 KiB      a pattern with version and offset
#   32-40    512 bytes   fio's headers; in runs of different versions
#   40-48    4 KiB       a pattern with version and offset; the second half is the guest's own
#   48-56    1 KiB       fio's headers; the guest writes 3 of each 8 KiB, so that its writes take the rest from the image
#   56-64    4 KiB       the guest writes, trims and checks what it wrote
#
# fio's headers do not tell versions from each other; the patterns do, and so does the checksum of the first 48 MiB, which the
# guests take all the time. The partitions begin at different blocks: what images share is at another place in each of them.
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=600 guests=3 seed=$RANDOM broken=''
wrong_usage() { echo "tests/qemu/lifecycle.sh: $*" >&2; exit 1; }
while [ $# -gt 0 ]; do
  case $1 in
    --minutes | --seconds | --guests | --seed)
      [[ ${2:-} =~ ^[0-9]+$ ]] || wrong_usage "$1: give it a number"
      case $1 in
        --minutes) seconds=$(($2 * 60)) ;;
        --seconds) seconds=$2 ;;
        --guests) guests=$2 ;;
        --seed) seed=$2 ;;
      esac
      shift 2
      ;;
    --break) broken=1 seconds=30; shift ;;
    --qemu)
      { [ -x "$2" ] && [ "$(basename "$2")" = qemu-system-x86_64 ] && [ -x "$(dirname "$2")/qemu-img" ]; } ||
        wrong_usage "--qemu $2: name a qemu-system-x86_64 with a qemu-img beside it"
      PATH=$(realpath "$(dirname "$2")"):$PATH
      shift 2
      ;;
    *) wrong_usage "$1: see the head of the script" ;;
  esac
done
[ "$guests" -gt 0 ] || wrong_usage "--guests 0: there must be one"
export VMAR_BIN=${VMAR_BIN:-${CARGO_TARGET_DIR:-target}/debug/vmar}
[ -x "$VMAR_BIN" ] || cargo build --locked
VMAR_BIN=$(realpath "$VMAR_BIN")
work=$(mktemp -d -t vmar-lifecycle.XXXXXX)

names=()
# What servers are at goes to the logs, so that a guest that waits for a disk is told from one that gets no CPU time.
fail() {
  local name what
  rm -f "$work/storming"
  for name in "${names[@]}"; do
    for what in status statistics; do
      [ ! -S "$work/$name/control" ] ||
        timeout 5 "$VMAR_BIN" control "$work/$name/control" "$what" --json >"$work/$name/$what.json" 2>&1 || true
    done
  done
  echo "tests/qemu/lifecycle.sh: $* (seed $seed, logs: $work)" >&2
  exit 1
}

# shellcheck source=qemu-scripts/common.sh
. qemu-scripts/common.sh
# shellcheck source=tests/qemu/guest.sh
. tests/qemu/guest.sh
guest_need
need fio:fio jq:jq fincore:util-linux
guest_kernel
guest_initramfs "$work/initrd" tests/qemu/init-fio fio
RANDOM=$seed
say "seed $seed"

# ---------------------------------------------------------------------------------------------------------------------
# Images

# version TAG: $work/TAG.part, all regions of this version.
version() {
  truncate -s 64M "$work/$1.part"
  # The seed: a number that is the tag's.
  cat >"$work/$1.fio" <<END
[global]
filename=$work/$1.part
ioengine=sync
thread=1
rw=write
do_verify=0
verify_state_save=0
verify=crc32c
randseed=$(($(printf '%s' "$1" | cksum | cut -d' ' -f1) % 1000000 + 1))
[fine]
size=12m
bs=4k
[wide]
offset=12m
size=12m
bs=64k
[odd]
offset=24m
size=8184k
bs=12k
verify=pattern
verify_pattern="$(printf '%-8s' "$1" | tr ' ' -)"%o
[small]
offset=32m
size=8m
bs=512
[labelled]
offset=40m
size=8m
bs=4k
verify=pattern
verify_pattern="$(printf '%-8s' "$1" | tr ' ' -)"%o
[partial]
offset=48m
size=8m
bs=1k
[written]
offset=56m
size=8m
bs=4k
END
  (cd "$work" && fio --output="$work/$1.fio.log" "$work/$1.fio") || fail "fio cannot write: $(tail -n 1 "$work/$1.fio.log")"
}

# put FROM TO BLOCK COUNT: these blocks of 4 KiB, from one file to the same place in the other.
put() { dd if="$1" of="$2" bs=4k skip="$3" seek="$3" count="$4" conv=notrunc status=none; }

# put_runs TO BLOCK COUNT TAG...: the same in runs, each of any of these versions.
put_runs() {
  local to=$1 at=$2 end=$(($2 + $3)) tags=("${@:4}") run
  while [ "$at" -lt "$end" ]; do
    run=$((RANDOM % 48 + 1))
    [ $((at + run)) -le "$end" ] || run=$((end - at))
    put "$work/${tags[RANDOM % ${#tags[@]}]}.part" "$to" "$at" "$run"
    at=$((at + run))
  done
}

# image NAME SHIFT PART: $work/NAME.raw, the partition SHIFT blocks behind 1 MiB.
image() {
  truncate -s 66M "$work/$1.raw"
  printf '%d,131072,83\n' $((2048 + $2 * 8)) | sfdisk -q "$work/$1.raw" >/dev/null 2>&1
  dd if="$3" of="$work/$1.raw" bs=4k seek=$((256 + $2)) conv=notrunc status=none
}

# family K: the image g$K of a guest, with its sum in $work/g$K.sum, and the jobs of its fio in its initrd.
family() {
  local g=g$1 odd part=$work/family.part
  cp "$work/old.part" "$part"
  put_runs "$part" 0 3072 old old old new "$g"
  [ $(($1 % 2)) -eq 0 ] || put "$work/new.part" "$part" 3072 1536
  odd=old
  [ $(($1 % 3)) -ne 2 ] || odd=new
  put "$work/$odd.part" "$part" 6144 2048
  put_runs "$part" 8192 2048 old old new "$g"
  put "$work/$g.part" "$part" 11264 1024
  image "$g" $((($1 - 1) * 9)) "$part"
  head -c 48M "$part" | sha256sum | cut -d' ' -f1 >"$work/$g.sum"
  mkdir -p "$work/more/jobs"
  # Each is run once and then again: fio ends when all has been read.
  cat >"$work/more/jobs/read" <<END
[global]
filename=/dev/vda1
direct=1
thread=1
ioengine=libaio
verify=crc32c
verify_fatal=1
verify_state_save=0
randrepeat=0
[fine]
size=12m
bs=4k
rw=randread
iodepth=8
numjobs=2
[wide]
offset=12m
size=12m
bs=64k
rw=randread
iodepth=4
numjobs=3
[wide-sequential]
offset=12m
size=12m
bs=256k
verify_interval=64k
rw=read
iodepth=2
[odd]
offset=24m
size=8184k
bs=12k
verify=pattern
verify_pattern="$(printf '%-8s' "$odd" | tr ' ' -)"%o
rw=randread
iodepth=8
numjobs=2
[small]
offset=32m
size=2m
offset_increment=2m
numjobs=4
bs=512
rw=randread
iodepth=8
[small-wide]
offset=32m
size=8m
bs=20k
verify_interval=512
rw=randread
iodepth=4
[labelled]
offset=40m
size=4m
bs=4k
verify=pattern
verify_pattern="old-----"%o
rw=randread
iodepth=8
[labelled-own]
offset=44m
size=4m
bs=4k
verify=pattern
verify_pattern="$(printf '%-8s' "$g" | tr ' ' -)"%o
rw=randread
iodepth=8
END
  cat >"$work/more/jobs/write" <<END
[global]
filename=/dev/vda1
direct=1
thread=1
ioengine=libaio
verify=crc32c
verify_fatal=1
verify_state_save=0
verify_backlog=16
randrepeat=0
loops=100000
[partial]
offset=48m
size=8m
bs=3k
blockalign=8k
rw=randwrite
thinktime=$((seconds * 4000))
thinktime_blocks=1
[mixed]
offset=56m
size=4m
bs=2k
rw=randrw
rwmixread=60
iodepth=4
fsync=64
thinktime=20000
thinktime_blocks=16
[trimmed]
offset=60m
size=4m
rw=randtrimwrite
bs=16k
iodepth=4
trim_percentage=40
trim_backlog=32
trim_verify_zero=1
thinktime=20000
thinktime_blocks=16
END
  cat >"$work/more/jobs/rest" <<END
[global]
filename=/dev/vda1
direct=1
thread=1
ioengine=libaio
verify=crc32c
verify_fatal=1
verify_state_save=0
randrepeat=0
blockalign=8k
[rest]
offset=49156k
size=8188k
bs=4k
verify_interval=1k
rw=randread
iodepth=4
[tail]
offset=49155k
size=8189k
bs=1k
rw=randread
iodepth=4
END
  cp "$work/initrd" "$work/$g.initrd"
  (cd "$work/more" && find . | cpio --quiet -o -H newc) >>"$work/$g.initrd"
  cp "$cache/vmlinuz" "$work/$g.vmlinuz"
  echo "console=ttyS0 panic=-1 quiet vmar.name=$g vmar.sum=$(cat "$work/$g.sum") vmar.mib=48" >"$work/$g.cmdline"
  rm -rf "$work/more" "$part"
}

for ((k = 1; k <= guests; k++)); do names+=("g$k"); done
for tag in old new "${names[@]}"; do version "$tag"; done
image old 0 "$work/old.part"
for ((k = 1; k <= guests; k++)); do family "$k"; done

# What comes and goes: the key of an image, and where its content is. Not in the library: its name is empty.
declare -A source_of=() name_of=()
absent() { source_of[$1]=$2 name_of[$1]=''; }
absent old "$work/old.raw"
if [ -z "$broken" ]; then
  cp "$work/old.raw" "$work/twin.raw"
  absent twin "$work/twin.raw"
  put_runs "$work/new.part" 0 16384 old new "${names[@]}"
  image mix 5 "$work/new.part"
  absent mix "$work/mix.raw"
  qemu-img convert -f raw -O qcow2 "$work/mix.raw" "$work/mix.qcow2"
  absent mix-converted "$work/mix.qcow2"
  for name in "${names[@]}"; do
    cp "$work/$name.raw" "$work/copy-$name.raw"
    absent "copy-$name" "$work/copy-$name.raw"
    qemu-img convert -f raw -O qcow2 "$work/$name.raw" "$work/$name-converted.qcow2"
    absent "$name-converted" "$work/$name-converted.qcow2"
    cp "$work/mix.raw" "$work/next-$name.raw"
  done
  # The contents of the image that is updated.
  image idle-0 3 "$work/old.part"
  image idle-1 7 "$work/new.part"
  qemu-img convert -f raw -O qcow2 "$work/g1.raw" "$work/idle-2.raw"
fi
rm -f "$work"/*.part "$work"/*.fio "$work"/*.fio.log

# ---------------------------------------------------------------------------------------------------------------------
# Library and guests

library=$work/library
declare -A count=()
untold=0
export RUST_LOG=info
# change KIND ARGUMENT...: a command of vmar, which must succeed, in time.
change() {
  local kind=$1 status=0 began
  shift
  began=$(now_ms)
  timeout 180 "$VMAR_BIN" --library "$library" "$@" >"$work/said" 2>"$work/said.err" || status=$?
  echo "== $(date +%T) vmar $*: $status after $(as_seconds $(($(now_ms) - began))) s" >>"$work/storm.log"
  cat "$work/said" "$work/said.err" >>"$work/storm.log"
  [ "$status" -ne 124 ] || fail "'vmar $*' does not end"
  [ "$status" -eq 0 ] || fail "'vmar $*' failed: $(tail -n 1 "$work/said.err")"
  count[$kind]=$((${count[$kind]:-0} + 1))
  untold=$((untold + $(grep -c 'goes on with the map that it has' "$work/said.err" || true)))
}
change init library init "$library" --policy paper
count=()
# Before the guests', so that these read from them by all policies.
for key in old twin mix-converted copy-g1 g2-converted; do
  [ -n "${source_of[$key]:-}" ] || continue
  change add image add "$key=${source_of[$key]}"
  name_of[$key]=$key
done
first=()
for name in "${names[@]}"; do first+=("$name=$work/$name.raw"); done
[ -n "$broken" ] || first+=("idle=$work/idle-0.raw")
change add image add "${first[@]}"
declare -A guest_name=() kept=()
for name in "${names[@]}"; do guest_name[$name]=$name; done

# Used by the functions of common.sh.
# shellcheck disable=SC2034
vm_images=$work vm_library=$library vm_memory=512 vm_record='' vm_append="vmar.seconds=$((seconds + 15))"
vmar=$VMAR_BIN
probe_accel "$cache/vmlinuz"
vm_guard
for name in "${names[@]}"; do
  mkdir -p "$work/$name"
  vm_folder "$work/$name"
  vm_overlay vmar "$name" "$work/$name.qcow2"
  vm_serve_more=(--control "$work/$name/control")
  vm_start vmar "$name" "$work/$name" "$work/$name.qcow2"
done
# said NAME PATTERN
said() { grep -aE "^$2" "$work/$1/serial.log" 2>/dev/null | tr -d '\r'; }
# All guests and their servers are alive.
lives() {
  local name
  for name in "${names[@]}"; do
    kill -0 "$(cat "$work/$name/vmar.pid")" 2>/dev/null || fail "vmar of $name ended: $(tail -n 1 "$work/$name/vmar.log")"
    said "$name" VMAR-BOOT-OK >/dev/null || kill -0 "$(cat "$work/$name/qemu.pid")" 2>/dev/null ||
      fail "QEMU of $name ended: $(tail -n 1 "$work/$name/qemu.log")"
  done
}
for name in "${names[@]}"; do
  left=$((1200 + 300 * guests))
  until said "$name" VMAR-FIO-START >/dev/null; do
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail "the guest $name has not begun: $(tail -n 1 "$work/$name/serial.log")"
    lives
    sleep 0.2
  done
done
say "QEMU $(qemu-system-x86_64 --version | sed -n 's/.*version \([^ ]*\).*/\1/p'), $VMAR_ACCEL, $guests guests, $seconds s of load"

# ---------------------------------------------------------------------------------------------------------------------
# The storm

any() { local of=("$@"); picked=${of[RANDOM % ${#of[@]}]}; }
# pick present|absent: sets $picked to one of these images, or fails.
pick() {
  local key found=()
  for key in $(printf '%s\n' "${!source_of[@]}" | sort); do
    case $1 in
      present) [ -z "${name_of[$key]}" ] || found+=("$key") ;;
      absent) [ -n "${name_of[$key]}" ] || found+=("$key") ;;
    esac
  done
  [ ${#found[@]} -gt 0 ] || return 1
  any "${found[@]}"
}

# The files of all images. Those that vmar made are named from the library on.
listed() { jq -r '.images[].path' "$library/library.json" | sed "s|^[^/]|$library/&|"; }

# prefer NAME: the trace of a server that has read very much of this image, so that the policy most-used has all others read
# from it. The server is killed before it has read anything; then there is a record as TRACE.md describes it.
prefer() {
  local pid left=200
  rm -f "$work/preferred" "$work/preferred.sock"
  "$vmar" serve --library "$library" --image "$1" --read-only --socket-path "$work/preferred.sock" --state-dir "$work" \
    --record "$work/preferred" >"$work/preferred.log" 2>&1 </dev/null &
  pid=$!
  until [ -S "$work/preferred.sock" ] && [ -s "$work/preferred" ]; do
    left=$((left - 1))
    kill -0 "$pid" 2>/dev/null || fail "no server of $1: $(tail -n 1 "$work/preferred.log")"
    [ "$left" -gt 0 ] || fail "the server of $1 shows no socket"
    sleep 0.1
  done
  kill -KILL "$pid"
  { wait "$pid" || true; } 2>/dev/null
  truncate -s 96 "$work/preferred"
  { head -c 20 /dev/zero; printf '\0\0\0\20'; } >>"$work/preferred"
}

# preferring KEY: remaps so that all read from this image what it has.
preferring() {
  prefer "${name_of[$1]}"
  change remap library remap --policy most-used --bridge $((RANDOM % 9)) --min-run $((RANDOM % 9 + 1)) \
    --traces "$work/preferred"
}

remap() {
  case $((RANDOM % 8)) in
    0) change remap library remap ;;
    1) change remap library remap --policy paper ;;
    2) change remap library remap --policy bridge ;;
    3) change remap library remap --policy bridge --bridge $((RANDOM % 20)) --min-run $((RANDOM % 20 + 1)) ;;
    4) change remap library remap --policy least-fragmented --bridge $((RANDOM % 9)) --min-run $((RANDOM % 9 + 1)) ;;
    *) if pick present; then preferring "$picked"; fi ;;
  esac
}

take_away() {
  change remove image remove "${name_of[$1]}"
  name_of[$1]=''
}

bring() {
  local key args=()
  for key; do args+=("$key=${source_of[$key]}") name_of[$key]=$key; done
  change add image add "${args[@]}"
}

renames=0
call_otherwise() {
  local new
  renames=$((renames + 1))
  if [ $((RANDOM % 2)) -eq 0 ] && pick present; then
    new=$picked-$renames
    change rename image rename "${name_of[$picked]}" "$new"
    name_of[$picked]=$new
  else
    any "${names[@]}"
    new=$picked-$renames
    # What was kept of it when it was updated goes with it.
    change rename image rename "${guest_name[$picked]}" "$new"
    guest_name[$picked]=$new
  fi
}

updates=0
renew() {
  updates=$((updates + 1))
  change update image update idle "$work/idle-$((updates % 3)).raw"
}

# An update of the image that a guest runs on, once each: the server goes on with what it has, which stays.
renew_served() {
  any "${names[@]}"
  [ -z "${kept[$picked]:-}" ] || { renew; return; }
  change update-served image update "${guest_name[$picked]}" "$work/next-$picked.raw" --json
  kept[$picked]=$(jq -r .kept "$work/said")
  [ "${kept[$picked]}" != null ] || fail "an update gave up the content that $picked reads"
}

# Beside the changes, servers are told to look for themselves at any moment.
reloader() {
  while [ -e "$work/storming" ] && kill -0 $$ 2>/dev/null; do
    any "${names[@]}"
    if timeout 60 "$vmar" control "$work/$picked/control" reload >"$work/reload" 2>&1; then
      echo "ok $picked" >>"$work/reloads"
    else
      echo "$picked: $(tail -n 1 "$work/reload")" >>"$work/reloads-failed"
    fi
    sleep $((RANDOM % 2)).$((RANDOM % 900 + 100))
  done
}

forget() {
  local made
  mapfile -t made < <(find "$library/images" -type f)
  drop_cached "$work"/*.raw "${made[@]}"
  count[drop]=$((${count[drop]:-0} + 1))
}

# The image of a guest does not go.
refuse() {
  any "${names[@]}"
  [ -z "${kept[$picked]:-}" ] || return 0
  ! timeout 180 "$VMAR_BIN" --library "$library" image remove "${guest_name[$picked]}" >>"$work/storm.log" 2>&1 ||
    fail "the image of $picked could be removed"
  count[refused]=$((${count[refused]:-0} + 1))
}

verdict() {
  local name
  for name in "${names[@]}"; do
    ! said "$name" 'VMAR-(FIO-ERROR|SUM-ERROR|BOOT-FAIL)' || fail "the guest $name found something wrong"
  done
  [ ! -e "$work/reloads-failed" ] || fail "a reload failed: $(tail -n 1 "$work/reloads-failed")"
}

began=$(now_ms)
if [ -n "$broken" ]; then
  # A block in the middle of the labelled region: at block 10240 of the partition, which begins at block 256.
  at=$((256 + 10240 + 300))
  # From the half of the same region that is a guest's own: right in form, and wrong.
  dd if="$work/g1.raw" of="$work/old.raw" bs=4k skip=$((at + 1024)) seek="$at" count=1 conv=notrunc status=none
  say "block $at of old.raw is another one now"
else
  touch "$work/storming"
  reloader &
  reloader=$!
  deck=()
  while [ $(($(now_ms) - began)) -lt $((seconds * 1000)) ]; do
    # Cards, not dice: a short storm has some of all.
    [ ${#deck[@]} -gt 0 ] || deck=(remap remap remap remap remove remove remove hunt hunt add add add two renew renew_served
      call_otherwise call_otherwise forget refuse)
    i=$((RANDOM % ${#deck[@]}))
    card=${deck[i]}
    deck[i]=${deck[-1]}
    unset 'deck[-1]'
    case $card in
      remove) if pick present; then take_away "$picked"; fi ;;
      # What all read from goes.
      hunt) if pick present; then preferring "$picked"; take_away "$picked"; fi ;;
      add) if pick absent; then bring "$picked"; fi ;;
      two)
        if pick absent; then
          one=$picked
          pick absent
          if [ "$one" = "$picked" ]; then bring "$one"; else bring "$one" "$picked"; fi
        fi
        ;;
      *) "$card" ;;
    esac
    lives
    verdict
    sleep 0.$((RANDOM % 10))
  done
  rm "$work/storming"
  wait "$reloader"
  verdict
  count[reload]=$(wc -l <"$work/reloads")
  for name in "${names[@]}"; do
    ! said "$name" VMAR-FIO-END >/dev/null || fail "the guest $name was done before the storm was over"
  done

  # All that comes and goes goes, and nobody holds on to it.
  while pick present; do take_away "$picked"; done
  change remap library remap --policy paper
  listed >"$work/listed"
  left=100
  held() {
    local name pid
    for name in "${names[@]}"; do
      pid=$(cat "$work/$name/vmar.pid")
      # Descriptors and mappings, but for the guest's memory.
      { find "/proc/$pid/fd" -type l -printf '%l\n' 2>/dev/null; sed -n 's|^[^/]*\(/.*\)|\1|p' "/proc/$pid/maps"; } |
        sort -u >"$work/$name.open"
      grep ' (deleted)$' "$work/$name.open" | grep -v '^/memfd:' || true
      grep -E '\.raw$' "$work/$name.open" | grep -vxFf "$work/listed" || true
    done
  }
  until [ -z "$(held)" ]; do
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail "a server holds on to $(held | head -n 1)"
    sleep 0.1
  done
  for name in "${names[@]}"; do
    grep -qxF "$work/$name.raw" "$work/$name.open" || fail "what the server of $name has open cannot be seen"
  done
fi

# ---------------------------------------------------------------------------------------------------------------------
# What has come of it

reloads=0 verified=0 shared=0 least=''
for name in "${names[@]}"; do
  left=$(((seconds * 3 + 900) * 5))
  until said "$name" 'VMAR-FIO-END' >/dev/null; do
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail "the guest $name does not come to an end"
    lives
    sleep 0.2
  done
  vm_wait_up "$work/$name" 36000
  from=$("$VMAR_BIN" control "$work/$name/control" statistics --json 2>/dev/null | jq .total.read_bytes_from.other_images)
  vm_wait_off "$work/$name" 60
  n=$(grep -c 'the block map is another one now' "$work/$name/vmar.log" || true)
  reloads=$((reloads + n))
  [ -n "$least" ] && [ "$least" -lt "$n" ] || least=$n
  bytes=$(said "$name" VMAR-FIO-ROUND | awk '{ s += $4 } END { printf "%.0f", s }')
  verified=$((verified + bytes))
  shared=$((shared + from))
  say "$name: $n reloads, $bytes bytes verified by fio, $from read from other images; $(said "$name" VMAR-SUMS);" \
    "$(said "$name" VMAR-FIO-END)"
  [ "$bytes" -gt 0 ] || fail "$name: nothing was verified"
  [ "$from" -gt 0 ] || fail "$name read nothing from other images: the test shows nothing"
done
if [ -n "$broken" ]; then
  for name in "${names[@]}"; do
    said "$name" 'VMAR-FIO-ERROR .* job labelled error' >/dev/null || fail "fio in $name did not find the block"
    said "$name" 'VMAR-SUM-ERROR' >/dev/null || fail "the sum in $name did not find the block"
    said "$name" 'VMAR-(FIO|SUM)-ERROR' | sort | uniq -c | sort -rn | head -n 3
  done
  ! "$VMAR_BIN" --library "$library" image verify >/dev/null 2>&1 || fail "image verify did not find the block"
  vm_stop_all || fail "a server did not end well"
  say "each guest found the block by fio and by its sum, and so did image verify: the test can fail"
  rm -rf "$work"
  exit 0
fi
verdict
for name in "${names[@]}"; do
  case $(said "$name" VMAR-FIO-END) in *" errors 0 messages 0") ;; *) fail "the guest $name saw errors" ;; esac
  case $(said "$name" VMAR-SUMS) in
    "VMAR-SUMS passes 0 "* | '') fail "the guest $name took no sum" ;;
    *" wrong 0 "*) ;;
    *) fail "the guest $name read a wrong sum" ;;
  esac
done
vm_stop_all || fail "a server did not end well"
for name in "${names[@]}"; do
  ! grep -aE 'WARN|ERROR|panicked' "$work/$name/vmar.log" || fail "the server of $name complains"
  qemu-img check -q "$work/$name.qcow2" || fail "qemu-img check of the overlay of $name"
  qemu-img convert -O raw "$work/$name.qcow2" "$work/after.raw"
  sum=$(sha256sum "$work/after.raw" | cut -d' ' -f1)
  [ "VMAR-SUM $sum" = "$(said "$name" 'VMAR-SUM ')" ] ||
    fail "the guest $name read $(said "$name" 'VMAR-SUM '), its overlay holds $sum"
done
change verify image verify
unset 'count[verify]'
# vmar deletes what it made, and nothing else.
change sweep library remap
unset 'count[sweep]'
find "$library/images" -type f | while read -r file; do
  grep -qxF "$file" <(listed) ||
    fail "nobody reads $file any more, and it is still there"
done
for key in "${!source_of[@]}"; do [ -e "${source_of[$key]}" ] || fail "${source_of[$key]} was not vmar's, and is gone"; done
kinds=''
for kind in $(printf '%s\n' "${!count[@]}" | sort); do kinds+=" $kind ${count[$kind]}"; done
say "changes:$kinds; $reloads reloads by servers, $untold times a server was not told"
[ "$untold" -eq 0 ] || fail "$untold times a server was not told of its new map"
[ "$least" -ge 10 ] || fail "a server took only $least reloads: the test shows too little"
say "$verified bytes verified by fio, $shared bytes read from other images, 0 errors in fio, 0 wrong sums, 0 in dmesg;" \
  "images verified, overlays clean, the disks read the same outside, no file of a removed image is open"
rm -rf "$work"
