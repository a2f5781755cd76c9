#!/usr/bin/env bash
# Moves a running VM back and forth between two hosts that have a slow link between them, in many ways, and measures each move.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=qemu-scripts/migrate/vm.sh
. "$repo/qemu-scripts/migrate/vm.sh"

all_modes=default,xbzrle,multifd-zstd,vmar,vmar+base,vmar+template,vmar+base+template,return,vmar+all

usage() {
    cat <<EOF
usage: qemu-scripts/migrate.sh [option...]

Two network namespaces are two hosts, with a link between them that both throttle (tc tbf). A guest is booted once, from a Debian
image, and then moved from QEMU to QEMU and back, in each mode in turns; its disk stands still (an overlay that both hosts reach,
each through a vmar serve of its own). After each move the guest says whether its files, a running counter and its kernel are as
they should be. Ends with a table. Modes:

  default             QEMU to QEMU over TCP, as it is
  xbzrle              the same, with QEMU's delta compression of pages that it sends again
  multifd-zstd        the same, with QEMU's compression: multifd, 2 channels, zstd at level 1
  vmar                through vmar migrate send and receive, which know nothing beforehand: repeated pages, and zstd
  vmar+base           with a library on both hosts, and the guest's base image in it
  vmar+template       with a template on both hosts: pages that other VMs, of other images, had in common
  vmar+base+template  with both
  return              two moves: there, with a store on both sides, and, after a stay, back to the memory that was kept
  vmar+all            the same, with base and template

  --images DIR          where the images are (default \$VMAR_IMAGES_DIR, else build/images)
  --image NAME          the guest's (default web)
  --memory MIB          the guest's memory (default $vm_memory)
  --smp N               its processors (default 1)
  --load LOAD           what runs in it all the time (default idle): idle; stress: a process that writes over 64 MiB, --dirty
                        MiB a second; video: frames in a ring of 64 MiB, 8 MiB a second; web: nginx and a client, 20 requests a
                        second; db: PostgreSQL and pgbench, 10 transactions a second. migrate/guest.sh has them
  --dirty MIB           for --load stress (default 8)
  --files MIB           so much of the image's files is read, and so cached, first; they are what is verified (default 32)
  --modes A,B...        (default $all_modes)
  --repeat N            rounds through the modes (default 3)
  --stay S              seconds between moves (default 5)
  --rate RATE           of the link, as tc writes it (default 200mbit); none: as fast as the machine can
  --limit S             a move that has not ended by then is cancelled (default 120)
  --exact               compare what the source's QEMU wrote with what the destination's read, in the modes with proxies (costs time)
  --library DIR         of the sender and the receiver (default: one in --workdir, of the guest's image and those of the template)
  --far-library DIR     of the second host (default: the same)
  --template-from A,B.. images of the VMs that a template is made of (default: the first 4 of cache, monitor, db, python, web that
                        are there and not the guest's)
  --share K             a page is in the template if K of them have it (default 2)
  --qemu BIN            this qemu-system-x86_64, with a qemu-img beside it
  --qemu-to BIN         another one on the second host. The guest then never comes back: it is booted anew for each move, with the
                        machine type of the first QEMU, and modes with a way back are left out
  --workdir DIR         library, template (used again the next time, if they are of the same images), logs (default: a new one below
                        /tmp, removed at the end if all went well)
  --out DIR             write points.jsonl (a line a move) and table.md there
  --json                print what was measured as JSON at the end, instead of the table; progress goes to standard error

Exit status 0: all moves were measured, and all were verified. Bytes are those of the link's devices, both ways, without the headers
of single packets (the devices count segments). Needs root, for network namespaces. The namespaces, QEMUs and proxies are in a PID
namespace and vanish with the script, whatever ends it.
EOF
}

image=web smp=1 load=idle dirty=8 files=32 modes=$all_modes repeat=3 stay=5 rate=200mbit limit=120 exact='' far_library=''
template_from='' share=2 qemu='' qemu_to='' dir='' out='' json=''
arguments=("$@")
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --exact) exact=1; shift; continue ;;
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
        --modes) modes=$2 ;;
        --repeat) repeat=$2 ;;
        --stay) stay=$2 ;;
        --rate) rate=$2 ;;
        --limit) limit=$2 ;;
        --library) vm_library=$2 ;;
        --far-library) far_library=$2 ;;
        --template-from) template_from=$2 ;;
        --share) share=$2 ;;
        --qemu) qemu=$2 ;;
        --qemu-to) qemu_to=$2 ;;
        --workdir) dir=$2 ;;
        --out) out=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
[[ $vm_memory =~ ^[1-9][0-9]*$ && $smp =~ ^[1-9][0-9]*$ && $dirty =~ ^[1-9][0-9]*$ && $files =~ ^[0-9]+$ && $repeat =~ ^[1-9][0-9]*$ &&
    $stay =~ ^[0-9]+$ && $limit =~ ^[1-9][0-9]*$ && $share =~ ^[1-9][0-9]*$ ]] || { usage >&2; exit 2; }
case $load in idle | stress | video | web | db) ;; *) usage >&2; exit 2 ;; esac
for mode in ${modes//,/ }; do
    case ,$all_modes, in *",$mode,"*) ;; *) die "--modes $mode: there are $all_modes" ;; esac
done
[ -e "$vm_images/$image.raw" ] || die "$vm_images/$image.raw is not there: build it with images/build.sh $image"
[ "$(id -u)" -eq 0 ] || die "must run as root: it makes network namespaces"
here=$repo/qemu-scripts/migrate

# ---------------------------------------------------------------------------------------------------------------------
# Outside: tools, and the sandbox. Its first process is this script, too; with it goes all that it has started.

outside() {
    local status=0
    need jq:jq python3:python3 ip:iproute2 tc:iproute2 nsenter:util-linux flock:util-linux setpriv:util-linux
    [ -z "$exact" ] || need socat:socat
    [ -n "$qemu" ] || need_qemu
    need_vmar
    [ -n "$dir" ] || { temporary=$(mktemp -d -t vmar-migrate.XXXXXX); arguments+=(--workdir "$temporary"); }
    # Standard output is for what was measured.
    exec 3>&1
    [ -z "$json" ] || exec 1>&2
    trap end_inner EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    VMAR_MIGRATE_INSIDE=1 VMAR_BIN=$(realpath "$vmar") setpriv --pdeathsig KILL \
        unshare --mount --pid --fork --kill-child --mount-proc bash "$repo/qemu-scripts/migrate.sh" "${arguments[@]}" </dev/null &
    child=$!
    wait "$child" || status=$?
    child=''
    [ "$status" -le 128 ] || say "ended by signal $((status - 128))" >&2
    exit "$status"
}

# What runs inside is asked first; then killed, which kills everything. Logs of what went wrong stay.
end_inner() {
    local status=$? inner
    case $status in 0 | 130 | 143) [ -z "$temporary" ] || trap 'rm -rf "$temporary"' RETURN ;; esac
    [ -n "$child" ] || return 0
    inner=$(cat "/proc/$child/task/$child/children" 2>/dev/null || true)
    # shellcheck disable=SC2086 # a word, or none
    [ -z "$inner" ] || kill -TERM $inner 2>/dev/null || true
    wait_gone "$child" 300 || kill -KILL "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
}

child='' temporary=''
[ -n "${VMAR_MIGRATE_INSIDE:-}" ] || outside

# ---------------------------------------------------------------------------------------------------------------------
# Inside: two hosts, a and b

declare -A qemu_of=() address=([a]=192.0.2.1 [b]=192.0.2.2) other=([a]=b [b]=a) library_of=()

make_hosts() {
    local host
    mkdir -p /run/netns
    mount -t tmpfs vmar-migrate /run/netns
    ip netns add a
    ip netns add b
    ip link add link0 netns a type veth peer name link0 netns b
    for host in a b; do
        ip -n "$host" address add "${address[$host]}/30" dev link0
        ip -n "$host" link set lo up
        ip -n "$host" link set link0 up
    done
}

# set_rate RATE: in both directions. The bucket holds what passes in 10 ms, and no less than a segment of 64 KiB; the queue 50 ms.
set_rate() {
    local host bytes burst=262144
    for host in a b; do
        tc -n "$host" qdisc del dev link0 root 2>/dev/null || true
        [ "$1" != none ] || continue
        tc -n "$host" qdisc add dev link0 root tbf rate "$1" burst "$burst" latency 50ms || die "--rate $1: tc does not take it"
        bytes=$(tc -n "$host" -j qdisc show dev link0 | jq '.[0].options.rate // 0')
        [ "$bytes" -le $((burst * 100)) ] || tc -n "$host" qdisc change dev link0 root tbf rate "$1" burst $((bytes / 100)) latency 50ms
    done
}

# What host a's end of the link has sent and got so far, in bytes.
link_bytes() {
    ip -n a -s -j link show dev link0 | jq -r '.[0].stats64 | "\(.tx.bytes) \(.rx.bytes)"'
}

# ---------------------------------------------------------------------------------------------------------------------
# Moves

# What is where: the guest's host, its folder, how many QEMUs there were.
at='' now='' count=0

# Options of the two proxies in this mode, in sends and receives. What a mode may not use is not there, or forbidden.
proxy_options() {
    local mode=$1
    sends=() receives=()
    case $mode in
        *+base* | vmar+all) sends=(--library "${library_of[$at]}" --image "$name") receives=(--library "${library_of[$to]}") ;;
    esac
    case $mode in
        leave) sends+=(--store "$dir/template/store" --domain "$domain") ;;
        *+template | return | vmar+all)
            sends+=(--store "$dir/store-$at" --domain "$domain")
            receives+=(--store "$dir/store-$to")
            ;;
    esac
    case $mode in
        *+template) sends+=(--no-kept) receives+=(--no-kept) ;;
    esac
}

# new_stores MODE: nothing is in the stores of the two hosts but what this mode is about.
new_stores() {
    local host
    rm -rf "$dir"/store-[ab]
    for host in a b; do
        mkdir "$dir/store-$host"
        case $1 in
            *+template | vmar+all)
                "$vmar" template import --store "$dir/store-$host" --domain "$domain" "$dir"/template/file/* >"$dir/template.log" 2>&1 ||
                    die "could not import the template: $(tail -n 1 "$dir/template.log")"
                ;;
        esac
    done
}

# move MODE: of the guest $name to the other host. Sets $result, which has how it went, and $at and $now if it did.
move() {
    local mode=$1 to=${other[$at]} next spec capabilities='["return-path"]' parameters incoming='' migrate='' send=null receive=null
    local taps='[]' what=incoming before after tap exactly=null sends receives
    count=$((count + 1))
    next=$dir/vm-$count
    rm -rf "$next"
    parameters='{"max-bandwidth": 4000000000, "downtime-limit": 300}'
    incoming=tcp:${address[$to]}:7000
    migrate=$incoming
    case $mode in
        default) ;;
        xbzrle) capabilities='["return-path", "xbzrle"]' ;;
        multifd-zstd)
            capabilities='["return-path", "multifd"]'
            parameters=$(jq -c '. + {"multifd-channels": 2, "multifd-compression": "zstd", "multifd-zstd-level": 1}' <<<"$parameters")
            ;;
        *)
            what=incoming-stopped incoming=unix:$next/in.sock migrate=unix:$next/out.sock
            proxy_options "$mode"
            tap=$next/
            if [ -n "$exact" ]; then
                # Between QEMU and each proxy: -r keeps what goes to the other side.
                tap=$next/tap-
                taps=$(jq -cn --arg d "$next" '[
                    ["socat", "-r", "\($d)/sent", "UNIX-LISTEN:\($d)/out.sock", "UNIX-CONNECT:\($d)/tap-out.sock,retry=50,interval=0.1"],
                    ["socat", "-r", "\($d)/got", "UNIX-LISTEN:\($d)/tap-in.sock", "UNIX-CONNECT:\($d)/in.sock"]]')
            fi
            send=$(words nsenter --net="/run/netns/$at" env RUST_LOG="${RUST_LOG:-info}" "$vmar" migrate send --vm "$name" --source "${tap}out.sock" \
                --link "${address[$to]}:7000" --records "$next/records" --json "${sends[@]}")
            receive=$(words nsenter --net="/run/netns/$to" env RUST_LOG="${RUST_LOG:-info}" "$vmar" migrate receive --listen "${address[$to]}:7000" \
                --destination "${tap}in.sock" --qmp "$next/proxy.qmp" --records "$next/records" "${receives[@]}")
            ;;
    esac
    qemu_start "$to" "$name" "$next" "$overlay" "$what"
    spec=$(jq -cn --arg source "$now/script.qmp" --arg destination "$next/script.qmp" --argjson capabilities "$capabilities" \
        --argjson parameters "$parameters" --arg incoming "$incoming" --arg migrate "$migrate" --argjson taps "$taps" \
        --argjson receive "$receive" --argjson send "$send" --arg logs "$next" --argjson limit "$limit" '$ARGS.named')
    before=$(link_bytes)
    result=$(python3 "$here/move.py" "$spec" 2>"$next/move.log") || die "move.py: $(tail -n 1 "$next/move.log")"
    after=$(link_bytes)
    if [ "$taps" != '[]' ]; then
        exactly=false
        ! cmp -s "$next/sent" "$next/got" || exactly=true
        rm -f "$next/sent" "$next/got"
    fi
    # shellcheck disable=SC2086 # pairs of numbers
    set -- $before $after
    result=$(jq -c --arg from "$at" --arg to "$to" --argjson there $(($3 - $1)) --argjson back $(($4 - $2)) --argjson exact "$exactly" '
        {$from, $to, link: (if $from == "a" then {$there, back: $back} else {there: $back, back: $there} end), $exact} + .' <<<"$result")
    if [ "$(jq -r .state <<<"$result")" = completed ]; then
        settle "$now" "$next"
        now=$next at=$to
    else
        settle "$next" "$now"
    fi
}

# words WORD...: as a JSON list.
words() {
    jq -cn '$ARGS.positional' --args -- "$@"
}

# settle OLD NEW: the old QEMU and its server end; the new VM must run.
settle() {
    local old=$1 new=$2 d keep=() said
    vm_stop "$old" || true
    for d in "${vm_dirs[@]}"; do
        [ "$d" = "$old" ] || keep+=("$d")
    done
    vm_dirs=("${keep[@]}")
    kill -0 "$(cat "$new/qemu.pid")" 2>/dev/null || die "QEMU ended: $(tail -n 1 "$new/qemu.log") (logs: $new)"
    # What a server says is worth a look: nothing here is out of the ordinary.
    said=$(grep -E 'ERROR|WARN|panicked' "$old/vmar.log" || true)
    [ -z "$said" ] || say "note: the server of $old says: ${said%%$'\n'*}"
}

# boot NAME: on host a, with a fresh overlay.
boot() {
    name=$1
    count=$((count + 1))
    at=a now=$dir/vm-$count overlay=$dir/overlay-$count.qcow2
    rm -rf "$now"
    vm_overlay vmar "$name" "$overlay"
    qemu_start a "$name" "$now" "$overlay" boot
    vm_wait_up "$now" 600
    say "$name: up after $(as_seconds "$vm_boot_ms") s"
}

# end_guest: the guest and its disk are of no more use.
end_guest() {
    vm_stop_all || true
    rm -f "$overlay"
}

prepare_guest() {
    boot "$image"
    local wrong
    wrong=$(in_guest 600 setup "$files" "$load" "$dirty" 2>&1) || die "the guest cannot be set up: $wrong (logs: $now)"
    sleep "$stay"
}

# measure ROUND MODE [LEG]: one move as a line of points.jsonl. Sets $arrived if the guest is there and well. One that has come to
# harm has a successor.
measure() {
    local round=$1 mode=$2 leg=${3:-} said verified=true state
    arrived=''
    move "$mode"
    state=$(jq -r .state <<<"$result")
    said=$(in_guest 300 verify 2>&1) || verified=false
    result=$(jq -c --argjson round "$round" --arg mode "$mode" --arg leg "$leg" --arg said "$said" --argjson verified "$verified" '
        {$round, $mode, leg: (if $leg == "" then null else $leg end)} + . + {
            verified: ($verified and (.state != "completed" or .exact != false)),
            wrong: (if $verified then null else $said end), note: (if $verified and $said != "" then $said else null end)}' <<<"$result")
    printf '%s\n' "$result" >>"$points"
    say "$(jq -r -f "$here/line.jq" <<<"$result")"
    [ "$state" = completed ] && [ "$(jq -r .verified <<<"$result")" = true ] && arrived=1 || bad=$((bad + 1))
    if [ "$verified" != true ]; then
        say "the guest has come to harm; another one is booted (logs: $now)"
        harmed+=("$now")
        end_guest
        prepare_guest
    else
        sleep "$stay"
    fi
}

# ---------------------------------------------------------------------------------------------------------------------
# What moves need

choose_qemu() {
    local bin
    for bin in "$qemu" "$qemu_to"; do
        [ -z "$bin" ] || { [ -x "$bin" ] && [ -x "$(dirname "$bin")/qemu-img" ]; } ||
            die "$bin: name a qemu-system-x86_64 with a qemu-img beside it"
    done
    [ -z "$qemu" ] || PATH=$(realpath "$(dirname "$qemu")"):$PATH
    qemu_of[a]=$(command -v qemu-system-x86_64)
    qemu_of[b]=${qemu_to:-${qemu_of[a]}}
    machine_type=q35
    # The other one has this type, too; its own q35 is another machine.
    [ -z "$qemu_to" ] || machine_type=pc-q35-$(qemu_version a | cut -d. -f1,2)
}

# The modes that this vmar and these QEMUs have.
choose_modes() {
    local mode left=() without=''
    if [[ $("$vmar" migrate send --help) != *--store* ]]; then
        without=1
        say "note: this vmar has no stores and templates; modes that need them are left out"
    fi
    [ -z "$qemu_to" ] || [ "${modes/return/}${modes/vmar+all/}" = "$modes$modes" ] ||
        say "note: from QEMU $(qemu_version b) there is no way back to $(qemu_version a); return and vmar+all are left out"
    for mode in ${modes//,/ }; do
        case $mode in
            *+template) [ -n "$without" ] || left+=("$mode") ;;
            return | vmar+all) [ -n "$without" ] || [ -n "$qemu_to" ] || left+=("$mode") ;;
            *) left+=("$mode") ;;
        esac
    done
    modes=${left[*]}
    [ -n "$modes" ] || die "no mode is left"
}

# What a template is of: images of other VMs.
choose_template() {
    local name
    templates=()
    if [ -n "$template_from" ]; then
        IFS=, read -ra templates <<<"$template_from"
    else
        for name in cache monitor db python web; do
            [ "$name" = "$image" ] || [ ! -e "$vm_images/$name.raw" ] || [ ${#templates[@]} -eq 4 ] || templates+=("$name")
        done
    fi
    for name in "${templates[@]}"; do
        [ -e "$vm_images/$name.raw" ] || die "$vm_images/$name.raw is not there: build it with images/build.sh $name"
        [ "$name" != "$image" ] || die "--template-from: the guest's own image $image would flatter"
    done
    [ ${#templates[@]} -ge "$share" ] || die "a template of pages that $share VMs have needs so many images: name them with --template-from"
}

# make_template: other VMs boot on host a and leave it with a store there, which keeps their memory; a template is made of what they
# have in common. Both hosts import it before each move that may use it.
make_template() {
    local wanted name
    wanted=$(jq -cn --argjson share "$share" --argjson memory "$vm_memory" --arg qemu "$(qemu_version a)" \
        --arg domain "$domain" '{images: $ARGS.positional, $share, memory_mib: $memory, $domain, $qemu}' --args -- "${templates[@]}")
    if [ -s "$dir/template/made.json" ] && jq -e --argjson wanted "$wanted" 'del(.pages) == $wanted' "$dir/template/made.json" >/dev/null; then
        say "the template of ${templates[*]} is there already"
        return 0
    fi
    rm -rf "$dir/template"
    mkdir -p "$dir/template/store"
    library_with "${templates[@]}"
    set_rate none
    for name in "${templates[@]}"; do
        boot "$name"
        sleep 5
        move leave
        [ "$(jq -r .state <<<"$result")" = completed ] || die "$name cannot leave for the template: $(jq -r .error <<<"$result") (logs: $dir/vm-$count)"
        end_guest
    done
    "$vmar" template build --store "$dir/template/store" --domain "$domain" --share "$share" --json >"$dir/template/built.json" 2>"$dir/template.log" ||
        die "no template: $(tail -n 1 "$dir/template.log")"
    mkdir "$dir/template/file"
    cp "$(jq -r .path "$dir/template/built.json")" "$dir/template/file/"
    rm -rf "$dir/template/store"
    jq -c --argjson wanted "$wanted" '$wanted + {pages}' "$dir/template/built.json" >"$dir/template/made.json"
    say "template of ${templates[*]}: $(jq .pages "$dir/template/made.json") pages"
}

choose_qemu
need_vmar
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
exec 8>"$dir/.lock"
flock -n 8 || die "$dir: another run measures there; wait for its end, or name another --workdir"
vm_images=$(cd "$vm_images" && pwd)
choose_modes
# What an earlier run has left.
rm -rf "$dir"/vm-[0-9]* "$dir"/overlay-[0-9]*.qcow2 "$dir"/store-[ab]
[ -z "$out" ] || { mkdir -p "$out"; out=$(cd "$out" && pwd); }
points=${out:-$dir}/points.jsonl bad=0 harmed=() templates=() template=null
: >"$points"
vm_library=${vm_library:-$dir/library}
# shellcheck disable=SC2034 # for vm_serve
vm_record=''
probe_accel "$vm_images/$image.vmlinuz"
choose_memory a
vm_guard
# Nothing ends this without a word.
set -o errtrace
trap 'say "line $LINENO: failed: $BASH_COMMAND" >&2' ERR
trap 'say "ended by a signal" >&2; exit 143' TERM HUP
make_hosts
library_with "$image"
# Who may share pages with the guest.
domain=$("$vmar" image list --json --library "$vm_library" | jq -r --arg name "$image" '.[] | select(.name == $name).domain')
case " $modes " in
    *+template* | *vmar+all*)
        choose_template
        make_template
        template=$(cat "$dir/template/made.json")
        ;;
esac
library_with "$image" "${templates[@]}"
library_of[a]=$vm_library
library_of[b]=${far_library:-$vm_library}
set_rate "$rate"
setup=$(jq -cn --arg image "$image" --argjson memory_mib "$vm_memory" --argjson smp "$smp" --arg load "$load" --argjson dirty_mib "$dirty" \
    --argjson files_mib "$files" --arg rate "$rate" --arg accel "$VMAR_ACCEL" --argjson processors "$(nproc)" --arg a "$(qemu_version a)" \
    --arg b "$(qemu_version b)" --argjson template "$template" --argjson library "$("$vmar" image list --json --library "$vm_library" | jq -c 'map(.name)')" \
    '$ARGS.named + {qemu: [$a, $b]} | del(.a, .b)')
say "$(nproc) processors, $VMAR_ACCEL, QEMU $(qemu_version a)${qemu_to:+ to $(qemu_version b)}, link $rate, load $load, logs in $dir"
prepare_guest
for ((round = 1; round <= repeat; round++)); do
    for mode in $modes; do
        if [ -n "$qemu_to" ] && [ "$at" = b ]; then
            end_guest
            prepare_guest
        fi
        case $mode in
            *+template) new_stores "$mode"; measure "$round" "$mode" ;;
            return | vmar+all)
                new_stores "$mode"
                measure "$round" "$mode" there
                [ -z "$arrived" ] || measure "$round" "$mode" back
                ;;
            *) measure "$round" "$mode" ;;
        esac
    done
done
end_guest
rm -rf "$dir"/store-[ab]

table=$(jq -s -r --argjson setup "$setup" -f "$here/table.jq" "$points")
if [ -n "$out" ]; then
    printf '%s\n' "$setup" >"$out/run.json"
    printf '%s\n' "$table" >"$out/table.md"
fi
if [ -n "$json" ]; then
    jq -s --argjson setup "$setup" '{$setup, moves: .}' "$points" >&3
else
    printf '\n%s\n' "$table"
fi
[ "$bad" -eq 0 ] || die "$bad moves did not come to their end, or did harm${harmed[*]:+ (logs: ${harmed[*]})}"
