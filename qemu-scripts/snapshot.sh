#!/usr/bin/env bash
# Keeps a running VM in several stores, loses some of what they have, brings it back, and looks whether the guest came to harm.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=qemu-scripts/migrate/vm.sh
. "$repo/qemu-scripts/migrate/vm.sh"

all_checks=all,each,once,free,many,class,plain

usage() {
    cat <<EOF
usage: qemu-scripts/snapshot.sh [option...]

A guest is booted from a Debian image, gets some load, and is saved twice to several stores, which are directories; the second time
some seconds later. Then it is brought back, each time into a new QEMU with a new overlay, and audited: files that are in its page cache, in
memory and on its disk, a counter that runs, its kernel's messages, and, with a database, that one's own checks. Checks:

  all     from all stores
  each    with each store lost in turn
  once    with all packs lost that are in one store: free pages come back as zeros
  free    with all free pages lost, those as well that the base image has
  many    four VMs at once from the one snapshot, each verified
  class   the negative control: with the clean page cache lost as well, as the paper does. This one has to come to harm
  plain   beside it: QEMU's migration to a file through zstd -1, and a copy of the overlay; saved and loaded, not audited

  --images DIR       where the images are (default \$VMAR_IMAGES_DIR, else build/images)
  --image NAME       the guest's (default web)
  --memory MIB       the guest's memory (default $vm_memory)
  --smp N            its processors (default 1)
  --load LOAD        idle, stress, video, web, db or build (default idle): migrate/guest.sh has them
  --dirty MIB        for --load stress (default 8)
  --files MIB        so much of the image's files is read, and so cached, first; they are what is verified (default 32)
  --fill             all other files of the image are read, too: the fullest page cache
  --stores N         how many (default 3)
  --checks A,B...    (default $all_checks)
  --stay S           seconds between the two saves (default 10)
  --library DIR      (default: one in --workdir)
  --qemu BIN         this qemu-system-x86_64, with a qemu-img beside it
  --workdir DIR      library, stores, logs (default: a new one below /tmp, removed at the end if all went well)
  --out FILE         append what was measured as a line of JSON
  --json             print that line instead of the table

Exit status 0: all audits were as they have to be.
EOF
}

image=web smp=1 load=idle dirty=8 files=32 fill='' stores=3 checks=$all_checks stay=10 qemu='' dir='' out='' json=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --fill) fill=1; shift; continue ;;
        --json) json=1; shift; continue ;;
        --*) [ $# -ge 2 ] || { usage >&2; exit 2; } ;;
        *) usage >&2; exit 2 ;;
    esac
    case $1 in
        --images) vm_images=$2 ;;
        --image) image=$2 ;;
        --memory) vm_memory=$2 ;;
        --smp) smp=$2 ;;
        --load) load=$2 ;;
        --dirty) dirty=$2 ;;
        --files) files=$2 ;;
        --stores) stores=$2 ;;
        --checks) checks=$2 ;;
        --stay) stay=$2 ;;
        --library) vm_library=$2 ;;
        --qemu) qemu=$2 ;;
        --workdir) dir=$2 ;;
        --out) out=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
[[ $vm_memory =~ ^[1-9][0-9]*$ && $smp =~ ^[1-9][0-9]*$ && $dirty =~ ^[1-9][0-9]*$ && $files =~ ^[0-9]+$ && $stores =~ ^[1-9]$ &&
    $stay =~ ^[0-9]+$ ]] || { usage >&2; exit 2; }
case $load in idle | stress | video | web | db | build) ;; *) usage >&2; exit 2 ;; esac
for check in ${checks//,/ }; do
    case ,$all_checks, in *",$check,"*) ;; *) die "--checks $check: there are $all_checks" ;; esac
done
[ -e "$vm_images/$image.raw" ] || die "$vm_images/$image.raw is not there: build it with images/build.sh $image"
exec 3>&1
[ -z "$json" ] || exec 1>&2
need jq:jq python3:python3 zstd:zstd flock:util-linux
[ -n "$qemu" ] || need_qemu
need_vmar
temporary=''
[ -n "$dir" ] || { dir=$(mktemp -d -t vmar-snapshot.XXXXXX); temporary=$dir; }
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
exec 8>"$dir/.lock"
flock -n 8 || die "$dir: another run is at work there; wait for its end, or name another --workdir"
vm_images=$(cd "$vm_images" && pwd)
[ -z "$qemu" ] || PATH=$(realpath "$(dirname "$qemu")"):$PATH
declare -A qemu_of
qemu_of[-]=$(command -v qemu-system-x86_64)
# Used by the functions of vm.sh and common.sh.
# shellcheck disable=SC2034
machine_type=q35 vm_record='' vm_library=${vm_library:-$dir/library}
probe_accel "$vm_images/$image.vmlinuz"
choose_memory -
vm_guard
lose=${CARGO_TARGET_DIR:-$repo/target}/release/examples/lose_class
case ,$checks, in
    *,class,* | *,free,*) [ -x "$lose" ] || (cd "$repo" && cargo build --release --locked --quiet --example lose_class) || die "could not build $lose" ;;
esac
rm -rf "$dir"/vm-* "$dir"/store-* "$dir"/plain*
library_with "$image"

# ---------------------------------------------------------------------------------------------------------------------

# urls [WITHOUT]: the options that name the stores, but for one.
urls() {
    local n
    for n in $(seq "$stores"); do
        [ "$n" = "${1:-}" ] || printf '%s\n' --store "$dir/store-$n"
    done
}

# snapshot VERB WORD...: with all stores.
snapshot() {
    local all
    mapfile -t all < <(urls)
    "$vmar" --library "$vm_library" snapshot "$@" "${all[@]}" 2>>"$dir/vmar.log"
}

# end_vm: the one that runs.
end_vm() {
    vm_stop_all || true
    vm_dirs=()
}

# back NAME WORD...: the snapshot NAME in a new QEMU; words name the stores. Sets $now and $restored.
count=0
back() {
    local name=$1 began
    shift
    count=$((count + 1))
    now=$dir/vm-$count
    mkdir -p "$now"
    "$vmar" --library "$vm_library" snapshot restore "$name" --overlay "$now/overlay.qcow2" --state-dir "$now/state" "$@" --json \
        >"$now/disk.json" 2>>"$dir/vmar.log" || die "no disk: $(tail -n 1 "$dir/vmar.log")"
    qemu_start - "$image" "$now" "$now/overlay.qcow2" restore
    began=$(now_ms)
    "$vmar" --library "$vm_library" snapshot restore "$name" --qmp "$now/proxy.qmp" "$@" --json >"$now/memory.json" \
        2>>"$dir/vmar.log" || die "no memory: $(tail -n 1 "$dir/vmar.log")"
    restored=$(jq -cn --slurpfile d "$now/disk.json" --slurpfile m "$now/memory.json" --argjson ms $(($(now_ms) - began)) \
        '{disk_s: $d[0].seconds, memory_s: $m[0].seconds, memory_ms: $ms, lost_pages: $m[0].lost_pages}')
}

audits=() bad=0
# audit WHAT EXPECTED NAME WORD...: brings it back and audits it; EXPECTED is well or harm.
audit() {
    local what=$1 expected=$2 name=$3 said state=well
    shift 3
    back "$name" "$@"
    said=$(in_guest 600 audit 2>&1) || state=harm
    audits+=("$(jq -cn --arg what "$what" --arg expected "$expected" --arg state "$state" --arg said "$said" --argjson r "$restored" \
        '{$what, $expected, $state, said: ($said | .[0:200])} + $r')")
    say "$what: $state${said:+ ($(tail -n 1 <<<"$said" | cut -c 1-120))}, $(jq -r '"disk \(.disk_s * 100 | round / 100) s, memory \(.memory_s * 100 | round / 100) s, \(.lost_pages) pages lost"' <<<"$restored")"
    [ "$state" = "$expected" ] || { bad=$((bad + 1)); say "$what: $expected was expected (logs: $now)"; }
    end_vm
}

# many COUNT: so many VMs from "second", at once.
many() {
    local n dirs=() pids=() began seconds state=well said=''
    for n in $(seq "$1"); do
        dirs+=("$dir/vm-many-$n")
        mkdir -p "$dir/vm-many-$n"
        "$vmar" --library "$vm_library" snapshot restore second --overlay "$dir/vm-many-$n/overlay.qcow2" \
            --state-dir "$dir/vm-many-$n/state" "${every[@]}" >/dev/null 2>>"$dir/vmar.log" || die "no disk: $(tail -n 1 "$dir/vmar.log")"
        qemu_start - "$image" "$dir/vm-many-$n" "$dir/vm-many-$n/overlay.qcow2" restore
    done
    began=$(now_ms)
    for now in "${dirs[@]}"; do
        "$vmar" --library "$vm_library" snapshot restore second --qmp "$now/proxy.qmp" "${every[@]}" --json >"$now/memory.json" \
            2>>"$now/restore.log" &
        pids+=("$!")
    done
    for n in "${pids[@]}"; do
        wait "$n" || die "no memory: $(tail -qn 1 "$dir"/vm-many-*/restore.log)"
    done
    seconds=$(as_seconds $(($(now_ms) - began)))
    for now in "${dirs[@]}"; do
        said=$(in_guest 600 verify 2>&1) || { state=harm; break; }
    done
    audits+=("$(jq -cn --arg what "$1 VMs at once" --arg state "$state" --arg said "$said" --argjson s "$seconds" \
        '{$what, expected: "well", $state, $said, disk_s: null, memory_s: $s, lost_pages: 0}')")
    say "$1 VMs at once: $state, memory of all in $seconds s"
    [ "$state" = well ] || bad=$((bad + 1))
    end_vm
}

say "$(nproc) processors, $VMAR_ACCEL, QEMU $(qemu_version -), image $image, $vm_memory MiB, load $load, logs in $dir"
now=$dir/vm-0
mkdir -p "$now"
vm_overlay vmar "$image" "$now/overlay.qcow2"
qemu_start - "$image" "$now" "$now/overlay.qcow2" boot
vm_wait_up "$now" 600
say "up after $(as_seconds "$vm_boot_ms") s"
wrong=$(in_guest 900 setup "$files" "$load" "$dirty" 2>&1) || die "the guest cannot be set up: $wrong (logs: $now)"
if [ -n "$fill" ]; then
    printf 'find / -xdev -type f -size -64M -exec cat {} + >/dev/null 2>&1; sync\n' |
        python3 "$repo/qemu-scripts/migrate/console.py" "$now/shell.sock" 900 || die "the guest cannot read its files"
fi
sleep "$stay"
disk=(--overlay "$now/overlay.qcow2" --state-dir "$now/state")
# What QEMU is asked for first pays for the memory that the guest has never touched: a memfd gets it when it is read.
plain=null untouched=null
plain_save() {
    python3 "$repo/qemu-scripts/snapshot/plain.py" save "$now/script.qmp" "$dir/plain.zst" "$now/overlay.qcow2" "$dir/plain.qcow2" ||
        die "QEMU's own way fails"
}
case ,$checks, in *,plain,*) untouched=$(plain_save) ;; esac
first=$(snapshot save first --qmp "$now/proxy.qmp" "${disk[@]}" --json) || die "no snapshot: $(tail -n 1 "$dir/vmar.log")"
first_bytes=$(cat "$dir"/store-*/packs/* "$dir"/store-*/snapshots/* | wc -c)
sleep "$stay"
second=$(snapshot save second --qmp "$now/proxy.qmp" "${disk[@]}" --json) || die "no snapshot: $(tail -n 1 "$dir/vmar.log")"
second_bytes=$(($(cat "$dir"/store-*/packs/* "$dir"/store-*/snapshots/* | wc -c) - first_bytes))
case ,$checks, in *,plain,*) plain=$(plain_save) ;; esac
said=$(in_guest 600 verify 2>&1) || die "the guest came to harm while it was saved: $said (logs: $now)"
[ -z "$said" ] || say "note: $said"
end_vm
snapshot check --json >"$dir/check.json" || die "check: $(tail -n 1 "$dir/vmar.log")"
shown=$(snapshot show second --json)
mapfile -t every < <(urls)
for check in ${checks//,/ }; do
    case $check in
        all) audit "all stores" well second "${every[@]}" ;;
        each)
            for n in $(seq "$stores"); do
                mapfile -t some < <(urls "$n")
                audit "store $n lost" well second "${some[@]}"
            done
            ;;
        once)
            # What a store has that has lost them is not there: the others are copied beside it.
            for n in $(seq "$stores"); do
                cp -al "$dir/store-$n" "$dir/store-$n.whole"
            done
            jq -r '.packs[] | select(.once) | .id' <<<"$shown" | while read -r id; do rm -f "$dir"/store-?/packs/"$id.pack"; done
            audit "all that is in one store lost" well second "${every[@]}"
            for n in $(seq "$stores"); do
                rm -rf "$dir/store-$n"
                mv "$dir/store-$n.whole" "$dir/store-$n"
            done
            ;;
        free)
            said=$("$lose" second nofree "${every[@]}" --class free) || die "lose_class: $said"
            audit "free pages lost ($said)" well nofree "${every[@]}"
            ;;
        many) many 4 ;;
        class)
            said=$("$lose" second less "${every[@]}" --class cache-clean) || die "lose_class: $said"
            audit "clean page cache lost ($said)" harm less "${every[@]}"
            ;;
        plain)
            count=$((count + 1))
            now=$dir/vm-$count
            mkdir -p "$now"
            qemu_start - "$image" "$now" "$dir/plain.qcow2" restore
            plain=$(jq -c --argjson r "$(python3 "$repo/qemu-scripts/snapshot/plain.py" restore "$now/script.qmp" "$dir/plain.zst")" \
                '. + {restore: $r}' <<<"$plain")
            end_vm
            ;;
    esac
done

line=$(jq -cn --arg image "$image" --arg load "$load${fill:+ + all files}" --argjson memory_mib "$vm_memory" --arg qemu "$(qemu_version -)" \
    --arg accel "$VMAR_ACCEL" --argjson stores "$stores" --argjson first "$first" --argjson second "$second" \
    --argjson first_bytes "$first_bytes" --argjson second_bytes "$second_bytes" --argjson shown "$shown" --argjson plain "$plain" --argjson untouched "$untouched" \
    --argjson audits "[$(IFS=,; printf '%s' "${audits[*]}")]" '$ARGS.named' | jq -c -f "$repo/qemu-scripts/snapshot/line.jq")
[ -z "$out" ] || printf '%s\n' "$line" >>"$out"
if [ -n "$json" ]; then
    printf '%s\n' "$line" >&3
else
    jq -r -s -f "$repo/qemu-scripts/snapshot/table.jq" <<<"$line"
fi
[ "$bad" -eq 0 ] || die "$bad audits were not as they have to be (logs: $dir)"
[ -z "$temporary" ] || rm -rf "$temporary"
