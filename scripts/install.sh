#!/usr/bin/env bash
# Puts lloop in place: lloop_tgt, lloop, SPDK's client with lloop's methods (spdk_rpc.py), the service lloop.service, manual
# pages, and completions for bash, zsh and fish. Build first: scripts/setup.sh
#
# usage: install.sh [--prefix DIR] [--uninstall]
#   --prefix DIR   where to (default /usr/local); with /usr and /usr/local, configuration is in /etc, else in DIR/etc
#   --uninstall    remove what was installed there, folders too, except for what others have put into them
#
# DESTDIR  a folder to install into as if it were /, for packages
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

prefix=/usr/local uninstall=''
while [ $# -gt 0 ]; do
	case $1 in
	--prefix)
		[[ ${2:-} = /* ]] || die "--prefix wants a folder, from the root (/usr/local)"
		prefix=${2%/}
		shift
		;;
	--uninstall) uninstall=yes ;;
	*) help_or_die "$1" ;;
	esac
	shift
done
case $prefix in
'' | /usr | /usr/local) sysconfdir=/etc ;;
*) sysconfdir=$prefix/etc ;;
esac
DESTDIR=${DESTDIR:-}
DESTDIR=${DESTDIR%/}
bindir=$prefix/bin libexecdir=$prefix/libexec share=$prefix/share
unit=$prefix/lib/systemd/system/lloop.service
manifest=$share/lloop/manifest
built=$CARGO_TARGET_DIR/release

# The manifest has a line for everything that was made, folders with a slash at the end, in the order of their making.
remove() {
	local path paths=()
	mapfile -t paths < <(tac "$DESTDIR$manifest")
	rm -f "$DESTDIR$manifest"
	for path in "${paths[@]}"; do
		case $path in
		*/) [ ! -d "$DESTDIR$path" ] || rmdir "$DESTDIR$path" 2>/dev/null || note "not empty, so it stays: $path" ;;
		*) rm -f "$DESTDIR$path" ;;
		esac
	done
}

if [ -n "$uninstall" ]; then
	[ -r "$DESTDIR$manifest" ] || die "nothing is installed there: there is no $DESTDIR$manifest" "say with --prefix where it is"
	# A file of options that was changed is the user's.
	options=$DESTDIR$sysconfdir/lloop/lloop_tgt.conf
	if [ -e "$options" ] && ! cmp -s "$options" "$LLOOP_ROOT/scripts/install/lloop_tgt.conf"; then
		sed -i "\|^$sysconfdir/lloop/lloop_tgt.conf\$|d" "$DESTDIR$manifest"
		note "changed, so it stays: $sysconfdir/lloop/lloop_tgt.conf"
	fi
	remove
	say "lloop is removed from $DESTDIR$prefix"
	exit 0
fi

for program in lloop lloop_tgt; do
	[ -x "$built/$program" ] || die "$built/$program is not there" "build it: scripts/setup.sh"
done
work=$(mktemp -d)
finish() {
	local rc=$?
	if [ "$rc" -ne 0 ] && [ -s "$work/manifest" ]; then
		mkdir -p "$DESTDIR$share/lloop"
		install -m 0644 "$work/manifest" "$DESTDIR$manifest"
		note "remove what is in place already: $0 --prefix ${prefix:-/} --uninstall" >&2
	fi
	rm -rf "$work"
	exit "$rc"
}
trap finish EXIT

# The files of an older one go first, so that none of them is forgotten; its folders stay, and what is the user's.
touch "$work/manifest"
if [ -r "$DESTDIR$manifest" ]; then
	while IFS= read -r path; do
		case $path in
		*/ | "$sysconfdir"/*) [ ! -e "$DESTDIR$path" ] || printf '%s\n' "$path" >>"$work/manifest" ;;
		*) rm -f "$DESTDIR$path" ;;
		esac
	done <"$DESTDIR$manifest"
fi

# folder DIR: makes it and those above it that are missing.
folder() {
	[ ! -d "$DESTDIR$1" ] || return 0
	folder "$(dirname "$1")"
	mkdir "$DESTDIR$1"
	printf '%s/\n' "$1" >>"$work/manifest"
}
# place MODE FROM TO
place() {
	[ ! -e "$DESTDIR$3" ] || die "$DESTDIR$3 is there already, and not lloop's" "move it away"
	folder "$(dirname "$3")"
	printf '%s\n' "$3" >>"$work/manifest"
	install -m "$1" "$2" "$DESTDIR$3"
}
place 0755 "$built/lloop" "$bindir/lloop"
place 0755 "$built/lloop_tgt" "$bindir/lloop_tgt"
place 0644 "$LLOOP_ROOT/rpc/lloop_rpc.py" "$share/lloop/rpc/lloop_rpc.py"
place 0755 "$LLOOP_ROOT/rpc/spdk_rpc.py" "$share/lloop/rpc/spdk_rpc.py"
place 0755 "$LLOOP_ROOT/scripts/install/hugepages" "$libexecdir/lloop/hugepages"

printf '#!/bin/sh\nexec /usr/bin/python3 %q "$@"\n' "$share/lloop/rpc/spdk_rpc.py" >"$work/spdk_rpc.py"
place 0755 "$work/spdk_rpc.py" "$bindir/spdk_rpc.py"

sed -e "s|@bindir@|$bindir|g; s|@libexecdir@|$libexecdir|g; s|@sysconfdir@|$sysconfdir|g" \
	"$LLOOP_ROOT/scripts/install/lloop.service.in" >"$work/lloop.service"
place 0644 "$work/lloop.service" "$unit"
folder "$sysconfdir/lloop"
chmod 0700 "$DESTDIR$sysconfdir/lloop"
options=$sysconfdir/lloop/lloop_tgt.conf
[ -e "$DESTDIR$options" ] || place 0644 "$LLOOP_ROOT/scripts/install/lloop_tgt.conf" "$options"

"$built/lloop" man | gzip -9n >"$work/lloop.1.gz"
"$built/lloop_tgt" --man | gzip -9n >"$work/lloop_tgt.8.gz"
place 0644 "$work/lloop.1.gz" "$share/man/man1/lloop.1.gz"
place 0644 "$work/lloop_tgt.8.gz" "$share/man/man8/lloop_tgt.8.gz"

complete() { # PROGRAM SHELL TO
	case $1 in
	lloop) "$built/lloop" completions "$2" ;;
	*) "$built/$1" --completions "$2" ;;
	esac >"$work/completion"
	place 0644 "$work/completion" "$3"
}
for program in lloop lloop_tgt; do
	complete $program bash "$share/bash-completion/completions/$program"
	complete $program zsh "$share/zsh/site-functions/_$program"
	complete $program fish "$share/fish/vendor_completions.d/$program.fish"
done

folder "$share/lloop"
install -m 0644 "$work/manifest" "$DESTDIR$manifest"
say "lloop is installed in $DESTDIR$prefix"
note "start it:   systemctl enable --now lloop    (options: $sysconfdir/lloop/lloop_tgt.conf)"
case $prefix in
/usr | /usr/local) ;;
*) note "            after: systemctl link $unit" ;;
esac
note "remove it:  $0 --prefix $prefix --uninstall"
