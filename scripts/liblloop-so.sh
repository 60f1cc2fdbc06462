#!/usr/bin/env bash
# Makes liblloop.so of liblloop.a, beside it: lloop without SPDK, for programs of a SPDK built --with-shared, unmodified:
#
#     LD_PRELOAD=target/release/liblloop.so spdk_tgt ...
#
# It finds SPDK in the program that it is loaded into, so it must be the version that liblloop.a was built for (SPDK_DIR).
# Prints its path.
#
# usage: liblloop-so.sh LIBLLOOP
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[ $# -eq 1 ] || die "usage: liblloop-so.sh LIBLLOOP"
library=$1
shared=${library%.a}.so
[ -r "$library" ] || die "$library is missing; cargo build --release makes it"
if ! [ "$shared" -nt "$library" ]; then
	# Everything in it is for itself: it is entered by its constructor, which registers the module with SPDK.
	cc -shared -o "$shared.new" -Wl,-soname,liblloop.so -Wl,--whole-archive "$library" -Wl,--no-whole-archive -Wl,--gc-sections \
		-Wl,--version-script=<(printf '{ local: *; };\n') -lpthread -ldl -lm
	mv "$shared.new" "$shared"
fi
printf '%s\n' "$shared"
