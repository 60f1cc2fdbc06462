#!/usr/bin/env bash
# From a fresh machine to a block device over NVMe/TCP: sets everything up, starts lloop_tgt, attaches an image, exports it on
# loopback, proves with an NVMe-oF initiator that data written comes back, and keeps serving until Ctrl-C.
#
# usage: run.sh [--image FILE] [--check] [--port PORT]
#   --image FILE   serve this file instead of a demo image of 256 MiB; what is in it stays: the proof writes what it reads there
#   --check        stop after the proof
#   --port PORT    listen there on 127.0.0.1 (default 4420)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

image='' check='' port=4420
while [ $# -gt 0 ]; do
	case $1 in
	--image)
		[ -n "${2:-}" ] || die "--image wants a file"
		image=$2
		shift
		;;
	--port)
		[[ ${2:-} =~ ^[0-9]+$ ]] && [ "$2" -ge 1 ] && [ "$2" -le 65535 ] || die "--port wants a number from 1 to 65535"
		port=$2
		shift
		;;
	--check) check=yes ;;
	*) help_or_die "$1" ;;
	esac
	shift
done
if [ -n "$image" ]; then
	[ -e "$image" ] || die "$image: no such file" "create one: target/release/lloop create $image --size 1G"
	image=$(realpath "$image")
fi

"$LLOOP_ROOT/scripts/setup.sh" --hugepages 1536
SPDK_DIR=$("$LLOOP_ROOT/scripts/spdk.sh" 2>/dev/null)
bin=$CARGO_TARGET_DIR/release
apps=$("$LLOOP_ROOT/scripts/spdk-apps.sh" "$SPDK_DIR" "$bin/liblloop.a" spdk_dd)
lloop=$bin/lloop
work=$(mktemp -d "${TMPDIR:-/tmp}/lloop-run.XXXXXX")
socket=$work/rpc.sock
nqn=nqn.2026-11.io.lloop:demo
target=''

# The target is ours: whatever way this script ends, it ends too, by its own process id.
finish() {
	local rc=$?
	trap - EXIT
	# From now on Ctrl-C is for the user's patience, not for the target's clean end.
	trap '' INT TERM
	if [ -n "$target" ] && kill -0 "$target" 2>/dev/null; then
		say "stopping the target"
		kill -TERM "$target"
		wait "$target" || note "the target ended with status $?"
	fi
	if [ "$rc" -eq 0 ]; then
		rm -rf "$work"
	else
		[ ! -e "$work/lloop_tgt.log" ] || tail -n 20 "$work/lloop_tgt.log" | sed 's/^/    | /' >&2
		note "logs are in $work"
	fi
	exit "$rc"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

own=''
if [ -z "$image" ]; then
	own=yes
	image=$LLOOP_CACHE/demo.img
	if [ ! -e "$image" ]; then "$lloop" create "$image" --size 256M >/dev/null; fi
fi

say "starting lloop_tgt"
# A session of its own: Ctrl-C reaches this script, which then ends the target in order.
setsid "$bin/lloop_tgt" --disable-cpumask-locks -m 0x1 -s 512 -r "$socket" >"$work/lloop_tgt.log" 2>&1 &
target=$!
for _ in $(seq 150); do
	if grep -q 'is ready' "$work/lloop_tgt.log"; then break; fi
	kill -0 "$target" 2>/dev/null || die "lloop_tgt did not start"
	sleep 0.2
done
grep -q 'is ready' "$work/lloop_tgt.log" || die "lloop_tgt was not ready within 30 s"

run() { # shows a command as the user would type it, and runs it
	note "$ ${*/#$bin\//}" >&2
	"$@"
}
say "attaching $image"
name=$(run "$lloop" --socket "$socket" attach "$image" --allow-any-fs)
say "exporting $name over NVMe/TCP on 127.0.0.1:$port"
run "$lloop" --socket "$socket" export nvmf "$name" --listen "127.0.0.1:$port" --nqn "$nqn" --allow-any-host | sed 's/^/    /'

# The proof: SPDK's NVMe-oF initiator, in a process of its own, writes the first 64 MiB (or what there is), reads them back,
# and both are compared with each other and with the file. Random data for the demo image; a user's image gets what it has.
attach_remote='{"subsystems":[{"subsystem":"bdev","config":[{"method":"bdev_nvme_attach_controller","params":{"name":"Remote",
	"trtype":"TCP","adrfam":"IPv4","traddr":"127.0.0.1","trsvcid":"'$port'","subnqn":"'$nqn'"}}]}]}'
printf '%s\n' "$attach_remote" >"$work/initiator.json"
initiator() {
	"$apps/spdk_dd" --json "$work/initiator.json" -m 0x2 -s 256 -r "$work/initiator.sock" --bs=1048576 "$@" >>"$work/initiator.log" 2>&1 ||
		{ tail -n 15 "$work/initiator.log" | sed 's/^/    | /' >&2; die "the NVMe-oF initiator failed" "its log: $work/initiator.log"; }
}
size=$(stat -L -c %s "$image")
count=$((size / 1048576 < 64 ? size / 1048576 : 64))
[ "$count" -gt 0 ] || die "$image is smaller than 1 MiB: too small for the proof"
if [ -n "$own" ]; then
	say "writing $count MiB of random data through the initiator"
	head -c "$((count * 1048576))" /dev/urandom >"$work/written"
else
	say "writing the image's first $count MiB, as they are, through the initiator"
	dd if="$image" of="$work/written" bs=1M count="$count" iflag=direct status=none
fi
initiator --if="$work/written" --ob=Remoten1 --count="$count"
say "reading $count MiB back through the initiator"
initiator --ib=Remoten1 --of="$work/read" --count="$count"
cmp "$work/written" "$work/read" || die "what was read is not what was written"
dd if="$image" bs=1M count="$count" iflag=direct status=none | cmp - "$work/written" || die "the file does not hold what was written"
rm -f "$work/written" "$work/read"
say "proven: $count MiB went through NVMe/TCP and $name, and came back the same; the file holds them too"

"$lloop" --socket "$socket" list | sed 's/^/    /'
if [ -n "$check" ]; then exit 0; fi
# From here on a signal is how it is meant to end.
trap 'exit 0' INT TERM
cat <<END

${BOLD}$image is being served.${PLAIN} Ctrl-C ends it. Meanwhile:
    export LLOOP_SOCKET=$socket PATH=$bin:\$PATH
    lloop list ; lloop info $name ; lloop stat --watch
    lloop create /some/where/disk.img --size 10G ; lloop attach /some/where/disk.img --allow-any-fs
    nvme connect -t tcp -a 127.0.0.1 -s $port -n $nqn    # from a host with nvme-cli, as root
END
wait "$target" || true
die "the target has ended by itself"
