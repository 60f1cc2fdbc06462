#!/usr/bin/env bash
# Builds SPDK's own programs with lloop inside: bdevio and bdevperf (SPDK's test suites), spdk_dd and spdk_tgt, or those of them
# that are named. Prints the folder they are in as its last line.
#
# Their sources are copied out of the SPDK tree and built beside our own build, so that the tree stays as it is: it may be
# somebody's own, or read-only. liblloop.a comes in by LDFLAGS, without a patch.
#
# usage: spdk-apps.sh SPDK_DIR LIBLLOOP [PROGRAM]...
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec 3>&1 1>&2

[ $# -ge 2 ] || die "usage: spdk-apps.sh SPDK_DIR LIBLLOOP [PROGRAM]..."
spdk=$1 library=$2
shift 2
wanted=" ${*:-bdevio bdevperf spdk_dd spdk_tgt} "
[ -r "$library" ] || die "$library is missing; cargo build --release makes it"
out=$CARGO_TARGET_DIR/spdk-apps/$(spdk_version "$spdk")
mkdir -p "$out"

# Lets a test lay the programs' cores on the processors that there are (tests/lcores.c).
cc -O2 -Wall -c -o "$out/lcores.o" "$LLOOP_ROOT/tests/lcores.c"
# Tells the benchmark how long bdevperf's reactor stays away (tests/gap.c).
cc -O2 -Wall -I "$spdk/include" -c -o "$out/gap.o" "$LLOOP_ROOT/tests/gap.c"

build() { # NAME SOURCE
	local name=$1 source=$2 copy=$out/src/$1 objects=$out/lcores.o
	[ "$name" != bdevperf ] || objects+=" $out/gap.o"
	rm -rf "$copy"
	mkdir -p "$copy"
	cp -r "$spdk/$source/." "$copy"
	find "$copy" -name '*.o' -delete
	PATH=/usr/bin:/bin:/usr/sbin:/sbin:$PATH \
		LDFLAGS="$(spdk_rpath "$spdk") -Wl,--whole-archive $library -Wl,--no-whole-archive -Wl,--wrap=rte_eal_init $objects" \
		make -C "$copy" "SPDK_ROOT_DIR=$spdk" "APP=$out/$name"
	[ -x "$out/$name" ]
}

is_new() { # NAME
	local than
	for than in "$library" "$LLOOP_ROOT/tests/lcores.c" "$LLOOP_ROOT/tests/gap.c" "$spdk/build/lib/libspdk_bdev.a"; do
		[ "$out/$1" -nt "$than" ] || return 1
	done
}

for app in bdevio:test/bdev/bdevio "bdevperf:$(cd "$spdk" && ls -d test/bdev/bdevperf examples/bdev/bdevperf 2>/dev/null | head -n 1)" spdk_dd:app/spdk_dd spdk_tgt:app/spdk_tgt; do
	name=${app%%:*}
	[[ $wanted == *" $name "* ]] && ! is_new "$name" || continue
	rm -f "$out/$name"
	quietly "building SPDK's $name with lloop inside" "$out/$name.log" build "$name" "${app#*:}"
done
printf '%s\n' "$out" >&3
