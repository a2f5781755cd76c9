#!/usr/bin/env bash
# Makes real Debian disk images, one per role, from nothing but Debian packages. See README.md beside this file.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
default_roles=(web db cache python)
# What a machine needs to boot, and what an administrator expects to find on one.
base_packages=(systemd-sysv udev dbus kmod initramfs-tools zstd iproute2 procps ca-certificates
    openssl curl wget gnupg perl man-db bash-completion sudo rsync file less vim tmux htop)
grub=/usr/lib/grub/i386-pc
part_start=$((1024 * 1024))
lists_max_age=$((6 * 3600))

usage() {
    cat <<EOF
usage: images/build.sh [--out DIR] [--size 2G] [--force] [--list] [ROLE...]

Builds ROLE.raw, and ROLE.vmlinuz, ROLE.initrd and ROLE.cmdline for a boot without boot loader, in DIR.

  --out DIR     where images and caches go (default: \$VMAR_IMAGES_DIR, else build/images of the repository)
  --size SIZE   virtual size of the disk, a multiple of 1 MiB (default 2G)
  --force       build again what is there already
  --list        print the roles there are, and stop

Roles: $(roles | tr '\n' ' ')(default: ${default_roles[*]})
Takes Debian's mirror and the release from this machine's apt configuration. Must run as root.
EOF
}

die() {
    printf 'images/build.sh: %s\n' "$*" >&2
    exit 1
}

roles() {
    local f
    for f in "$here"/roles/*.sh; do
        basename "$f" .sh
    done
}

# --------------------------------------------------------------------------------------------------------------------
# Outside: tools, apt's sources, one sandbox per image.

apt_lists_fresh() {
    [ -n "$(find /var/lib/apt/lists -maxdepth 1 -name '*Release' -mmin -1440 -print -quit 2>/dev/null)" ]
}

install_tools() {
    local missing=() pair
    # command or file : package
    for pair in debootstrap:debootstrap mkfs.ext4:e2fsprogs grub-mkimage:grub-common "$grub/boot.img:grub-pc-bin" \
        sfdisk:fdisk losetup:mount fstrim:util-linux flock:util-linux unshare:util-linux \
        /usr/share/keyrings/debian-archive-keyring.gpg:debian-archive-keyring; do
        command -v "${pair%:*}" >/dev/null || [ -e "${pair%:*}" ] || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "installing ${missing[*]}"
    { apt_lists_fresh || apt-get update; DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        "${missing[@]}"; } >"$out/log/tools.log" 2>&1 ||
        die "could not install ${missing[*]}: see $out/log/tools.log"
}

# Writes sources.list: every Debian suite of the release of this machine that its own apt uses.
find_sources() {
    local codename origin label name uri release component
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    [ -n "$codename" ] || die "/etc/os-release names no VERSION_CODENAME: is this Debian?"
    apt_lists_fresh || apt-get update >"$out/log/apt-update.log" 2>&1 ||
        die "apt-get update failed: see $out/log/apt-update.log"
    # The $(...) are apt's own placeholders.
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)' \
        'Created-By: Packages' |
        while IFS='|' read -r origin label name uri release component; do
            case $origin/$component/$label/$name in
                Debian/main/Debian/"$codename" | Debian/main/Debian/"$codename-updates" | \
                    Debian/main/Debian-Security/"$codename"*)
                    echo "deb $uri $release $component" ;;
            esac
        done | sort -u >"$cache/sources.list.new"
    mv "$cache/sources.list.new" "$cache/sources.list"
    suite=$codename
    mirror=$(awk -v s="$suite" '$3 == s { print $2; exit }' "$cache/sources.list")
    [ -n "$mirror" ] || die "apt of this machine has no source for Debian $suite main"
}

# apt in the image behaves as apt of this machine does (proxy, clock checks), and keeps what it downloads.
write_apt_conf() {
    {
        apt-config dump | grep -E '^Acquire::(http|https|ftp|Retries|Check-Date|Check-Valid-Until)' | grep -v '""' || true
        cat <<'EOF'
APT::Keep-Downloaded-Packages "true";
Acquire::Languages "none";
Dpkg::Options { "--force-unsafe-io"; };
Dpkg::Use-Pty "false";
EOF
    } >"$cache/apt.conf"
}

cleanup() {
    if [ -n "${child:-}" ]; then
        kill -KILL "$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    [ -z "${tmp:-}" ] || rm -rf "$tmp"
}

# Runs one function of this script as process 1 of its own PID and mount namespace: whatever ends it, also kill -9,
# takes its processes, its mounts and, with them, its loop devices away.
sandboxed() {
    local log=$1
    shift
    VMAR_BUILD_INSIDE=1 out=$out cache=$cache suite=$suite mirror=$mirror size_mib=$size_mib tmp=$tmp \
        unshare --mount --pid --fork --kill-child --mount-proc bash "$here/build.sh" "$@" \
        </dev/null 3>&1 >"$log" 2>&1 &
    child=$!
    local status=0
    wait "$child" || status=$?
    child=
    return $status
}

parse_size() {
    local bytes
    bytes=$(numfmt --from=iec "$1" 2>/dev/null) || die "--size $1 is no size; say 2G or 1536M"
    [ $((bytes % 1048576)) -eq 0 ] || die "--size $1 is no multiple of 1 MiB"
    size_mib=$((bytes / 1048576))
    [ "$size_mib" -ge 1536 ] || die "--size $1 is too small; 1536M is the least that holds a system"
}

main() {
    out=${VMAR_IMAGES_DIR:-$here/../build/images}
    local size=2G force='' wanted=()
    while [ $# -gt 0 ]; do
        case $1 in
            --out) out=${2:?--out needs a directory}; shift ;;
            --size) size=${2:?--size needs a size}; shift ;;
            --force) force=1 ;;
            --list) roles; exit 0 ;;
            -h | --help) usage; exit 0 ;;
            -*) usage >&2; exit 2 ;;
            *) wanted+=("$1") ;;
        esac
        shift
    done
    [ ${#wanted[@]} -gt 0 ] || wanted=("${default_roles[@]}")
    local role
    for role in "${wanted[@]}"; do
        [ -f "$here/roles/$role.sh" ] || die "no role $role; there are: $(roles | tr '\n' ' ')"
    done
    parse_size "$size"
    [ "$(id -u)" -eq 0 ] || die "must run as root: it mounts file systems and installs packages in them"

    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    cache=$out/cache
    mkdir -p "$out/log" "$cache/apt/archives/partial" "$cache/lists/partial"
    exec 9>"$out/.lock"
    flock -n 9 || { echo "another build is at work in $out; waiting for it"; flock 9; }
    rm -rf "$out"/.tmp.*

    local missing=()
    for role in "${wanted[@]}"; do
        if [ -z "$force" ] && [ -e "$out/$role.raw" ]; then
            echo "$role: there already ($out/$role.raw)"
        else
            missing+=("$role")
        fi
    done
    [ ${#missing[@]} -gt 0 ] || return 0

    child=
    tmp=
    trap cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    install_tools
    find_sources
    write_apt_conf

    local free_mib
    free_mib=$(df --output=avail -m "$out" | tail -n 1)
    [ "$free_mib" -gt $((1000 * (${#missing[@]} + 1))) ] ||
        die "$out has only $free_mib MiB free; ${#missing[@]} images need about $((1000 * (${#missing[@]} + 1)))"

    tmp=$(mktemp -d "$out/.tmp.XXXXXX")
    if [ ! -e "$cache/base-$suite.tar" ]; then
        sandboxed "$out/log/base.log" inside_base || die "the base system failed: see $out/log/base.log"
    fi
    local began
    for role in "${missing[@]}"; do
        began=$SECONDS
        sandboxed "$out/log/$role.log" inside_image "$role" || die "image $role failed: see $out/log/$role.log"
        publish "$role"
        echo "$role: $out/$role.raw, $(du -m "$out/$role.raw" | cut -f1) MiB of $size_mib, in $((SECONDS - began)) s"
    done
}

# The raw comes last: where it is, the image is complete.
publish() {
    local role=$1 part
    for part in vmlinuz initrd cmdline raw; do
        mv -f "$tmp/$role.$part" "$out/$role.$part"
    done
}

# --------------------------------------------------------------------------------------------------------------------
# Inside: process 1 of a sandbox. Standard output is the log, descriptor 3 is for the person who waits.

step() {
    echo "== $*"
    printf '%s: %s\n' "$inside_name" "$*" >&3
}

in_image() {
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C \
        DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true chroot "$root" "$@"
}

inside_base() {
    inside_name=base
    root=$tmp/base
    step "debootstrap of $suite (once, then cached)"
    debootstrap --variant=minbase --include="$(IFS=,; echo "${base_packages[*]}")" "$suite" "$root" "$mirror"
    rm -f "$root"/var/cache/apt/archives/*.deb "$root"/var/cache/apt/*.bin
    rm -rf "$root"/var/lib/apt/lists/*
    tar -C "$root" --one-file-system --numeric-owner --xattrs -cf "$cache/base-$suite.tar.new" .
    mv "$cache/base-$suite.tar.new" "$cache/base-$suite.tar"
    rm -rf "$root"
}

make_disk() {
    local raw=$1 uuid=$2
    truncate -s "${size_mib}M" "$raw"
    # MBR, one bootable Linux partition at 1 MiB: 4 KiB blocks of the disk are 4 KiB blocks of the file system.
    printf 'label: dos\nstart=%s, type=83, bootable\n' $((part_start / 512)) | sfdisk --quiet "$raw"
    # Tables are initialized now, not by the first guest.
    mkfs.ext4 -q -b 4096 -L "$role" -U "$uuid" -J size=16 \
        -E "offset=$part_start,lazy_itable_init=0,lazy_journal_init=0" "$raw" "$((size_mib - 1))M"
}

# Kernels: the newest that the archive has, and one some point releases older.
choose_kernel() {
    local which=$1 newest series all
    newest=$(in_image apt-cache show --no-all-versions linux-image-cloud-amd64 |
        sed -n 's/^Depends:.*\(linux-image-[0-9][^ ,]*\).*/\1/p')
    [ -n "$newest" ] || { echo "apt knows no linux-image-cloud-amd64"; return 1; }
    series=$(cut -d. -f1,2 <<<"$newest")
    mapfile -t all < <(in_image apt-cache pkgnames "$series." | grep -E -- '-cloud-amd64$' |
        while read -r name; do
            # Names that other packages only mention have no version.
            [ -z "$(in_image apt-cache madison "$name")" ] || echo "$name"
        done | sort -V)
    case $which in
        newest) kernel=$newest ;;
        older) kernel=${all[$((${#all[@]} > 3 ? ${#all[@]} - 4 : 0))]} ;;
        *) echo "unknown kernel choice '$which'"; return 1 ;;
    esac
}

update_lists() {
    local stamp=$cache/lists/updated
    if [ -e "$stamp" ] && [ $(($(date +%s) - $(stat -c %Y "$stamp"))) -lt $lists_max_age ] &&
        cmp -s "$stamp" "$cache/sources.list"; then
        return 0
    fi
    step "package lists"
    in_image apt-get update
    cp "$cache/sources.list" "$stamp"
}

configure_system() {
    echo "$role" >"$root/etc/hostname"
    printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$role" >"$root/etc/hosts"
    printf 'UUID=%s / ext4 errors=remount-ro 0 1\n' "$uuid" >"$root/etc/fstab"
    : >"$root/etc/machine-id"
    rm -f "$root/var/lib/dbus/machine-id"
    mkdir -p "$root/etc/systemd/network"
    printf '[Match]\nName=en*\n\n[Network]\nDHCP=yes\n' >"$root/etc/systemd/network/50-wired.network"
    # Nothing that only makes a short life longer: no waiting, no daily chores. The serial port belongs to the marker.
    in_image systemctl mask systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer \
        dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-pstore.service \
        serial-getty@ttyS0.service
    in_image systemctl enable systemd-networkd.service
    install -m 0755 "$here/guest/vmar-marker" "$root/usr/local/sbin/vmar-marker"
    install -m 0644 "$here/guest/vmar-marker.service" "$root/etc/systemd/system/vmar-marker.service"
    printf 'name=%s\nunits="%s"\n' "$role" "${role_units:-}" >"$root/etc/vmar-image"
    in_image systemctl enable vmar-marker.service
}

# GRUB, put in place by hand: grub-install wants to see partitions, and a loop device with an offset has none. The first
# stage loads the sector after it, where the core image lies between the partition table and the partition; its list of
# sectors says just that as it comes.
#
# Not extlinux: its two first stages run at the same address, the second loaded over the first. Under TCG it
# hangs there with any vhost-user disk (seen with qemu-storage-daemon too), as if QEMU did not notice that another process
# has replaced code that it has translated. GRUB loads into a buffer, lets the processor copy, and boots.
install_boot_loader() {
    local version=$1 cmdline=$2 raw=$3 core=$tmp/core.img
    mkdir -p "$root/boot/grub/i386-pc"
    cp "$grub"/*.mod "$grub"/*.lst "$root/boot/grub/i386-pc/"
    cat >"$root/boot/grub/grub.cfg" <<EOF
serial --unit=0 --speed=115200
terminal_output serial
set timeout=0
menuentry Debian {
    linux /boot/vmlinuz-$version $cmdline
    initrd /boot/initrd.img-$version
}
EOF
    grub-mkimage -O i386-pc -p '(hd0,msdos1)/boot/grub' -o "$core" biosdisk part_msdos ext2 serial normal linux
    [ "$(stat -c %s "$core")" -le $((part_start - 512)) ] || { echo "GRUB's core image is too big"; return 1; }
    dd if="$grub/boot.img" of="$raw" bs=440 count=1 conv=notrunc status=none
    dd if="$core" of="$raw" bs=512 seek=1 conv=notrunc status=none
    rm "$core"
}

inside_image() {
    role=$1
    inside_name=$role
    role_kernel=newest role_packages='' role_apt_options='' role_units='' role_debconf=''
    role_configure() { :; }
    # shellcheck source=/dev/null
    . "$here/roles/$role.sh"

    local raw=$tmp/$role.raw uuid version cmdline
    root=$tmp/mnt
    uuid=$(cat /proc/sys/kernel/random/uuid)
    cmdline="root=UUID=$uuid ro console=tty0 console=ttyS0,115200 quiet"

    step "disk of $size_mib MiB, base system"
    make_disk "$raw" "$uuid"
    mkdir -p "$root"
    mount -o "loop,offset=$part_start,sizelimit=$(((size_mib - 1) * 1048576))" "$raw" "$root"
    tar -C "$root" --numeric-owner --xattrs --xattrs-include='*' -xf "$cache/base-$suite.tar"
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t tmpfs tmpfs "$root/run"
    mount -t tmpfs tmpfs "$root/tmp"
    mount --bind "$cache/apt" "$root/var/cache/apt"
    mount --bind "$cache/lists" "$root/var/lib/apt/lists"
    cp "$cache/sources.list" "$root/etc/apt/sources.list"
    cp "$cache/apt.conf" "$root/etc/apt/apt.conf.d/99vmar-build"
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod 0755 "$root/usr/sbin/policy-rc.d"

    update_lists
    choose_kernel "$role_kernel"
    step "kernel ${kernel#linux-image-}"
    in_image apt-get install -y --no-install-recommends "$kernel"
    step "${role_packages}"
    [ -z "$role_debconf" ] || in_image debconf-set-selections <<<"$role_debconf"
    # shellcheck disable=SC2086
    in_image apt-get install -y $role_apt_options $role_packages

    step "configuration and boot loader"
    version=${kernel#linux-image-}
    configure_system
    role_configure "$root"
    install_boot_loader "$version" "$cmdline" "$raw"
    cp "$root/boot/vmlinuz-$version" "$tmp/$role.vmlinuz"
    cp "$root/boot/initrd.img-$version" "$tmp/$role.initrd"
    echo "$cmdline" >"$tmp/$role.cmdline"

    rm -f "$root/usr/sbin/policy-rc.d" "$root/etc/apt/apt.conf.d/99vmar-build" "$root/etc/resolv.conf"
    umount "$root/var/lib/apt/lists" "$root/var/cache/apt" "$root/tmp" "$root/run" "$root/sys" "$root/proc"
    sync -f "$root"
    fstrim "$root"
    umount "$root"
    e2fsck -f -n "$raw?offset=$part_start"
}

if [ "${VMAR_BUILD_INSIDE:-}" = 1 ]; then
    "$@"
else
    main "$@"
fi
