#!/usr/bin/env bash
# Every check of the project, in one command: format, lints, unit, property, model and end-to-end tests, documentation,
# and a guest that QEMU boots from an overlay. Installs what is missing (Debian 12 with Rust, as root).
#
#   tests/run.sh           everything
#   tests/run.sh --rust    without the QEMU guest
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-all}
started=$(date +%s)
step() { printf '\n==> %s (%d s)\n' "$1" "$(($(date +%s) - started))"; }

tests/install.sh

step "format"
cargo fmt --check
step "lints"
RUSTFLAGS='-D warnings' cargo clippy --locked --quiet --all-targets --profile test
step "documentation"
RUSTDOCFLAGS='-D warnings' cargo doc --locked --quiet --no-deps
step "shell scripts"
git ls-files '*.sh' .ci/run | xargs shellcheck --severity=warning --external-sources
step "tests"
cargo test --locked --no-fail-fast
if [ "$what" != --rust ]; then
  step "a guest under QEMU"
  tests/qemu/run.sh
fi
step "all passed"
