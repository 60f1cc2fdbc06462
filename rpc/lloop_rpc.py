"""lloop's methods as subcommands of SPDK's rpc.py.

    PYTHONPATH=rpc rpc.py --plugin lloop_rpc bdev_lloop_create --filename /lustre/vm/disk0.img
    PYTHONPATH=rpc rpc.py --plugin lloop_rpc bdev_lloop_create --help

rpc.py is the one of any SPDK tree (scripts/rpc.py) or the spdk-rpc of the `spdk` package of PyPI. spdk_rpc.py, next to
this file, is that client with this plugin already loaded.
"""

import argparse
import json
import re

UNITS = {'': 0, 'K': 10, 'M': 20, 'G': 30, 'T': 40}


def size(text):
    """A number of bytes: 4096, 0x1000, 4K, 4KiB; the units are powers of 1024."""
    match = re.match(r'(0x[0-9a-f]+|[0-9]+)(?:([kmgt])(?:ib)?)?$', text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError("'%s' is no size: bytes, in hex too, or with one of the units K, M, G, T" % text)
    digits, unit = match.groups('')
    return int(digits, 16 if digits.lower().startswith('0x') else 10) << UNITS[unit.upper()]


class Method:
    """A method as a subcommand. Its options are the method's parameters, under the same names; what is not given is not
    sent, so that the defaults are the target's."""

    def __init__(self, subparsers, name, text):
        self.name = name
        self.params = set()
        self.parser = subparsers.add_parser(name, help=text, description=text)
        self.parser.set_defaults(func=self.call)

    def option(self, *flags, group=None, **kwargs):
        # SPDK has both --like-this and --like_this, so nobody should have to remember which it is here.
        spellings = list(flags) + ['--' + flag[2:].replace('-', '_') for flag in flags if '-' in flag[2:]]
        action = (group or self.parser).add_argument(*spellings, default=None, **kwargs)
        self.params.add(action.dest)

    def flag(self, *flags, value=True, **kwargs):
        self.option(*flags, action='store_const', const=value, **kwargs)

    def operand(self, *flags, required=True, **kwargs):
        """A parameter that is given by its place or as an option."""
        group = self.parser.add_mutually_exclusive_group(required=required)
        self.option(*flags, group=group, metavar=flags[-1][2:].upper(), **kwargs)
        # With a default of its own it would overwrite what the option has set.
        group.add_argument(flags[-1][2:], nargs='?', default=argparse.SUPPRESS, help='the same as ' + flags[-1])

    def call(self, args):
        given = {name: getattr(args, name) for name in sorted(self.params)}
        result = args.client.call(self.name, {name: value for name, value in given.items() if value is not None})
        # Nothing comes back from a dry run or a batch. A string is printed as SPDK's print_json does: without quotes.
        if result is not None:
            print(result if isinstance(result, str) else json.dumps(result, indent=2))


def spdk_rpc_plugin_initialize(subparsers):
    # `rpc.py --server` may ask for a plugin on each line, and argparse takes a subcommand once.
    if 'bdev_lloop_create' in subparsers.choices:
        return

    m = Method(subparsers, 'bdev_lloop_create', 'Attach a file as a block device')
    m.operand('-f', '--filename', help='the file, as the target sees it')
    m.option('-b', '--name', help='name of the device (default: the lowest free lloopN)')
    m.option('--block-size', type=size, metavar='BYTES', help='logical block size, 512 or 4096 (default: 4096)')
    m.flag('-r', '--read-only', '--readonly', help='no writes')
    m.option('-o', '--offset', type=size, metavar='BYTES', help='where in the file the device starts (default: 0)')
    m.option('--size-limit', type=size, metavar='BYTES',
             help='how much of the file the device has at most (default: 0, to its end)')
    m.option('--engine', choices=['auto', 'threads', 'uring'], help='what moves the data (default: auto)')
    m.flag('--allow-any-fs', help='accept other filesystems than Lustre')
    m.option('-u', '--uuid', help="the device's UUID (default: derived from the file)")
    m.option('--lock', choices=['group', 'advisory', 'off'], help='how the file is kept from others')
    m.option('--group-id', type=int, metavar='N',
             help='share the file with those that give the same number (default: a group of its own)')
    m.flag('--discard', help='offer UNMAP and WRITE ZEROES where they work (default, but not under a group lock)')
    m.flag('--no-discard', value=False, dest='discard', help='offer neither')
    m.option('--stripe-split', choices=['auto', 'on', 'off'],
             help='split I/O at stripes (default: auto, where the Lustre client needs that)')

    m = Method(subparsers, 'bdev_lloop_delete', 'Detach a device from its file')
    m.operand('-b', '--name', help='name of the device')
    m.flag('-f', '--force', help='even while somebody has it open')

    m = Method(subparsers, 'bdev_lloop_resize', 'Change the size of a device; prints the new one in bytes')
    m.operand('-b', '--name', help='name of the device')
    m.option('-s', '--size', type=size, metavar='BYTES', help="the new size (default: 0, the file's)")

    m = Method(subparsers, 'bdev_lloop_resume', 'Let a fenced or degraded device go on')
    m.operand('-b', '--name', help='name of the device')

    m = Method(subparsers, 'bdev_lloop_set_options', "Change the module's options; what is left out stays")
    m.option('--max-lloop', type=int, metavar='N', help='the most devices at a time, 1 to 256')
    m.option('--workers', type=int, metavar='N', help='the most worker threads, 1 to 1024')
    m.option('--lane-limit', type=int, metavar='N', help='the most calls at a time on one lane, 1 to 1024')
    m.option('--max-merge-bytes', type=size, metavar='BYTES',
             help='the longest call that neighbouring requests are merged into, 4K to 64M; 0: 1M, and 4M on Lustre')
    m.option('--reset-timeout-s', type=int, metavar='SECONDS',
             help='how long a reset waits for what is in flight, 1 to 3600')
    m.option('--detach-timeout-s', type=int, metavar='SECONDS',
             help='how long a detach waits for a call that does not return, 1 to 3600')
    m.option('--retry-timeout', type=int, metavar='SECONDS',
             help='how long I/O on Lustre is tried again that fails for a passing reason, 0 (not at all) to 3600')
    m.option('--lock-timeout', type=int, metavar='SECONDS', help='how long a lock is waited for, 1 to 3600')
    m.option('--lock-check', type=int, metavar='SECONDS', help='how often locks and files are looked at, 1 to 3600')
    m.option('--stall-warn', type=int, metavar='SECONDS', help='a call that takes longer is reported, 1 to 3600')
    m.flag('--sqpoll', help='threads of the kernel submit for reactors that cannot keep up')
    m.flag('--no-sqpoll', value=False, dest='sqpoll', help='they do not')

    Method(subparsers, 'bdev_lloop_get_options', "Show the module's options")

    m = Method(subparsers, 'bdev_lloop_get_stats', 'Show counters, latencies and queue depths')
    m.operand('-b', '--name', required=False, help='name of the device (default: all)')
    m.flag('--histogram', help='also how many I/O took how long: pairs of microseconds, at most, and a count')
