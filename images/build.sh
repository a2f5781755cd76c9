#!/usr/bin/env bash
# Makes real Debian disk images from nothing but Debian packages. See README.md beside this file.
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
usage: images/build.sh [--out DIR] [--size 2G] [--force] [--list] [IMAGE...]

IMAGE is [NAME=]ROLE[,KEY=VALUE...]; without NAME it is named after its role. Builds NAME.raw, and NAME.vmlinuz,
NAME.initrd and NAME.cmdline for a boot without boot loader, in DIR; NAME.info says what it is.

  release=R     bookworm, trixie, ... (default: the role's, else this machine's)
  kernel=K      newest, older by some point releases, backports (the newest there), or a series such as 6.12
                (default: the role's)
  fs=F          ext4 or xfs (default: the role's, else ext4)
  size=S        virtual size of this disk (default: the role's, else --size)
  pin=P:V[+..]  take package P, and what else its source package makes, in version V: newest, older (the oldest that the
                archive has) or how a version begins, such as 15.18
  use=U         make NAME.use.tar as well: what qemu-scripts/capture.sh runs in the guest, see use/U.sh

  --out DIR     where images and caches go (default: \$VMAR_IMAGES_DIR, else build/images of the repository)
  --size SIZE   virtual size of the disk, a multiple of 1 MiB (default 2G)
  --force       build again what is there already
  --list        print the roles there are, and stop

Roles: $(roles | tr '\n' ' ')(default: ${default_roles[*]})
Takes Debian's mirrors from this machine's apt configuration, for other releases too. Must run as root.
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
        /usr/share/keyrings/debian-archive-keyring.gpg:debian-archive-keyring "$@"; do
        command -v "${pair%:*}" >/dev/null || [ -e "${pair%:*}" ] || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "installing ${missing[*]}"
    { apt_lists_fresh || apt-get update; DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        "${missing[@]}"; } >"$out/log/tools.log" 2>&1 ||
        die "could not install ${missing[*]}: see $out/log/tools.log"
}

find_release() {
    machine=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    [ -n "$machine" ] || die "/etc/os-release names no VERSION_CODENAME: is this Debian?"
}

# Every Debian suite with packages that apt of this machine uses: codename, address, suite, component.
machine_sources() {
    # The $(...) are apt's own placeholders.
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)' \
        'Created-By: Packages' |
        while IFS='|' read -r origin label name uri suite component; do
            case $origin/$component/$label in
                Debian/main/Debian | Debian/main/Debian-Security) echo "$name $uri $suite $component" ;;
            esac
        done | sort -u
}

# Writes the sources of the images of one release ($variant: the release, or with "-backports"): what apt of this machine
# uses for that release, or else what it uses for its own, with the other name in it.
find_sources() {
    local file=$cache/sources-$variant.list name uri suite component
    apt_lists_fresh || apt-get update >"$out/log/apt-update.log" 2>&1 ||
        die "apt-get update failed: see $out/log/apt-update.log"
    machine_sources | awk -v r="$release" '$1 == r || $1 == r "-updates" || $1 ~ "^" r "(-|/)security$" {
        print "deb", $2, $3, $4 }' >"$file.new"
    if ! grep -q . "$file.new"; then
        machine_sources | while read -r name uri suite component; do
            case $name in
                "$machine" | "$machine-updates" | "$machine-security")
                    echo "deb $uri $release${name#"$machine"} $component" ;;
            esac
        done >"$file.new"
    fi
    # The suite that debootstrap is to take may be called "stable" in these sources.
    mirror=$(machine_sources | awk -v r="$release" -v m="$machine" '
        $1 == r { print $2; found = 1; exit } $1 == m { other = $2 } END { if (!found) print other }')
    [ -n "$mirror" ] || die "apt of this machine has no source for Debian $machine main: put one into /etc/apt/sources.list"
    [ "$variant" = "$release" ] || echo "deb $mirror $release-backports main" >>"$file.new"
    mv "$file.new" "$file"
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
    VMAR_BUILD_INSIDE=1 out=$out cache=$cache machine=$machine mirror=${mirror:-} size=$size tmp=$tmp \
        unshare --mount --pid --fork --kill-child --mount-proc bash "$here/build.sh" "$@" \
        </dev/null 3>&1 >"$log" 2>&1 &
    child=$!
    local status=0
    wait "$child" || status=$?
    child=
    return $status
}

# --------------------------------------------------------------------------------------------------------------------
# What an image is to be.

# parse_size SIZE: sets size_mib
parse_size() {
    local bytes
    bytes=$(numfmt --from=iec "$1" 2>/dev/null) || die "size $1 is no size; say 2G or 1536M"
    [ $((bytes % 1048576)) -eq 0 ] || die "size $1 is no multiple of 1 MiB"
    size_mib=$((bytes / 1048576))
    [ "$size_mib" -ge 1536 ] || die "size $1 is too small; 1536M is the least that holds a system"
}

# read_spec [NAME=]ROLE[,KEY=VALUE...]: sets name, role, release, kernel_choice, fs, size_mib, pins, use and variant, and the
# role's own variables and function. A role sees $release, the one that is asked for or this machine's.
# shellcheck disable=SC2034 # some are for one side of the sandbox only
read_spec() {
    local spec=$1 option options=()
    name=${spec%%,*}
    role=${name#*=}
    name=${name%%=*}
    IFS=, read -ra options <<<"${spec#"${spec%%,*}"}"
    local asked_release='' asked_kernel='' asked_fs='' asked_size=''
    use='' pins=''
    for option in "${options[@]}"; do
        case $option in
            '') ;;
            release=?*) asked_release=${option#*=} ;;
            kernel=?*) asked_kernel=${option#*=} ;;
            fs=?*) asked_fs=${option#*=} ;;
            size=?*) asked_size=${option#*=} ;;
            pin=?*) pins=${option#*=} ;;
            use=?*) use=${option#*=} ;;
            *) die "$spec: cannot read '$option'; say release=, kernel=, fs=, size=, pin= or use=" ;;
        esac
    done
    [[ $name =~ ^[a-z0-9][a-z0-9-]*$ ]] || die "$spec: the name is also the host's name: small letters, digits and -"
    [ -f "$here/roles/$role.sh" ] || die "no role $role; there are: $(roles | tr '\n' ' ')"
    [[ -z $pins || $pins =~ ^[^:+]+:[^:+]+(\+[^:+]+:[^:+]+)*$ ]] ||
        die "$spec: pin=$pins: say PACKAGE:VERSION, several joined by +"
    [ -z "$use" ] || [ -f "$here/use/$use.sh" ] || die "$spec: there is no images/use/$use.sh"

    release=${asked_release:-$machine}
    role_release='' role_kernel=newest role_fs=ext4 role_size='' role_packages='' role_apt_options='' role_units=''
    role_debconf='' role_app=''
    role_configure() { :; }
    # shellcheck source=/dev/null
    . "$here/roles/$role.sh"
    release=${asked_release:-${role_release:-$machine}}
    kernel_choice=${asked_kernel:-$role_kernel}
    fs=${asked_fs:-$role_fs}
    parse_size "${asked_size:-${role_size:-$size}}"
    variant=$release
    case $kernel_choice in
        newest | older) ;;
        backports | [0-9]*.[0-9]*) variant=$release-backports ;;
        *) die "$spec: kernel $kernel_choice: say newest, older, backports or a series such as 6.12" ;;
    esac
    case $fs in
        ext4 | xfs) ;;
        *) die "$spec: file system $fs: say ext4 or xfs" ;;
    esac
}

main() {
    out=${VMAR_IMAGES_DIR:-$here/../build/images}
    size=2G
    local force='' wanted=()
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
    find_release
    local spec
    for spec in "${wanted[@]}"; do
        read_spec "$spec"
    done
    [ "$(id -u)" -eq 0 ] || die "must run as root: it mounts file systems and installs packages in them"

    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    cache=$out/cache
    mkdir -p "$out/log"
    exec 9>"$out/.lock"
    flock -n 9 || { echo "another build is at work in $out; waiting for it"; flock 9; }
    rm -rf "$out"/.tmp.*

    local missing=() xfs=()
    for spec in "${wanted[@]}"; do
        read_spec "$spec"
        if [ -z "$force" ] && [ -e "$out/$name.raw" ]; then
            echo "$name: there already ($out/$name.raw)"
        else
            missing+=("$spec")
            [ "$fs" != xfs ] || xfs=(mkfs.xfs:xfsprogs)
        fi
    done
    [ ${#missing[@]} -gt 0 ] || return 0

    child=
    tmp=
    trap cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    install_tools "${xfs[@]}"
    mkdir -p "$cache/apt/archives/partial" "$cache/lists"
    write_apt_conf

    local free_mib
    free_mib=$(df --output=avail -m "$out" | tail -n 1)
    [ "$free_mib" -gt $((1000 * (${#missing[@]} + 1))) ] ||
        die "$out has only $free_mib MiB free; ${#missing[@]} images need about $((1000 * (${#missing[@]} + 1)))"

    tmp=$(mktemp -d "$out/.tmp.XXXXXX")
    local began
    for spec in "${missing[@]}"; do
        read_spec "$spec"
        find_sources
        if [ ! -e "$cache/base-$release.tar" ]; then
            sandboxed "$out/log/base-$release.log" inside_base "$release" ||
                die "the base system of $release failed: see $out/log/base-$release.log"
        fi
        began=$SECONDS
        sandboxed "$out/log/$name.log" inside_image "$spec" || die "image $name failed: see $out/log/$name.log"
        echo "build_seconds=$((SECONDS - began))" >>"$tmp/$name.info"
        publish
        echo "$name: $out/$name.raw, $(du -m "$out/$name.raw" | cut -f1) MiB of $size_mib, in $((SECONDS - began)) s"
    done
}

# The raw comes last: where it is, the image is complete.
publish() {
    local part
    [ -z "$use" ] || mv -f "$tmp/$name.use.tar" "$out/$name.use.tar"
    for part in vmlinuz initrd cmdline info raw; do
        mv -f "$tmp/$name.$part" "$out/$name.$part"
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
    release=$1
    inside_name=base
    root=$tmp/base
    step "debootstrap of $release (once, then cached)"
    debootstrap --variant=minbase --include="$(IFS=,; echo "${base_packages[*]}")" "$release" "$root" "$mirror"
    rm -f "$root"/var/cache/apt/archives/*.deb "$root"/var/cache/apt/*.bin
    rm -rf "$root"/var/lib/apt/lists/*
    tar -C "$root" --one-file-system --numeric-owner --xattrs -cf "$cache/base-$release.tar.new" .
    mv "$cache/base-$release.tar.new" "$cache/base-$release.tar"
    rm -rf "$root"
}

make_disk() {
    local raw=$1 uuid=$2
    truncate -s "${size_mib}M" "$raw"
    # MBR, one bootable Linux partition at 1 MiB: 4 KiB blocks of the disk are 4 KiB blocks of the file system.
    printf 'label: dos\nstart=%s, type=83, bootable\n' $((part_start / 512)) | sfdisk --quiet "$raw"
    case $fs in
        ext4)
            # Tables are initialized now, not by the first guest.
            mkfs.ext4 -q -b 4096 -L "${name:0:16}" -U "$uuid" -J size=16 \
                -E "offset=$part_start,lazy_itable_init=0,lazy_journal_init=0" "$raw" "$((size_mib - 1))M"
            ;;
        xfs) on_loop "$raw" mkfs.xfs -q -f -b size=4096 -s size=512 -L "${name:0:12}" -m "uuid=$uuid" ;;
    esac
}

# on_loop RAW COMMAND...: the command on the partition. The device goes with the descriptor that holds it, whatever
# happens to this process.
on_loop() {
    local raw=$1 loop status=0
    shift
    loop=$(losetup --find --show --offset $part_start --sizelimit $(((size_mib - 1) * 1048576)) "$raw")
    exec 5<"$loop"
    losetup --detach "$loop"
    "$@" "$loop" || status=$?
    exec 5<&-
    return $status
}

check_disk() {
    case $fs in
        ext4) e2fsck -f -n "$1?offset=$part_start" ;;
        xfs) on_loop "$1" xfs_repair -n ;;
    esac
}

# kernels PREFIX: cloud kernels that can be had, oldest first.
kernels() {
    local names
    names=$(in_image apt-cache pkgnames "$1" | grep -E '^linux-image-[0-9]+\.[0-9]+\.[0-9].*-cloud-amd64$') || return 0
    # Names that other packages only mention have no version, and do not come out of madison.
    # shellcheck disable=SC2086
    in_image apt-cache madison $names | awk '{ print $1 }' | sort -uV
}

# The newest that the release has, or one some point releases older, or the newest of a newer series, or of this series.
choose_kernel() {
    local which=$1 newest all
    newest=$(in_image apt-cache show --no-all-versions linux-image-cloud-amd64 |
        sed -n 's/^Depends:.*\(linux-image-[0-9][^ ,]*\).*/\1/p')
    [ -n "$newest" ] || { echo "apt knows no linux-image-cloud-amd64"; return 1; }
    case $which in
        newest | older) mapfile -t all < <(kernels "$(cut -d. -f1,2 <<<"$newest").") ;;
        backports) mapfile -t all < <(kernels linux-image- | sed "1,/^$newest\$/d") ;;
        *) mapfile -t all < <(kernels "linux-image-$which.") ;;
    esac
    [ ${#all[@]} -gt 0 ] || { echo "the archive has no kernel $which for $release"; return 1; }
    case $which in
        newest) kernel=$newest ;;
        older) kernel=${all[$((${#all[@]} > 3 ? ${#all[@]} - 4 : 0))]} ;;
        *)
            # In backports a kernel may outlive packages that it depends on.
            while read -r kernel; do
                ! in_image apt-get install --simulate --no-install-recommends "$kernel" </dev/null >/dev/null 2>&1 ||
                    return 0
            done < <(printf '%s\n' "${all[@]}" | tac)
            echo "no kernel $which for $release can be installed: ${all[*]}"
            return 1
            ;;
    esac
}

update_lists() {
    local stamp=$lists/updated sources=$cache/sources-$variant.list
    if [ -e "$stamp" ] && [ $(($(date +%s) - $(stat -c %Y "$stamp"))) -lt $lists_max_age ] &&
        cmp -s "$stamp" "$sources"; then
        return 0
    fi
    step "package lists"
    in_image apt-get update
    cp "$sources" "$stamp"
}

# Writes apt's preferences for $pins, and what came of it to $pinned. A package that the archive has in one version only is
# taken in this one: archives drop old versions, and an image then differs less than was asked for, which the log, the
# person who waits and NAME.info are told.
pin_packages() {
    local pin package want all version source
    pinned=()
    for pin in ${pins//+/ }; do
        package=${pin%:*} want=${pin#*:}
        mapfile -t all < <(in_image apt-cache madison "$package" | awk '{ print $3 }' | awk '!seen[$0]++')
        [ ${#all[@]} -gt 0 ] || { echo "pin=$pins: the archive has no $package"; return 1; }
        case $want in
            newest) version=${all[0]} ;;
            older)
                version=${all[-1]}
                [ ${#all[@]} -gt 1 ] || step "note: the archive has $package in one version only, $version: no older one"
                ;;
            *)
                version=$(printf '%s\n' "${all[@]}" | awk -v v="$want" 'index($0, v) == 1 { print; exit }')
                [ -n "$version" ] || { echo "pin=$pins: the archive has $package in ${all[*]} only"; return 1; }
                ;;
        esac
        source=$(in_image apt-cache show "$package=$version" | sed -n 's/^Source: \([^ ]*\).*/\1/p' | head -n 1)
        printf 'Package: src:%s\nPin: version %s\nPin-Priority: 1001\n\n' "${source:-$package}" "$version" \
            >>"$root/etc/apt/preferences.d/99vmar-build"
        pinned+=("$package=$version")
    done
}

# What a guest is to do later, and the packages for it: NAME.use.tar, which a guest unpacks from a second disk.
make_use() {
    local dir=$tmp/use deb
    local use_packages=''
    # shellcheck source=/dev/null
    . "$here/use/$use.sh"
    mkdir -p "$dir/debs"
    cp "$here/use/$use.sh" "$dir/use.sh"
    install -m 0755 "$here/guest/run-use" "$dir/run"
    if [ -n "$use_packages" ]; then
        # shellcheck disable=SC2086
        in_image apt-get install -y --no-install-recommends --download-only $use_packages
        # Asked for without what is downloaded already, as apt would name nothing.
        # shellcheck disable=SC2086
        in_image apt-get install -y --no-install-recommends --print-uris -o Dir::Cache::archives=/tmp $use_packages |
            awk '$1 ~ /^\047/ { print $2 }' |
            while read -r deb; do cp "$root/var/cache/apt/archives/$deb" "$dir/debs/"; done
    fi
    tar -C "$dir" -cf "$tmp/$name.use.tar" .
    rm -rf "$dir"
}

configure_system() {
    echo "$name" >"$root/etc/hostname"
    printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$name" >"$root/etc/hosts"
    case $fs in
        ext4) echo "UUID=$uuid / ext4 errors=remount-ro 0 1" ;;
        xfs) echo "UUID=$uuid / xfs defaults 0 0" ;;
    esac >"$root/etc/fstab"
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
    printf 'name=%s\nunits="%s"\n' "$name" "${role_units:-}" >"$root/etc/vmar-image"
    install -m 0755 "$here/guest/vmar-packet" "$root/usr/local/sbin/vmar-packet"
    install -m 0644 "$here/guest/vmar-packet.service" "$root/etc/systemd/system/vmar-packet.service"
    in_image systemctl enable vmar-marker.service vmar-packet.service
    [ -z "$role_app" ] ||
        install -m 0755 /dev/stdin "$root/usr/local/sbin/vmar-app" <<<"#!/bin/sh -eu
# What loads the application of this machine, see vmar-marker.
$role_app"
}

# GRUB, put in place by hand: grub-install wants to see partitions, and a loop device with an offset has none. The first
# stage loads the sector after it, where the core image lies between the partition table and the partition; its list of
# sectors says just that as it comes.
#
# Not extlinux: its two first stages run at the same address, the second loaded over the first. Under TCG it
# hangs there with any vhost-user disk (seen with qemu-storage-daemon too), as if QEMU did not notice that another process
# has replaced code that it has translated. GRUB loads into a buffer, lets the processor copy, and boots.
install_boot_loader() {
    local version=$1 cmdline=$2 raw=$3 core=$tmp/core.img grub_fs=ext2
    [ "$fs" = ext4 ] || grub_fs=$fs
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
    grub-mkimage -O i386-pc -p '(hd0,msdos1)/boot/grub' -o "$core" biosdisk part_msdos "$grub_fs" serial normal linux
    [ "$(stat -c %s "$core")" -le $((part_start - 512)) ] || { echo "GRUB's core image is too big"; return 1; }
    dd if="$grub/boot.img" of="$raw" bs=440 count=1 conv=notrunc status=none
    dd if="$core" of="$raw" bs=512 seek=1 conv=notrunc status=none
    rm "$core"
}

inside_image() {
    read_spec "$1"
    inside_name=$name
    local raw=$tmp/$name.raw uuid version cmdline
    root=$tmp/mnt
    lists=$cache/lists/$variant
    uuid=$(cat /proc/sys/kernel/random/uuid)
    cmdline="root=UUID=$uuid ro console=tty0 console=ttyS0,115200 quiet"

    step "disk of $size_mib MiB with $fs, base system of $release"
    make_disk "$raw" "$uuid"
    mkdir -p "$root" "$lists/partial"
    mount -o "loop,offset=$part_start,sizelimit=$(((size_mib - 1) * 1048576))" "$raw" "$root"
    tar -C "$root" --numeric-owner --xattrs --xattrs-include='*' -xf "$cache/base-$release.tar"
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t tmpfs tmpfs "$root/run"
    mount -t tmpfs tmpfs "$root/tmp"
    mount --bind "$cache/apt" "$root/var/cache/apt"
    mount --bind "$lists" "$root/var/lib/apt/lists"
    cp "$cache/sources-$variant.list" "$root/etc/apt/sources.list"
    cp "$cache/apt.conf" "$root/etc/apt/apt.conf.d/99vmar-build"
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod 0755 "$root/usr/sbin/policy-rc.d"

    update_lists
    choose_kernel "$kernel_choice"
    step "kernel ${kernel#linux-image-}"
    local tools=()
    [ "$fs" != xfs ] || tools=(xfsprogs)
    in_image apt-get install -y --no-install-recommends "${tools[@]}" "$kernel"
    pin_packages
    step "$(echo $role_packages "${pinned[@]}")"
    [ -z "$role_debconf" ] || in_image debconf-set-selections <<<"$role_debconf"
    # shellcheck disable=SC2086
    in_image apt-get install -y $role_apt_options $role_packages

    step "configuration and boot loader"
    version=${kernel#linux-image-}
    configure_system
    role_configure "$root"
    install_boot_loader "$version" "$cmdline" "$raw"
    cp "$root/boot/vmlinuz-$version" "$tmp/$name.vmlinuz"
    cp "$root/boot/initrd.img-$version" "$tmp/$name.initrd"
    echo "$cmdline" >"$tmp/$name.cmdline"
    printf '%s=%s\n' name "$name" role "$role" release "$release" kernel "$version" fs "$fs" packet yes \
        >"$tmp/$name.info"
    [ -z "$role_app" ] || echo app=yes >>"$tmp/$name.info"
    [ -z "$pins" ] || echo "pinned=${pinned[*]}" >>"$tmp/$name.info"
    [ -z "$use" ] || make_use

    rm -f "$root/usr/sbin/policy-rc.d" "$root/etc/apt/apt.conf.d/99vmar-build" "$root/etc/resolv.conf" \
        "$root/etc/apt/preferences.d/99vmar-build"
    umount "$root/var/lib/apt/lists" "$root/var/cache/apt" "$root/tmp" "$root/run" "$root/sys" "$root/proc"
    sync -f "$root"
    fstrim "$root"
    umount "$root"
    check_disk "$raw"
}

if [ "${VMAR_BUILD_INSIDE:-}" = 1 ]; then
    "$@"
else
    main "$@"
fi
