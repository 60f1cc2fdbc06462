#!/usr/bin/env python3
"""SPDK's own rpc.py with lloop's methods in it:

    rpc/spdk_rpc.py bdev_lloop_create --filename /lustre/vm/disk0.img
    rpc/spdk_rpc.py bdev_get_bdevs

The client is that of $SPDK_DIR; without SPDK_DIR that of the newest SPDK that lloop's scripts have built into their cache;
without one that of the `spdk` package of PyPI.
"""

import argparse
import glob
import importlib
import importlib.util
import os
import runpy
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

NO_CLIENT = """spdk_rpc.py: there is no SPDK client on this machine. One of these makes one:
  SPDK_DIR=/path/to/spdk spdk_rpc.py ...   uses the client of that SPDK tree
  scripts/setup.sh                         builds SPDK into %s
  python3 -m pip install spdk              installs SPDK's client from PyPI (in a venv: run spdk_rpc.py with its python3)"""


def find_client():
    """The path of a rpc.py. The package of PyPI has the same file under another name."""
    tree = os.environ.get('SPDK_DIR')
    if tree:
        client = os.path.join(tree, 'scripts', 'rpc.py')
        if not os.path.isfile(client):
            sys.exit('spdk_rpc.py: SPDK_DIR=%s is not a SPDK tree: it has no scripts/rpc.py' % tree)
        return client

    cache = os.environ.get('LLOOP_CACHE') or os.path.expanduser('~/.cache/lloop')
    # A tree's build is finished when its stamp is there.
    stamps = glob.glob(os.path.join(glob.escape(cache), 'spdk-v*', '.lloop-complete'))
    for stamp in sorted(stamps, key=os.path.getmtime, reverse=True):
        client = os.path.join(os.path.dirname(stamp), 'scripts', 'rpc.py')
        if os.path.isfile(client):
            return client

    try:
        spec = importlib.util.find_spec('spdk.spdk_rpc')
    except ModuleNotFoundError:  # not even `spdk`
        spec = None
    if spec is None:
        sys.exit(NO_CLIENT % cache)
    return spec.origin


def take_plugins(argv):
    """Parts the plugins that the user asks for from the rest of the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--plugin', action='append', default=[])
    own, rest = parser.parse_known_args(argv)
    return own.plugin, rest


def spdk_rpc_plugin_initialize(subparsers):
    """The client takes one plugin, the last it is given. This one is lloop's and the user's together."""
    for name in dict.fromkeys(['lloop_rpc'] + plugins):
        try:
            importlib.import_module(name).spdk_rpc_plugin_initialize(subparsers)
        except (ModuleNotFoundError, AttributeError) as error:
            sys.exit('spdk_rpc.py: plugin %s: %s' % (name, error))


if __name__ == '__main__':
    client = find_client()
    plugins, rest = take_plugins(sys.argv[1:])
    # The client runs in this process, with its own folder in front as if it had been started itself.
    sys.path[:0] = [os.path.dirname(os.path.abspath(client)), HERE]
    # Where it imports the plugin spdk_rpc, it gets this file as it is now, with what the user asked for.
    sys.modules['spdk_rpc'] = sys.modules['__main__']
    sys.argv[1:] = ['--plugin', 'spdk_rpc'] + rest
    runpy.run_path(client, run_name='__main__')
