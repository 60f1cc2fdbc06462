#!/usr/bin/env bash
# Builds fio's t/io_uring, which Debian does not ship, out of the source that scripts/fio-plugin.sh keeps in the cache (run by
# scripts/bench.sh). Prints the program's path as its last line.
#
# usage: fio-uring.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec 3>&1 1>&2

version=$(dpkg-query -W -f '${source:Version}' fio 2>/dev/null) || die "Debian's fio is not installed" "scripts/setup.sh --fio installs it"
source=$LLOOP_CACHE/fio-$version
program=$LLOOP_CACHE/fio-uring-$version
[ -e "$source/t/io_uring.c" ] || die "$source has no t/io_uring.c" "scripts/setup.sh --fio fetches fio's source"

build() {
	local copy
	copy=$(mktemp -d "$LLOOP_CACHE/fio-uring.XXXXXX")
	# The source is the plugin's, too: it stays as it is.
	cp -r "$source/." "$copy"
	step make -C "$copy" t/io_uring
	mv "$copy/t/io_uring" "$program"
	rm -rf "$copy"
}

exec 9>"$LLOOP_CACHE/fio.lock"
flock 9
[ -x "$program" ] || quietly "building fio's t/io_uring" "$LLOOP_CACHE/fio-uring.log" build
printf '%s\n' "$program" >&3
