#!/usr/bin/env bash
# vmar in place of qemu-storage-daemon, for QEMU's own test of vhost-user-blk backends: takes the part of its command
# line that the test uses,
#
#   --blockdev driver=file,node-name=NODE,filename=FILE
#   --export type=vhost-user-blk,id=ID,addr.type=fd,addr.str=N,node-name=NODE,writable=on,num-queues=M
#
# each of them any number of times, and runs one $VMAR_BIN an export until SIGTERM. Fails when one of them does.
set -euo pipefail

refuse() {
    printf 'qsd-shim.sh: %s\n' "$*" >&2
    exit 2
}

# value KEY OPTIONS: of KEY=VALUE,KEY=VALUE...
value() {
    local pair
    while IFS= read -r -d , pair; do
        [ "${pair%%=*}" != "$1" ] || { printf '%s' "${pair#*=}"; return 0; }
    done <<<"$2,"
    return 1
}

declare -A file
exports=()
while [ $# -gt 0 ]; do
    case $1 in
        --blockdev)
            [ "$(value driver "$2")" = file ] || refuse "$2: only driver=file"
            file[$(value node-name "$2")]=$(value filename "$2")
            ;;
        --export)
            [ "$(value type "$2")" = vhost-user-blk ] || refuse "$2: only type=vhost-user-blk"
            [ "$(value addr.type "$2")" = fd ] || refuse "$2: only addr.type=fd"
            exports+=("$2")
            ;;
        --pidfile) echo $$ >"$2" ;;
        *) refuse "$1: not known" ;;
    esac
    shift 2
done

pids=()
status=0
stop=0
trap 'stop=1; [ ${#pids[@]} -eq 0 ] || kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for export in "${exports[@]}"; do
    options=(--blk-file "${file[$(value node-name "$export")]}" --fd "$(value addr.str "$export")"
        --num-queues "$(value num-queues "$export" || echo 1)")
    [ "$(value writable "$export" || true)" = on ] || options+=(--read-only)
    [ "$stop" -eq 0 ] || break
    "$VMAR_BIN" serve "${options[@]}" &
    pids+=($!)
    [ -z "${VMAR_SHIM_PIDS:-}" ] || echo $! >>"$VMAR_SHIM_PIDS"
done
# A signal between a start and its entry above.
[ "$stop" -eq 0 ] || kill -TERM "${pids[@]}" 2>/dev/null || true
for pid in "${pids[@]}"; do
    # A signal ends a wait early, with a status above 128.
    while :; do
        code=0
        wait "$pid" || code=$?
        [ "$code" -gt 128 ] && kill -0 "$pid" 2>/dev/null || break
    done
    [ "$code" -eq 0 ] || status=1
done
exit "$status"
