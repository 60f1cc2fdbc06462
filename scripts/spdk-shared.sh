#!/usr/bin/env bash
# Makes the spdk_tgt of a SPDK built --with-shared out of a static tree, for the test of liblloop.so: SPDK compiles the same
# objects either way, so its own makefiles only have to link them again (some 5 seconds). Prints the program's path as its last
# line.
#
# The tree stays as it is; what is linked lies beside our own build. The copy is mended where the tree cannot be linked that way
# (mend_ceph).
#
# usage: spdk-shared.sh SPDK_DIR
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec 3>&1 1>&2

[ $# -eq 1 ] || die "usage: spdk-shared.sh SPDK_DIR"
spdk=$1
copy=$CARGO_TARGET_DIR/spdk-apps/$(spdk_version "$spdk")/shared
program=$copy/build/bin/spdk_tgt

# The branch that Debian's ceph package carries is built without shared libraries there, and two things keep them from linking:
#   - lib/nvmf uses the log flag "reservation", which is defined in the rbd bdev's module only;
#   - the map of libspdk_notify does not export spdk_notify_type_register_once, which lib/nvmf calls.
mend_ceph() {
	local map=$copy/lib/notify/spdk_notify.map name=spdk_notify_type_register_once flag=SPDK_LOG_reservation
	if grep -q "$name" "$copy/include/spdk/notify.h" && ! grep -q "$name" "$map"; then
		step sed -i "s/^\tspdk_notify_type_register;/&\n\t$name;/" "$map" || return 1
	fi
	nm "$copy"/build/lib/libspdk_*.a >"$copy/symbols" 2>/dev/null
	if grep -q " U $flag\$" "$copy/symbols" && ! grep -q " [BDd] $flag\$" "$copy/symbols"; then
		printf '#include "spdk/log.h"\nSPDK_LOG_REGISTER_COMPONENT(reservation)\n' >"$copy/lib/nvmf/lloop_reservation.c"
		step sed -i '0,/^C_SRCS = /s//&lloop_reservation.c /' "$copy/lib/nvmf/Makefile"
	fi
}

build() {
	local entry part options
	rm -rf "$copy"
	mkdir -p "$copy/build/bin"
	# With their times: make must find the objects up to date.
	(cd "$spdk" && tar -cf - --exclude='*.so' --exclude='*.so.*' include lib module mk shared_lib build/lib build/include app/spdk_tgt) | tar -C "$copy" -xf -
	for entry in "$spdk"/*; do
		[ -e "$copy/${entry##*/}" ] || ln -s "$entry" "$copy/${entry##*/}"
	done
	step mend_ceph || return 1
	options=("SPDK_ROOT_DIR=$copy" "CONFIG_ENV=$copy/lib/env_dpdk" CONFIG_SHARED=y)
	export PATH=/usr/bin:/bin:/usr/sbin:/sbin:$PATH
	for part in lib module shared_lib; do step make -C "$copy/$part" "${options[@]}" -j"$(nproc)" || return 1; done
	LDFLAGS=$(spdk_rpath "$spdk" "$copy/build/lib") step make -C "$copy/app/spdk_tgt" "${options[@]}"
	[ -x "$program" ]
}

if ! [ "$program" -nt "$spdk/build/lib/libspdk_bdev.a" ]; then
	mkdir -p "${copy%/*}"
	quietly "linking SPDK v$(spdk_version "$spdk") as shared libraries" "${copy%/*}/shared.log" build
fi
printf '%s\n' "$program" >&3
