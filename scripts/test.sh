#!/usr/bin/env bash
# Sets everything up and passes every test. With NAMEs: only the tests whose names contain one of them.
#
# usage: test.sh [--fallback] [NAME]...
#   --fallback   with SPDK v20.07, the last resort, whatever else there is: a short suite (or NAMEs) of what a user of it relies on
#
# Where only the last resort can be had, all tests run that it supports; the others say "left out" and why. SPDK_DIR runs the tests
# against an SPDK of your own.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$LLOOP_ROOT"

fallback='' names=()
while [ $# -gt 0 ]; do
	case $1 in
	--fallback) fallback=yes ;;
	-*) help_or_die "$1" ;;
	*) names+=("$1") ;;
	esac
	shift
done

if [ -n "$fallback" ]; then
	# Both builds lie side by side, so that neither spoils the other's.
	export CARGO_TARGET_DIR=$CARGO_TARGET_DIR/fallback
	SPDK_DIR=$(env -u SPDK_DIR scripts/spdk.sh --fallback)
	export SPDK_DIR
	scripts/setup.sh --tests --no-build
else
	scripts/setup.sh --tests
	SPDK_DIR=$(scripts/spdk.sh)
	export SPDK_DIR
fi
version=$(spdk_version "$SPDK_DIR")
export LLOOP_SPDK_APPS=$CARGO_TARGET_DIR/spdk-apps/$version
export LLOOP_LUSTRE_SHIM=$CARGO_TARGET_DIR/lustre.so
export LLOOP_PYPI_VENV=$LLOOP_CACHE/pypi-venv
LLOOP_GUEST=$(scripts/guest.sh)
export LLOOP_GUEST

say "testing with SPDK v$version ($SPDK_DIR)"
if [ "$version" = 20.07 ]; then note "what v20.07 has not is left out, and said: vhost, interrupt mode, who is connected, FUA"; fi

# Each test that starts a target has its own socket and folder, and takes hugepage memory from a budget (tests/common/hugepages.rs).
# Two at a time is what two cores carry.
run=(--test-threads=2)
if [ -n "$fallback" ]; then
	[ ${#names[@]} -gt 0 ] || names=(_parameters bad_input:: every_method uuid_is_the_files_own a_saved_configuration signals_end_it lustre_fences
		io:: durability:: kernels_initiator)
	run+=(--skip fio::)
	quietly "building the tests and their programs" "$CARGO_TARGET_DIR/examples.log" cargo build --locked --examples
	exec cargo test --locked --no-fail-fast --test rpc --test target --test guest -- "${run[@]}" "${names[@]}"
fi
if [ ${#names[@]} -gt 0 ]; then
	# With a filter cargo leaves the examples out, which the tests run.
	quietly "building the tests' programs" "$CARGO_TARGET_DIR/examples.log" cargo build --locked --examples
	exec cargo test --locked --no-fail-fast -- "${run[@]}" "${names[@]}"
fi
quietly "checking the format" "$CARGO_TARGET_DIR/fmt.log" cargo fmt --all --check
quietly "linting" "$CARGO_TARGET_DIR/clippy.log" cargo clippy --locked --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" quietly "building the documentation" "$CARGO_TARGET_DIR/doc.log" cargo doc --no-deps --locked
deny=$LLOOP_CACHE/tools/bin/cargo-deny
[ -x "$deny" ] || quietly_or "building cargo-deny, once" "$LLOOP_CACHE/cargo-deny.log" \
	env -u CARGO_TARGET_DIR cargo install cargo-deny --version 0.20.2 --locked --debug --root "$LLOOP_CACHE/tools" || true
if [ -x "$deny" ]; then
	# Its database of advisories is fetched from a host that need not be within reach of a build machine.
	quietly "checking the dependencies" "$CARGO_TARGET_DIR/deny.log" "$deny" --locked check bans licenses sources
else
	note "left out: cargo deny check, since cargo-deny could not be built ($LLOOP_CACHE/cargo-deny.log)"
fi
# The lock-free parts under every order of events, in a build of their own.
RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=$CARGO_TARGET_DIR/loom cargo test --locked --release --no-default-features --lib loom_
# Each property of hostile input gets this long: a minute for all of them, two at a time.
export LLOOP_FUZZ_SECONDS=${LLOOP_FUZZ_SECONDS:-10}
# The simulator gets a minute.
export LLOOP_SIM_SECONDS=${LLOOP_SIM_SECONDS:-60}
exec cargo test --locked --no-fail-fast -- "${run[@]}"
