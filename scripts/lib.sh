# Shared by the scripts of this folder; sourced, never run.
# shellcheck shell=bash

LLOOP_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LLOOP_CACHE=${LLOOP_CACHE:-$HOME/.cache/lloop}
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$LLOOP_ROOT/target}
export LLOOP_CACHE CARGO_TARGET_DIR

if [ -t 1 ]; then BOLD=$'\e[1m' DIM=$'\e[2m' RED=$'\e[31m' PLAIN=$'\e[0m'; else BOLD='' DIM='' RED='' PLAIN=''; fi

say() { printf '%s==>%s %s\n' "$BOLD" "$PLAIN" "$*"; }
note() { printf '    %s%s%s\n' "$DIM" "$*" "$PLAIN"; }
die() {
	printf '%serror:%s %s\n' "$RED" "$PLAIN" "$1" >&2
	shift
	for line in "$@"; do printf '       %s\n' "$line" >&2; done
	exit 1
}

# The comment at the top of the running script is its help.
help() { sed -n '2,/^set -e/p' "$0" | sed 's/^# \{0,1\}//;/^set -e/d'; }

# help_or_die OPTION: what every script does with an option that is not its own.
help_or_die() {
	case $1 in
	-h | --help) help && exit 0 ;;
	*) die "unknown option $1" "see $0 --help" ;;
	esac
}

# quietly WHAT LOG COMMAND...: runs COMMAND with its output in LOG, says WHAT and how long it took, and on a failure
# shows the end of the log: quiet while all is well, informative when it is not.
quietly() {
	local rc=0
	quietly_or "$@" || rc=$?
	[ "$rc" -ne 0 ] || return 0
	if disk_is_full "$2"; then die "the disk is full: $1" "make room in $(dirname "$2") and run this again"; fi
	tail -n 30 "$2" | sed 's/^/    | /' >&2
	die "failed with status $rc: $1" "the whole log: $2"
}

# disk_is_full LOG: whether that is why it failed. A log on a full disk cannot say so.
disk_is_full() {
	local free
	grep -q 'No space left on device' "$1" 2>/dev/null && return 0
	free=$(df -Pm "$(dirname "$1")" 2>/dev/null | awk 'NR == 2 { print $4 }')
	[ "${free:-99}" -lt 4 ]
}

# As quietly, but a failure is the caller's to handle.
quietly_or() {
	local what=$1 log=$2 start=$SECONDS rc=0
	shift 2
	mkdir -p "$(dirname "$log")" || return 1
	say "$what"
	"$@" >"$log" 2>&1 </dev/null || rc=$?
	if [ $((SECONDS - start)) -ge 3 ]; then note "took $((SECONDS - start)) s"; fi
	return "$rc"
}

# need_cache: makes the folder of the cache, which has to be writable.
need_cache() {
	mkdir -p "$LLOOP_CACHE" 2>/dev/null && : 2>/dev/null >"$LLOOP_CACHE/.writable" ||
		die "cannot write to the cache $LLOOP_CACHE" "make it writable, make room, or set LLOOP_CACHE to another folder"
	rm -f "$LLOOP_CACHE/.writable"
}

# step COMMAND...: shows the command in the log that it is run into.
step() {
	local rc=0
	printf '+ %s\n' "$*"
	"$@" || rc=$?
	return "$rc"
}

# The version of an SPDK tree as MAJOR.MINOR with two digits each ("26.01"), or nothing. A tree of a newer release has version.h
# only once it is built, and says its version in VERSION before.
spdk_version() {
	local header=$1/include/spdk/version.h
	if [ -r "$header" ]; then
		awk '$1 == "#define" && $2 == "SPDK_VERSION_MAJOR" { major = $3 } $1 == "#define" && $2 == "SPDK_VERSION_MINOR" { minor = $3 }
			END { if (major != "") printf "%d.%02d\n", major, minor }' "$header"
	elif [ -r "$1/VERSION" ]; then
		sed -n 's/^\([0-9][0-9]*\.[0-9][0-9]\).*/\1/p' "$1/VERSION"
	fi
}

# not_older A B: whether version A is B or later.
not_older() { [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]; }

# spdk_rpath SPDK [LIBRARIES]: linker options by which a program finds the libraries of a SPDK built --with-shared (in LIBRARIES,
# default SPDK's own folder), and DPDK's; without effect for a static one. (The old kind of path: it also counts for the
# libraries that libraries need.)
spdk_rpath() {
	printf -- '-Wl,--disable-new-dtags,-rpath,%s:%s/lib\n' "${2:-$1/build/lib}" "$(sed -n 's/^CONFIG_DPDK_DIR?*=//p' "$1/mk/config.mk")"
}

spdk_is_built() { [ -e "$1/build/lib/libspdk_bdev.a" ] && [ -e "$1/build/lib/libspdk_nvmf.a" ]; }

# Free and total hugepage memory of the default size, in MiB.
hugepages_free_mib() { awk '/^HugePages_Free/ { n = $2 } /^Hugepagesize/ { k = $2 } END { print int(n * k / 1024) }' /proc/meminfo; }
hugepages_total_mib() { awk '/^HugePages_Total/ { n = $2 } /^Hugepagesize/ { k = $2 } END { print int(n * k / 1024) }' /proc/meminfo; }
