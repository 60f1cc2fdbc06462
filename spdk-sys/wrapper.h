/* What spdk-sys binds: the public headers of the parts that a bdev module and its target use. */
#include <stdarg.h>
#include <spdk/stdinc.h>
#include <spdk/version.h>
#include <spdk/bdev.h>
#include <spdk/bdev_module.h>
#include <spdk/env.h>
#include <spdk/event.h>
#include <spdk/json.h>
#include <spdk/jsonrpc.h>
#include <spdk/log.h>
#include <spdk/rpc.h>
#include <spdk/scsi_spec.h>
#include <spdk/thread.h>
#include <spdk/vhost.h>
