# Sourced by the scripts beside it: tools, accelerator, and the life of one VM.
# shellcheck shell=bash

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
me=qemu-scripts/$(basename "$0")

die() {
    printf '%s: %s\n' "$me" "$*" >&2
    exit 1
}

say() {
    printf '%s\n' "$*"
}

# ---------------------------------------------------------------------------------------------------------------------
# Tools

apt_get() {
    local log=${TMPDIR:-/tmp}/vmar-apt.log
    [ "$(id -u)" -eq 0 ] || die "needs $* but may not install it: run as root, or install it first"
    if [ -z "$(find /var/lib/apt/lists -maxdepth 1 -name '*Release' -mmin -1440 -print -quit 2>/dev/null)" ]; then
        apt-get update >"$log" 2>&1 || die "apt-get update failed: see $log"
    fi
    say "installing $*"
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends --allow-downgrades "$@" >"$log" 2>&1 ||
        die "could not install $*: see $log"
}

# need COMMAND:PACKAGE...
need() {
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -eq 0 ] || apt_get "${missing[@]}"
}

# qemu-system-x86 depends on the other parts of QEMU in its own version. If the machine has some of them from another
# suite, they must move with it, or apt would rather remove them.
need_qemu() {
    if command -v qemu-system-x86_64 >/dev/null && command -v qemu-img >/dev/null; then
        return 0
    fi
    [ "$(id -u)" -eq 0 ] || die "needs QEMU but may not install it: run as root, or install qemu-system-x86 and qemu-utils"
    [ -n "$(apt-cache madison qemu-system-x86)" ] || apt-get update >/dev/null || die "apt-get update failed"
    local system package version wanted=()
    # The version of the utilities that are there, when the archive has the system emulator in it; else the candidate.
    system=$(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null || true)
    if [ -z "$system" ] || ! apt-cache madison qemu-system-x86 | awk '{print $3}' | grep -qxF -- "$system"; then
        system=$(apt-cache policy qemu-system-x86 | sed -n 's/^ *Candidate: //p')
    fi
    case $system in '' | "(none)") die "apt of this machine offers no qemu-system-x86" ;; esac
    # Binary packages of one source version, rebuilt or not (+bN), belong together.
    while read -r package; do
        version=$(apt-cache madison "$package" | awk '{print $3}' |
            awk -v want="${system%+b*}" '{ v = $0; sub(/\+b[0-9]+$/, "", v) } v == want { print $0; exit }')
        [ -z "$version" ] || wanted+=("$package=$version")
    done < <({ echo qemu-system-x86; echo qemu-utils
        dpkg-query -W -f '${source:Package} ${Package} ${db:Status-Abbrev}\n' | awk '$1 == "qemu" && $3 == "ii" { print $2 }'
        } | sort -u)
    apt_get "${wanted[@]}"
}

qemu_major() {
    qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\)\..*/\1/p'
}

# The binary: $VMAR_BIN, else what cargo makes of this repository, made first if it is not there. Sets $vmar.
need_vmar() {
    vmar=${VMAR_BIN:-${CARGO_TARGET_DIR:-$repo/target}/release/vmar}
    [ ! -x "$vmar" ] || return 0
    [ -z "${VMAR_BIN:-}" ] || die "VMAR_BIN=$VMAR_BIN is not there or cannot be run"
    build_vmar
}

build_vmar() {
    command -v cargo >/dev/null || die "no cargo on the PATH: install Rust, or set VMAR_BIN"
    need cc:build-essential
    say "building vmar (cargo build --release)"
    (cd "$repo" && cargo build --release --bin vmar) || die "cargo build --release failed"
}

# Sets VMAR_ACCEL. /dev/kvm may be there and still never run an ordinary kernel, so one has to come as far as looking for
# its root file system within a time limit.
probe_accel() {
    local kernel=$1 log
    case ${VMAR_ACCEL:-} in
        kvm | tcg) export VMAR_ACCEL; return 0 ;;
        '') ;;
        *) die "VMAR_ACCEL=$VMAR_ACCEL: say kvm or tcg" ;;
    esac
    VMAR_ACCEL=tcg
    if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then
        log=$(mktemp)
        timeout --foreground -k 2 15 qemu-system-x86_64 -machine q35 -accel kvm -m 256M -nodefaults -display none -no-reboot \
            -serial "file:$log" -kernel "$kernel" -append "console=ttyS0 panic=-1" >/dev/null 2>&1 </dev/null || true
        if grep -qa 'Unable to mount root fs' "$log"; then
            VMAR_ACCEL=kvm
        fi
        rm -f "$log"
    fi
    export VMAR_ACCEL
}

# ---------------------------------------------------------------------------------------------------------------------
# Small things

now_ms() {
    echo $(($(date +%s%N) / 1000000))
}

# as_seconds MILLISECONDS
as_seconds() {
    printf '%d.%d' $(($1 / 1000)) $(($1 % 1000 / 100))
}

# as_mib BYTES
as_mib() {
    awk -v b="$1" 'BEGIN { printf "%.1f", b / 1048576 }'
}

# Bytes of these files in the page cache (fincore uses mincore).
cached_bytes() {
    [ $# -gt 0 ] || { echo 0; return 0; }
    fincore --bytes --noheadings --output RES "$@" | awk '{ s += $1 } END { printf "%.0f\n", s }'
}

# Out of the page cache with these files, and only these: others live on this machine too.
drop_cached() {
    local file
    for file in "$@"; do
        sync "$file"
        dd if="$file" iflag=nocache count=0 status=none
    done
}

# begin_guest NAME: what a script that runs fio in the test guest begins with. Sets $vmar, $work (a new folder below /tmp if it is
# empty, and $temporary with it) and what tests/qemu/guest.sh has, whose helpers work from the repository.
# shellcheck disable=SC2034 # temporary is for the caller
begin_guest() {
    need_vmar
    vmar=$(realpath "$vmar")
    [ -n "$work" ] || { work=$(mktemp -d -t "vmar-$1.XXXXXX"); temporary=$work; }
    mkdir -p "$work"
    work=$(cd "$work" && pwd)
    cd "$repo" || die "cannot go to $repo"
    # shellcheck source=tests/qemu/guest.sh
    . tests/qemu/guest.sh
    guest_need
    need jq:jq fio:fio
    guest_kernel
}

# wait_gone PID DECISECONDS: whether the process ended in time.
wait_gone() {
    local pid=$1 left=$2
    while kill -0 "$pid" 2>/dev/null; do
        [ "$left" -gt 0 ] || return 1
        left=$((left - 1))
        sleep 0.1
    done
}

# ---------------------------------------------------------------------------------------------------------------------
# One VM. Its folder holds overlay.qcow2, serial.log, qemu.log, qemu.pid, packet-id, and with vmar vmar.log, vmar.pid, trace.
#
# Settings, global because a script has one way to run its VMs:
vm_images=${VMAR_IMAGES_DIR:-$repo/build/images} # where NAME.raw and its kernel are
vm_library=${VMAR_LIBRARY:-}                     # vmar's library
vm_boot=kernel                                   # kernel: QEMU loads it; disk: SeaBIOS and the boot loader do
vm_memory=512                                    # MiB
vm_append=                                       # more for the kernel command line
vm_app=                                          # 1: guests load their application when they are up
vm_record=1                                      # empty: vmar serve records no trace
vm_devices=()                                    # more for QEMU's command line
vm_dirs=()                                       # what vm_stop_all stops
vm_packets=                                      # set by vm_listen: what packets came
vm_port=                                         # set by vm_listen: where guests say that they can be reached

# A folder that no other script run uses. Sockets are named by full path, which the kernel limits to 107 characters.
vm_folder() {
    local dir=$1
    mkdir -p "$dir/state"
    [ ${#dir} -le 90 ] || die "$dir: too long a path for a socket in it; choose a shorter --workdir"
    rm -f "$dir"/{serial.log,qemu.log,vmar.log,trace,qemu.pid,vmar.pid,blk.sock,began,packet-id}
}

# vm_overlay MODE NAME FILE: a fresh overlay, made by whoever will use it.
vm_overlay() {
    local mode=$1 name=$2 file=$3
    rm -f "$file"
    case $mode in
        plain) qemu-img create -q -f qcow2 -F raw -b "$(realpath "$vm_images/$name.raw")" "$file" ;;
        vmar) "$vmar" overlay create "$file" --image "$name" --library "$vm_library" >/dev/null ;;
        *) die "mode $mode: say plain or vmar" ;;
    esac || die "could not make the overlay $file of $name ($mode)"
}

# vm_serve NAME DIR OVERLAY: vmar as the VM's disk, ready when this returns. $vm_serve_more: more options.
vm_serve_more=()
vm_serve() {
    local name=$1 dir=$2 overlay=$3 pid left=100
    "$vmar" serve --library "$vm_library" --image "$name" --overlay "$overlay" --socket-path "$dir/blk.sock" \
        --state-dir "$dir/state" ${vm_record:+--record "$dir/trace"} "${vm_serve_more[@]}" \
        >"$dir/vmar.log" 2>&1 </dev/null 9>&- &
    pid=$!
    echo "$pid" >"$dir/vmar.pid"
    while [ ! -S "$dir/blk.sock" ]; do
        kill -0 "$pid" 2>/dev/null || die "vmar serve ended for $name: $(tail -n 1 "$dir/vmar.log") (log: $dir/vmar.log)"
        left=$((left - 1))
        [ "$left" -gt 0 ] || die "vmar serve for $name shows no socket after 10 s (log: $dir/vmar.log)"
        sleep 0.1
    done
}

# vm_start MODE NAME DIR OVERLAY: starts the VM in the background. With mode raw, OVERLAY is the image itself, read only.
# shellcheck disable=SC2054 # QEMU's commas
vm_start() {
    local mode=$1 name=$2 dir=$3 overlay=$4 accel disk kernel=() net=() reconnect='reconnect=1'
    local words=$vm_append${vm_app:+ vmar.app=1} calm=''
    vm_dirs+=("$dir")
    if [ -n "$vm_port" ]; then
        # 10.0.2.2 is this host in QEMU's own network. No boot ROM: nobody boots from there.
        vm_started=$((vm_started + 1))
        echo "$vm_started" >"$dir/packet-id"
        words+=" vmar.packet=10.0.2.2:$vm_port/$vm_started"
        net=(-netdev user,id=net0 -device virtio-net-pci,netdev=net0,romfile=)
    fi
    now_ms >"$dir/began"
    case $mode in
        plain)
            disk=(-drive "if=none,id=disk0,file=$overlay,format=qcow2,discard=unmap"
                -device virtio-blk-pci,drive=disk0,bootindex=1)
            ;;
        raw)
            disk=(-drive "if=none,id=disk0,file=$overlay,format=raw,read-only=on"
                -device virtio-blk-pci,drive=disk0,bootindex=1)
            ;;
        vmar)
            vm_serve "$name" "$dir" "$overlay"
            [ "$(qemu_major)" -lt 10 ] || reconnect='reconnect-ms=1000'
            disk=(-chardev "socket,id=disk0,path=$dir/blk.sock,$reconnect"
                -device vhost-user-blk-pci,chardev=disk0,bootindex=1)
            ;;
        *) die "mode $mode: say raw, plain or vmar" ;;
    esac
    # Early on the kernel counts the ticks of a moment. An emulated processor that gets no share of a busy host in it sees
    # none, and the kernel would panic: "IO-APIC + timer doesn't work".
    [ "$VMAR_ACCEL" != tcg ] || calm=' no_timer_check'
    case $vm_boot in
        kernel)
            kernel=(-kernel "$vm_images/$name.vmlinuz" -initrd "$vm_images/$name.initrd"
                -append "$(cat "$vm_images/$name.cmdline") panic=-1$calm${words:+ $words}")
            ;;
        disk) [ -z "$words" ] || die "a boot from disk takes its kernel command line from the disk" ;;
        *) die "boot $vm_boot: say kernel or disk" ;;
    esac
    # TCG seems not to notice when another process writes over code that it has translated. Guests that clear a page
    # before they read into it are safe (Linux with init_on_alloc, Debian's default), and boot loaders that copy (GRUB).
    accel=$VMAR_ACCEL
    [ "$accel" != tcg ] || accel=tcg,tb-size=256
    # Both modes get the same machine, also the shared memory that only vhost-user needs.
    qemu-system-x86_64 -name "vmar-$name,debug-threads=on" -nodefaults -display none -no-reboot \
        -machine q35,memory-backend=ram0 -object "memory-backend-memfd,id=ram0,size=${vm_memory}M,share=on" \
        -m "${vm_memory}M" -smp 1 -accel "$accel" "${disk[@]}" "${kernel[@]}" "${vm_devices[@]}" \
        -device virtio-rng-pci "${net[@]}" \
        -serial "file:$dir/serial.log" >"$dir/qemu.log" 2>&1 </dev/null 9>&- &
    echo $! >"$dir/qemu.pid"
}

# vm_state DIR: booting | up SECONDS | failed WHY
vm_state() {
    local dir=$1 line
    # With its seconds to the last digit: a line may be there in part.
    line=$(grep -aE '^VMAR-(BOOT-OK [^ ]+ [0-9]+\.[0-9][0-9]|BOOT-FAIL |DATA-FAIL )' "$dir/serial.log" 2>/dev/null |
        head -n 1 | tr -d '\r' || true)
    case $line in
        "VMAR-BOOT-OK "*) echo "up ${line##* }" ;;
        VMAR-*) echo "failed the guest says: $line" ;;
        *)
            if kill -0 "$(cat "$dir/qemu.pid")" 2>/dev/null; then
                echo booting
            elif [ -s "$dir/qemu.log" ]; then
                echo "failed QEMU ended: $(tail -n 1 "$dir/qemu.log")"
            else
                echo "failed the guest stopped before it was up"
            fi
            ;;
    esac
}

# shellcheck disable=SC2034 # vm_guest_s is for the caller
# vm_wait_up DIR TIMEOUT: sets vm_boot_ms (on the host, from the start of the VM) and vm_guest_s (what the guest says).
vm_wait_up() {
    local dir=$1 timeout=$2 began state
    began=$(cat "$dir/began")
    while :; do
        state=$(vm_state "$dir")
        vm_boot_ms=$(($(now_ms) - began))
        case $state in
            up*) vm_guest_s=${state#up }; return 0 ;;
            failed*) die "${state#failed } (logs: $dir)" ;;
        esac
        [ "$vm_boot_ms" -lt $((timeout * 1000)) ] || die "no boot marker after $timeout s (logs: $dir)"
        sleep 0.2
    done
}

# has_app NAME: whether this image has an application that its guest loads with vmar.app=1.
has_app() {
    grep -qsx 'app=yes' "$vm_images/$1.info"
}

# vm_app_state DIR: loading | loaded SECONDS | failed WHY
vm_app_state() {
    local dir=$1 line
    line=$(grep -aE '^VMAR-APP-(OK [^ ]+ [0-9]+\.[0-9][0-9]|FAIL )' "$dir/serial.log" 2>/dev/null |
        head -n 1 | tr -d '\r' || true)
    case $line in
        "VMAR-APP-OK "*) echo "loaded ${line##* }" ;;
        VMAR-*) echo "failed the guest says: $line" ;;
        *)
            if kill -0 "$(cat "$dir/qemu.pid")" 2>/dev/null; then
                echo loading
            else
                echo "failed QEMU ended while the application was loading: $(tail -n 1 "$dir/qemu.log")"
            fi
            ;;
    esac
}

# shellcheck disable=SC2034 # vm_app_ms and vm_app_s are for the caller
# vm_wait_app DIR TIMEOUT: after vm_wait_up; sets vm_app_ms (on the host, from the boot marker on) and vm_app_s (what the
# guest says).
vm_wait_app() {
    local dir=$1 timeout=$2 up state
    up=$(($(cat "$dir/began") + vm_boot_ms))
    while :; do
        state=$(vm_app_state "$dir")
        vm_app_ms=$(($(now_ms) - up))
        case $state in
            loaded*) vm_app_s=${state#loaded }; return 0 ;;
            failed*) die "${state#failed } (logs: $dir)" ;;
        esac
        [ "$vm_app_ms" -lt $((timeout * 1000)) ] || die "the application was not loaded after $timeout s (logs: $dir)"
        sleep 0.2
    done
}

# vm_cpu DIR: four numbers of the VM since its start, in milliseconds: the CPU time of QEMU and of its vmar (0 without), the
# CPU time of the virtual CPU's thread, and how long that thread was ready to run and had no processor (null if the kernel
# does not say). What is left of the clock the virtual CPU was idle: it waited for the disk or for a timer. Under TCG this
# tells a guest that is slow to compute from one that is slow to read.
vm_cpu() {
    local dir=$1 pid task comm what line ms=(0 0) vcpu=0 queue=null hz
    hz=$(getconf CLK_TCK)
    for what in 0:qemu 1:vmar; do
        [ -e "$dir/${what#*:}.pid" ] || continue
        pid=$(<"$dir/${what#*:}.pid")
        line=$(cat "/proc/$pid/stat" 2>/dev/null) || continue
        # shellcheck disable=SC2086 # words, after the name in parentheses
        set -- ${line##*) }
        ms[${what%:*}]=$(((${12} + ${13}) * 1000 / hz))
    done
    pid=$(<"$dir/qemu.pid")
    for task in /proc/"$pid"/task/*; do
        comm=$(cat "$task/comm" 2>/dev/null) || continue
        [[ $comm = "CPU 0/"* ]] || continue
        line=$(cat "$task/schedstat" 2>/dev/null || true)
        if [ -n "$line" ] && [ "${line%% *}" != 0 ]; then
            # shellcheck disable=SC2086
            set -- $line
            vcpu=$(($1 / 1000000)) queue=$(($2 / 1000000))
        else
            line=$(cat "$task/stat" 2>/dev/null) || continue
            # shellcheck disable=SC2086
            set -- ${line##*) }
            vcpu=$(((${12} + ${13}) * 1000 / hz))
        fi
    done
    echo "${ms[*]} $vcpu $queue"
}

# cpu_json MS BEFORE AFTER: what vm_cpu said at two times that are MS apart, as JSON. BEFORE may be "0 0 0 0".
cpu_json() {
    jq -cn --argjson ms "$1" --argjson a "[${2// /,}]" --argjson b "[${3// /,}]" '
        [range(4) as $i | if $b[$i] == null then null else $b[$i] - ($a[$i] // 0) end]
        | {qemu_ms: .[0], server_ms: .[1], vcpu_ms: .[2], runqueue_ms: .[3],
            idle_ms: ([$ms - .[2] - (.[3] // 0), 0] | max)}'
}

# ---------------------------------------------------------------------------------------------------------------------
# The packet by which a guest tells that it can be reached

# vm_listen FILE: from now on VMs get a network and are asked to send a packet; FILE has a line "MILLISECONDS WORDS" for each
# that came.
vm_started=0
vm_listen() {
    local left=20
    vm_packets=$1
    need socat:socat
    : >"$vm_packets"
    while :; do
        vm_port=$((20000 + RANDOM % 12000))
        # The port may be taken: then socat ends at once.
        socat -u "UDP4-RECV:$vm_port,bind=127.0.0.1" STDOUT 2>"$vm_packets.log" </dev/null 9>&- > >(
            while read -r line; do
                echo "$(now_ms) $line"
            done >>"$vm_packets"
        ) &
        vm_listener=$!
        sleep 0.2
        ! kill -0 "$vm_listener" 2>/dev/null || return 0
        left=$((left - 1))
        [ "$left" -gt 0 ] || die "could not listen for packets: $(tail -n 1 "$vm_packets.log")"
    done
}

vm_deaf() {
    [ -n "${vm_listener:-}" ] || return 0
    kill "$vm_listener" 2>/dev/null || true
    wait "$vm_listener" 2>/dev/null || true
}

# has_packet NAME: whether the guest of this image sends a packet when it is asked for one.
has_packet() {
    grep -qsx 'packet=yes' "$vm_images/$1.info"
}

# vm_wait_packets SECONDS DIR...: no longer than this for the packets of all these VMs. A packet may come after the marker,
# as no service waits for the network.
vm_wait_packets() {
    local left=$(($1 * 5)) dir
    shift
    for dir; do
        while [ "$left" -gt 0 ] && [ "$(vm_packet_ms "$dir")" = null ]; do
            left=$((left - 1))
            sleep 0.2
        done
    done
}

# vm_packet_ms DIR: how long after the start of the VM its packet came, or null.
vm_packet_ms() {
    local dir=$1
    if [ -z "$vm_packets" ] || [ ! -e "$dir/packet-id" ]; then
        echo null
        return 0
    fi
    awk -v id="$(<"$dir/packet-id")" -v began="$(<"$dir/began")" '
        $2 == "VMAR-UP" && $4 == id { print $1 - began; found = 1; exit }
        END { if (!found) print "null" }' "$vm_packets"
}

# ---------------------------------------------------------------------------------------------------------------------
# The end of VMs

# vm_wait_off DIR TIMEOUT: until the guest has powered itself off.
vm_wait_off() {
    wait_gone "$(cat "$1/qemu.pid")" $(($2 * 10)) || die "the guest has not powered off after $2 s (logs: $1)"
}

# vm_stop DIR: QEMU, then its disk. Not zero if vmar had to be killed or did not end well.
vm_stop() {
    local dir=$1 what pid status=0
    for what in qemu vmar; do
        [ -e "$dir/$what.pid" ] || continue
        pid=$(cat "$dir/$what.pid")
        rm -f "$dir/$what.pid"
        kill -TERM "$pid" 2>/dev/null || true
        if ! wait_gone "$pid" 150; then
            kill -KILL "$pid" 2>/dev/null || true
            say "$what did not end within 15 s of SIGTERM and was killed (logs: $dir)" >&2
            status=1
        fi
        if ! wait "$pid" 2>/dev/null && [ "$what" = vmar ]; then
            say "vmar serve did not end well: $(tail -n 1 "$dir/vmar.log") (log: $dir/vmar.log)" >&2
            status=1
        fi
    done
    return $status
}

vm_stop_all() {
    local dir status=0
    for dir in "${vm_dirs[@]}"; do
        [ ! -e "$dir/qemu.pid" ] || kill -TERM "$(cat "$dir/qemu.pid")" 2>/dev/null || true
    done
    for dir in "${vm_dirs[@]}"; do
        vm_stop "$dir" || status=1
    done
    vm_dirs=()
    return $status
}

# Whatever ends the script, no VM survives it.
vm_guard() {
    trap 'vm_stop_all || true; vm_deaf' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}
