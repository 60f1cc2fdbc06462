#!/usr/bin/env bash
# Prints, as its last line, the folder of a built SPDK tree: $SPDK_DIR when that is set, else v20.07 out of Debian's
# `ceph` source package, fetched and verified by apt and built once into the cache.
#
# Interrupted anywhere it starts again from the unfinished step's beginning: a tree counts only when its stamp is there,
# and the stamp is written last. Two runs at once wait for each other on a lock.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$LLOOP_ROOT/scripts/debian-source.sh"
exec 3>&1 1>&2 # progress goes to stderr; only the answer goes to stdout

SPDK_WANTED=20.07
# Not "native": a cache may move to another machine, where a native build dies of SIGILL (facts/spdk.md).
case $(uname -m) in
x86_64) ARCH=x86-64-v2 ;;
aarch64) ARCH=armv8-a+crc+crypto ;;
*) die "SPDK builds on x86_64 and aarch64, this machine is $(uname -m)" ;;
esac
OPTIONS=(--disable-tests --disable-unit-tests --with-uring --with-vhost --with-virtio --without-isal "--target-arch=$ARCH")
# (The crypto bdev's library is written in x86's assembler.)
[ "$(uname -m)" != x86_64 ] || OPTIONS+=(--with-crypto)

if [ -n "${SPDK_DIR:-}" ]; then
	[ -d "$SPDK_DIR" ] || die "SPDK_DIR=$SPDK_DIR is not a folder" "unset it to let this script build SPDK v$SPDK_WANTED"
	SPDK_DIR=$(cd "$SPDK_DIR" && pwd)
	version=$(spdk_version "$SPDK_DIR")
	[ -n "$version" ] || die "SPDK_DIR=$SPDK_DIR is not a SPDK tree (no include/spdk/version.h)"
	spdk_is_built "$SPDK_DIR" || die "SPDK_DIR=$SPDK_DIR holds SPDK v$version, but it is not built" "build it (./configure && make) or unset SPDK_DIR"
	say "SPDK v$version at $SPDK_DIR (from SPDK_DIR)"
	printf '%s\n' "$SPDK_DIR" >&3
	exit 0
fi

key=$(printf '%s\n' "${OPTIONS[@]}" "$(gcc -dumpversion 2>/dev/null || true)" | sha256sum | cut -c1-10)
tree=$LLOOP_CACHE/spdk-v$SPDK_WANTED-$key
stamp=$tree/.lloop-complete
mkdir -p "$LLOOP_CACHE"
exec 9>"$LLOOP_CACHE/spdk.lock"
if ! flock -n 9; then
	note "another run is building SPDK in $LLOOP_CACHE; waiting for it"
	flock 9
fi
if [ -e "$stamp" ] && spdk_is_built "$tree"; then
	printf '%s\n' "$tree" >&3
	exit 0
fi
rm -rf "$tree"

obtain() {
	local suite uri work tarball found=''
	work=$LLOOP_CACHE/fetch
	rm -rf "$work"
	for suite in trixie sid $(. /etc/os-release && echo "${VERSION_CODENAME:-}"); do
		while read -r uri; do
			rm -rf "$work"
			mkdir -p "$work"
			fetch_source "$suite" "$uri" "$work" ceph || continue
			tarball=$(ls "$work"/ceph_*.orig.tar.* | head -n 1)
			mkdir "$work/unpacked"
			step tar -C "$work/unpacked" -xf "$tarball" --wildcards '*/src/spdk' || continue
			found=$(ls -d "$work"/unpacked/*/src/spdk 2>/dev/null | head -n 1)
			if [ "$(spdk_version "$found")" = "$SPDK_WANTED" ]; then
				mv "$found" "$tree"
				rm -rf "$work"
				return 0
			fi
			printf 'suite %s carries SPDK "%s", wanted %s\n' "$suite" "$(spdk_version "$found")" "$SPDK_WANTED"
		done < <(debian_archives)
	done
	rm -rf "$work"
	printf 'no suite of the configured Debian archive has SPDK v%s in its ceph source package\n' "$SPDK_WANTED"
	return 1
}

build() {
	cd "$tree"
	# /usr/bin first: a pyenv or conda python lacks the modules that Debian's meson and DPDK's build bring along.
	export PATH=/usr/bin:/bin:/usr/sbin:/sbin:$PATH
	unset MAKEFLAGS MAKELEVEL LDFLAGS
	# v20.07's iSCSI brings an arc4random of its own, which glibc 2.36 and later declare too: this is its switch.
	export CFLAGS=-DHAVE_ARC4RANDOM=1
	step ./configure "${OPTIONS[@]}" && step make -j"$(nproc)" && spdk_is_built "$tree"
}

command -v apt-get >/dev/null || die "this machine has no apt-get to fetch SPDK with" "set SPDK_DIR to a built SPDK tree (v20.07 to v26.05)"
quietly "fetching SPDK v$SPDK_WANTED out of Debian's ceph source package (150 MB)" "$LLOOP_CACHE/spdk-fetch.log" obtain
quietly "building SPDK v$SPDK_WANTED in $tree (some 3 minutes on 2 cores)" "$LLOOP_CACHE/spdk-build.log" build
touch "$stamp"
printf '%s\n' "$tree" >&3
