#!/usr/bin/env bash
# Sets this machine up to build and run lloop: Debian packages, a built SPDK, hugepages, and lloop itself.
# Safe to run again, and twice at once: what is there already is left alone. Needs root for packages and hugepages only.
#
# usage: setup.sh [--tests] [--fio] [--hugepages MIB] [--no-build] [--undo-hugepages]
#   --tests            also what scripts/test.sh needs: SPDK's own programs with lloop inside, a small virtual machine,
#                      and all of --fio
#   --fio              also Debian's fio and, for it, SPDK's plugin with lloop inside (docs/fio.md)
#   --hugepages MIB    free hugepage memory to have at least (default 1024; 4096 with --tests)
#   --no-build         nothing that is built of lloop, and with --tests no more than machine and packages
#   --undo-hugepages   put the number of hugepages back to what it was before the first run, and exit
#
# SPDK_DIR     a built SPDK tree to use (v24.09 or later) instead of building one
# LLOOP_CACHE  where SPDK is built (default ~/.cache/lloop)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

tests='' fio='' build=yes hugepages_mib=''
while [ $# -gt 0 ]; do
	case $1 in
	--tests) tests=yes fio=yes ;;
	--fio) fio=yes ;;
	--no-build) build='' ;;
	--hugepages)
		[[ ${2:-} =~ ^[0-9]+$ ]] || die "--hugepages wants a number of MiB"
		hugepages_mib=$2
		shift
		;;
	--undo-hugepages) undo=yes ;;
	*) help_or_die "$1" ;;
	esac
	shift
done
hugepages_mib=${hugepages_mib:-$([ -n "$tests" ] && echo 4096 || echo 1024)}
hugepages_before=$LLOOP_CACHE/hugepages-before
nr_hugepages=/proc/sys/vm/nr_hugepages

if [ -n "${undo:-}" ]; then
	[ -r "$hugepages_before" ] || die "nothing to undo: $hugepages_before is not there"
	cat "$hugepages_before" >"$nr_hugepages" || die "cannot write $nr_hugepages" "run this as root"
	say "hugepages are $(cat "$nr_hugepages") again"
	rm -f "$hugepages_before"
	exit 0
fi

# Debian's names. The first two lines build SPDK and what it links, the third is bindgen's.
packages=(
	gcc g++ make pkg-config patch autoconf automake libtool nasm meson ninja-build python3 python3-jinja2 python3-pyelftools python3-tabulate xz-utils procps
	libnuma-dev libaio-dev libssl-dev uuid-dev libncurses-dev libcunit1-dev liburing-dev libkeyutils-dev libfuse3-dev libbsd-dev libarchive-dev
	libclang-dev clang
)
[ -z "$tests" ] || packages+=(util-linux mount e2fsprogs fuse3 python3-venv libiscsi-bin fdisk groff-base systemd squashfs-tools curl)
[ -z "$fio" ] || packages+=(fio)
# The virtual machine of the tests, and what runs it.
[ -z "$tests" ] || packages+=(qemu-system-x86 busybox-static nvme-cli cpio kmod)

install_packages() {
	local missing=() package
	for package in "${packages[@]}"; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	command -v apt-get >/dev/null || die "this machine has no apt-get" "install the counterparts of: ${missing[*]}"
	[ "$(id -u)" = 0 ] || die "packages are missing, and installing them needs root" "sudo apt-get install ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	# apt says what it could not fetch as a warning only, and goes on with its old lists: that is enough where they are.
	quietly_or "updating apt's lists" "$LLOOP_CACHE/apt-update.log" apt-get -q update || true
	quietly_or "installing ${#missing[@]} packages" "$LLOOP_CACHE/apt.log" \
		apt-get -q -o DPkg::Lock::Timeout=600 install -y --no-install-recommends "${missing[@]}" && return 0
	if disk_is_full "$LLOOP_CACHE/apt.log"; then die "the disk is full: packages could not be installed" "make room and run this again"; fi
	tail -n 15 "$LLOOP_CACHE/apt.log" | sed 's/^/    | /' >&2
	die "apt-get could not install: ${missing[*]}" "see to the network (apt-get update has to work) and run this again" \
		"the logs: $LLOOP_CACHE/apt-update.log, $LLOOP_CACHE/apt.log"
}

check_rust() {
	local wanted have
	wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$LLOOP_ROOT/Cargo.toml")
	[ -x "$HOME/.cargo/bin/cargo" ] && PATH=$PATH:$HOME/.cargo/bin
	command -v cargo >/dev/null || die "Rust is missing" "install Rust $wanted or later with rustup (Debian's own is too old)"
	have=$(cd "$LLOOP_ROOT" && rustc --version 2>&1) || die "rustc does not run here" "$have" "rust-toolchain.toml names the version: rustup toolchain install"
	have=$(printf '%s' "$have" | awk '{ print $2 }')
	[ "$(printf '%s\n' "$wanted" "${have%%-*}" | sort -V | head -n 1)" = "$wanted" ] ||
		die "Rust $have is too old, lloop needs $wanted" "rustup update"
}

# What dead programs of SPDK's kind have left: hugepage files, which hold memory, and locks of their sockets. A file is left when
# the process in its name is gone and nobody holds it locked, as DPDK does with those in use (a process of another container, say).
reclaim_leftovers() {
	local file pid mount count=0
	while read -r mount; do
		for file in "$mount"/spdk_pid*map_*; do
			pid=${file##*/spdk_pid} pid=${pid%%map_*}
			if [[ $pid =~ ^[0-9]+$ ]] && [ ! -d "/proc/$pid" ] && flock -n "$file" rm -f "$file" 2>/dev/null; then count=$((count + 1)); fi
		done
	done < <(awk '$3 == "hugetlbfs" { print $2 }' /proc/mounts)
	[ "$count" -eq 0 ] || say "reclaimed $count hugepage files of dead processes"
	# The tests' sockets have the test program's process id in their names, and SPDK holds such a lock as long as it lives.
	for file in "${TMPDIR:-/tmp}"/lloop-*.sock.lock; do
		pid=${file##*/lloop-} pid=${pid%%-*}
		if [[ $pid =~ ^[0-9]+$ ]] && [ ! -d "/proc/$pid" ] && flock -n "$file" rm -f "$file" 2>/dev/null; then rm -f "${file%.lock}"; fi
	done
}

reserve_hugepages() {
	local free total page_kib missing before
	free=$(hugepages_free_mib)
	if [ "$free" -lt "$hugepages_mib" ]; then
		page_kib=$(awk '/^Hugepagesize/ { print $2 }' /proc/meminfo)
		[ -n "$page_kib" ] || die "this kernel has no hugepages"
		before=$(cat "$nr_hugepages")
		total=$(((($(hugepages_total_mib) - free + hugepages_mib) * 1024 + page_kib - 1) / page_kib))
		[ -w "$nr_hugepages" ] && [ "$(id -u)" = 0 ] ||
			die "$hugepages_mib MiB of free hugepages are needed, $free MiB are there, and reserving them needs root" \
				"sudo sh -c 'echo $total > $nr_hugepages'"
		mkdir -p "$LLOOP_CACHE"
		[ -e "$hugepages_before" ] || printf '%s\n' "$before" >"$hugepages_before"
		# Asking for pages in a fragmented memory can fail half-way; compacting it first helps.
		echo 1 >/proc/sys/vm/compact_memory 2>/dev/null || true
		echo "$total" >"$nr_hugepages"
		free=$(hugepages_free_mib)
		missing=$((hugepages_mib - free))
		[ "$missing" -le 0 ] || die "the kernel found $free MiB for hugepages, $missing MiB short of what is needed" \
			"free memory: $(awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo) MiB; end something large, or reboot and try again"
		say "hugepages: $before -> $total of $page_kib KiB (undo: scripts/setup.sh --undo-hugepages)"
	fi
	if ! grep -q ' hugetlbfs ' /proc/mounts; then
		[ "$(id -u)" = 0 ] || die "hugetlbfs is not mounted, and mounting it needs root" "sudo mount -t hugetlbfs nodev /dev/hugepages"
		mkdir -p /dev/hugepages
		mount -t hugetlbfs nodev /dev/hugepages
		say "mounted hugetlbfs on /dev/hugepages"
	fi
}

# One set-up at a time: they would install the same packages and write the same files.
need_cache
exec 8>"$LLOOP_CACHE/setup.lock"
if ! flock -n 8; then
	note "another set-up is running; waiting for it"
	flock 8
fi
install_packages
check_rust
SPDK_DIR=$("$LLOOP_ROOT/scripts/spdk.sh")
export SPDK_DIR
reclaim_leftovers
reserve_hugepages
cd "$LLOOP_ROOT"
if [ -n "$build" ]; then
	quietly "building lloop with SPDK v$(spdk_version "$SPDK_DIR")" "$CARGO_TARGET_DIR/build.log" cargo build --release --locked
	"$LLOOP_ROOT/scripts/liblloop-so.sh" "$CARGO_TARGET_DIR/release/liblloop.a" >/dev/null
fi
if [ -n "$fio" ] && [ -n "$build" ]; then
	plugin=$("$LLOOP_ROOT/scripts/fio-plugin.sh" "$SPDK_DIR" "$CARGO_TARGET_DIR/release/liblloop.a")
	[ -n "$tests" ] || note "fio's plugin is $plugin; docs/fio.md says how to use it"
fi
if [ -n "$tests" ]; then
	# What makes a test's filesystem look like Lustre. A new file in place of the old one: programs may have that loaded.
	shim=$CARGO_TARGET_DIR/lustre.so
	if ! [ "$shim" -nt "$LLOOP_ROOT/tests/lustre.c" ]; then
		quietly "building the stand-in for Lustre" "$shim.log" \
			cc -O2 -Wall -Wextra -Werror -shared -fPIC -o "$shim.new" "$LLOOP_ROOT/tests/lustre.c"
		mv "$shim.new" "$shim"
	fi
	"$LLOOP_ROOT/scripts/guest.sh" >/dev/null
fi
if [ -n "$tests" ] && [ -n "$build" ]; then
	"$LLOOP_ROOT/scripts/spdk-apps.sh" "$SPDK_DIR" "$CARGO_TARGET_DIR/release/liblloop.a" >/dev/null
	"$LLOOP_ROOT/scripts/spdk-shared.sh" "$SPDK_DIR" >/dev/null
	# SPDK's client as PyPI has it: the plugin is tested with it, too.
	venv=$LLOOP_CACHE/pypi-venv
	if ! "$venv/bin/python" -c 'import spdk.rpc' 2>/dev/null; then
		rm -rf "$venv"
		quietly "installing SPDK's client from PyPI for the tests" "$LLOOP_CACHE/pypi.log" \
			sh -c '/usr/bin/python3 -m venv "$1" && "$1/bin/pip" --disable-pip-version-check install spdk' sh "$venv"
	fi
fi
