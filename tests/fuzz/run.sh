#!/usr/bin/env bash
# Builds every fuzz target with libFuzzer's instrumentation, on the stable compiler, and runs each for a while.
# Usage: tests/fuzz/run.sh [SECONDS [TARGET...]]    What it finds is kept in tests/fuzz/artifacts/TARGET.
#
# The flags are those of cargo-fuzz with --sanitizer none, all of them stable: coverage counters for every edge, and comparisons.
# `cargo fuzz run TARGET` works as well where cargo-fuzz and a nightly compiler are installed.
set -euo pipefail
cd "$(dirname "$0")"
export PATH="$PATH:/usr/sbin:/sbin"
seconds=${1:-60}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=($(cd targets && ls *.rs | sed 's/\.rs$//'))

host=$(rustc -vV | sed -n 's/^host: //p')
export CARGO_ENCODED_RUSTFLAGS
CARGO_ENCODED_RUSTFLAGS=$(printf '%s\x1f' --cfg=fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 | sed 's/\x1f$//')
# Naming the target keeps the flags away from build scripts, which have no fuzzer to report to.
cargo build --release --quiet --target "$host" $(printf -- '--bin %s ' "${targets[@]}")
built=${CARGO_TARGET_DIR:-target}/$host/release
env -u CARGO_ENCODED_RUSTFLAGS cargo run --release --quiet --bin seeds -- corpus

failed=0
for target in "${targets[@]}"; do
    mkdir -p "corpus/$target" "artifacts/$target"
    echo "== $target: $seconds s"
    if ! "$built/$target" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=1024 -max_len=400000 \
        -artifact_prefix="artifacts/$target/" -print_final_stats=1 "corpus/$target" > "artifacts/$target/log" 2>&1; then
        failed=1
        echo "found something:"
        tail -n 30 "artifacts/$target/log"
    fi
    grep -E "number_of_executed_units|new_units_added|peak_rss_mb" "artifacts/$target/log" || true
done
exit $failed
