"""The benchmark behind scripts/bench.sh: lloop beside its rivals, interleaved, medians, ratios, charts.

Every competitor of a case does the same work, one after the other, round after round, so that a busy neighbour on the machine
meets all of them alike. What counts are the ratios of the medians; the spread tells how much to believe them.

The rivals in SPDK run in one program, bdevperf with lloop linked in; fio runs on the raw file. The mean latency is depth
divided by IOPS (Little's law); processor time is what the whole process used, its polling reactor included.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time

GIB = 1 << 30
MIB = 1 << 20


class Bench:
    def __init__(self, args):
        self.args = args
        self.rounds, self.seconds = (1, 1) if args.quick else (3, 2)
        self.results = []
        shutil.rmtree(args.work, ignore_errors=True)
        os.makedirs(args.work)
        self.slow = None

    # -- files --------------------------------------------------------------------------------------------------------

    def path(self, name):
        return os.path.join(self.args.work, name)

    def unwritten(self, name, size=GIB):
        """A file of unwritten extents: reading it costs software only, no device time. Writing changes that: made anew."""
        path = self.path(name)
        if os.path.exists(path):
            os.unlink(path)
        with open(path, "wb") as f:
            os.posix_fallocate(f.fileno(), 0, size)
            os.fsync(f.fileno())
        return path

    def written(self, name, size=GIB):
        path = self.path(name)
        if not os.path.exists(path):
            block = os.urandom(MIB)
            with open(path, "wb") as f:
                for _ in range(size // MIB):
                    f.write(block)
                os.fsync(f.fileno())
        return path

    def slow_file(self):
        """A file whose every read and write blocks its caller for a millisecond more (tests/slowfs)."""
        if self.slow is None:
            backing = self.unwritten("slow.backing", 256 * MIB)
            with open(backing + ".faults", "w") as f:
                f.write("latency_us=1000")
            mount = self.path("slow")
            os.makedirs(mount)
            # Its server would be another machine: it must not take the reactor's processor.
            child = subprocess.Popen(["taskset", "-c", "1", self.args.slowfs, backing, mount])
            self.slow = (child, mount)
            deadline = time.monotonic() + 20
            while not os.path.exists(os.path.join(mount, "image")):
                if time.monotonic() > deadline:
                    sys.exit("slowfs does not come up; is /dev/fuse there?")
                time.sleep(0.01)
        return os.path.join(self.slow[1], "image")

    def close(self):
        if self.slow:
            child, mount = self.slow
            subprocess.run(["umount", "-l", mount], check=False)
            child.kill()
            child.wait()
        shutil.rmtree(self.args.work, ignore_errors=True)

    # -- competitors --------------------------------------------------------------------------------------------------

    @staticmethod
    def bdev(kind, name, path):
        if kind.startswith("lloop/"):
            return ("bdev_lloop_create", {"filename": path, "name": name, "allow_any_fs": True, "engine": kind[6:]})
        if kind == "malloc":
            return ("bdev_malloc_create", {"name": name, "num_blocks": 128 * MIB // 4096, "block_size": 4096})
        return (kind + "_create", {"filename": path, "name": name, "block_size": 4096})

    def bdevperf(self, bdevs, work, depth, size):
        """Runs bdevperf on bdevs [(kind, name, path)]; {name: IOPS}, and processor microseconds an I/O."""
        calls = [dict(zip(("method", "params"), self.bdev(*b))) for b in bdevs]
        config = self.path("bdevs.json")
        with open(config, "w") as f:
            json.dump({"subsystems": [{"subsystem": "bdev", "config": calls}]}, f)
        command = [os.path.join(self.args.apps, "bdevperf"), "--json", config, "-q", str(depth), "-o", str(size), "-t",
                   str(self.seconds), "-m", "0x1", "-u", "-s", "1024", "-r", self.path("rpc.sock")] + work
        if float(self.args.spdk) > 22:
            command.append("--disable-cpumask-locks")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        iops = {}
        for _, name, _ in bdevs:
            line = re.search(r"^\s*%s\s*:\s*(.*)$" % re.escape(name), done.stdout, re.M)
            numbers = re.findall(r"[\d.]+", line.group(1)) if line else []
            # v20.07 prints IOPS first; newer ones the runtime and then IOPS.
            at = 0 if line and "IOPS" in line.group(1) else 1
            if done.returncode or len(numbers) <= at:
                sys.exit("bdevperf failed on %s:\n%s" % (bdevs, done.stdout[-3000:]))
            iops[name] = float(numbers[at])
        cpu = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e6
        return iops, cpu / max(1.0, sum(iops.values()) * self.seconds)

    def fio(self, path, options, depth, size):
        """Runs fio on the raw file; (IOPS, processor microseconds an I/O)."""
        command = ["taskset", "-c", "0", "fio", "--name=x", "--filename=" + path, "--direct=1", "--time_based=1", "--thread=1",
                   "--runtime=%d" % self.seconds, "--bs=%d" % size, "--iodepth=%d" % depth, "--output-format=json",
                   "--randrepeat=0", "--norandommap=1", "--gtod_reduce=1"] + options
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            sys.exit("fio failed:\n" + done.stdout[-3000:])
        jobs = json.loads(done.stdout[done.stdout.index("{"):])["jobs"]
        iops = sum(j["read"]["iops"] + j["write"]["iops"] for j in jobs)
        cpu = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e6
        return iops, cpu / max(1.0, iops * self.seconds)

    # -- cases --------------------------------------------------------------------------------------------------------

    def case(self, title, competitors, depth, size, baseline):
        """Runs {name: function() -> (IOPS, cpu)} in rounds; keeps medians and the ratio to `baseline`."""
        samples = {name: [] for name in competitors}
        for _ in range(self.rounds):
            for name, run in competitors.items():
                samples[name].append(run())
        median = {name: statistics.median(s[0] for s in values) for name, values in samples.items()}
        rows = []
        for name, values in samples.items():
            iops = [v[0] for v in values]
            rows.append({
                "competitor": name,
                "iops": round(median[name]),
                "iops_min": round(min(iops)),
                "iops_max": round(max(iops)),
                "mib_per_s": round(median[name] * size / MIB, 1),
                "mean_us": round(depth / median[name] * 1e6, 2) if depth else None,
                "cpu_us_per_io": round(statistics.median(v[1] for v in values), 2),
                "ratio": round(median[name] / median[baseline], 3),
            })
        self.results.append({"case": title, "depth": depth, "block_bytes": size, "baseline": baseline, "rows": rows})
        print("\n%s" % title)
        print("  %-28s %12s %10s %10s %9s %8s   spread" % ("", "IOPS", "MiB/s", "mean us", "CPU us", "ratio"))
        for r in rows:
            print("  %-28s %12s %10s %10s %9s %8s   %s to %s" % (
                r["competitor"], f'{r["iops"]:,}', f'{r["mib_per_s"]:,}', r["mean_us"] or "-", r["cpu_us_per_io"], r["ratio"],
                f'{r["iops_min"]:,}', f'{r["iops_max"]:,}'))
        sys.stdout.flush()

    def one(self, kind, path, work, depth, size):
        def run():
            iops, cpu = self.bdevperf([(kind, "B", path() if callable(path) else path)], work, depth, size)
            return iops["B"], cpu
        return run

    def run(self):
        file = self.unwritten("unwritten")
        in_spdk = ["lloop/uring", "lloop/threads", "bdev_aio", "bdev_uring", "malloc"]
        registered = ["--ioengine=io_uring", "--registerfiles=1", "--fixedbufs=1"]
        for depth in (1, 32, 128):
            batch = ["--iodepth_batch_submit=16", "--iodepth_batch_complete_max=16"] if depth > 1 else []
            competitors = {k: self.one(k, file, ["-w", "randread"], depth, 4096) for k in in_spdk}
            competitors["fio io_uring, registered"] = lambda: self.fio(file, registered + batch + ["--rw=randread"], depth, 4096)
            competitors["fio libaio"] = lambda: self.fio(file, ["--ioengine=libaio", "--rw=randread"] + batch, depth, 4096)
            self.case("4 KiB random read, unwritten extents, depth %d" % depth, competitors, depth, 4096, "bdev_aio")

        data = self.written("written")
        # (v20.07's bdev_uring polls for completions, which this data cannot do: facts/spdk.md.)
        on_data = ["lloop/uring", "lloop/threads", "bdev_aio"]
        for size, depth in ((128 << 10, 32), (MIB, 8)):
            competitors = {k: self.one(k, data, ["-w", "read"], depth, size) for k in on_data}
            competitors["fio io_uring"] = lambda: self.fio(data, ["--ioengine=io_uring", "--rw=read"], depth, size)
            self.case("%d KiB sequential read, written data, depth %d" % (size >> 10, depth), competitors, depth, size,
                      "fio io_uring")
        competitors = {k: self.one(k, data, ["-w", "randrw", "-M", "70"], 32, 4096) for k in on_data}
        self.case("4 KiB random, 70 % reads, written data, depth 32", competitors, 32, 4096, "bdev_aio")

        slow = self.slow_file()
        blocking = ["lloop/threads", "bdev_aio"]
        self.case("4 KiB sequential write, slow file (1 ms, blocks the caller), depth 32",
                  {k: self.one(k, slow, ["-w", "write"], 32, 4096) for k in blocking}, 32, 4096, "bdev_aio")
        self.case("4 KiB random read, slow file (1 ms, blocks the caller), depth 64",
                  {k: self.one(k, slow, ["-w", "randread"], 64, 4096) for k in blocking}, 64, 4096, "bdev_aio")

        def neighbour(kind):
            def run():
                bdevs = [("malloc", "Innocent", None)] + ([(kind, "Slow", slow)] if kind else [])
                iops, cpu = self.bdevperf(bdevs, ["-w", "randread"], 32, 4096)
                return iops["Innocent"], cpu
            return run
        self.case("the innocent neighbour: a malloc bdev on the reactor of a slow file, depth 32 each",
                  {"alone": neighbour(None), "beside lloop/threads": neighbour("lloop/threads"),
                   "beside bdev_aio": neighbour("bdev_aio")}, 32, 4096, "alone")

        files = [self.unwritten("many%d" % i, 64 * MIB) for i in range(16)]

        def many(kind):
            def run():
                iops, cpu = self.bdevperf([(kind, "B%02d" % i, f) for i, f in enumerate(files)], ["-w", "randread"], 8, 4096)
                return sum(iops.values()), cpu
            return run
        for kind in ("lloop/uring", "lloop/threads"):
            self.case("16 bdevs of depth 8 beside one of depth 128: %s" % kind,
                      {"one": self.one(kind, files[0], ["-w", "randread"], 128, 4096), "sixteen": many(kind)}, 128, 4096, "one")

    # -- output -------------------------------------------------------------------------------------------------------

    def write(self, out):
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        os.makedirs(out, exist_ok=True)
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown")
        machine = {"cpu": cpu, "cores": os.cpu_count(), "kernel": platform.release(), "spdk": self.args.spdk,
                   "rounds": self.rounds, "seconds": self.seconds}
        with open(os.path.join(out, "results.json"), "w") as f:
            json.dump({"machine": machine, "cases": self.results}, f, indent=1)
        columns = 2
        rows = -(-len(self.results) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(15, 2.7 * rows), squeeze=False)
        for axis in axes.flat[len(self.results):]:
            axis.axis("off")
        for axis, case in zip(axes.flat, self.results):
            names = [r["competitor"] for r in case["rows"]][::-1]
            values = [r["iops"] / 1000 for r in case["rows"]][::-1]
            low = [max(0, v - r["iops_min"] / 1000) for v, r in zip(values, case["rows"][::-1])]
            high = [max(0, r["iops_max"] / 1000 - v) for v, r in zip(values, case["rows"][::-1])]
            colours = ["#2a6f97" if "lloop" in n or n in ("one", "sixteen") else "#b0b7bf" for n in names]
            axis.barh(names, values, color=colours, xerr=[low, high], error_kw={"lw": 1, "ecolor": "#444444"})
            for i, r in enumerate(case["rows"][::-1]):
                axis.text(values[i] + high[i], i, "  %s k  (%.2f x)" % (f'{values[i]:,.1f}', r["ratio"]), va="center", fontsize=8)
            axis.set_xlim(0, max(v + h for v, h in zip(values, high)) * 1.35)
            axis.set_title(case["case"], fontsize=9, loc="left")
            axis.set_xlabel("thousand IOPS, median; bars: lowest to highest; x: of %s" % case["baseline"], fontsize=7)
            axis.tick_params(labelsize=8)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
        figure.suptitle("lloop beside its rivals: %s, %d cores, Linux %s, SPDK v%s" %
                        (cpu, os.cpu_count(), platform.release(), self.args.spdk), fontsize=11)
        figure.tight_layout(rect=(0, 0, 1, 0.985))
        for ending in ("svg", "png"):
            figure.savefig(os.path.join(out, "results." + ending), dpi=110)
        print("\nwritten: %s" % ", ".join(os.path.join(out, "results." + e) for e in ("json", "svg", "png")))


def main():
    parser = argparse.ArgumentParser(description="run by scripts/bench.sh")
    parser.add_argument("--apps", required=True)
    parser.add_argument("--slowfs", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--spdk", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", default="bench-results")
    bench = Bench(parser.parse_args())
    try:
        bench.run()
        bench.write(bench.args.out)
    finally:
        bench.close()


if __name__ == "__main__":
    main()
