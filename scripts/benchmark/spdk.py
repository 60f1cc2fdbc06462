"""The rivals inside SPDK: one bdevperf a run, told by RPC when to start, and asked for latencies and gaps while it runs."""

import array
import base64
import glob
import json
import os
import re
import signal
import socket
import subprocess
import time

MIB = 1 << 20
# Of the time of a run: how much after its start the reactor is watched (before that bdevperf allocates), and how long before its
# end that is over: what was counted must be fetched until then, even from a reactor that has to wait for its processor.
LEAD_S = 0.15
TAIL_S = 0.25
# When the watched work may be more than the default options are made for: docs/performance.md says where.
DEEP = {"lane_limit": 64, "workers": 128}

# The uring engine on the reactor's processor alone.
HELPED = "lloop/uring sqpoll"


class Failed(Exception):
    """A rival cannot do this work. Says why in a line."""


class Client:
    """JSON-RPC of SPDK's, a connection of its own."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(90)
        self.socket.connect(path)

    def send(self, method, params=None):
        call = {"jsonrpc": "2.0", "id": 1, "method": method}
        if params is not None:
            call["params"] = params
        self.socket.sendall(json.dumps(call).encode())

    def receive(self):
        text = b""
        while True:
            part = self.socket.recv(1 << 20)
            if not part:
                raise Failed("bdevperf ended before it answered")
            text += part
            try:
                answer = json.loads(text)
            except ValueError:
                continue
            if "error" in answer:
                raise Failed(answer["error"]["message"])
            return answer["result"]

    def call(self, method, params=None):
        self.send(method, params)
        return self.receive()

    def close(self):
        self.socket.close()


def buckets(answer):
    """A histogram of SPDK's as [(middle in microseconds, count)]. include/spdk/histogram_data.h says how it is laid out."""
    counts = array.array("Q", base64.b64decode(answer["histogram"]))
    shift = answer.get("bucket_shift", answer.get("granularity"))
    us = 1e6 / answer["tsc_rate"]
    found = []
    for place, count in enumerate(counts):
        if count:
            rank, index = (place >> shift) + answer.get("min_range", 0), place & ((1 << shift) - 1)
            width = 1 if rank == 0 else 1 << (rank - 1)
            start = index if rank == 0 else (1 << (rank + shift - 1)) + index * width
            found.append(((start + width / 2) * us, count))
    return found


def latencies(histogram):
    """{mean_us, p50_us, p99_us, p999_us} of [(microseconds, count)]."""
    total = sum(count for _, count in histogram)
    if not total:
        return {}
    found = {"mean_us": sum(us * count for us, count in histogram) / total}
    for name, share in (("p50_us", 0.5), ("p99_us", 0.99), ("p999_us", 0.999)):
        seen = 0
        for us, count in sorted(histogram):
            seen += count
            if seen >= share * total:
                found[name] = us
                break
    return found


def description(kind, name, path):
    """The RPC that makes a bdev."""
    if kind.startswith("lloop/"):
        return ("bdev_lloop_create", {"filename": path, "name": name, "allow_any_fs": True, "engine": kind[6:].split()[0]})
    if kind == "malloc":
        return ("bdev_malloc_create", {"name": name, "num_blocks": 128 * MIB // 4096, "block_size": 4096})
    return (kind + "_create", {"filename": path, "name": name, "block_size": 4096})


class Bdevperf:
    """Runs bdevperf on one processor, 0."""

    def __init__(self, program, version, work):
        self.program = program
        self.is_new = float(version) > 22
        self.work = work
        self.tsc_hz = None

    def start(self, bdevs, work, depth, size, seconds, deep):
        calls = [dict(zip(("method", "params"), description(*b))) for b in bdevs]
        options = dict(DEEP) if deep else {}
        if any(kind == HELPED for kind, _, _ in bdevs):
            options["sqpoll_cpus"] = [1]
        if options:
            calls.insert(0, {"method": "bdev_lloop_set_options", "params": options})
        config = os.path.join(self.work, "bdevs.json")
        with open(config, "w") as file:
            json.dump({"subsystems": [{"subsystem": "bdev", "config": calls}]}, file)
        rpc = os.path.join(self.work, "rpc.sock")
        if os.path.exists(rpc):
            os.unlink(rpc)
        command = [self.program, "-z", "--json", config, "-q", str(depth), "-o", str(size), "-t", str(seconds), "-m", "0x1", "-u",
                   "-s", "1024", "-r", rpc] + work
        if self.is_new:
            command.append("--disable-cpumask-locks")
        self.log = open(os.path.join(self.work, "bdevperf.log"), "w+")
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while True:
            try:
                client = Client(rpc)
                break
            except OSError:
                if self.child.poll() is not None:
                    raise Failed("bdevperf does not start: " + self.complaint())
                if time.monotonic() > deadline:
                    raise Failed("bdevperf has not opened its socket after 60 s: " + self.complaint())
                time.sleep(0.005)
        client.call("framework_wait_init")
        return client, rpc

    def complaint(self):
        """The last line of bdevperf's output that speaks of an error."""
        lines = [line.strip() for line in self.output().replace("\r", "\n").splitlines() if line.strip()]
        return next((line for line in lines if "*ERROR*" in line), lines[-1] if lines else "it said nothing")[:300]

    def output(self):
        self.log.flush()
        self.log.seek(0)
        return self.log.read()

    def stop(self):
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(20)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
                for left in glob.glob("/dev/hugepages/spdk_pid%dmap_*" % self.child.pid):
                    os.unlink(left)
        self.log.close()

    def idle(self, bdevs, seconds):
        """What the reactor does with nothing to do."""
        try:
            client, _ = self.start(bdevs, ["-w", "randread"], 1, 4096, 1, False)
            time.sleep(LEAD_S)
            client.call("bench_gap_start")
            time.sleep(seconds)
            return self.gap(client.call("bench_gap_stop"))
        finally:
            self.stop()

    @staticmethod
    def gap(seen):
        return {"gap_us": seen["longest_ns"] / 1000, "gaps_over_1ms": seen["over_1ms"], "slept": seen["slept"],
                "put_off": seen["put_off"], "cpu_share": seen["cpu_ns"] / seen["elapsed_ns"]}

    def run(self, bdevs, work, depth, size, seconds, of=None, deep=False, meanwhile=None):
        """Runs bdevperf on bdevs [(kind, name, path)]; a sample, of the bdev named `of` or of all together.

        `meanwhile` is called while the reactor is watched, and latencies are left out: it makes things break.
        """
        try:
            client, rpc = self.start(bdevs, work, depth, size, seconds, deep)
            names = [of] if of else [name for _, name, _ in bdevs]
            for name in names:
                client.call("bdev_enable_histogram", {"name": name, "enable": True})
            started = time.monotonic()
            other = Client(rpc)
            other.send("perform_tests")
            time.sleep(LEAD_S)
            client.call("bench_gap_start")
            if meanwhile:
                meanwhile()
            time.sleep(max(0, started + seconds - TAIL_S - time.monotonic()))
            seen = client.call("bench_gap_stop")
            histogram = []
            if not meanwhile:
                # Now and not later: what a thread has counted is gone when its test is over.
                for name in names:
                    answer = client.call("bdev_get_histogram", {"name": name})
                    self.tsc_hz = answer["tsc_rate"]
                    histogram += buckets(answer)
            result = other.receive()
            sample = self.gap(seen)
            iops = self.iops(result, [name for _, name, _ in bdevs])
            sample["iops"] = sum(iops[name] for name in names)
            # Of everything that the process did: with several bdevs, over the I/O of all of them.
            sample["cpu_us_per_io"] = sample["cpu_share"] * 1e6 / sum(iops.values()) if sum(iops.values()) >= 1 else None
            sample.update(latencies(histogram))
            return sample
        except Failed as failure:
            raise Failed("%s (%s)" % (failure, self.complaint()))
        finally:
            self.stop()

    def iops(self, result, names):
        if isinstance(result, dict):
            found = {}
            for job in result["results"]:
                found[job["job"]] = found.get(job["job"], 0) + job["iops"]
            return {name: found[name] for name in names}
        text = self.output()
        found = {}
        for name in names:
            line = re.search(r"^\s*%s\s*:\s*([\d.]+) IOPS" % re.escape(name), text.replace("\r", "\n"), re.M)
            if not line:
                raise Failed("bdevperf printed no result for " + name)
            found[name] = float(line.group(1))
        return found
