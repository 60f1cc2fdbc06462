#!/usr/bin/env bash
# Measures lloop beside its rivals, interleaved in one run on one machine, and draws what came out.
#
# usage: bench.sh [--quick] [--out DIR]
#   --quick    one round of one second each (some 3 minutes) instead of three of two seconds
#   --out DIR  where the results go (default bench-results)
#
# Nothing else should run meanwhile. Needs some 8 GiB of disk below the build folder, and fio.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$LLOOP_ROOT"

scripts/setup.sh --tests
SPDK_DIR=$(scripts/spdk.sh)
export SPDK_DIR
command -v fio >/dev/null || quietly "installing fio" "$LLOOP_CACHE/apt.log" apt-get -q install -y --no-install-recommends fio
quietly "building the slow filesystem" "$CARGO_TARGET_DIR/build.log" cargo build --release --locked --example slowfs
venv=$LLOOP_CACHE/bench-venv
if ! "$venv/bin/python" -c 'import matplotlib' 2>/dev/null; then
	rm -rf "$venv"
	quietly "installing matplotlib for the charts" "$LLOOP_CACHE/pypi.log" \
		sh -c '/usr/bin/python3 -m venv "$1" && "$1/bin/pip" --disable-pip-version-check install matplotlib' sh "$venv"
fi
exec "$venv/bin/python" scripts/bench.py --apps "$CARGO_TARGET_DIR/spdk-apps/$(spdk_version "$SPDK_DIR")" \
	--slowfs "$CARGO_TARGET_DIR/release/examples/slowfs" --work "$CARGO_TARGET_DIR/bench" --spdk "$(spdk_version "$SPDK_DIR")" "$@"
