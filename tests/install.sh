#!/usr/bin/env bash
# Installs what the tests need on Debian 12.
set -euo pipefail
# shellcheck source=qemu-scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../qemu-scripts/common.sh"
need cc:build-essential git:git jq:jq shellcheck:shellcheck fincore:util-linux mke2fs:e2fsprogs openssl:openssl
need_qemu
"$repo/tests/qemu/qemu10.sh"
