# SPDK v20.07, the last resort: everything about it that the scripts have to know. Sourced by scripts/spdk.sh.
# shellcheck shell=bash
#
# It is used where no suite of the Debian archive has a newer SPDK, and by `scripts/test.sh --fallback`. What is lost with it:
#   - virtual machines by vhost. Its vhost maps guest memory in steps of 2 MiB and reads below the mapping: the target can die of
#     SIGSEGV when a machine connects, with all its devices. So it is built without vhost.
#   - FUA. It drops the bit, so lloop opens every file off Lustre with O_DSYNC: each write is on stable storage when it is answered.
#   - interrupt mode, ublk, TLS, in-band authentication, asymmetric namespace access.

FALLBACK_VERSION=20.07
FALLBACK_LOST="no vhost (virtual machines use NVMe/TCP or iSCSI), no interrupt mode, no ublk, no TLS, slower writes off Lustre (O_DSYNC)"
FALLBACK_OPTIONS=(--disable-tests --disable-unit-tests --with-uring --without-vhost --without-virtio --without-isal)

provide_fallback() { # WHY
	local key tree options=("${FALLBACK_OPTIONS[@]}" "--target-arch=$ARCH")
	[ "$(uname -m)" != x86_64 ] || options+=(--with-crypto)
	key=$(key fallback "${options[@]}")
	tree=$(cached "$key")
	say "${RED}using SPDK v$FALLBACK_VERSION, the last resort${PLAIN} ($1): $FALLBACK_LOST"
	if [ -n "$tree" ]; then
		printf '%s\n' "$tree" >&3
		return 0
	fi
	need_archive
	remove_half_built
	need_disk 1500
	fetch_or_die "SPDK v$FALLBACK_VERSION out of Debian's ceph source package (150 MB)" \
		"trixie sid $(. /etc/os-release && echo "${VERSION_CODENAME:-}")" src/spdk "$FALLBACK_VERSION" "$key" ||
		die "the Debian archive that this machine's apt is configured for has no usable SPDK: neither v$OLDEST or later nor v$FALLBACK_VERSION" \
			"set SPDK_DIR to a built SPDK tree (v$OLDEST or later); the log: $LLOOP_CACHE/spdk-fetch.log"
	tree=$(cat "$LLOOP_CACHE/fetch/tree")
	touch "$tree/.lloop-fallback"
	# Its iSCSI target brings an arc4random of its own, which glibc 2.36 and later declare too: this is its switch.
	CFLAGS=-DHAVE_ARC4RANDOM=1 provide "$tree" "${options[@]}"
}
