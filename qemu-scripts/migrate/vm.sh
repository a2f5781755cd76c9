# Sourced by the scripts that move VMs and keep them: one VM with a monitor for vmar, one for the script, and a root shell.
#
# They set: qemu_of (the QEMU of each host), machine_type, smp, dir, now (the folder of the VM that runs), and what common.sh has.
# shellcheck shell=bash disable=SC2034,SC2154

# qemu_start HOST NAME DIR OVERLAY WHAT: a vmar and a QEMU there (HOST: a network namespace, or - for none), with a guest that boots (WHAT:
# boot), or ready to take one that then runs by itself (incoming) or not (incoming-stopped); or an earlier one of itself (restore).
# shellcheck disable=SC2054 # QEMU's commas
qemu_start() {
    local host=$1 name=$2 dir=$3 overlay=$4 what=$5 left=200 reconnect='reconnect=1' machine=() enter=() accel=$VMAR_ACCEL calm=''
    local bin=${qemu_of[$host]}
    [ "$("$bin" --version | sed -n 's/.*version \([0-9]*\)\..*/\1/p')" -lt 10 ] || reconnect='reconnect-ms=1000'
    [ "$accel" != tcg ] || { accel=tcg,tb-size=256 calm=' no_timer_check'; }
    vm_serve_more=()
    case $what in
        boot) ;;
        incoming | restore) machine=(-incoming defer) ;;
        incoming-stopped) machine=(-incoming defer -S) ;;
    esac
    case $what in incoming*) vm_serve_more=(--incoming) ;; esac
    [ "$host" = - ] || enter=(nsenter --net="/run/netns/$host")
    vm_folder "$dir"
    vm_dirs+=("$dir")
    vm_serve "$name" "$dir" "$overlay"
    now_ms >"$dir/began"
    # Not by a function: this is to be QEMU's own process.
    "${enter[@]}" "$bin" -name "vmar-$name" -nodefaults -display none -no-reboot -machine "$machine_type,memory-backend=ram0" \
        -object "memory-backend-memfd,id=ram0,size=$ram_bytes,share=on" -m "${ram_bytes}B" -smp "$smp" -accel "$accel" \
        -chardev "socket,id=disk0,path=$dir/blk.sock,$reconnect" -device vhost-user-blk-pci,chardev=disk0,bootindex=1 \
        -kernel "$vm_images/$name.vmlinuz" -initrd "$vm_images/$name.initrd" \
        -append "$(cat "$vm_images/$name.cmdline") panic=-1$calm systemd.debug_shell=ttyS1" -device virtio-rng-pci \
        -qmp "unix:$dir/proxy.qmp,server=on,wait=off" -qmp "unix:$dir/script.qmp,server=on,wait=off" -serial "file:$dir/serial.log" \
        -chardev "socket,id=shell,path=$dir/shell.sock,server=on,wait=off" -serial chardev:shell "${machine[@]}" \
        >"$dir/qemu.log" 2>&1 </dev/null &
    echo $! >"$dir/qemu.pid"
    until [ -S "$dir/proxy.qmp" ] && [ -S "$dir/script.qmp" ] && [ -S "$dir/shell.sock" ]; do
        kill -0 "$(cat "$dir/qemu.pid")" 2>/dev/null || die "QEMU ended: $(tail -n 1 "$dir/qemu.log") (log: $dir/qemu.log)"
        left=$((left - 1))
        [ "$left" -gt 0 ] || die "QEMU shows no monitor after 20 s (log: $dir/qemu.log)"
        sleep 0.1
    done
}

# in_guest SECONDS VERB [ARGUMENT...]: see migrate/guest.sh
in_guest() {
    local seconds=$1
    shift
    python3 "$repo/qemu-scripts/migrate/console.py" "$now/shell.sock" "$seconds" "$@" <"$repo/qemu-scripts/migrate/guest.sh"
}

# qemu_version HOST
qemu_version() {
    "${qemu_of[$1]}" --version | sed -n 's/.*version \([0-9.]*\).*/\1/p'
}

# library_with NAME...: $vm_library has these images.
library_with() {
    local name sources=() known
    if [ ! -d "$vm_library" ]; then
        mkdir -p "$(dirname "$vm_library")"
        "$vmar" library init "$vm_library" >"$dir/library.log" || die "could not make the library $vm_library"
    fi
    known=$("$vmar" image list --json --library "$vm_library" | jq -r '.[].name') || die "could not read the library $vm_library"
    for name; do
        grep -qxF -- "$name" <<<"$known" || sources+=("$name=$(realpath "$vm_images/$name.raw")")
    done
    [ ${#sources[@]} -gt 0 ] || return 0
    say "adding ${#sources[@]} images to $vm_library"
    "$vmar" image add "${sources[@]}" --library "$vm_library" >>"$dir/library.log" 2>&1 || die "could not add the images: $(tail -n 1 "$dir/library.log")"
}

# choose_memory HOST: until 9.0 QEMU loses writes of an emulated guest while it migrates: it clears dirty bits 64 at a time and does not tell the translated
# code (its commit 03bfc2188f06): two guests in some sixty moves crashed, in whatever mode. It goes page by page, and does tell, through
# memory that is not of whole 64 pages, so that is what it gets; the first round begins up to a second later.
choose_memory() {
    ram_bytes=$((vm_memory * 1048576))
    if [ "$VMAR_ACCEL" = tcg ] && [ "$(qemu_version "$1" | cut -d. -f1)" -lt 9 ]; then
        ram_bytes=$((ram_bytes + 8192))
        say "note: QEMU $(qemu_version "$1") loses writes of emulated guests that migrate, but for 8 KiB more memory, which the guest gets"
    fi
}
