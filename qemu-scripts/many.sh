#!/usr/bin/env bash
# Starts many `vmar serve` on one machine, each with an overlay of its own, and measures what they cost: start-up, memory,
# threads, idle CPU.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

clients=4 seconds=20

usage() {
    cat <<EOF
usage: qemu-scripts/many.sh [option...]

Makes a library of 8 small images that share most of their content, and for each count starts so many servers, one after
another. Measures all of them without a VM, then gives some of them a VM and measures these again.

  --count N[,N...]  how many servers (default 50,200)
  --connected N     so many of them get a VM (default $clients; 0: none)
  --seconds S       how long the idle CPU is measured (default $seconds)
  --dir DIR         images, overlays and logs, 600 MiB, are kept in DIR/vmar-many until the next time (default: a new
                    directory below /tmp, removed at the end)
  --json FILE       write what was measured there too

The VM is a QEMU whose boot sector halts the CPU once it has run: its BIOS has set up a queue, read through it, and leaves
it running. VMAR_BIN names the vmar binary. Exit status 0: it was measured, whether the bars are met or not.
EOF
}

counts=50,200 dir='' json='' temporary=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --*) [ $# -ge 2 ] || { usage >&2; exit 2; } ;;
    esac
    case $1 in
        --count) counts=$2 ;;
        --connected) clients=$2 ;;
        --seconds) seconds=$2 ;;
        --dir) dir=$2 ;;
        --json) json=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
[[ $counts =~ ^[1-9][0-9]*(,[1-9][0-9]*)*$ && $clients =~ ^[0-9]+$ && $seconds =~ ^[1-9][0-9]*$ ]] ||
    { usage >&2; exit 2; }

need_qemu
need jq:jq
need_vmar
[ -n "$dir" ] || { dir=$(mktemp -d -t vmar-many.XXXXXX); temporary=$dir; }
rm -rf "$dir/vmar-many"
mkdir -p "$dir/vmar-many"
dir=$(cd "$dir/vmar-many" && pwd)
[ ${#dir} -le 80 ] || die "$dir: too long a path for sockets in it; choose a shorter --dir"
state=''
pids=() qemus=()

# ends PID...: SIGTERM to all of them, then waits. Not zero if one had to be killed or did not end well.
ends() {
    local pid status=0
    [ $# -eq 0 ] || kill -TERM "$@" 2>/dev/null || true
    for pid; do
        if ! wait_gone "$pid" 150; then
            kill -KILL "$pid" 2>/dev/null || true
            status=1
        fi
        wait "$pid" 2>/dev/null || status=1
    done
    return $status
}

clean() {
    ends "${qemus[@]}" || true
    ends "${pids[@]}" || true
    qemus=() pids=()
    rm -rf ${state:+"$state"} ${temporary:+"$temporary"}
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# A sleep without a process, for steps of a millisecond: nobody writes to this pipe.
mkfifo "$dir/nobody"
exec 8<>"$dir/nobody"
rm "$dir/nobody"
nap() {
    local nothing
    # shellcheck disable=SC2034 # as it says
    read -r -t "$1" -u 8 nothing || true
}

now_us() {
    now=${EPOCHREALTIME/[.,]/}
}

# 8 images of 64 pieces of 1 MiB: every fourth piece the image's own, the others those of all, each time in other places.
# The first is the same everywhere and starts with a boot sector: "OK" to the serial port, then cli, hlt, and again hlt.
images=()
make_library() {
    local i k own=0 parts
    mkdir "$dir/pieces"
    for ((k = 0; k < 64; k++)); do
        head -c 1M /dev/urandom >"$dir/pieces/$k"
    done
    {
        printf '\xba\xf8\x03\xb0O\xee\xb0K\xee\xb0\n\xee\xfa\xf4\xeb\xfc'
        head -c 494 /dev/zero
        printf '\x55\xaa'
    } | dd of="$dir/pieces/0" conv=notrunc status=none
    for ((i = 1; i <= 8; i++)); do
        parts=("$dir/pieces/0")
        for ((k = 1; k < 64; k++)); do
            if ((k % 4 == 3)); then
                own=$((own + 1))
                head -c 1M /dev/urandom >"$dir/pieces/own-$own"
                parts+=("$dir/pieces/own-$own")
            else
                parts+=("$dir/pieces/$((1 + (k + 7 * i) % 63))")
            fi
        done
        cat "${parts[@]}" >"$dir/image$i.raw"
        rm -f "$dir"/pieces/own-*
        images+=("image$i=$dir/image$i.raw")
    done
    rm -r "$dir/pieces"
    "$vmar" library init "$dir/library" >"$dir/library.log" 2>&1 &&
        "$vmar" image add "${images[@]}" --library "$dir/library" >>"$dir/library.log" 2>&1 ||
        die "no library: $(tail -n 1 "$dir/library.log")"
}

# serve I: starts server I, ready when this returns; how long that took goes to started_us.
serve() {
    local i=$1 began pid
    now_us
    began=$now
    "$vmar" serve --library "$dir/library" --image "image$((i % 8 + 1))" --overlay "$dir/servers/$i.qcow2" \
        --socket-path "$dir/servers/$i.sock" --state-dir "$state/$i" >"$dir/servers/$i.log" 2>&1 </dev/null 8>&- &
    pid=$!
    pids+=("$pid")
    until [ -S "$dir/servers/$i.sock" ]; do
        kill -0 "$pid" 2>/dev/null || die "vmar serve ended: $(tail -n 1 "$dir/servers/$i.log")"
        now_us
        [ $((now - began)) -lt 10000000 ] || die "vmar serve shows no socket after 10 s: $(tail -n 1 "$dir/servers/$i.log")"
        nap 0.0005
    done
    now_us
    started_us+=($((now - began)))
}

# A VM for server I, its BIOS through with the disk when this returns.
connect() {
    local i=$1 left=1200 pid
    qemu-system-x86_64 -name "vmar-many-$i" -nodefaults -display none -no-reboot -accel tcg,tb-size=16 -m 64M \
        -machine q35,memory-backend=ram0 -object memory-backend-memfd,id=ram0,size=64M,share=on \
        -chardev "socket,id=disk0,path=$dir/servers/$i.sock" -device vhost-user-blk-pci,chardev=disk0,bootindex=1 \
        -serial "file:$dir/servers/$i.serial" >"$dir/servers/$i.qemu" 2>&1 </dev/null 8>&- &
    pid=$!
    qemus+=("$pid")
    until grep -qsa OK "$dir/servers/$i.serial"; do
        kill -0 "$pid" 2>/dev/null || die "QEMU ended: $(tail -n 1 "$dir/servers/$i.qemu")"
        left=$((left - 1))
        [ "$left" -gt 0 ] || die "the boot sector of VM $i has not run after 60 s: $(tail -n 1 "$dir/servers/$i.log")"
        nap 0.05
    done
}

# cpu_us PID...: what they have used so far, all their threads. The scheduler's own count where the kernel shows it;
# utime + stime count a process in whole ticks, in which little use by many does not show well.
cpu_us() {
    local pid status
    for pid; do
        if [ "$fine" = yes ]; then
            cat "/proc/$pid/task/"*/schedstat
        else
            status=$(<"/proc/$pid/stat")
            echo "${status##*) }"
        fi
    done | awk -v fine="$fine" -v hz="$(getconf CLK_TCK)" \
        '{ s += fine == "yes" ? $1 / 1000 : ($12 + $13) * 1000000 / hz } END { printf "%.0f\n", s }'
}
fine=no
[ "$(cut -d' ' -f1 "/proc/$$/schedstat" 2>/dev/null || echo 0)" = 0 ] || fine=yes

# idle PID...: the CPU that they use in $seconds s, in microseconds.
idle() {
    local before after
    before=$(cpu_us "$@")
    sleep "$seconds"
    after=$(cpu_us "$@")
    echo $((after - before))
}

# memory PID...: a line for each, in KiB: PSS, private dirty, anonymous; threads. Without the guest's memory, which is a
# mapping of a memfd.
memory() {
    local pid
    for pid; do
        # "from-to rights ..." starts a mapping, "Name: n kB" says something of it.
        awk '/^[0-9a-f]+-[0-9a-f]+ / { guest = /\/memfd:/; next }
            guest { next }
            $1 == "Pss:" { pss += $2 }
            $1 == "Private_Dirty:" { dirty += $2 }
            $1 == "Anonymous:" { anonymous += $2 }
            END { printf "%d %d %d ", pss, dirty, anonymous }' "/proc/$pid/smaps"
        awk '$1 == "Threads:" { print $2 }' "/proc/$pid/status"
    done | jq -Rn '[inputs | split(" ") | map(tonumber)]
        | map({pss_kib: .[0], private_dirty_kib: .[1], anonymous_kib: .[2], threads: .[3]})'
}

all_run() {
    local i
    for i in "${!pids[@]}"; do
        kill -0 "${pids[i]}" 2>/dev/null || die "a server ended: $(tail -n 1 "$dir/servers/$i.log")"
    done
}

# measure N: one line of JSON on file 7.
measure() {
    local count=$1 i idle_us memory vms=0 vm_idle_us=null vm_memory='[]'
    started_us=()
    rm -rf "$dir/servers"
    mkdir "$dir/servers"
    # The live state belongs on tmpfs.
    state=$(mktemp -d -p "$([ -w /dev/shm ] && echo /dev/shm || echo "$dir")" vmar-many.XXXXXX)
    say "$count servers: overlays"
    for ((i = 0; i < count; i++)); do
        mkdir "$state/$i"
        vm_library=$dir/library vm_overlay vmar "image$((i % 8 + 1))" "$dir/servers/$i.qcow2"
    done
    say "$count servers: starting"
    for ((i = 0; i < count; i++)); do
        serve "$i"
    done
    sleep 2
    all_run
    say "$count servers: idle for $seconds s"
    memory=$(memory "${pids[@]}")
    idle_us=$(idle "${pids[@]}")
    all_run
    if [ "$clients" -gt 0 ]; then
        vms=$((clients < count ? clients : count))
        say "$count servers: $vms of them with an idle VM, for $seconds s"
        for ((i = 0; i < vms; i++)); do
            connect "$i"
        done
        sleep 2
        vm_memory=$(memory "${pids[@]:0:vms}")
        vm_idle_us=$(idle "${pids[@]:0:vms}")
        all_run
        ends "${qemus[@]}" || die "a QEMU did not end well: $(tail -qn 1 "$dir"/servers/*.qemu | tail -n 1)"
        qemus=()
    fi
    ends "${pids[@]}" || die "a server did not end well: $(tail -qn 1 "$dir"/servers/*.log | tail -n 1)"
    pids=()
    rm -rf "$state"
    state=''
    printf '%s\n' "${started_us[@]}" | jq -sc --argjson count "$count" --argjson seconds "$seconds" --arg fine "$fine" \
        --argjson memory "$memory" --argjson idle_us "$idle_us" --argjson vms "$vms" \
        --argjson vm_memory "$vm_memory" --argjson vm_idle_us "$vm_idle_us" '
        # The least value that a share of p of all do not exceed.
        def rank($p): sort | .[([(length * $p | ceil), 1] | max) - 1];
        def spread: {median: rank(0.5), p95: rank(0.95), max: max};
        def part($us; $m): {
            pss_kib: ($m | map(.pss_kib) | spread), private_dirty_kib: ($m | map(.private_dirty_kib) | spread),
            anonymous_kib: ($m | map(.anonymous_kib) | spread), threads: ($m | map(.threads) | spread),
            pss_sum_kib: ($m | map(.pss_kib) | add), idle_percent_of_core: ($us / 10000 / $seconds)};
        {servers: $count, seconds: $seconds,
            cpu_time_from: (if $fine == "yes" then "schedstat" else "utime+stime" end),
            ready_ms: (map(. / 1000) | spread), idle: part($idle_us; $memory),
            vms: (if $vms > 0 then part($vm_idle_us; $vm_memory) + {servers: $vms} else null end)}' >&7
}

say "8 images of 64 MiB in $dir"
make_library
exec 7>"$dir/results"
for count in ${counts//,/ }; do
    measure "$count"
done
exec 7>&-
result=$(jq -s --arg cpus "$(nproc)" '{cpus: ($cpus | tonumber), runs: .}' "$dir/results")
[ -z "$json" ] || printf '%s\n' "$result" >"$json"

jq -r '
    def places($n): . * pow(10; $n) | round / pow(10; $n) | tostring;
    def mib: . / 1024 | places(2);
    def pad(n): tostring | (" " * ([n - length, 0] | max)) + .;
    def left(n): tostring | . + (" " * ([n - length, 0] | max));
    def bar($met): if $met then "   met" else "   MISSED" end;
    def row($name; $s): ($name | left(44)) + ($s | [.median, .p95, .max] | map(pad(10)) | join(""));
    def part: row("  PSS, MiB"; .pss_kib | map_values(mib)),
        row("  private memory (dirty), MiB"; .private_dirty_kib | map_values(mib)),
        row("  of it anonymous, MiB"; .anonymous_kib | map_values(mib)), row("  threads"; .threads);
    .runs[]
    | "", row("\(.servers) servers"; {median: "median", p95: "p95", max: "max"}),
      row("  start to accepting socket, ms"; .ready_ms | map_values(places(1))), (.idle | part),
      "  PSS of all \(.idle.pss_sum_kib | mib) MiB, idle CPU of all \(.idle.idle_percent_of_core | places(3)) % of a core",
      (if .vms then "\(.vms.servers) of them with an idle VM, without its memory", (.vms | part),
        "  idle CPU of these \(.vms.idle_percent_of_core | places(3)) % of a core" else empty end),
      "bar: ready in 30 ms (p95)                    \(bar(.ready_ms.p95 <= 30))",
      "bar: private memory 4 MiB at most            \(bar([.idle, .vms // .idle | .private_dirty_kib.max] | max <= 4096))",
      "bar: idle CPU below 1 % of a core            \(bar(.idle.idle_percent_of_core < 1))"' <<<"$result"
say ""
say "Ready is the time to the socket that accepts; the example first_read times a first read, too."
say "CPU time is counted by $([ $fine = yes ] && echo "the scheduler (schedstat)" || echo "ticks (utime + stime)")."
