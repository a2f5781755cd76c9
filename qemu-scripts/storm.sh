#!/usr/bin/env bash
# Boots many VMs from several images, and measures what they cost the host while all of them run.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<EOF
usage: qemu-scripts/storm.sh --mode plain|vmar [option...] NAME...

Boots one VM for each NAME (an image; a name may come more than once), each with a fresh overlay, and waits until all
have reached their boot marker (with --app, have loaded their application, too) and all are still running. Then measures page cache, disk reads and boot times.

  --mode MODE       plain: QEMU's own qcow2 overlays over the raws; vmar: through vmar serve
  --count N         N VMs, taking the names in turn
  --interval S      seconds between arrivals (default 0: all at once)
  --poisson         S is the mean of exponential gaps
  --seed N          for --poisson (default 1)
  --images DIR      where the images are (default \$VMAR_IMAGES_DIR, else build/images)
  --library DIR     vmar's library (default \$VMAR_LIBRARY)
  --boot HOW        kernel: QEMU loads the kernel (default); disk: through the boot loader
  --app             let guests load their application when they are up, those whose image has one
  --packet          give VMs a network, and ask them for a packet when they can be reached (images that know how)
  --memory MIB      each guest's memory (default $vm_memory)
  --append WORDS    more for the kernel command line
  --timeout S       until the last marker (default 300, and 60 more for each VM; with --app twice that)
  --workdir DIR     overlays and logs (default: a new directory below /tmp)
  --json FILE       write what was measured there too

JSON, of each VM: boot_ms (host's clock, from its start to its boot marker), guest_seconds (the guest's, which a busy host
can mislead), packet_ms (to its packet; null: none came), cpu; app_ms (from boot marker to the end of the load; null: no
application), app_guest_seconds, app_cpu. Of cpu and app_cpu, over that time: qemu_ms and server_ms (CPU of the processes),
vcpu_ms (CPU of the virtual CPU's thread), runqueue_ms (it could run and had no processor), idle_ms (the rest: it waited for
the disk or a timer).

Image files are dropped from the page cache first, nothing else is. Do not change or read them meanwhile.
EOF
}

mode='' count='' interval=0 poisson='' seed=1 timeout='' dir='' json='' app='' packet='' names=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --poisson) poisson=1; shift; continue ;;
        --app) app=1; shift; continue ;;
        --packet) packet=1; shift; continue ;;
        --*) [ $# -ge 2 ] || { usage >&2; exit 2; } ;;
        *) names+=("$1"); shift; continue ;;
    esac
    case $1 in
        --mode) mode=$2 ;;
        --count) count=$2 ;;
        --interval) interval=$2 ;;
        --seed) seed=$2 ;;
        --images) vm_images=$2 ;;
        --library) vm_library=$2 ;;
        --boot) vm_boot=$2 ;;
        --memory) vm_memory=$2 ;;
        --append) vm_append=$2 ;;
        --timeout) timeout=$2 ;;
        --workdir) dir=$2 ;;
        --json) json=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
[ ${#names[@]} -gt 0 ] || { usage >&2; exit 2; }
case $mode in plain | vmar) ;; *) usage >&2; exit 2 ;; esac
count=${count:-${#names[@]}}
timeout=${timeout:-$(((300 + 60 * count) * (${app:-0} + 1)))}
[ "$mode" != vmar ] || [ -n "$vm_library" ] || die "--mode vmar needs --library (or VMAR_LIBRARY)"
for name in "${names[@]}"; do
    [ -e "$vm_images/$name.raw" ] || die "$vm_images/$name.raw is not there: build it with images/build.sh $name"
done

need_qemu
need jq:jq fincore:util-linux
[ "$mode" != vmar ] || need_vmar
probe_accel "$vm_images/${names[0]}.vmlinuz"
dir=${dir:-$(mktemp -d -t vmar-storm.XXXXXX)}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
vm_guard

# Bytes that these processes have made the kernel fetch from storage. Of the three counters at hand this is the honest
# one: /proc/diskstats counts the whole machine's reads; the block I/O counters of control groups have other names and
# places in version 1 and 2 and need rights and a mounted controller; /proc/PID/io charges each read, readahead and
# page-fault reads too, to the process on whose behalf it was submitted (threads, io_uring workers and threads that are
# gone included), and is everywhere. The device's own count is printed beside it, to see that nothing hides elsewhere.
processes_read_bytes() {
    local sum=0 pid bytes
    for pid in "$@"; do
        bytes=$(sed -n 's/^read_bytes: //p' "/proc/$pid/io" 2>/dev/null || true)
        sum=$((sum + ${bytes:-0}))
    done
    echo "$sum"
}

device_read_bytes() {
    local device
    device=$(findmnt -n -o MAJ:MIN -T "$vm_images" | tr -d ' ')
    awk -v d="$device" '$1 ":" $2 == d { printf "%.0f\n", $6 * 512; found = 1 } END { if (!found) print "null" }' \
        /proc/diskstats
}

# What is read from the same disk but is no image: out of the measurement by being in the cache before it.
warm_up() {
    local binary
    {
        for binary in "$(command -v qemu-system-x86_64)" ${vmar:+"$vmar"}; do
            cat "$binary"
            ldd "$binary" | grep -o '/[^ ]*' | sort -u | xargs -r cat
        done
        for name in "${names[@]}"; do
            cat "$vm_images/$name".{vmlinuz,initrd,cmdline}
        done
        find /usr/share/seabios /usr/share/qemu -maxdepth 1 -type f \( -name '*.bin' -o -name '*.rom' \) -exec cat {} +
    } >/dev/null 2>&1 || true
}

# Arrival times in milliseconds from the start, one a line.
arrivals() {
    awk -v n="$count" -v gap="$interval" -v poisson="${poisson:-0}" -v seed="$seed" 'BEGIN {
        srand(seed)
        for (i = 0; i < n; i++) {
            printf "%d\n", t * 1000
            t += poisson ? -gap * log(1 - rand()) : gap
        }
    }'
}

vm_app=$app
[ -z "$packet" ] || vm_listen "$dir/packets"

# app_ms: empty while the application loads, null if there is none to wait for.
image_of=() folder=() began=() boot_ms=() guest_s=() boot_cpu=() app_ms=() app_s=() app_cpu=() cpu=() due=()
mapfile -t due < <(arrivals)
declare -A seen=()
for ((i = 0; i < count; i++)); do
    name=${names[i % ${#names[@]}]}
    seen[$name]=$((${seen[$name]:-0} + 1))
    image_of[i]=$name
    folder[i]=$dir/$name-${seen[$name]}
    vm_folder "${folder[i]}"
    vm_overlay "$mode" "$name" "${folder[i]}/overlay.qcow2"
    app_s[i]=null app_cpu[i]=null app_ms[i]=null
    [ -z "$app" ] || ! has_app "$name" || app_ms[i]=''
done

# All images there are, not only those of the VMs: a canonical block may live in any of them.
raws=("$vm_images"/*.raw)
maps=()
if [ "$mode" = vmar ]; then
    mapfile -t maps < <(find "$vm_library" -name '*.map' -type f)
fi
warm_up
drop_cached "${raws[@]}" "${maps[@]}"
left=$(cached_bytes "${raws[@]}")
[ "$left" -eq 0 ] || say "note: $(as_mib "$left") MiB of the images stay in the page cache; does another process use them?"

# Where the kernel takes cold pages back by itself, what a slow storm read early may be gone again when it ends: then the
# page cache looks smaller than it was, in both modes, and disk reads tell more.
if pgrep -x 'kdamond\..*' >/dev/null; then
    say "note: DAMON runs on this host and may reclaim cold page cache during the storm"
fi

say "storm: $count VMs ($mode, $VMAR_ACCEL, from $vm_boot), arrivals every $interval s${poisson:+ on average}, logs in $dir"
device_before=$(device_read_bytes)
storm_began=$(now_ms)
started=0 up=0 done=0
while [ "$done" -lt "$count" ]; do
    elapsed=$(($(now_ms) - storm_began))
    while [ "$started" -lt "$count" ] && [ "${due[started]}" -le "$elapsed" ]; do
        vm_start "$mode" "${image_of[started]}" "${folder[started]}" "${folder[started]}/overlay.qcow2"
        began[started]=$(cat "${folder[started]}/began")
        started=$((started + 1))
    done
    # One look at all the serial ports; more only where there is something new.
    spoke=$(grep -laE '^VMAR-(BOOT|DATA)-' "$dir"/*/serial.log 2>/dev/null || true)
    loaded=''
    [ -z "$app" ] || loaded=$(grep -laE '^VMAR-APP-' "$dir"/*/serial.log 2>/dev/null || true)
    for ((i = 0; i < started; i++)); do
        vm=$(basename "${folder[i]}")
        if [ -z "${boot_ms[i]:-}" ] && grep -qxF "${folder[i]}/serial.log" <<<"$spoke"; then
            state=$(vm_state "${folder[i]}")
            [ "$state" != booting ] || continue
            [ "${state%% *}" = up ] || die "$vm: ${state#failed } (logs: ${folder[i]})"
            boot_ms[i]=$(($(now_ms) - began[i]))
            guest_s[i]=${state#up }
            cpu[i]=$(vm_cpu "${folder[i]}")
            boot_cpu[i]=$(cpu_json "${boot_ms[i]}" "0 0 0 0" "${cpu[i]}")
            up=$((up + 1))
            [ -z "${app_ms[i]}" ] || done=$((done + 1))
            say "  $vm: up after $(as_seconds "${boot_ms[i]}") s ($up of $count)"
        elif [ -n "${boot_ms[i]:-}" ] && [ -z "${app_ms[i]}" ] && grep -qxF "${folder[i]}/serial.log" <<<"$loaded"; then
            state=$(vm_app_state "${folder[i]}")
            [ "$state" != loading ] || continue
            [ "${state%% *}" = loaded ] || die "$vm: ${state#failed } (logs: ${folder[i]})"
            app_ms[i]=$(($(now_ms) - began[i] - boot_ms[i]))
            app_s[i]=${state#loaded }
            app_cpu[i]=$(cpu_json "${app_ms[i]}" "${cpu[i]}" "$(vm_cpu "${folder[i]}")")
            done=$((done + 1))
            say "  $vm: application loaded in $(as_seconds "${app_ms[i]}") s ($done of $count)"
        fi
        kill -0 "$(<"${folder[i]}/qemu.pid")" 2>/dev/null ||
            die "$vm: $(vm_state "${folder[i]}" | sed 's/^failed //; s/^up .*/QEMU ended after the marker/') (logs: ${folder[i]})"
    done
    [ "$elapsed" -lt $((timeout * 1000)) ] || 
        die "only $up of $count VMs were up${app:+, $done done,} after $timeout s (logs: $dir)"
    sleep 0.25
done
storm_ms=$(($(now_ms) - storm_began))

# All are up, all still run: now.
cache_images=$(cached_bytes "${raws[@]}")
cache_overlays=$(cached_bytes "${folder[@]/%//overlay.qcow2}")
cache_maps=$(cached_bytes "${maps[@]}")
# The traces as they are now: later reads are in neither figure. What was recorded reaches the file within 0.2 s.
if [ "$mode" = vmar ]; then
    sleep 0.3
    for ((i = 0; i < count; i++)); do
        cp "${folder[i]}/trace" "${folder[i]}/trace-now"
    done
fi
mapfile -t pids < <(cat "${folder[@]/%//qemu.pid}"; [ "$mode" = plain ] || cat "${folder[@]/%//vmar.pid}")
read_bytes=$(processes_read_bytes "${pids[@]}")
device_after=$(device_read_bytes)
device_bytes=null
[ "$device_before" = null ] || device_bytes=$((device_after - device_before))
per_image=$(fincore --json --bytes --output FILE,RES "${raws[@]}" |
    jq '[.fincore[] | {name: (.file | sub(".*/"; "") | rtrimstr(".raw")), bytes: (.res | tonumber)}]')

# What was to be measured is measured; a packet may come after the marker.
if [ -n "$packet" ]; then
    late=()
    for ((i = 0; i < count; i++)); do
        ! has_packet "${image_of[i]}" || late+=("${folder[i]}")
    done
    vm_wait_packets 20 "${late[@]}"
fi
vm_stop_all || die "a VM or its vmar did not end well (logs: $dir)"

# The least that any sharing of the base's content can cost: each block content that was read, once.
limit=null
if [ "$mode" = vmar ]; then
    limit=$("$vmar" trace stat "${folder[@]/%//trace-now}" --json 2>"$dir/trace-stat.log") ||
        die "vmar trace stat failed: $(tail -n 1 "$dir/trace-stat.log")"
fi

result=$(
    for ((i = 0; i < count; i++)); do
        printf '%s %s %d %d %s %s %s %s %s %s\n' "$(basename "${folder[i]}")" "${image_of[i]}" \
            $((began[i] - storm_began)) "${boot_ms[i]}" "${guest_s[i]}" "$(vm_packet_ms "${folder[i]}")" "${boot_cpu[i]}" \
            "${app_ms[i]}" "${app_s[i]}" "${app_cpu[i]}"
    done | jq -Rn --arg mode "$mode" --arg accel "$VMAR_ACCEL" --arg boot "$vm_boot" --argjson interval "$interval" \
        --argjson storm_ms "$storm_ms" --argjson images "$cache_images" --argjson overlays "$cache_overlays" \
        --argjson maps "$cache_maps" --argjson per_image "$per_image" --argjson read "$read_bytes" \
        --argjson device "$device_bytes" --argjson limit "$limit" --arg logs "$dir" '{
            $mode, $accel, $boot, $interval, $storm_ms,
            vms: [inputs | split(" ") | {name: .[0], image: .[1], arrived_ms: (.[2] | tonumber),
                boot_ms: (.[3] | tonumber), guest_seconds: (.[4] | tonumber), packet_ms: (.[5] | fromjson),
                cpu: (.[6] | fromjson), app_ms: (.[7] | fromjson), app_guest_seconds: (.[8] | fromjson),
                app_cpu: (.[9] | fromjson)}],
            cache: {images_bytes: $images, overlays_bytes: $overlays, maps_bytes: $maps, images: $per_image},
            disk: {read_bytes: $read, device_read_bytes: $device},
            limit: $limit, $logs
        }'
)
[ -z "$json" ] || printf '%s\n' "$result" >"$json"

jq -r '
    def mib: if . == null then "-" else . / 1048576 * 10 | round / 10 | tostring end;
    def pad(n): tostring | (" " * ([n - length, 0] | max)) + .;
    def seconds: if . == null then "-" else . / 100 | round / 10 end;
    def cpu: [.vcpu_ms, .runqueue_ms, .idle_ms] | map(seconds);
    "", (["VM", "image", "arrived s", "boot s", "guest s", "packet s", "cpu s", "runqueue s", "idle s"] | map(pad(12)) |
        join("")),
    (.vms[] | [.name, .image, .arrived_ms / 1000, .boot_ms / 1000, .guest_seconds, (.packet_ms | seconds)] + (.cpu | cpu) |
        map(pad(12)) | join("")),
    ([.vms[] | select(.app_ms)] | if length == 0 then empty else
        "", (["VM", "image", "load s", "guest s", "cpu s", "runqueue s", "idle s"] | map(pad(12)) | join("")),
        (.[] | [.name, .image, .app_ms / 1000, .app_guest_seconds] + (.app_cpu | cpu) | map(pad(12)) | join("")) end),
    "",
    "page cache of the images   \(.cache.images_bytes | mib | pad(8)) MiB   (\([.cache.images[] | select(.bytes > 0) |
        "\(.name) \(.bytes | mib)"] | join(", ")))",
    "page cache of the overlays \(.cache.overlays_bytes | mib | pad(8)) MiB",
    (if .mode == "vmar" then "page cache of the maps     \(.cache.maps_bytes | mib | pad(8)) MiB" else empty end),
    "disk reads of these VMs    \(.disk.read_bytes | mib | pad(8)) MiB   (whole device, everyone: \(.disk.device_read_bytes | mib) MiB)",
    (if .limit then "limit: content read, once  \(.limit.distinct_bytes | mib | pad(8)) MiB" else empty end),
    "all up\(if any(.vms[]; .app_ms) then " and loaded" else "" end) after \(.storm_ms / 1000) s"' <<<"$result"
