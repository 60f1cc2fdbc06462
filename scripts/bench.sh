#!/usr/bin/env bash
# Measures lloop beside its rivals, interleaved in one run on one machine, compares that with what is demanded, and draws it.
#
# usage: bench.sh [--quick] [--only GROUP]... [--out DIR] | --docs
#   --quick       one round of fewer cases and rivals (some 3 minutes) instead of three rounds (some 15)
#   --only GROUP  only these cases: unwritten, written, sequential, slow, many or gaps
#   --out DIR     where the results go (default bench-results; with --quick or --only bench-results/quick)
#   --docs        only write the tables of docs/performance.md anew, as a whole run does: from bench-results/results.json
#
# Nothing else should run meanwhile. Needs root, 2 processors, some 5 GiB of disk below the build folder, and /dev/fuse.
# SPDK_DIR chooses SPDK, as for every script. A whole run takes the place of the one in bench-results: give --out to keep that one.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$LLOOP_ROOT"

for option in "$@"; do
	case $option in
	-h | --help)
		help
		exit 0
		;;
	--docs) exec python3 scripts/bench.py --docs ;;
	esac
done
scripts/setup.sh --tests
SPDK_DIR=$(scripts/spdk.sh)
export SPDK_DIR
quietly "building the slow filesystems" "$CARGO_TARGET_DIR/build.log" \
	cargo build --release --locked --example slowfs --example latencyfs
venv=$LLOOP_CACHE/bench-venv
if ! "$venv/bin/python" -c 'import matplotlib' 2>/dev/null; then
	rm -rf "$venv"
	quietly "installing matplotlib for the charts" "$LLOOP_CACHE/pypi.log" \
		sh -c '/usr/bin/python3 -m venv "$1" && "$1/bin/pip" --disable-pip-version-check install matplotlib' sh "$venv"
fi
version=$(spdk_version "$SPDK_DIR")
# The files are on the disk below the build folder; no two runs on one machine measure anything.
mkdir -p "$CARGO_TARGET_DIR"
exec 8>/tmp/lloop-bench.lock
flock -n 8 || die "another benchmark is running on this machine" "wait until it has ended"
"$venv/bin/python" scripts/bench.py --apps "$CARGO_TARGET_DIR/spdk-apps/$version" --examples "$CARGO_TARGET_DIR/release/examples" \
	--t-io-uring "$(scripts/fio-uring.sh)" --work "$CARGO_TARGET_DIR/bench" --spdk "$version" "$@" 8>&-
