#!/usr/bin/env bash
# Builds SPDK's fio plugin with lloop inside, for the fio that is installed (Debian's /usr/bin/fio). Prints the plugin's path
# as its last line.
#
# fio refuses a plugin of another version and shares its structures with it, so the headers are those of the installed
# package's own source, configured here. They are kept in the cache; the plugin is built beside our own build, as
# spdk-apps.sh does.
#
# usage: fio-plugin.sh SPDK_DIR LIBLLOOP
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$LLOOP_ROOT/scripts/debian-source.sh"
exec 3>&1 1>&2

[ $# -eq 2 ] || die "usage: fio-plugin.sh SPDK_DIR LIBLLOOP"
spdk=$1 library=$2
[ -r "$library" ] || die "$library is missing; cargo build --release makes it"
out=$CARGO_TARGET_DIR/spdk-apps/$(spdk_version "$spdk")
plugin=$out/liblloop_fio.so
version=$(dpkg-query -W -f '${source:Version}' fio 2>/dev/null) || die "Debian's fio is not installed" "scripts/setup.sh --fio installs it"
headers=$LLOOP_CACHE/fio-$version

obtain_headers() {
	local work=$LLOOP_CACHE/fetch-fio suite uri
	local codename
	codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
	for suite in "$codename" "$codename-updates" "$codename-backports"; do
		while read -r uri; do
			rm -rf "$work"
			mkdir -p "$work"
			fetch_source "$suite" "$uri" "$work" "fio=$version" || continue
			mkdir "$work/unpacked"
			step tar -C "$work/unpacked" --strip-components=1 -xf "$(ls "$work"/fio_*.orig.tar.* | grep -v '\.asc$')"
			# As Debian's own build; what is left out by a missing library is not part of any structure that a plugin sees.
			(cd "$work/unpacked" && step ./configure --disable-native)
			rm -rf "$headers"
			mv "$work/unpacked" "$headers"
			rm -rf "$work"
			return 0
		done < <(debian_archives)
	done
	rm -rf "$work"
	printf 'no suite of the configured Debian archive has the source of fio %s, which is installed\n' "$version"
	return 1
}

build() {
	local source copy=$out/src/fio_plugin
	source=$(ls -d "$spdk/examples/bdev/fio_plugin" "$spdk/app/fio/bdev" 2>/dev/null | head -n 1)
	rm -rf "$copy"
	mkdir -p "$copy"
	cp -r "$source/." "$copy"
	find "$copy" -name '*.o' -delete
	PATH=/usr/bin:/bin:/usr/sbin:/sbin:$PATH LDFLAGS="$(spdk_rpath "$spdk") -Wl,--whole-archive $library -Wl,--no-whole-archive" \
		make -C "$copy" "SPDK_ROOT_DIR=$spdk" "CONFIG_FIO_SOURCE_DIR=$headers" "FIO_PLUGIN=$plugin"
	[ -e "$plugin" ]
}

mkdir -p "$out"
exec 9>"$LLOOP_CACHE/fio.lock"
flock 9
if [ ! -e "$headers/config-host.h" ]; then
	quietly "fetching the source of fio $version for its headers (6 MB)" "$LLOOP_CACHE/fio-fetch.log" obtain_headers
fi
if ! [ "$plugin" -nt "$library" ] || ! [ "$plugin" -nt "$spdk/build/lib/libspdk_bdev.a" ] || ! [ "$plugin" -nt "$headers/config-host.h" ]; then
	rm -f "$plugin"
	quietly "building SPDK's fio plugin with lloop inside" "$out/fio_plugin.log" build
fi
printf '%s\n' "$plugin" >&3
