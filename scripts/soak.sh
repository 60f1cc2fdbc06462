#!/usr/bin/env bash
# Random faults in the middle of random I/O, on the tests' stand-in for Lustre: evictions, hanging and failing servers, stale
# descriptors, full disks, resets, broken connections, detaching and attaching. Ends with everything checked: contents, locks, leaks.
# scripts/test.sh does the same for a minute.
#
# usage: soak.sh [--sim] [--seconds N] [--seed N]
#   --sim         in the simulator instead (tests/sim): no target, no files, no SPDK, and every order of events; for hours
#   --seconds N   how long (default 1200)
#   --seed N      repeats the faults and the I/O of the run that printed it, as far as time lets it; with --sim exactly
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

seconds=1200 seed='' sim=''
while [ $# -gt 0 ]; do
	case $1 in
	--sim) sim=yes ;;
	--seconds | --seed)
		[[ ${2:-} =~ ^[0-9]+$ ]] || die "$1 wants a number"
		if [ "$1" = --seed ]; then seed=$2; else seconds=$2; fi
		shift
		;;
	*) help_or_die "$1" ;;
	esac
	shift
done
export RUST_TEST_NOCAPTURE=1
if [ -n "$sim" ]; then
	cd "$LLOOP_ROOT"
	if [ -n "$seed" ]; then export LLOOP_SIM_SEED=$seed; fi
	LLOOP_SIM_SECONDS=$seconds exec cargo test --locked --no-default-features --test sim random_worlds
fi
if [ -n "$seed" ]; then export LLOOP_SOAK_SEED=$seed; fi
export LLOOP_SOAK_SECONDS=$seconds
exec "$LLOOP_ROOT/scripts/test.sh" soak_random_faults
