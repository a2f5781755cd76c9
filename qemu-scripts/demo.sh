#!/usr/bin/env bash
# From a fresh clone on Debian with Rust to a table: the same VMs from different images, with plain QEMU and through vmar.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<EOF
usage: qemu-scripts/demo.sh [--workdir DIR] [--images DIR] [--interval S] [--boot kernel|disk] [--quick] [ROLE...]

Installs what is missing, builds vmar and the images, indexes them, boots one VM for each ROLE all at once, first with
plain qcow2 overlays over the raw images, then through vmar, and prints what both cost. As root.

  --workdir DIR   library, overlays and logs (default build/demo of the repository)
  --images DIR    images (default \$VMAR_IMAGES_DIR, else build/images); those that are there are used as they are
  --interval S    seconds between the arrivals of the VMs (default 0)
  --boot HOW      kernel: QEMU loads the kernel (default); disk: through the boot loader
  --quick         two VMs only, to see that it works

Roles: web db cache python (default; at least four make the comparison worth its name), mail, java.
Environment: VMAR_BIN (use this binary), VMAR_ACCEL=kvm|tcg, CARGO_TARGET_DIR.
EOF
}

workdir=$repo/build/demo interval=0 boot=kernel roles=() fallback=(web db cache python)
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --quick) fallback=(web db); shift; continue ;;
        --*) [ $# -ge 2 ] || { usage >&2; exit 2; } ;;
        *) roles+=("$1"); shift; continue ;;
    esac
    case $1 in
        --workdir) workdir=$2 ;;
        --images) vm_images=$2 ;;
        --interval) interval=$2 ;;
        --boot) boot=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
[ ${#roles[@]} -gt 0 ] || roles=("${fallback[@]}")

mkdir -p "$workdir/log" "$vm_images"
workdir=$(cd "$workdir" && pwd)
vm_images=$(cd "$vm_images" && pwd)
library=$workdir/library
steps=7 step=0 demo_began=$SECONDS

# run WHAT COMMAND...: one step, its output on the terminal and in a log of its own.
run() {
    local what=$1 began=$SECONDS log status
    shift
    step=$((step + 1))
    log=$workdir/log/$step-${what//[^a-z]/-}.log
    say "[$step/$steps] $what"
    set +e
    (set -e; "$@") 2>&1 | tee "$log" | sed 's/^/      /'
    status=${PIPESTATUS[0]}
    set -e
    [ "$status" -eq 0 ] || die "step $step, $what, failed: $(tail -n 1 "$log") (log: $log)"
    say "      ($((SECONDS - began)) s)"
}

tools() {
    need jq:jq fincore:util-linux
    need_qemu
    [ -n "${VMAR_BIN:-}" ] || need cc:build-essential
    qemu-system-x86_64 --version | head -n 1
}

index() {
    local role sources=()
    for role in "${roles[@]}"; do
        sources+=("$role=$vm_images/$role.raw")
    done
    rm -rf "$library"
    "$vmar" library init "$library" --policy paper
    "$vmar" image add "${sources[@]}" --library "$library"
}

storm() {
    local mode=$1
    VMAR_BIN=$vmar "$repo/qemu-scripts/storm.sh" --mode "$mode" --images "$vm_images" --library "$library" \
        --interval "$interval" --boot "$boot" --workdir "$workdir/$mode" --json "$workdir/$mode.json" "${roles[@]}"
}

trap 'exit 130' INT
trap 'exit 143' TERM HUP
[ "$(id -u)" -eq 0 ] || die "must run as root: it builds images and may have to install packages"
run "tools" tools
if [ -n "${VMAR_BIN:-}" ]; then
    run "the vmar binary" need_vmar
else
    run "building vmar" build_vmar
fi
need_vmar
run "building images" "$repo/images/build.sh" --out "$vm_images" "${roles[@]}"
run "fingerprints and maps" index
run "what the images share" "$vmar" stats --library "$library"
probe_accel "$vm_images/${roles[0]}.vmlinuz"
run "storm with plain qemu" storm plain
run "storm through vmar" storm vmar

# shellcheck disable=SC2016 # these are jq's variables
table='
    def mib: . / 1048576 * 10 | round / 10;
    def seconds: . / 100 | round / 10;
    def ratio($limit): if $limit > 0 then . / $limit * 100 | round / 100 else "-" end;
    def left(n): tostring | . + (" " * ([n - length, 0] | max));
    def pad(n): tostring | (" " * ([n - length, 0] | max)) + .;
    def row($name; $cells): ($name | left(34)) + ($cells | map(pad(10)) | join(""));
    .[0] as $plain | .[1] as $vmar | $vmar.limit.distinct_bytes as $limit
    | row("VM, seconds to its boot marker"; ["plain", "vmar"]),
      (range($plain.vms | length) | . as $i
        | row("  \($plain.vms[$i].name)"; [$plain.vms[$i].boot_ms, $vmar.vms[$i].boot_ms | seconds])),
      row("  all"; [$plain.storm_ms, $vmar.storm_ms | seconds]),
      "",
      row("while all \($plain.vms | length) VMs run, MiB"; ["plain", "vmar", "limit", "plain/lim", "vmar/lim"]),
      row("  page cache of the images"; [($plain.cache.images_bytes, $vmar.cache.images_bytes, $limit | mib),
        ($plain.cache.images_bytes, $vmar.cache.images_bytes | ratio($limit))]),
      row("  disk reads"; [($plain.disk.read_bytes, $vmar.disk.read_bytes, $limit | mib),
        ($plain.disk.read_bytes, $vmar.disk.read_bytes | ratio($limit))]),
      row("  page cache of overlays, maps"; [($plain.cache, $vmar.cache | .overlays_bytes + .maps_bytes | mib)]),
      "",
      "limit: the content of the blocks that the VMs read of their images, each once (from the traces of vmar serve).",
      "target: vmar at most 1.1 x limit: page cache \(if $vmar.cache.images_bytes <= 1.1 * $limit then "met" else "MISSED" end), disk reads \(if $vmar.disk.read_bytes <= 1.1 * $limit then "met" else "MISSED" end)"
'
say ""
jq -rs "$table" "$workdir/plain.json" "$workdir/vmar.json" | tee "$workdir/table.txt"
say ""
say "$((SECONDS - demo_began)) s in all ($VMAR_ACCEL). Logs, measurements (plain.json, vmar.json) and this table: $workdir"
