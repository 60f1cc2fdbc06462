#!/usr/bin/env bash
# Prints, as its last line, the folder of a small virtual machine for the tests: vmlinuz, initrd and root.img, out of Debian's packages.
#
# The kernel is Debian's cloud kernel, fetched and verified by apt and unpacked aside; nothing of it is installed. The root
# filesystem holds busybox, mkfs, nvme, fio and the like with their libraries, as they are on this machine, and a shell on a virtio
# port through which the tests drive it (tests/guest). Built once into the cache; a folder counts only when it is whole.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec 3>&1 1>&2 # progress goes to stderr; only the answer goes to stdout

[ "$(uname -m)" = x86_64 ] || die "the virtual machine of the tests is an x86_64 one, this machine is $(uname -m)"
META=linux-image-cloud-amd64
MODULES=(virtio_pci virtio_blk virtio_scsi sd_mod virtio_net virtio_console nvme-tcp)
PROGRAMS=(/bin/dash /sbin/mke2fs /sbin/e2fsck /usr/sbin/nvme /usr/bin/fio /sbin/fstrim /sbin/blkdiscard /sbin/blockdev /bin/lsblk)

kernel_package() { apt-cache depends --important "$META" 2>/dev/null | awk '$1 == "Depends:" { print $2; exit }'; }
package=$(kernel_package)
if [ -z "$package" ]; then
	quietly "updating apt's lists" "$LLOOP_CACHE/apt.log" apt-get -q update
	package=$(kernel_package)
	[ -n "$package" ] || die "apt knows no kernel $META" "see $LLOOP_CACHE/apt.log"
fi
key=$({
	cat "${BASH_SOURCE[0]}"
	apt-cache show --no-all-versions "$package" | sed -n 's/^Version: //p'
	dpkg-query -W busybox-static e2fsprogs nvme-cli fio util-linux libc6
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
rm -rf "$work" "$LLOOP_CACHE"/guest-??????????
mkdir -p "$work/result"

fetch() {
	cd "$work"
	# apt's own user may not write here. Lists that are too old name a package that is gone.
	step apt-get -q -o APT::Sandbox::User=root download "$package" ||
		{ step apt-get -q update && step apt-get -q -o APT::Sandbox::User=root download "$package"; } || return 1
	step dpkg-deb -x "$package"_*.deb kernel || return 1
	step cp kernel/boot/vmlinuz-* result/vmlinuz
}

# with_libraries PROGRAM ROOT: the program and the libraries it loads, at their places.
with_libraries() {
	local file
	for file in "$1" $(ldd "$1" | grep -o '/[^ ]*'); do
		[ -e "$2$file" ] || install -D "$file" "$2$file" || return 1
	done
}

initrd() {
	local version root=$work/initrd module
	version=$(ls "$work/kernel/lib/modules")
	depmod -b "$work/kernel" "$version" || return 1
	mkdir -p "$root"/{bin,dev,proc,sys,root}
	cp /bin/busybox "$root/bin/busybox"
	for module in "${MODULES[@]}"; do
		modprobe -d "$work/kernel" -S "$version" --show-depends "$module" || return 1
	done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$work/modules"
	while read -r module; do
		cp "$module" "$root/" || return 1
		basename "$module"
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
quietly "building the tests' virtual machine ($package)" "$LLOOP_CACHE/guest.log" build
mv "$work/result" "$guest"
rm -rf "$work"
printf '%s\n' "$guest" >&3
