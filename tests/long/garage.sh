#!/usr/bin/env bash
# Snapshots of a real guest in a cluster of three Garage nodes that are killed: README.md beside this file.
#
#   tests/long/garage.sh [--repeat N] [--garage BIN] [--images DIR] [--image NAME] [--memory MIB] [--fill MIB] [--rate RATE]
#                        [--workdir DIR]
#
#   --repeat N     rounds (default 1); in each, one node dies in a save, one in a restore, and the third after that
#   --fill MIB     so much is new in the guest's memory in each round (default 256; packs have 64)
#   --rate RATE    of the loopback device, as tc writes it (default 400mbit), so that a save and a restore have a middle
#
# Needs root: network and processes are in namespaces of their own, which end with the script. VMAR_BIN names the binary.
set -Eeuo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../qemu-scripts/common.sh"
# shellcheck source=qemu-scripts/migrate/vm.sh
. "$repo/qemu-scripts/migrate/vm.sh"
me=tests/long/garage.sh

usage() {
    sed -n '2,11s/^# \?//p' "$repo/$me" >&2
    exit 2
}

arguments=("$@")
repeat=1 garage=garage image=web fill=256 rate=400mbit work='' vm_memory=1024
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || usage
    case $1 in
        --repeat) repeat=$2 ;;
        --garage) garage=$2 ;;
        --images) vm_images=$2 ;;
        --image) image=$2 ;;
        --memory) vm_memory=$2 ;;
        --fill) fill=$2 ;;
        --rate) rate=$2 ;;
        --workdir) work=$2 ;;
        *) usage ;;
    esac
    shift 2
done
[[ $repeat =~ ^[1-9][0-9]*$ && $vm_memory =~ ^[1-9][0-9]*$ && $fill =~ ^[1-9][0-9]*$ ]] || usage
garage=$(command -v "$garage") || die "no garage in PATH: 'cargo install garage' builds one; then name it with --garage BIN"
[ -e "$vm_images/$image.raw" ] || die "$vm_images/$image.raw is not there: build it with images/build.sh $image, or name --images DIR"
[ "$(id -u)" -eq 0 ] || die "must run as root: it makes namespaces"

if [ -z "${VMAR_GARAGE_INSIDE:-}" ]; then
    need jq:jq python3:python3 curl:curl ip:iproute2 tc:iproute2 unshare:util-linux
    need_qemu
    need_vmar
    VMAR_GARAGE_INSIDE=1 VMAR_BIN=$(realpath "$vmar") exec unshare --net --pid --fork --kill-child --mount-proc \
        bash "$repo/$me" "${arguments[@]}"
fi
# The first process of a PID namespace has no default for signals, and takes all others with it.
trap 'exit 130' INT TERM HUP
vmar=$VMAR_BIN
ip link set lo up
tc qdisc add dev lo root tbf rate "$rate" burst 1mb latency 50ms || die "--rate $rate: tc does not take it"
temporary=''
[ -n "$work" ] || { work=$(mktemp -d -t vmar-garage.XXXXXX); temporary=$work; }
mkdir -p "$work"
work=$(cd "$work" && pwd)
# shellcheck source=tests/long/s3.sh
. "$repo/tests/long/s3.sh"
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR
# Used by the functions of vm.sh and common.sh.
# shellcheck disable=SC2034
machine_type=q35 smp=1 vm_record='' vm_library=$work/library dir=$work ram_bytes=$((vm_memory << 20))
declare -A qemu_of
qemu_of[-]=$(command -v qemu-system-x86_64)

# ---------------------------------------------------------------------------------------------------------------------
# The cluster

# port N WHAT: of a node; 0 is S3, 1 is what the nodes have among themselves. Nobody else is in this network.
port() {
    echo "39$1$2"
}

node() {
    "$garage" -c "$work/node$1/garage.toml" "${@:2}"
}

node_start() {
    RUST_LOG=garage=info NO_COLOR=1 "$garage" -c "$work/node$1/garage.toml" server >>"$work/node$1/log" 2>&1 </dev/null &
    echo $! >"$work/node$1/pid"
}

node_kill() {
    local pid
    pid=$(cat "$work/node$1/pid")
    kill -KILL "$pid"
    wait "$pid" 2>/dev/null || true
}

# healthy N: waits until node N sees all three. What they have missed comes to them later, in the background.
healthy() {
    local left=300 health=''
    until [ "$health" = healthy ]; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || fail "the cluster is not healthy after a minute: $health"
        sleep 0.2
        health=$(node "$1" json-api GetClusterHealth 2>/dev/null | jq -r .status) || health=unknown
    done
}

cluster() {
    local secret n id
    secret=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    for n in 1 2 3; do
        mkdir -p "$work/node$n"
        cat >"$work/node$n/garage.toml" <<END
metadata_dir = "$work/node$n/meta"
data_dir = "$work/node$n/data"
db_engine = "sqlite"
replication_factor = 3
rpc_bind_addr = "127.0.0.1:$(port "$n" 1)"
rpc_public_addr = "127.0.0.1:$(port "$n" 1)"
rpc_secret = "$secret"
[s3_api]
s3_region = "garage"
api_bind_addr = "127.0.0.1:$(port "$n" 0)"
END
        node_start "$n"
    done
    for n in 1 2 3; do
        until id=$(node "$n" node id -q 2>/dev/null) && node 1 node connect "$id" >/dev/null 2>&1; do sleep 0.2; done
        node 1 layout assign -z "zone$n" -c 20G "${id%@*}" >/dev/null 2>&1
    done
    node 1 layout apply --version 1 >/dev/null 2>&1
    healthy 1
    node 1 bucket create snapshots >/dev/null 2>&1
    node 1 key create vmar >"$work/key" 2>/dev/null
    node 1 bucket allow --read --write snapshots --key vmar >/dev/null 2>&1
    key=$(sed -n 's/^Key ID: *//p' "$work/key")
    secret_key=$(sed -n 's/^Secret key: *//p' "$work/key")
    printf 'AWS_ACCESS_KEY_ID=%s\nAWS_SECRET_ACCESS_KEY=%s\n' "$key" "$secret_key" >"$work/credentials"
}

# order N...: vmar asks the nodes in this order.
order() {
    local n url="s3://snapshots/long?region=garage&credentials=$work/credentials"
    for n; do url+="&endpoint=http://127.0.0.1:$(port "$n" 0)"; done
    stores "$url"
}

# objects N FOLDER: how many there are, as node N says; vmar has no part in it.
objects() {
    local answer
    # The digest of nothing: not all versions of curl send it by themselves.
    answer=$(curl --silent --show-error --fail --aws-sigv4 aws:amz:garage:s3 --user "$key:$secret_key" \
        --header 'x-amz-content-sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855' \
        "http://127.0.0.1:$(port "$1" 0)/snapshots?list-type=2&prefix=long%2F$2%2F")
    awk -F '<Key>' '{ n += NF - 1 } END { print n + 0 }' <<<"$answer"
}

# asked N METHOD FOLDER: requests that node N has got since the marks were set.
declare -A mark=()
marks() {
    local n
    for n in 1 2 3; do mark[$n]=$(stat -c %s "$work/node$n/log"); done
}
asked() {
    tail -c "+$((mark[$1] + 1))" "$work/node$1/log" |
        awk -v what=") $2 /snapshots/long/$3/" 'index($0, "INFO") && index($0, what) && !index($0, "error") { n++ } END { print n + 0 }'
}

# ---------------------------------------------------------------------------------------------------------------------
# Kills that fall in the middle

# kill_in WHAT PID LOG N CONDITION AT: kills node N as soon as the condition holds and while PID runs, and calls AT then. PID must end
# well, and say that it has asked another node. Sets $after, in seconds.
kill_in() {
    local what=$1 pid=$2 log=$3 n=$4 condition=$5 at=$6 status=0 killed
    until "$condition" "$n"; do
        kill -0 "$pid" 2>/dev/null || fail "$what: has ended before it had a middle: $(last "$log"); take a lower --rate or more --fill"
        sleep 0.02
    done
    node_kill "$n"
    killed=$(now_ms)
    kill -0 "$pid" 2>/dev/null || fail "$what: had ended when node $n was killed"
    "$at" "$n"
    wait "$pid" || status=$?
    after=$(as_seconds $(($(now_ms) - killed)))
    [ "$status" -eq 0 ] || fail "$what: node $n was killed, and it ended with $status: $(last "$log")"
    grep -q 'the next endpoint is asked' "$log" || fail "$what: node $n was killed, and vmar has lost no request there"
}

# A save: new packs are there, others are under way to the node.
is_saving() {
    [ "$(asked "$1" PUT packs)" -ge 3 ] || return 1
    packs=$(objects "$other" packs)
    [ "$packs" -gt "$packs_before" ]
}
# The snapshot itself, which comes last, is not.
saved_nothing_yet() {
    packs=$(objects "$other" packs)
    [ "$(objects "$other" snapshots)" -eq "$snapshots_before" ] || fail "the snapshot was there already when node $1 was killed"
}

# save_with_kill NAME N OTHER: OTHER is a node that lives.
save_with_kill() {
    local name=$1 n=$2 packs packs_before snapshots_before packs_after came puts
    other=$3
    packs_before=$(objects "$other" packs)
    snapshots_before=$(objects "$other" snapshots)
    marks
    save "$name" &
    kill_in "save $name" $! "$work/save-$name.log" "$n" is_saving saved_nothing_yet
    packs_after=$(objects "$other" packs)
    came=$(asked "$n" PUT packs)
    puts=$(($(asked 1 PUT packs) + $(asked 2 PUT packs) + $(asked 3 PUT packs)))
    [ "$packs_after" -gt "$packs" ] && [ "$(objects "$other" snapshots)" -eq $((snapshots_before + 1)) ] ||
        fail "save $name: $packs_before packs, $packs when node $n was killed, $packs_after: that is no middle"
    step "save $name: node $n killed with $((packs - packs_before)) of $((packs_after - packs_before)) new packs there and" \
        "$came of $puts PUTs on it; ended well $after s later"
}

# A restore: QEMU has some of the memory, and a pack is under way.
is_restoring() {
    mib=$(qemu_mib)
    [ "$mib" -ge "$mib_least" ] && [ "$(asked "$1" GET packs)" -ge 3 ]
}
mib_now() {
    mib=$(qemu_mib)
}

restore_with_kill() {
    local name=$1 n=$2 mib=0 mib_least mib_after gets
    back_disk "$name"
    mib_least=$(($(qemu_mib) + 48))
    marks
    back_memory "$name" &
    kill_in "restore $name" $! "$work/memory-$name.log" "$n" is_restoring mib_now
    mib_after=$(qemu_mib) gets=$(asked "$n" GET packs)
    [ "$mib_after" -ge $((mib + 32)) ] || fail "restore $name: QEMU had $mib MiB when node $n was killed, and $mib_after at the end: that is no middle"
    back_end
    step "restore $name: node $n killed with $mib of $mib_after MiB in QEMU and $gets GETs on it; ended well $after s later; the guest is what it was"
}

# ---------------------------------------------------------------------------------------------------------------------

probe_accel "$vm_images/$image.vmlinuz"
cluster
order 1 2 3
step "$("$garage" --version | cut -d' ' -f1,2), three nodes, 3 copies, loopback $rate; $VMAR_ACCEL, QEMU $(qemu_version -), $image, $vm_memory MiB"
library_with "$image"
guest_boot
step "the guest is up"
save first || fail "save first: $(last "$work/save-first.log")"
step "save first: $(objects 2 packs) packs"
check "with all nodes"
back first
step "restore first: the guest is what it was"

for ((round = 1; round <= repeat; round++)); do
    # Each node has its turn at each of the three.
    a=$(((round - 1) % 3 + 1)) b=$((round % 3 + 1)) c=$(((round + 1) % 3 + 1))
    order $a $b $c
    guest_fill "$fill"
    save_with_kill "round$round" $a $b
    node_start $a
    healthy $a
    order $b $c $a
    restore_with_kill "round$round" $b
    node_start $b
    healthy $b
    order $c $a $b
    node_kill $c
    back "round$round"
    step "restore round$round: node $c killed before; the guest is what it was"
    check "with node $c dead"
    node_start $c
    healthy $c
done
check "with all nodes"
[ "$(objects 1 snapshots)" -eq $((repeat + 1)) ] || fail "there are $(objects 1 snapshots) snapshots, not $((repeat + 1))"
guest_end "$now"
[ -z "$temporary" ] || rm -rf "$temporary"
say "$((3 * repeat)) nodes killed in $repeat rounds; $((repeat + 1)) snapshots, $((2 * repeat + 1)) restores, the guest was what it was after each; nothing lost"
