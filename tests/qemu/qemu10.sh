#!/usr/bin/env bash
# QEMU 10.0 of bookworm-backports beside the machine's own QEMU: nothing is installed, everything is in one folder.
#
#   tests/qemu/qemu10.sh [DIR]      [default: build/qemu10]
#
# Leaves DIR/root (the unpacked packages, with the libraries that the machine lacks) and DIR/bin (wrappers that run
# them). Says nothing and does nothing when they are there and run.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../qemu-scripts/common.sh"
# shellcheck source=tests/qemu/private-apt.sh
. "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh"
# shellcheck disable=SC2034 # die says it
me=tests/qemu/qemu10.sh

dir=${1:-$repo/build/qemu10}
programs=(qemu-system-x86_64 qemu-img qemu-io qemu-nbd qemu-storage-daemon)

# complete BIN: whether every wrapper in it runs and is of version 10.0.
complete() {
    local program
    for program in "${programs[@]}"; do
        case $("$1/$program" --version 2>/dev/null </dev/null) in
            *" 10.0."*) ;;
            *) return 1 ;;
        esac
    done
}

# A machine without a guest comes up and answers its monitor.
starts() {
    timeout -k 2 60 "$dir/bin.new/qemu-system-x86_64" -M none -display none -nodefaults -monitor stdio \
        <<<quit >"$dir/start.log" 2>&1
}

# needed FILE: not what the machine has itself, and never its C library: that belongs to the machine's dynamic linker.
needed() {
    local name version installed
    name=$(dpkg-deb -f "$1" Package)
    version=$(dpkg-deb -f "$1" Version)
    case $name in
        qemu* | seabios | ipxe-qemu) return 0 ;;
        libc6) return 1 ;;
    esac
    installed=$(dpkg-query -W -f '${db:Status-Abbrev}${Version}' "$name" 2>/dev/null) || return 0
    case $installed in
        "ii "*) ! dpkg --compare-versions "${installed#ii }" ge "$version" ;;
        *) return 0 ;;
    esac
}

! complete "$dir/bin" || exit 0

mkdir -p "$dir"
dir=$(realpath "$dir")
exec 8>"$dir/lock"
flock 8
! complete "$dir/bin" || exit 0

say "getting QEMU 10.0 of bookworm-backports into $dir"
private_apt_setup "$dir/apt" deb bookworm-backports
version=$(apt-cache "${apt_options[@]}" madison qemu-system-x86 | awk '$3 ~ /^1:10\.0\./ { print $3; exit }')
[ -n "$version" ] || die "apt offers no qemu-system-x86 10.0 in bookworm-backports: $(
    apt-cache "${apt_options[@]}" madison qemu-system-x86 | awk '{ printf "%s ", $3 }')"
apt-get "${apt_options[@]}" -t bookworm-backports --no-install-recommends --download-only --yes \
    install "qemu-system-x86=$version" "qemu-utils=$version" ipxe-qemu >"$dir/install.log" 2>&1 ||
    die "could not download QEMU $version: see $dir/install.log"

rm -rf "${dir:?}"/{root,bin,bin.new}
mkdir -p "$dir"/{root,bin.new}
for package in "$dir"/apt/cache/archives/*.deb; do
    ! needed "$package" || dpkg -x "$package" "$dir/root"
done
rm -rf "$dir/apt"

libraries=$dir/root/usr/lib/x86_64-linux-gnu:$dir/root/lib/x86_64-linux-gnu
modules=$dir/root/usr/lib/x86_64-linux-gnu/qemu
for program in "${programs[@]}"; do
    firmware=
    if [ "$program" = qemu-system-x86_64 ]; then
        firmware="-L '$dir/root/usr/share/qemu' -L '$dir/root/usr/share/seabios' -L '$dir/root/usr/lib/ipxe/qemu' "
    fi
    cat >"$dir/bin.new/$program" <<END
#!/bin/sh
export LD_LIBRARY_PATH='$libraries'\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH} QEMU_MODULE_DIR='$modules'
exec '$dir/root/usr/bin/$program' $firmware"\$@"
END
    chmod +x "$dir/bin.new/$program"
done

complete "$dir/bin.new" || die "QEMU 10.0 does not run: try $dir/bin.new/qemu-system-x86_64 --version"
starts || die "QEMU 10.0 starts no machine: see $dir/start.log"
mv "$dir/bin.new" "$dir/bin"
