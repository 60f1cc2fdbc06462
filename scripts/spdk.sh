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
# It may be interrupted anywhere. A tree counts only when its stamp is there, and the stamp is written last. Two runs at once
# wait for each other on a lock.
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
# Its path is written to the file $LLOOP_CACHE/fetch/tree.
obtain() {
	local suites=$1 folder=$2 oldest=$3 key=$4 work=$LLOOP_CACHE/fetch suite uri found version tree
	for suite in $suites; do
		while read -r uri; do
			rm -rf "$work"
			mkdir -p "$work/unpacked" || return 1
			fetch_source "$suite" "$uri" "$work" ceph || continue
			step tar -C "$work/unpacked" -xf "$(ls "$work"/ceph_*.orig.tar.* | head -n 1)" --wildcards "*/$folder" || continue
			found=$(ls -d "$work"/unpacked/*/"$folder" 2>/dev/null | head -n 1)
			version=$(spdk_version "$found")
			if [ -n "$version" ] && not_older "$version" "$oldest"; then
				tree=$LLOOP_CACHE/spdk-v$version-$key
				rm -rf "$tree"
				mv "$found" "$tree" || return 1
				rm -rf "$work"
				mkdir -p "$work"
				printf '%s\n' "$tree" >"$work/tree"
				return 0
			fi
			printf 'suite %s carries SPDK "%s" in %s; %s or later is needed\n' "$suite" "$version" "$folder" "$oldest"
		done < <(debian_archives)
	done
	rm -rf "$work"
	printf 'no suite out of "%s" of the configured Debian archive has SPDK v%s or later in its ceph source package\n' "$suites" "$oldest"
	return 1
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
	touch "$tree/.lloop-complete"
	printf '%s\n' "$tree" >&3
}

mkdir -p "$LLOOP_CACHE"
exec 9>"$LLOOP_CACHE/spdk.lock"
if ! flock -n 9; then
	note "another run is building SPDK in $LLOOP_CACHE; waiting for it"
	flock 9
fi

if [ -z "$fallback" ]; then
	key=$(key "${OPTIONS[@]}")
	tree=$(cached "$key")
	if [ -n "$tree" ]; then
		printf '%s\n' "$tree" >&3
		exit 0
	fi
	command -v apt-get >/dev/null || die "this machine has no apt-get to fetch SPDK with" "set SPDK_DIR to a built SPDK tree (v$OLDEST or later)"
	[ -n "$(debian_archives)" ] || die "apt knows no Debian archive to fetch SPDK from" \
		"run apt-get update, or set SPDK_DIR to a built SPDK tree (v$OLDEST or later)"
	need_disk $((SOURCE_MIB + BUILD_MIB))
	if quietly_or "fetching SPDK out of Debian's ceph source package (250 MB)" "$LLOOP_CACHE/spdk-fetch.log" \
		obtain "forky sid" src/nvmeof/gateway/spdk "$OLDEST" "$key"; then
		provide "$(cat "$LLOOP_CACHE/fetch/tree")" "${OPTIONS[@]}"
		exit 0
	fi
	grep -q 'No space left on device' "$LLOOP_CACHE/spdk-fetch.log" && die "the disk is full: SPDK could not be unpacked" "make room in $LLOOP_CACHE"
	say "${RED}the SPDK of today cannot be had here${PLAIN} (the reason: $LLOOP_CACHE/spdk-fetch.log); trying v$FALLBACK_VERSION, the last resort"
fi
provide_fallback
