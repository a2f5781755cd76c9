#!/usr/bin/env bash
# Installs what the tests need on Debian 12: the QEMU emulator and its tools, a kernel and busybox for a small guest.
set -euo pipefail

need=()
have() { command -v "$1" >/dev/null 2>&1; }
have qemu-system-x86_64 && have qemu-img && have qemu-io || need+=(qemu-system-x86 qemu-utils)
have shellcheck || need+=(shellcheck)
have cpio || need+=(cpio)
have fincore || need+=(util-linux)
have mkfs.ext4 || need+=(e2fsprogs)
have cc || need+=(gcc libc6-dev)
[ -x /bin/busybox ] && [ ! -e /lib/x86_64-linux-gnu/none ] || need+=(busybox-static)
if [ ${#need[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ]; then
    echo "tests: missing ${need[*]}; install them or run this as root" >&2
    exit 1
  fi
  echo "tests: installing ${need[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # The emulator and its tools must be of one version. A machine may hold newer tools than its sources offer: those are
  # replaced by the ones that match the emulator.
  versioned=()
  for package in "${need[@]}"; do
    if [ "$package" = qemu-system-x86 ] || [ "$package" = qemu-utils ]; then
      version=$(apt-cache madison qemu-system-x86 | awk '{print $3; exit}')
      versioned+=("$package=$version")
    else
      versioned+=("$package")
    fi
  done
  apt-get install -y -qq --no-install-recommends --allow-downgrades "${versioned[@]}" >/dev/null
fi
