#!/usr/bin/env bash
# QEMU's own test of vhost-user-blk backends (tests/qtest/vhost-user-blk-test.c), run against vmar in place of
# qemu-storage-daemon. It is built from Debian's source package of the installed QEMU, in its version, into build/qtest,
# with a QEMU for it: Debian's own lacks the accelerator "qtest". The first run builds 1,300 files (10 minutes on two busy
# cores) and needs 1 GiB; later ones take seconds.
#
#   tests/qemu/qtest.sh [PATTERN]     only the cases whose path contains PATTERN
#
# VMAR_BIN names the binary (default: the one of the tests' profile). With QSD=1 the real qemu-storage-daemon is tested
# instead, for comparison. Not zero when a case fails.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../qemu-scripts/common.sh"
# shellcheck source=tests/qemu/private-apt.sh
. "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh"
# shellcheck disable=SC2034 # die says it
me=tests/qemu/qtest.sh
pattern=${1:-}
work=$repo/build/qtest
CASE_SECONDS=120

need_qemu
version=$(dpkg-query -W -f '${source:Version}' qemu-system-x86) || die "the installed QEMU is not Debian's"

# get_source: Debian's source package of that version, with its patches, in $work/src.
get_source() {
    need dpkg-source:dpkg-dev patch:patch xz:xz-utils
    say "getting the source of QEMU $version"
    private_apt_setup "$work/apt" deb-src
    (cd "$work" && apt-get "${apt_options[@]}" source --download-only "qemu=$version") >"$work/source.log" 2>&1 ||
        die "could not get the source of QEMU $version: see $work/source.log"
    dpkg-source --no-check -x "$work"/qemu_*.dsc "$work/src" >>"$work/source.log" 2>&1 ||
        die "could not unpack the source of QEMU $version: see $work/source.log"
}

# The test program and a QEMU that knows the few devices it uses.
build() {
    local started log=$work/build.log build=$work/src/build device
    need cc:build-essential ninja:ninja-build meson:meson pkg-config:pkg-config flex:flex bison:bison python3:python3
    pkg-config --exists glib-2.0 pixman-1 && [ -e /usr/include/libfdt.h ] ||
        apt_get libglib2.0-dev libpixman-1-dev libfdt-dev
    say "building qos-test and QEMU $version for it (log: $log)"
    started=$(now_ms)
    mkdir -p "$build"
    for device in I440FX Q35 PCI_DEVICES E1000_PCI VIRTIO VIRTIO_PCI VIRTIO_BLK VHOST_USER_BLK; do
        echo "CONFIG_$device=y"
    done >"$work/src/configs/devices/x86_64-softmmu/qtest.mak"
    (
        cd "$build"
        ../configure --target-list=x86_64-softmmu --without-default-features --without-default-devices \
            --with-devices-x86_64=qtest --firmwarepath=/usr/share/qemu:/usr/share/seabios:/usr/lib/ipxe/qemu \
            --enable-system --enable-kvm --enable-tools --enable-vhost-user --enable-vhost-user-blk-server \
            --disable-docs --with-git-submodules=ignore
        nice -n 5 ninja -j"$(nproc)" tests/qtest/qos-test qemu-system-x86_64
    ) >"$log" 2>&1 || die "could not build QEMU's qos-test: see $log"
    mv "$build/tests/qtest/qos-test" "$build/qemu-system-x86_64" "$work/"
    # The test names no devices but its own; the default ones are not built.
    mkdir -p "$work/bin"
    printf '#!/bin/sh\nexec "%s" "$@" -nodefaults\n' "$work/qemu-system-x86_64" >"$work/bin/qemu-system-x86_64"
    chmod +x "$work/bin/qemu-system-x86_64"
    say "built in $(as_seconds $(($(now_ms) - started))) s"
}

if [ "$(cat "$work/version" 2>/dev/null || true)" != "$version" ]; then
    rm -rf "${work:?}"
    mkdir -p "$work"
    get_source
    build
    [ -n "${KEEP:-}" ] || rm -rf "${work:?}"/{apt,src,qemu_*}
    echo "$version" >"$work/version"
fi

if [ -n "${QSD:-}" ]; then
    backend=$(command -v qemu-storage-daemon) || die "no qemu-storage-daemon here"
else
    backend=$repo/tests/qemu/qsd-shim.sh
    if [ -z "${VMAR_BIN:-}" ]; then
        (cd "$repo" && cargo build --locked --quiet --profile test --bin vmar) || die "cargo build failed"
        VMAR_BIN=${CARGO_TARGET_DIR:-$repo/target}/debug/vmar
    fi
    export VMAR_BIN
fi

run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
cd "$run"
export TMPDIR=$run QTEST_QEMU_STORAGE_DAEMON_BINARY=$backend
export QTEST_QEMU_BINARY=$work/bin/qemu-system-x86_64 VMAR_SHIM_PIDS=$run/pids

"$work/qos-test" -l >"$run/list" 2>"$run/list.err" || die "qos-test lists no cases: $(tail -n 1 "$run/list.err")"
mapfile -t cases < <(grep -E '/vhost-user-blk(-pci)?-tests/' "$run/list" | grep -F -- "$pattern")
[ ${#cases[@]} -gt 0 ] || die "no case matches '$pattern'"

# One process a case: a failed assertion ends it.
passed=0 failed=0 skipped=0
for case in "${cases[@]}"; do
    code=0
    : >"$run/pids"
    timeout -k 5 "$CASE_SECONDS" "$work/qos-test" --tap -p "$case" >"$run/tap" 2>"$run/err" || code=$?
    # A test that aborts may leave its servers behind.
    xargs -r kill -KILL <"$run/pids" 2>/dev/null || true
    rm -f "$run/pids" "$run"/qtest*
    if [ "$code" -eq 0 ] && grep -qE '^ok .* # SKIP' "$run/tap"; then
        skipped=$((skipped + 1))
        say "skip $case: $(sed -n 's/^ok .* # SKIP *//p' "$run/tap")"
    elif [ "$code" -eq 0 ] && grep -q '^ok ' "$run/tap"; then
        passed=$((passed + 1))
        say "ok   $case"
    else
        failed=$((failed + 1))
        say "FAIL $case (exit $code)"
        grep -hE 'Bail out|ERROR|rror:|WARN' "$run/tap" "$run/err" | sed 's/^/     /' | head -n 20 || true
    fi
done
say "vhost-user-blk-test of QEMU $version against $(basename "${VMAR_BIN:-$backend}"):"
say "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
