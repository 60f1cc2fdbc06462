#!/usr/bin/env bash
# Prints, as its last line, the folder of a built SPDK tree:
#   - $SPDK_DIR when that is set (v24.09 or later);
#   - else the SPDK of today (v26.01 at the time of writing) out of Debian's `ceph` source package, suite forky, then sid;
#   - else, when no suite has it, SPDK v20.07, the last resort (scripts/spdk-fallback.sh says what is lost with it).
# Sources are fetched and verified by apt, through private lists, and built once into the cache.
#
# usage: spdk.sh [--fallback]
#   --fallback   the last resort even where the SPDK of today can be had
#
# It may be interrupted anywhere, and may run out of disk. A tree counts only when its stamp is there, and the stamp is written
# last; what is left without one is removed by the next run. Two runs at once wait for each other on a lock.
#
# SPDK_DIR     a built SPDK tree of your own
# LLOOP_CACHE  where SPDK is built (default ~/.cache/lloop)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$LLOOP_ROOT/scripts/debian-source.sh"
. "$LLOOP_ROOT/scripts/spdk-fallback.sh"
exec 3>&1 1>&2 # progress goes to stderr; only the answer goes to stdout

OLDEST=24.09 # the first release that hands FUA to a bdev module
SOURCE_MIB=700 # the tarball, and what is unpacked of it
BUILD_MIB=1500 # a built tree

fallback=''
while [ $# -gt 0 ]; do
	case $1 in
	--fallback) fallback=yes ;;
	*) help_or_die "$1" ;;
	esac
	shift
done

if [ -n "${SPDK_DIR:-}" ]; then
	[ -d "$SPDK_DIR" ] || die "SPDK_DIR=$SPDK_DIR is not a folder" "unset it to let this script build SPDK"
	SPDK_DIR=$(cd "$SPDK_DIR" && pwd)
	version=$(spdk_version "$SPDK_DIR")
	[ -n "$version" ] || die "SPDK_DIR=$SPDK_DIR is not an SPDK tree (it has neither include/spdk/version.h nor VERSION)"
	# The last resort is known by its stamp: its build is made safe, another v20.07 is not.
	[ -e "$SPDK_DIR/.lloop-fallback" ] || not_older "$version" "$OLDEST" ||
		die "SPDK_DIR=$SPDK_DIR holds SPDK v$version; lloop needs v$OLDEST or later" "unset SPDK_DIR to let this script build SPDK"
	spdk_is_built "$SPDK_DIR" || die "SPDK_DIR=$SPDK_DIR holds SPDK v$version, but it is not built" "build it (./configure && make) or unset SPDK_DIR"
	say "SPDK v$version at $SPDK_DIR (from SPDK_DIR)"
	printf '%s\n' "$SPDK_DIR" >&3
	exit 0
fi

# Not "native": a cache may move to another machine, where a native build dies of SIGILL.
case $(uname -m) in
x86_64) ARCH=x86-64-v2 ;;
aarch64) ARCH=armv8-a+crc+crypto ;;
*) die "SPDK builds on x86_64 and aarch64, this machine is $(uname -m)" ;;
esac
OPTIONS=(--disable-tests --disable-unit-tests --disable-examples --disable-apps
	--with-uring --with-vhost --with-virtio --with-ublk "--target-arch=$ARCH")
# The crypto bdev's library is written in x86's assembler.
[ "$(uname -m)" != x86_64 ] || OPTIONS+=(--with-crypto)

key() { printf '%s\n' "$@" "$(gcc -dumpversion 2>/dev/null || true)" | sha256sum | cut -c1-10; }

# The newest finished tree of this build's options, if there is one.
cached() { # KEY
	local stamp
	for stamp in "$LLOOP_CACHE"/spdk-v*-"$1"/.lloop-complete; do
		if [ -e "$stamp" ] && spdk_is_built "${stamp%/*}"; then printf '%s\n' "${stamp%/*}"; fi
	done | sort -V | tail -n 1
}

# obtain SUITES FOLDER OLDEST KEY: unpacks FOLDER of the ceph source package of the first of SUITES whose SPDK is OLDEST or later.
# Its path is written to the file $LLOOP_CACHE/fetch/tree. Status 1: no suite has it; 2: some suite could not be asked.
obtain() {
	local suites=$1 folder=$2 oldest=$3 key=$4 work=$LLOOP_CACHE/fetch suite uri found version tree rc=1
	for suite in $suites; do
		while read -r uri; do
			rm -rf "$work"
			mkdir -p "$work/unpacked" || return 2
			if ! fetch_source "$suite" "$uri" "$work" ceph >"$work/log" 2>&1; then
				cat "$work/log"
				# What is not there is answered with 404, and some archives answer 403.
				grep -Eq '40[34] |does not have a Release file|Unable to find a source package' "$work/log" || rc=2
				continue
			fi
			cat "$work/log"
			step tar -C "$work/unpacked" -xf "$(ls "$work"/ceph_*.orig.tar.* | head -n 1)" --wildcards "*/$folder" || continue
			found=$(ls -d "$work"/unpacked/*/"$folder" 2>/dev/null | head -n 1)
			version=$(spdk_version "$found")
			if [ -n "$version" ] && not_older "$version" "$oldest"; then
				tree=$LLOOP_CACHE/spdk-v$version-$key
				rm -rf "$tree"
				mv "$found" "$tree" || return 2
				rm -rf "$work"
				mkdir -p "$work"
				printf '%s\n' "$tree" >"$work/tree" || return 2
				return 0
			fi
			printf 'suite %s carries SPDK "%s" in %s; %s or later is needed\n' "$suite" "$version" "$folder" "$oldest"
		done < <(debian_archives)
	done
	rm -rf "$work"
	printf 'no suite out of "%s" of the configured Debian archive gave SPDK v%s or later\n' "$suites" "$oldest"
	return "$rc"
}

# What came of obtain, said to the user: ends with a sentence where there is nothing to go on with.
fetch_or_die() { # WHAT SUITES FOLDER OLDEST KEY
	local rc=0 log=$LLOOP_CACHE/spdk-fetch.log what=$1
	shift
	quietly_or "fetching $what" "$log" obtain "$@" || rc=$?
	[ "$rc" -ne 0 ] || return 0
	if disk_is_full "$log"; then die "the disk is full: SPDK could not be fetched" "make room in $LLOOP_CACHE and run this again"; fi
	[ "$rc" -ne 2 ] || die "the Debian archive that this machine's apt is configured for could not be reached" \
		"$(grep -E '^(E|W|Err)' "$log" | head -n 1 | cut -c1-200)" \
		"see to the network (apt-get update has to work) and run this again; the log: $log" \
		"or set SPDK_DIR to a built SPDK tree (v$OLDEST or later)"
	return 1
}

# What an interrupted or failed run has left. A tree without its stamp is of no use to anybody, and takes up the disk. Run under
# the lock.
remove_half_built() {
	local tree
	rm -rf "$LLOOP_CACHE/fetch"
	for tree in "$LLOOP_CACHE"/spdk-v*; do
		if [ -d "$tree" ] && { [ ! -e "$tree/.lloop-complete" ] || ! spdk_is_built "$tree"; }; then
			note "removing $tree, which is half-built"
			rm -rf "$tree"
		fi
	done
}

need_archive() {
	command -v apt-get >/dev/null || die "this machine has no apt-get to fetch SPDK with" "set SPDK_DIR to a built SPDK tree (v$OLDEST or later)"
	[ -n "$(debian_archives)" ] || die "apt knows no Debian archive to fetch SPDK from" \
		"run apt-get update, or set SPDK_DIR to a built SPDK tree (v$OLDEST or later)"
}

build() { # TREE OPTION...
	cd "$1"
	shift
	# /usr/bin first: a pyenv or conda python lacks the modules that Debian's meson and DPDK's build bring along.
	export PATH=/usr/bin:/bin:/usr/sbin:/sbin:$PATH
	unset MAKEFLAGS MAKELEVEL LDFLAGS
	step ./configure "$@" && step make -j"$(nproc)" && spdk_is_built "$PWD"
}

need_disk() { # MIB
	local free
	free=$(df -Pm "$LLOOP_CACHE" | awk 'NR == 2 { print $4 }')
	[ "${free:-0}" -ge "$1" ] || die "$LLOOP_CACHE has $free MiB of free disk space, and $1 MiB are needed to build SPDK" \
		"make room, or set LLOOP_CACHE to a folder on a larger disk"
}

# provide TREE OPTION...: builds it, stamps it, prints it.
provide() {
	local tree=$1
	shift
	quietly "building SPDK v$(spdk_version "$tree") in $tree (3 to 6 minutes on 2 cores)" "$LLOOP_CACHE/spdk-build.log" build "$tree" "$@"
	touch "$tree/.lloop-complete" || die "cannot write to $tree" "make room in $LLOOP_CACHE and run this again"
	printf '%s\n' "$tree" >&3
}

need_cache
exec 9>"$LLOOP_CACHE/spdk.lock"
if ! flock -n 9; then
	note "another run is building SPDK in $LLOOP_CACHE; waiting for it"
	flock 9
fi

why='asked for'
if [ -z "$fallback" ]; then
	key=$(key "${OPTIONS[@]}")
	tree=$(cached "$key")
	if [ -n "$tree" ]; then
		printf '%s\n' "$tree" >&3
		exit 0
	fi
	need_archive
	remove_half_built
	need_disk $((SOURCE_MIB + BUILD_MIB))
	if fetch_or_die "SPDK out of Debian's ceph source package (250 MB)" "forky sid" src/nvmeof/gateway/spdk "$OLDEST" "$key"; then
		provide "$(cat "$LLOOP_CACHE/fetch/tree")" "${OPTIONS[@]}"
		exit 0
	fi
	why="neither forky nor sid of this machine's Debian archive has v$OLDEST or later"
fi
provide_fallback "$why"
