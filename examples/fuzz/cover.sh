#!/bin/sh
# Builds this crate (and none of those that it uses) with LLVM's edge counters, so that the fuzzer sees which code an input
# reaches; stable Rust does that:
#
#   RUSTC_WORKSPACE_WRAPPER=examples/fuzz/cover.sh CARGO_TARGET_DIR=build/cover \
#       cargo run --profile test --example fuzz -- --target map,qcow2,live,trace,library
#
# Only targets that run in the fuzzer's own process profit from it.
case " $* " in
*' --crate-name vmar '*)
    exec "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=3 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
        -Ccodegen-units=1
    ;;
*) exec "$@" ;;
esac
