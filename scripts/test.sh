#!/usr/bin/env bash
# Sets everything up and passes every test. With arguments: only the tests whose names contain them (as cargo test takes them).
# SPDK_DIR runs them against another SPDK.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$LLOOP_ROOT"

scripts/setup.sh --tests
SPDK_DIR=$(scripts/spdk.sh)
export SPDK_DIR
export LLOOP_SPDK_APPS=$CARGO_TARGET_DIR/spdk-apps/$(spdk_version "$SPDK_DIR")
export LLOOP_LUSTRE_SHIM=$CARGO_TARGET_DIR/lustre.so
export LLOOP_PYPI_VENV=$LLOOP_CACHE/pypi-venv
LLOOP_GUEST=$(scripts/guest.sh)
export LLOOP_GUEST

if [ $# -eq 0 ]; then
	quietly "checking the format" "$CARGO_TARGET_DIR/fmt.log" cargo fmt --all --check
	quietly "linting" "$CARGO_TARGET_DIR/clippy.log" cargo clippy --locked --all-targets -- -D warnings
fi
say "testing with SPDK v$(spdk_version "$SPDK_DIR") ($SPDK_DIR)"
if [ $# -eq 0 ]; then
	# The lock-free parts under every order of events, in a build of their own.
	RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=$CARGO_TARGET_DIR/loom \
		cargo test --locked --release --no-default-features --lib loom_
fi
# Each property of hostile input gets this long: a minute for all of them, two at a time.
[ $# -gt 0 ] || export LLOOP_FUZZ_SECONDS=${LLOOP_FUZZ_SECONDS:-10}
# With a filter cargo leaves the examples out, which the tests run.
[ $# -eq 0 ] || quietly "building the tests' programs" "$CARGO_TARGET_DIR/examples.log" cargo build --locked --examples
# Each test that starts a target has its own socket, hugepage files and folder; two at a time is what two cores and 2 GiB of
# hugepages carry.
cargo test --locked --no-fail-fast "$@" -- --test-threads=2
