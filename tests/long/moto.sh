#!/usr/bin/env bash
# Snapshots of a real guest in S3 servers (moto), and what servers can do to them: README.md beside this file.
#
#   tests/long/moto.sh [--moto BIN] [--images DIR] [--image NAME] [--memory MIB] [--port N] [--workdir DIR]
#
#   --moto BIN     moto_server (default: in PATH); boto3 comes with it
#   --port N       five ports from here on, on loopback (default 50600)
#
# VMAR_BIN names the binary.
set -Eeuo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../qemu-scripts/common.sh"
# shellcheck source=qemu-scripts/migrate/vm.sh
. "$repo/qemu-scripts/migrate/vm.sh"
me=tests/long/moto.sh

usage() {
    sed -n '2,9s/^# \?//p' "$repo/$me" >&2
    exit 2
}

# What the environment says to S3 clients is not for this test.
unset "${!AWS_@}"
moto=moto_server image=web work='' port=50600
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || usage
    case $1 in
        --moto) moto=$2 ;;
        --images) vm_images=$2 ;;
        --image) image=$2 ;;
        --memory) vm_memory=$2 ;;
        --port) port=$2 ;;
        --workdir) work=$2 ;;
        *) usage ;;
    esac
    shift 2
done
[[ $vm_memory =~ ^[1-9][0-9]*$ && $port =~ ^[1-9][0-9]*$ ]] || usage
moto=$(command -v "$moto") || die "no moto_server in PATH: 'pip install moto[server]' brings it; or name it with --moto BIN"
python3 -c 'import boto3' 2>/dev/null || die "python3 has no boto3: 'pip install moto[server]' brings it, too"
[ -e "$vm_images/$image.raw" ] || die "$vm_images/$image.raw is not there: build it with images/build.sh $image, or name --images DIR"
need jq:jq python3:python3
need_qemu
need_vmar
vmar=$(realpath "$vmar")
temporary=''
[ -n "$work" ] || { work=$(mktemp -d -t vmar-moto.XXXXXX); temporary=$work; }
mkdir -p "$work"
work=$(cd "$work" && pwd)
# shellcheck source=tests/long/s3.sh
. "$repo/tests/long/s3.sh"
vm_guard
servers=()
trap 'kill "${servers[@]}" 2>/dev/null || true; vm_stop_all || true' EXIT
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR
# Used by the functions of vm.sh and common.sh.
# shellcheck disable=SC2034
machine_type=q35 smp=1 vm_record='' vm_library=$work/library dir=$work ram_bytes=$((vm_memory << 20))
declare -A qemu_of
qemu_of[-]=$(command -v qemu-system-x86_64)

# ---------------------------------------------------------------------------------------------------------------------
# Two servers, each behind a proxy that can be told to fail, and one that lets nobody in

a=$((port + 1)) b=$((port + 3)) strict=$((port + 4))

server() {
    "$moto" -H 127.0.0.1 -p "$1" >"$work/moto-$1.log" 2>&1 </dev/null &
    servers+=("$!")
}

proxy() {
    echo pass >"$work/mode-$1"
    : >"$work/requests-$1"
    python3 "$repo/tests/long/s3_proxy.py" "$1" "$2" "$work/mode-$1" "$work/requests-$1" 2>"$work/proxy-$1.log" </dev/null &
    servers+=("$!")
}

listening() {
    local left=150
    until (: <>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || fail "nothing listens on port $1 after 30 s"
        sleep 0.2
    done
}

# mode PORT WORDS: what the proxy does from now on; s3_proxy.py has the words.
mode() {
    echo "${*:2}" >"$work/mode-$1.new"
    mv "$work/mode-$1.new" "$work/mode-$1"
}

# objects SERVER BUCKET VERB...: straight from the server.
objects() {
    python3 "$repo/tests/long/s3_objects.py" "http://127.0.0.1:$1" "${@:2}"
}

# url PORT BUCKET/PREFIX [PARAMETERS]
url() {
    echo "s3://$2?endpoint=http://127.0.0.1:$1&region=us-east-1&credentials=$work/credentials${3:+&$3}"
}

# refused WORD SECONDS VERB [WORD...]: ends with an error of one line that has the word, in time. Sets $refusal.
refused() {
    local word=$1 most=$2 verb=$3 began status=0 took said
    shift 3
    began=$(now_ms)
    timeout "$((most + 60))" "$vmar" --library "$vm_library" snapshot "$verb" "${store[@]}" "$@" \
        >"$work/refused.out" 2>"$work/refused.log" || status=$?
    took=$(as_seconds $(($(now_ms) - began)))
    said=$(last "$work/refused.log")
    case $status in 1 | 2) ;; *) fail "$word: ended with $status after $took s: $said" ;; esac
    [[ $said == *"$word"* ]] || fail "there is no '$word' in: $said"
    [ "${took%.*}" -lt "$most" ] || fail "$word: it took $took s: $said"
    refusal="after $took s: $said"
}

# ---------------------------------------------------------------------------------------------------------------------

printf 'AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n' >"$work/credentials"
server "$port"
server $((port + 2))
INITIAL_NO_AUTH_ACTION_COUNT=0 server "$strict"
proxy "$a" "$port"
proxy "$b" $((port + 2))
for n in 0 1 2 3 4; do listening $((port + n)); done
for n in 0 2; do objects $((port + n)) bucket make; done
probe_accel "$vm_images/$image.vmlinuz"
step "moto, two servers; $VMAR_ACCEL, QEMU $(qemu_version -), $image, $vm_memory MiB"
library_with "$image"
guest_boot
step "the guest is up"

# What an operator may get wrong.
stores "$(url "$a" nowhere/x)"
refused 'make the bucket' 5 list
step "no such bucket, to read: $refusal"
refused 'make the bucket' 5 repair
step "no such bucket, to write: $refusal"
stores "$(url "$strict" bucket/x)"
refused 'check the credentials' 5 list
step "wrong key: $refusal"
stores "s3://bucket/x?endpoint=http://127.0.0.1:$a"
refused 'credentials' 5 list
step "no key: $refusal"
stores "$(url "$a" bucket/none)"
refused 'is no store of snapshots' 5 list
step "no store: $refusal"

# Where objects are, and in which class.
for prefix in bucket bucket/deep/er/one; do
    stores "$(url "$a" "$prefix")"
    save "at-${prefix//\//-}" || fail "save at $prefix: $(last "$work/save-at-${prefix//\//-}.log")"
    check "of $prefix"
    key=${prefix#bucket} key=${key#/}
    found=$(objects "$port" bucket keys "${key:+$key/}")
    grep -qx "${key:+$key/}snapshots/at-${prefix//\//-}.snapshot" <<<"$found" || fail "the snapshot is not where it belongs: $found"
done
step "prefixes: objects are where the URL says"

stores "$(url "$a" bucket/class "class=REDUCED_REDUNDANCY&class-once=ONEZONE_IA")"
save classes || fail "save classes: $(last "$work/save-classes.log")"
declare -A classes=()
while read -r id once; do
    class=$(objects "$port" bucket class "class/packs/$id.pack")
    [ "$class" = "$([ "$once" = true ] && echo ONEZONE_IA || echo REDUCED_REDUNDANCY)" ] || fail "pack $id (once: $once) is of class $class"
    classes[$class]=$((${classes[$class]:-0} + 1))
done < <("$vmar" snapshot show classes "${store[@]}" --json | jq -r '.packs[] | "\(.id) \(.once)"')
class=$(objects "$port" bucket class class/snapshots/classes.snapshot)
[ "$class" = REDUCED_REDUNDANCY ] && [ "${#classes[@]}" -eq 2 ] || fail "the snapshot is of class $class, packs are of ${!classes[*]}"
step "classes: ${classes[REDUCED_REDUNDANCY]} packs and the snapshot are REDUCED_REDUNDANCY, ${classes[ONEZONE_IA]} are ONEZONE_IA"

stores "$(url "$a" bucket/many)"
objects "$port" bucket fill many/packs/ 1200
save many || fail "save many: $(last "$work/save-many.log")"
: >"$work/requests-$a"
check "behind 1200 packs that nobody names"
lists=$(grep -c 'continuation-token=.* 200 ' "$work/requests-$a") || fail "the list had no second page"
back many
step "many objects: $lists more pages asked for; the guest is what it was"

# What nobody names, and a day.
stores "$(url "$a" bucket/class)"
before=$(objects "$port" bucket keys class/packs/ | wc -l)
"$vmar" snapshot delete classes "${store[@]}" >"$work/delete.log" 2>&1 || fail "delete: $(last "$work/delete.log")"
[ "$(objects "$port" bucket keys class/packs/ | wc -l)" -eq "$before" ] && [ -z "$(objects "$port" bucket keys class/snapshots/)" ] ||
    fail "delete: the snapshot has to go, and packs of today have to stay"
mode "$a" old
"$vmar" snapshot repair "${store[@]}" >"$work/prune.log" 2>&1 || fail "repair: $(last "$work/prune.log")"
mode "$a" pass
[ -z "$(objects "$port" bucket keys class/packs/)" ] || fail "repair: packs of 2001 have to go"
step "delete: $before packs stay while they are new, and are removed when they are older than a day"

# Three stores, and one of them lost in turn.
three=("$(url "$a" bucket/three)" "$(url "$b" bucket/three)" "$work/store")
stores "${three[@]}"
save three || fail "save three: $(last "$work/save-three.log")"
check "of three stores"
mode "$a" gone
back three
mode "$a" pass
step "first store gone: the guest is what it was"
mode "$b" status 500
back three
mode "$b" pass
step "second store answers 500: the guest is what it was"
mv "$work/store" "$work/store.away"
back three
mv "$work/store.away" "$work/store"
step "third store moved away: the guest is what it was"
check "of three stores"

# Objects that are not what they were.
mapfile -t packs < <("$vmar" snapshot show three "${store[@]}" --json | jq -r '.packs[] | select(.once | not) | .id')
[ "${#packs[@]}" -ge 2 ] || fail "there have to be two packs that must not be lost, and there are ${#packs[@]}"
objects "$port" bucket truncate "three/packs/${packs[0]}.pack" 100000
objects $((port + 2)) bucket copy "three/packs/${packs[0]}.pack" "three/packs/${packs[1]}.pack"
objects "$port" bucket flip "three/packs/${packs[1]}.pack" 200000
objects "$port" bucket truncate three/snapshots/three.snapshot 1000
objects $((port + 2)) bucket remove "three/packs/${packs[0]}.pack"
refused 'repair' 60 check --spool "$work" --json
faults=$(jq '.faults | length' "$work/refused.out")
[ "$faults" -eq 5 ] || fail "check: 5 faults were made, $faults are found: $(cat "$work/refused.out")"
step "harm: cut, changed, exchanged, removed: check finds $faults of 5"
back_disk three
stores "${three[0]}" "${three[1]}"
refused 'whole copy' 60 restore three --qmp "$next/proxy.qmp" --spool "$work"
guest_end "$next"
step "harm: not restored from the S3 stores alone, which lack a pack: $refusal"
stores "${three[@]}"
back three
step "harm: restored from all three; the guest is what it was"
"$vmar" snapshot repair "${store[@]}" --spool "$work" >"$work/repair.log" 2>&1 || fail "repair: $(last "$work/repair.log")"
check "after repair"
stores "${three[0]}"
back three
step "repaired: restored from one S3 store alone; the guest is what it was"

# A server that has its bad minute.
stores "$(url "$a" bucket/busy)"
for trouble in "status 503 6" "status 500 6" "cut 4"; do
    name=${trouble// /-}
    mode "$a" "$trouble"
    save "$name" || fail "save, $trouble: $(last "$work/save-$name.log")"
    [ "$(cat "$work/mode-$a")" = pass ] || fail "save: not all of '$trouble' came"
    mode "$a" "$trouble"
    back "$name"
    [ "$(cat "$work/mode-$a")" = pass ] || fail "restore: not all of '$trouble' came"
    step "$trouble: saved and restored; the guest is what it was"
done
stores "$(url "$a" bucket/late)"
: >"$work/requests-$a"
save late &
saving=$!
until grep -q '^PUT .*/packs/' "$work/requests-$a"; do
    kill -0 "$saving" 2>/dev/null || fail "save: ended before it had a middle: $(last "$work/save-late.log")"
    sleep 0.02
done
mode "$a" status 503
sleep 20
mode "$a" pass
wait "$saving" || fail "save, 503 for 20 s: $(last "$work/save-late.log")"
refusals=$(grep -c ' 503 ' "$work/requests-$a") || fail "save, 503 for 20 s: it has not asked then"
check "after 20 s of 503 in a save, $refusals times"

# And one that is not coming back.
stores "$(url "$a" bucket/busy)"
mode "$a" status 503
refused 'SlowDown' 120 list
step "503 for ever, to read: $refusal"
refused 'SlowDown' 120 save never --memory-only --qmp "$now/proxy.qmp"
step "503 for ever, to save: $refusal"
mode "$a" silent
refused 'no answer within' 120 list
step "silent for ever: $refusal"
mode "$a" gone
refused 'bucket/busy' 120 list
step "every connection cut: $refusal"
mode "$a" pass
guest_verify
stores "$(url 1 bucket/busy)"
refused 'refused' 120 list
step "nothing listens: $refusal"
stores "$(url "$a" bucket/busy)"
check "in the end"
guest_end "$now"
[ -z "$temporary" ] || rm -rf "$temporary"
say "$steps steps: all went as it should"
