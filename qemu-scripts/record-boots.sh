#!/usr/bin/env bash
# Records what each image reads of its base while it boots: one trace an image, for `vmar trace`.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<EOF
usage: qemu-scripts/record-boots.sh --images DIR --out DIR [option...] [NAME...]

Boots the images of a directory (all, or those named) one after the other through vmar, each with a fresh overlay, up to
its boot marker, and keeps the trace of base reads as NAME.trace in --out. A trace that is there stays. Ends with a table.

  --images DIR   where NAME.raw and its kernel are (default \$VMAR_IMAGES_DIR, else build/images)
  --out DIR      where the traces go
  --library DIR  vmar's library (default \$VMAR_LIBRARY, else lib in --out); images that it has not are added, in the order
                 of the names. If it is not there it is made, with maps that redirect nothing: only then is a trace in
                 the image's own addresses, and \`vmar trace replay\` can try other policies (\`vmar library remap\`) on it
  --boot HOW     kernel: QEMU loads the kernel (default); disk: through the boot loader
  --app          images that have an application load it, and their trace goes on until they have. NAME.app.json says where
                 in the trace's time the boot ended (boot_us) and the load did (app_us), as seen on the serial port
  --memory MIB   the guest's memory (default $vm_memory)
  --timeout S    for each boot (default 600)
  --workdir DIR  overlays and logs (default: a new directory below /tmp); overlays are removed after each boot
EOF
}

out='' timeout=600 dir='' app='' names=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --app) app=1; shift; continue ;;
        --*) [ $# -ge 2 ] || { usage >&2; exit 2; } ;;
        *) names+=("$1"); shift; continue ;;
    esac
    case $1 in
        --images) vm_images=$2 ;;
        --out) out=$2 ;;
        --library) vm_library=$2 ;;
        --boot) vm_boot=$2 ;;
        --memory) vm_memory=$2 ;;
        --timeout) timeout=$2 ;;
        --workdir) dir=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
[ -n "$out" ] || { usage >&2; exit 2; }
if [ ${#names[@]} -eq 0 ]; then
    for raw in "$vm_images"/*.raw; do
        [ ! -e "$raw" ] || names+=("$(basename "$raw" .raw)")
    done
fi
[ ${#names[@]} -gt 0 ] || die "$vm_images has no images: build some with images/build.sh or images/corpus.sh"
for name in "${names[@]}"; do
    [ -e "$vm_images/$name.raw" ] || die "$vm_images/$name.raw is not there: build it with images/build.sh"
done

need_qemu
need jq:jq
need_vmar
probe_accel "$vm_images/${names[0]}.vmlinuz"
mkdir -p "$out"
out=$(cd "$out" && pwd)
vm_images=$(cd "$vm_images" && pwd)
vm_library=${vm_library:-$out/lib}
dir=${dir:-$(mktemp -d -t vmar-record.XXXXXX)}
vm_guard

if [ ! -d "$vm_library" ]; then
    mkdir -p "$(dirname "$vm_library")"
    # Runs that never are long enough stay in the image.
    "$vmar" library init "$vm_library" --policy bridge --min-run 4294967295 ||
        die "could not make the library $vm_library"
fi
known=$("$vmar" image list --json --library "$vm_library" | jq -r '.[].name') ||
    die "could not read the library $vm_library"
sources=()
for name in "${names[@]}"; do
    grep -qxF -- "$name" <<<"$known" || sources+=("$name=$vm_images/$name.raw")
done
if [ ${#sources[@]} -gt 0 ]; then
    say "adding ${#sources[@]} images to $vm_library"
    "$vmar" image add "${sources[@]}" --library "$vm_library" || die "could not add the images to $vm_library"
fi

say "recording ${#names[@]} boots ($VMAR_ACCEL, from $vm_boot), logs in $dir"
traces=()
for name in "${names[@]}"; do
    traces+=("$out/$name.trace")
    if [ -e "$out/$name.trace" ]; then
        say "$name: there already ($out/$name.trace)"
        continue
    fi
    work=$dir/$name
    vm_folder "$work"
    vm_overlay vmar "$name" "$work/overlay.qcow2"
    vm_app=
    [ -z "$app" ] || ! has_app "$name" || vm_app=1
    vm_start vmar "$name" "$work" "$work/overlay.qcow2"
    vm_wait_up "$work" "$timeout"
    loaded=''
    if [ -n "$vm_app" ]; then
        vm_wait_app "$work" "$timeout"
        loaded=", application loaded in $(as_seconds "$vm_app_ms") s (guest: $vm_app_s s)"
    fi
    # Only a server that ends by itself closes its trace with a trailer.
    vm_stop_all || die "$name: the VM or its vmar did not end well (logs: $work)"
    rm -f "$work/overlay.qcow2"
    rm -f "$out/$name.app.json"
    if [ -n "$vm_app" ]; then
        # Written first: where the trace is, what belongs to it is.
        "$vmar" trace show "$work/trace" --json | jq --arg name "$name" --argjson up "$(($(<"$work/began") + vm_boot_ms))" \
            --argjson app "$vm_app_ms" --argjson boot_s "$vm_guest_s" --argjson app_s "$vm_app_s" '
            ($up * 1000 - (.start_ns / 1000 | floor)) as $boot_us
            | {$name, $boot_us, app_us: ($boot_us + $app * 1000), guest_seconds: $boot_s, app_guest_seconds: $app_s}' \
            >"$out/$name.app.json" || die "could not read the trace $work/trace"
    fi
    mv "$work/trace" "$out/$name.trace"
    say "$name: up after $(as_seconds "$vm_boot_ms") s (by the guest's clock $vm_guest_s s)$loaded"
done
"$vmar" trace stat "${traces[@]}"
