# Sourced by the scripts beside it: the test guest, a Debian cloud kernel with a busybox initramfs, and images for it.
# shellcheck shell=bash
# The caller has sourced qemu-scripts/common.sh, stands in the repository and sets $work, a folder of its own.

: "${work:?}"
cache=$PWD/build/test-guest

guest_need() {
  need_qemu
  need cpio:cpio busybox:busybox-static sfdisk:fdisk depmod:kmod mke2fs:e2fsprogs
}

# The kernel's package is unpacked, not installed: it is the guest's, not this machine's. Leaves $cache/vmlinuz.
guest_kernel() {
  [ ! -e "$cache/vmlinuz" ] || return 0
  mkdir -p "$cache/deb" && rm -rf "$cache/root"
  local package
  package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
  [ -n "$package" ] || { apt-get update -qq
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1); }
  (cd "$cache/deb" && apt-get download -qq "$package" 2>/dev/null)
  dpkg -x "$cache"/deb/linux-image-*.deb "$cache/root"
  cp "$cache"/root/boot/vmlinuz-* "$cache/vmlinuz"
}

# guest_initramfs OUT INIT [PROGRAM|FILE...]: busybox, the modules for a virtio disk and ext4, and these programs of this
# machine with their libraries. Not compressed: unpacking is what takes an emulated guest its time. What has a / in its name
# is a file for the root directory.
guest_initramfs() {
  local out=$1 init=$2 tree=$work/initramfs version part program file
  shift 2
  version=$(basename "$cache"/root/lib/modules/*)
  rm -rf "$tree"
  mkdir -p "$tree"/{bin,proc,sys,dev,mnt,tmp} "$tree/lib/modules/$version/kernel"
  cp "$cache/root/lib/modules/$version"/modules.{builtin,order} "$tree/lib/modules/$version/"
  for part in drivers/virtio drivers/block/virtio_blk.ko fs/ext4 fs/jbd2 fs/mbcache.ko lib crypto; do
    (cd "$cache/root/lib/modules/$version/kernel" && [ ! -e "$part" ] ||
      cp -a --parents "$part" "$tree/lib/modules/$version/kernel/")
  done
  depmod -b "$tree" "$version" 2>/dev/null
  cp "$(command -v busybox)" "$tree/bin/busybox"
  for program; do
    case $program in */*) cp "$program" "$tree/"; continue ;; esac
    cp "$(command -v "$program")" "$tree/bin/"
    # The loader, and the libraries where the loader will look for them.
    for file in $(ldd "$(command -v "$program")" | grep -o '/[^ ]*'); do
      mkdir -p "$tree$(dirname "$file")"
      [ -e "$tree$file" ] || cp -L "$file" "$tree$file"
    done
  done
  cp "$init" "$tree/init"
  chmod +x "$tree/init"
  (cd "$tree" && find . | cpio --quiet -o -H newc) >"$out"
  rm -rf "$tree"
}

# guest_image NAME INITRD: 96 MiB in $work/NAME.raw, a partition at 1 MiB with ext4; most files are the same in all such
# images. Beside it what vm_start of common.sh needs.
guest_image() {
  local name=$1 initrd=$2 files=$work/files-$1
  mkdir -p "$files/share"
  for module in "$cache"/root/lib/modules/*/kernel/drivers/net/ethernet/*; do
    cp -r "$module" "$files/share/"
    [ "$(du -sm "$files/share" | cut -f1)" -lt 30 ] || break
  done
  cp "$cache/vmlinuz" "$files/share/"
  head -c 3000000 /dev/urandom >"$files/only-$name"
  (cd "$files" && find . -type f -print0 | sort -z | xargs -0 sha256sum >"$work/sums" && mv "$work/sums" SUMS)
  mke2fs -q -t ext4 -d "$files" "$work/$name.fs" 95M >/dev/null
  truncate -s 1M "$work/$name.raw"
  # One partition, type 83, from sector 2048 on.
  printf '2048,,83\n' >"$work/table"
  cat "$work/$name.fs" >>"$work/$name.raw"
  sfdisk -q "$work/$name.raw" <"$work/table" >/dev/null 2>&1
  rm -rf "$work/$name.fs" "$files"
  cp "$cache/vmlinuz" "$work/$name.vmlinuz"
  cp "$initrd" "$work/$name.initrd"
  echo "console=ttyS0 panic=-1 quiet vmar.name=$name" >"$work/$name.cmdline"
}
