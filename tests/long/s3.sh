# Sourced by garage.sh and moto.sh: a real guest, its way into stores and back, and what must not come to harm.
# shellcheck shell=bash disable=SC2034,SC2154
# The caller has sourced qemu-scripts/common.sh and migrate/vm.sh and set what they need, $work, and $image.

: "${work:?}" "${image:?}"
steps=0 vms=0

# What went wrong stays in $work.
fail() {
    trap - ERR
    die "$* (logs: $work)"
}

# last FILE: its last line; a bar of progress is over its own lines again and again.
last() {
    tr '\r' '\n' <"$1" | grep -v '^[[:space:]]*$' | tail -n 1
}

step() {
    steps=$((steps + 1))
    printf '%3d %5d s  %s\n' "$steps" "$SECONDS" "$*"
}

# guest_start OVERLAY WHAT: see qemu_start, in a new folder: $next.
guest_start() {
    vms=$((vms + 1))
    next=$work/vm$vms
    qemu_start - "$image" "$next" "$1" "$2"
}

# guest_end DIR: without a word, as a host that fails. What was saved has to be enough.
guest_end() {
    local what pid
    for what in qemu vmar; do
        pid=$(cat "$1/$what.pid" 2>/dev/null) || continue
        rm -f "$1/$what.pid"
        kill -KILL "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
}

# guest_boot: a guest on a new overlay, $now and $overlay, with files, memory and a counter that are verified from now on.
guest_boot() {
    overlay=$work/disk0.qcow2
    vm_overlay vmar "$image" "$overlay"
    guest_start "$overlay" boot
    now=$next
    vm_wait_up "$now" 600
    in_guest 600 setup 32 idle 0 >"$now/setup.log" 2>&1 || fail "the guest cannot be set up: $(last "$now/setup.log")"
}

# guest_fill MIB: so much that nothing can compress, new each time, in a file on tmpfs that is verified with the others.
guest_fill() {
    python3 "$repo/qemu-scripts/migrate/console.py" "$now/shell.sock" 600 "$1" >"$now/fill.log" 2>&1 <<'END' || fail "the guest: $(last "$now/fill.log")"
set -e
head -c "$1M" /dev/urandom >/dev/shm/vmar-fill
cd /run/vmar-migrate
sed -i '/vmar-fill/d' sums
sha256sum /dev/shm/vmar-fill >>sums
END
}

# guest_verify: files in page cache, on disk and in memory by SHA-256, a counter that goes on, and no new error of the kernel.
guest_verify() {
    in_guest 600 verify >"$now/verify.log" 2>&1 || fail "the guest is not what it was: $(last "$now/verify.log")"
}

# Of QEMU in $next: MiB of memory that it has filled in.
qemu_mib() {
    awk '/^RssShmem/ { print int($2 / 1024) }' "/proc/$(cat "$next/qemu.pid")/status"
}

# stores URL...: what the functions below use.
stores() {
    local url
    store=()
    for url; do store+=(--store "$url"); done
}

# save NAME [WORD...]: the guest in $now; what vmar says goes to $work/save-NAME.log.
save() {
    "$vmar" --library "$vm_library" snapshot save "$1" --qmp "$now/proxy.qmp" --overlay "$overlay" --state-dir "$now/state" "${store[@]}" \
        --spool "$work" "${@:2}" >"$work/save-$1.log" 2>&1
}

# back_disk NAME: into a new overlay for a QEMU that waits in $next. back_memory NAME: into that.
back_disk() {
    overlay_next=$work/disk$((vms + 1)).qcow2
    rm -f "$overlay_next"
    "$vmar" --library "$vm_library" snapshot restore "$1" --overlay "$overlay_next" --state-dir "$work/state" "${store[@]}" --spool "$work" \
        >"$work/disk-$1.log" 2>&1 || fail "restore $1: $(last "$work/disk-$1.log")"
    guest_start "$overlay_next" restore
}
back_memory() {
    "$vmar" --library "$vm_library" snapshot restore "$1" --qmp "$next/proxy.qmp" "${store[@]}" --spool "$work" >"$work/memory-$1.log" 2>&1
}

# back_end: the guest in $next is the one that runs, and what it was.
back_end() {
    guest_end "$now"
    rm -f "$overlay"
    now=$next overlay=$overlay_next
    guest_verify
}

back() {
    back_disk "$1"
    back_memory "$1" || fail "restore $1: $(last "$work/memory-$1.log")"
    back_end
}

# check WHAT: all is there, and whole.
check() {
    "$vmar" snapshot check "${store[@]}" --spool "$work" --json >"$work/check.json" 2>"$work/check.log" ||
        fail "check $1: $(head -c 300 "$work/check.json") $(last "$work/check.log")"
    step "check $1: $(jq -r '"\(.snapshots) snapshots, \(.packs) packs, \(.bytes) bytes read, nothing is wrong"' "$work/check.json")"
}
