/*
 * How long SPDK's reactor stays away: a poller on the application's thread that remembers the longest time between two of its
 * turns. Whatever holds the reactor (a system call that blocks, a long loop) or takes its processor away shows there; how often
 * the thread slept or was put off tells the two apart. Linked into the benchmark's bdevperf (scripts/spdk-apps.sh).
 *
 * RPCs: bench_gap_start, and bench_gap_stop, which answers with what was seen since then.
 */
#define _GNU_SOURCE
#include <sys/resource.h>
#include <time.h>

#include "spdk/stdinc.h"
#include "spdk/env.h"
#include "spdk/json.h"
#include "spdk/jsonrpc.h"
#include "spdk/rpc.h"
#include "spdk/thread.h"

static struct spdk_poller *g_poller;
static struct rusage g_usage;
static uint64_t g_start, g_last, g_longest, g_long_ones, g_cpu_ns;

/* What all threads of this process, those that ended included, have used of processors. */
static uint64_t
cpu_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

static uint64_t
ns(uint64_t ticks)
{
	return (uint64_t)((double)ticks * 1e9 / spdk_get_ticks_hz());
}

static int
look(void *arg)
{
	uint64_t now = spdk_get_ticks(), gap = now - g_last;

	(void)arg;
	g_last = now;
	if (gap > g_longest) {
		g_longest = gap;
	}
	if (gap > spdk_get_ticks_hz() / 1000) {
		g_long_ones++;
	}
	return 0;
}

static void
bench_gap_start(struct spdk_jsonrpc_request *request, const struct spdk_json_val *params)
{
	struct spdk_json_write_ctx *w;

	(void)params;
	if (g_poller != NULL) {
		spdk_jsonrpc_send_error_response(request, -EBUSY, "bench_gap_start was called already");
		return;
	}
	g_poller = spdk_poller_register(look, NULL, 0);
	if (g_poller == NULL) {
		spdk_jsonrpc_send_error_response(request, -ENOMEM, "no memory for a poller");
		return;
	}
	g_longest = g_long_ones = 0;
	getrusage(RUSAGE_THREAD, &g_usage);
	g_cpu_ns = cpu_ns();
	g_start = g_last = spdk_get_ticks();
	w = spdk_jsonrpc_begin_result(request);
	spdk_json_write_bool(w, true);
	spdk_jsonrpc_end_result(request, w);
}

static void
bench_gap_stop(struct spdk_jsonrpc_request *request, const struct spdk_json_val *params)
{
	struct spdk_json_write_ctx *w;
	struct rusage usage;
	uint64_t now = spdk_get_ticks(), cpu = cpu_ns();

	(void)params;
	if (g_poller == NULL) {
		spdk_jsonrpc_send_error_response(request, -EINVAL, "bench_gap_start was not called");
		return;
	}
	look(NULL);
	spdk_poller_unregister(&g_poller);
	getrusage(RUSAGE_THREAD, &usage);
	w = spdk_jsonrpc_begin_result(request);
	spdk_json_write_object_begin(w);
	spdk_json_write_named_uint64(w, "longest_ns", ns(g_longest));
	spdk_json_write_named_uint64(w, "over_1ms", g_long_ones);
	spdk_json_write_named_uint64(w, "elapsed_ns", ns(now - g_start));
	spdk_json_write_named_uint64(w, "cpu_ns", cpu - g_cpu_ns);
	spdk_json_write_named_uint64(w, "slept", usage.ru_nvcsw - g_usage.ru_nvcsw);
	spdk_json_write_named_uint64(w, "put_off", usage.ru_nivcsw - g_usage.ru_nivcsw);
	spdk_json_write_object_end(w);
	spdk_jsonrpc_end_result(request, w);
}

SPDK_RPC_REGISTER("bench_gap_start", bench_gap_start, SPDK_RPC_RUNTIME)
SPDK_RPC_REGISTER("bench_gap_stop", bench_gap_stop, SPDK_RPC_RUNTIME)
