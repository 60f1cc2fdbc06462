#!/usr/bin/env bash
# Prints, as its last line, the folder of a small virtual machine for the tests: vmlinuz, initrd and root.img, out of Debian's packages.
#
# The kernel is Debian's cloud kernel out of backports (with ublk, and with TLS and in-band authentication for NVMe/TCP), or where
# there is none, the release's own. It is fetched and verified by apt through private lists and unpacked aside; nothing of it is
# installed. What the machine needs to boot is loaded then; other modules (MORE_MODULES, and the kernel's cryptography) are there
# for modprobe. The root filesystem holds busybox, mkfs, nvme, fio and the like with their libraries, as they are on this machine,
# and a shell on a virtio port through which the tests drive it (tests/guest). Built once into the cache; a folder counts only
# when it is whole. The file "kernel" in it has the kernel's version.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$LLOOP_ROOT/scripts/debian-source.sh"
exec 3>&1 1>&2 # progress goes to stderr; only the answer goes to stdout

[ "$(uname -m)" = x86_64 ] || die "the virtual machine of the tests is an x86_64 one, this machine is $(uname -m)"
META=linux-image-cloud-amd64
MODULES=(virtio_pci virtio_blk virtio_scsi sd_mod virtio_net virtio_console nvme-tcp)
# Where the kernel has them. (nvme-auth and nvme-keyring are part of the kernel itself in 6.12.)
MORE_MODULES=(ublk_drv nbd tls nvme-auth nvme-keyring)
MODULE_FOLDERS=(kernel/crypto kernel/lib/crypto kernel/arch/x86/crypto)
PROGRAMS=(/bin/dash /sbin/mke2fs /sbin/e2fsck /usr/sbin/nvme /usr/bin/fio /sbin/fstrim /sbin/blkdiscard /sbin/blockdev /bin/lsblk /sbin/modprobe)

release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
key=$({
	cat "${BASH_SOURCE[0]}"
	dpkg-query -W busybox-static e2fsprogs nvme-cli fio util-linux kmod libc6
} | sha256sum | cut -c1-10)
guest=$LLOOP_CACHE/guest-$key
mkdir -p "$LLOOP_CACHE"
exec 9>"$LLOOP_CACHE/guest.lock"
flock 9
if [ -d "$guest" ]; then
	printf '%s\n' "$guest" >&3
	exit 0
fi
work=$LLOOP_CACHE/guest-work
rm -rf "$work"
# Another working copy may use the same cache, and be running tests with another machine.
find "$LLOOP_CACHE" -maxdepth 1 -name 'guest-??????????' -mtime +2 -exec rm -rf {} +
mkdir -p "$work/result"

fetch() {
	local suite uri version
	for suite in "$release-backports" "$release"; do
		while read -r uri; do
			rm -rf "$work/apt" "$work/kernel"
			mkdir -p "$work/apt"
			fetch_kernel "$suite" "$uri" "$work/apt" "$META" || continue
			step dpkg-deb -x "$(ls "$work"/apt/linux-image-*.deb | head -n 1)" "$work/kernel" || return 1
			# Where / and /usr are one, the modules are below /usr.
			[ -d "$work/kernel/lib/modules" ] || ln -s usr/lib "$work/kernel/lib" || return 1
			step cp "$work"/kernel/boot/vmlinuz-* "$work/result/vmlinuz" || return 1
			version=$(ls "$work/kernel/lib/modules")
			step depmod -b "$work/kernel" "$version" || return 1
			printf '%s\n' "$version" >"$work/result/kernel"
			return 0
		done < <(debian_archives)
	done
	printf 'no %s in %s-backports or %s of the configured Debian archive\n' "$META" "$release" "$release"
	return 1
}

# module_files MODULE: its file and those of the modules it needs, in the order in which they are loaded.
module_files() {
	modprobe -d "$work/kernel" -S "$(cat "$work/result/kernel")" --show-depends "$1" | awk '$1 == "insmod" { print $2 }'
}

# with_libraries PROGRAM ROOT: the program and the libraries it loads, at their places.
with_libraries() {
	local file
	for file in "$1" $(ldd "$1" | grep -o '/[^ ]*'); do
		[ -e "$2$file" ] || install -D "$file" "$2$file" || return 1
	done
}

initrd() {
	local root=$work/initrd module name
	mkdir -p "$root"/{bin,dev,proc,sys,root}
	cp /bin/busybox "$root/bin/busybox"
	for module in "${MODULES[@]}"; do
		module_files "$module" || return 1
	done | awk '!seen[$0]++' >"$work/modules" || return 1
	while read -r module; do
		name=$(basename "$module" .xz)
		# Busybox loads what is not compressed.
		case $module in
		*.xz) xz -dc "$module" >"$root/$name" ;;
		*) cp "$module" "$root/$name" ;;
		esac || return 1
		printf '%s\n' "$name"
	done <"$work/modules" >"$root/modules"
	cat >"$root/init" <<-'END'
		#!/bin/busybox sh
		# Mounts the root filesystem: what lloop.root= names, else the disk with the serial number "root".
		export PATH=/bin
		busybox mount -t proc proc /proc
		busybox --install -s /bin
		mount -t devtmpfs dev /dev && mount -t sysfs sys /sys
		while read -r module; do insmod "/$module"; done </modules
		name=$(sed -n 's/.*lloop.root=\([^ ]*\).*/\1/p' /proc/cmdline)
		for turn in $(seq 300); do
			[ -n "$name" ] || for disk in /sys/block/*; do
				[ "$(cat "$disk/serial" 2>/dev/null)" = root ] && name=${disk##*/}
			done
			[ -n "$name" ] && [ -b "/dev/$name" ] && break
			sleep 0.1
		done
		mount -o ro "/dev/$name" /root || { echo "lloop: no root filesystem on /dev/$name"; cat /proc/partitions; poweroff -f; }
		for folder in dev proc sys; do mount --move "/$folder" "/root/$folder"; done
		exec switch_root /root /sbin/init
	END
	chmod +x "$root/init"
	(cd "$root" && find . | cpio --quiet -o -H newc | gzip -1) >"$work/result/initrd"
}

# The modules that are loaded when they are asked for.
modules() { # ROOT
	local version from to module folder file
	version=$(cat "$work/result/kernel")
	from=$work/kernel/lib/modules/$version to=$1/lib/modules/$version
	mkdir -p "$to"
	cp "$from"/modules.{order,builtin,builtin.modinfo} "$to" || return 1
	for folder in "${MODULE_FOLDERS[@]}"; do
		[ ! -d "$from/$folder" ] || find "$from/$folder" -name '*.ko*'
	done >"$work/more-modules"
	for module in "${MODULES[@]}" "${MORE_MODULES[@]}"; do
		module_files "$module" || printf 'this kernel has no module %s\n' "$module" >&2
	done >>"$work/more-modules"
	while read -r file; do
		[ -e "$to${file#"$from"}" ] || install -D -m 644 "$file" "$to${file#"$from"}" || return 1
	done <"$work/more-modules"
	step depmod -b "$1" "$version"
}

root() {
	local root=$work/root program applet
	mkdir -p "$root"/{bin,sbin,usr/bin,usr/sbin,dev,proc,sys,tmp,run,mnt,etc}
	cp /bin/busybox "$root/bin/busybox"
	for applet in $(busybox --list); do [ -e "$root/bin/$applet" ] || ln -s busybox "$root/bin/$applet"; done
	# What is a whole program here goes before busybox's.
	for program in "${PROGRAMS[@]}"; do
		rm -f "$root/bin/$(basename "$program")"
		with_libraries "$(readlink -f "$program")" "$root" || return 1
		[ -e "$root$program" ] || ln -s "$(readlink -f "$program")" "$root$program"
	done
	ln -s mke2fs "$root/sbin/mkfs.ext4"
	# (Busybox's own shell takes its own programs for those of the same name.)
	ln -sf dash "$root/bin/sh"
	modules "$root" || return 1
	cat >"$root/sbin/init" <<-'END'
		#!/bin/sh
		# A shell on the virtio port named "shell": what the host writes is run, what it prints goes back.
		export PATH=/sbin:/usr/sbin:/bin:/usr/bin
		mount -t tmpfs tmp /tmp; mount -t tmpfs tmp /run; mount -t tmpfs tmp /mnt
		port=/dev/$(basename "$(dirname "$(grep -lx shell /sys/class/virtio-ports/*/name)")")
		while :; do
			sh -s <>"$port" >&0 2>&1 # it can be opened once only
			sleep 0.1
		done
	END
	chmod +x "$root/sbin/init"
	step mke2fs -q -t ext4 -O ^has_journal -m 0 -L lloop-root -d "$root" "$work/result/root.img" \
		"$(($(du -sm "$root" | cut -f1) + 64))M"
}

build() { fetch && step initrd && step root; }
quietly "building the tests' virtual machine (Debian's cloud kernel, 35 MB)" "$LLOOP_CACHE/guest.log" build
note "its kernel is $(cat "$work/result/kernel")"
mv "$work/result" "$guest"
rm -rf "$work"
printf '%s\n' "$guest" >&3
