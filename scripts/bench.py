"""The benchmark behind scripts/bench.sh: lloop beside its rivals, interleaved, medians, ratios, bars, charts.

Every rival of a case does the same work, one after the other, round after round, so that a busy neighbour on the machine meets
all of them alike. What counts are the ratios of the medians; the spread tells how much to believe them.

- scripts/benchmark/files.py: what the work is done on; spdk.py, raw.py: the rivals and what is measured of them
- scripts/benchmark/bars.py: what is demanded; output.py: the terminal, JSON, charts and the tables in docs/performance.md
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time

from benchmark import output, raw
from benchmark.bars import judge
from benchmark.files import GIB, MIB, SLOW_SIZE, Files
from benchmark.spdk import HELPED, Bdevperf, Failed

IN_SPDK = ["lloop/uring", "lloop/threads", "bdev_aio", "bdev_uring"]
RAW = ["fio io_uring", "fio libaio"]
WORDS = {"randread": "random read", "randwrite": "random write", "read": "sequential read", "write": "sequential write",
         "mixed": "random, 70 % reads"}
BACKINGS = {"unwritten": "unwritten extents", "fresh": "unwritten extents", "written": "written data",
            "slow": "slow file (1 ms, blocks the caller)"}
# What a sample has, and what becomes of the samples of all rounds.
SUMMARY = {"cpu_us_per_io": statistics.median, "mean_us": statistics.median, "p50_us": statistics.median, "p99_us": statistics.median,
           "p999_us": statistics.median, "gap_us": statistics.median, "slept": statistics.median, "put_off": statistics.median,
           "gaps_over_1ms": max, "cpu_share": statistics.median}


class Isolation:
    """A reactor's processor is its own on a host that is set up for polling (isolcpus). Here as far as it can be had, for all alike:
    what else the machine runs keeps off processor 0 meanwhile, and processors are not shared out by sessions (sched_autogroup: a
    reactor whose session is busy on the other processors gets little of its own)."""

    AUTOGROUP = "/proc/sys/kernel/sched_autogroup_enabled"

    def __enter__(self):
        self.autogroup = None
        try:
            with open(self.AUTOGROUP) as file:
                self.autogroup = file.read()
            self.write("0")
        except OSError as error:
            print("sched_autogroup stays as it is: %s" % error)
        everywhere = set(range(os.cpu_count()))
        self.moved = []
        # (Ourselves, too: what we start says for itself where it runs.)
        for task in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            try:
                if os.sched_getaffinity(task) == everywhere:
                    os.sched_setaffinity(task, everywhere - {0})
                    self.moved.append((task, everywhere))
            except OSError:
                # It has ended, or the kernel wants it there.
                pass

    def __exit__(self, *_):
        for task, where in self.moved:
            try:
                os.sched_setaffinity(task, where)
            except OSError:
                pass
        if self.autogroup is not None:
            self.write(self.autogroup)

    def write(self, value):
        with open(self.AUTOGROUP, "w") as file:
            file.write(value)


class Bench:
    def __init__(self, args):
        self.args = args
        self.rounds, self.seconds = (1, 1) if args.quick else (3, 1)
        self.files = Files(args.work, args.examples)
        self.spdk = Bdevperf(os.path.join(args.apps, "bdevperf"), args.spdk, args.work)
        self.results = []
        self.broken = []
        self.started = time.time()
        self.load = os.getloadavg()[0]

    def wanted(self, group):
        return not self.args.only or group in self.args.only

    # -- one case -----------------------------------------------------------------------------------------------------

    def case(self, key, group, title, competitors, depth, size, baseline, note=None):
        """Runs {name: function(last round?) -> sample} in rounds; keeps medians, and the ratio to `baseline`."""
        if not self.wanted(group):
            return
        samples = {name: [] for name in competitors}
        failures = {}
        for turn in range(self.rounds):
            for name, run in competitors.items():
                if name in failures:
                    continue
                try:
                    samples[name].append(run(turn == self.rounds - 1))
                except Failed as failure:
                    failures[name] = str(failure)
                    # A rival may be unable to do it; lloop may not.
                    if "lloop" in name:
                        self.broken.append("%s: %s: %s" % (title, name, failure))
        rows = []
        for name in competitors:
            if name in failures:
                rows.append({"competitor": name, "failed": failures[name]})
                continue
            row = {"competitor": name}
            iops = [s["iops"] for s in samples[name] if "iops" in s]
            if iops:
                row.update(iops=statistics.median(iops), iops_min=min(iops), iops_max=max(iops))
                row["mib_per_s"] = row["iops"] * size / MIB
            for what, summary in SUMMARY.items():
                values = [s[what] for s in samples[name] if s.get(what) is not None]
                if values:
                    row[what] = summary(values)
                if values and what == "gap_us":
                    row["gap_max_us"] = max(values)
            rows.append(row)
        reference = next((r.get("iops") for r in rows if r["competitor"] == baseline), None)
        for row in rows:
            if row.get("iops") and reference:
                row["ratio"] = row["iops"] / reference
        result = {"key": key, "group": group, "case": title, "depth": depth, "block_bytes": size, "baseline": baseline, "note": note,
                  "rows": rows}
        self.results.append(result)
        output.show(result)

    def competitor(self, name, backing, rw, depth, size):
        """What runs one rival on one backing."""
        def path():
            return self.files.fresh() if backing == "fresh" else getattr(self.files, backing)()

        def in_spdk(_):
            work = ["-w", "randrw", "-M", "70"] if rw == "mixed" else ["-w", rw]
            bdev = (name, "B", None if name == "malloc" else path())
            return self.spdk.run([bdev], work, depth, size, self.seconds, deep=backing == "slow" and depth > 32)

        def outside(is_last):
            def once(with_latencies):
                file = path()
                if name == "fio t/io_uring":
                    return raw.t_io_uring(self.args.t_io_uring, file, rw, depth, size, self.seconds, self.spdk.tsc_hz, with_latencies)
                if name == "fio on kernel loop":
                    file = self.files.loop(file)
                return raw.fio(name, file, rw, depth, size, self.seconds, SLOW_SIZE if backing == "slow" else GIB, with_latencies)
            sample = once(False)
            if is_last:
                sample.update(once(True))
            return sample

        return outside if name.startswith("fio") else in_spdk

    def work(self, group, backing, rw, depth, size, names, baseline, note=None):
        unit = "%d KiB" % (size >> 10) if size < MIB else "%d MiB" % (size >> 20)
        key = "%s %s %s %d" % (backing if backing != "fresh" else "unwritten", rw, unit, depth)
        title = "%s %s, %s, depth %d" % (unit, WORDS[rw], BACKINGS[backing], depth)
        self.case(key, group, title, {n: self.competitor(n, backing, rw, depth, size) for n in names}, depth, size, baseline, note)

    # -- all of them --------------------------------------------------------------------------------------------------

    def run(self):
        quick = self.args.quick
        aio = "bdev_aio"
        everybody = IN_SPDK + ["malloc", "fio t/io_uring"] + RAW + ["fio pvsync2 pool", "fio on kernel loop"]
        few = IN_SPDK + ["fio io_uring"]
        some = few if quick else few + ["fio on kernel loop"]
        everybody.insert(1, HELPED)
        for depth in (1, 32, 128):
            names = everybody if depth == 32 or not quick else [HELPED] + IN_SPDK + ["malloc", "fio t/io_uring"]
            self.work("unwritten", "unwritten", "randread", depth, 4096, names, "bdev_uring" if depth == 1 else aio)
        for depth in (1, 32, 128):
            self.work("unwritten", "fresh", "randwrite", depth, 4096, some + ["fio pvsync2 pool"], aio)
        for rw in ("randread", "randwrite"):
            for depth in (32,) if quick else (1, 32, 128):
                self.work("written", "written", rw, depth, 4096, some, aio)
        self.work("written", "written", "mixed", 32, 4096, some, aio)
        for size, depth in ((128 << 10, 32), (MIB, 8)):
            self.work("sequential", "written", "read", depth, size, some + ["fio libaio"], "fio io_uring")
        self.work("sequential", "written", "write", 32, 4096, some, aio)

        pool = ["fio pvsync2 pool"]
        self.work("slow", "slow", "write", 32, 4096, IN_SPDK + ([] if quick else ["fio io_uring"]), aio)
        for depth in (1,) if quick else (1, 32):
            self.work("slow", "slow", "randread", depth, 4096, (["lloop/threads"] if quick else few) + pool, pool[0])
        deep = "lloop has lane_limit 64 and workers 128 here (bdev_lloop_set_options); by default a lane has 32 calls at a time"
        self.work("slow", "slow", "randread", 64, 4096, (IN_SPDK if quick else few) + pool, aio, deep)
        if not quick:
            self.work("slow", "slow", "randwrite", 64, 4096, few + pool, aio, deep)
        for group, cases in (("slow", self.neighbour), ("many", self.many), ("gaps", self.gaps)):
            if self.wanted(group):
                cases()
        self.seconds_taken = time.time() - self.started

    def neighbour(self):
        slow = self.files.slow()

        def beside(kind):
            def run(_):
                bdevs = [("malloc", "Innocent", None)] + ([(kind, "Slow", slow)] if kind else [])
                return self.spdk.run(bdevs, ["-w", "randread"], 32, 4096, self.seconds, of="Innocent")
            return run

        def elsewhere(_):
            # The same load on the slow file, by a program on the other processor: what the machine costs, not the module.
            load = subprocess.Popen(["taskset", "-c", "1", "fio", "--name=x", "--filename=" + slow, "--direct=1", "--thread=1",
                                     "--ioengine=pvsync2", "--rw=randread", "--bs=4096", "--numjobs=32", "--time_based=1",
                                     "--runtime=60", "--gtod_reduce=1", "--group_reporting=1"],
                                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                return self.spdk.run([("malloc", "Innocent", None)], ["-w", "randread"], 32, 4096, self.seconds)
            finally:
                load.terminate()
                load.wait()

        competitors = {"alone": beside(None), "alone, fio on the slow file elsewhere": elsewhere}
        competitors.update({"beside " + kind: beside(kind) for kind in IN_SPDK if kind != "lloop/uring"})
        self.case("neighbour", "slow", "the innocent neighbour: a malloc bdev on the reactor of a slow file, depth 32 each", competitors, 32,
                  4096, "alone", "processor time is that of the I/O of both bdevs")

    def many(self):
        files = [self.files.unwritten("many%d" % i, 64 * MIB) for i in range(16)]

        def run(kind, paths, depth):
            bdevs = [(kind, "B%02d" % i, path) for i, path in enumerate(paths)]
            return lambda _: self.spdk.run(bdevs, ["-w", "randread"], depth, 4096, self.seconds)
        for kind in IN_SPDK[:2 if self.args.quick else 4]:
            self.case("many " + kind, "many", "16 bdevs of depth 8 beside one of depth 128, unwritten extents: %s" % kind,
                      {"one " + kind: run(kind, files[:1], 128), "sixteen " + kind: run(kind, files, 8)}, 128, 4096, "one " + kind)
        for file in files:
            self.files.drop(file)

    def gaps(self):
        """The longest time that the reactor is away, with nothing to do and with everything that can be wrong with a file."""
        sick = self.files.sick()

        def fault(kind, words, seconds=1.0):
            # It begins while there is I/O, and ends while there is: what a file that is sick from the start does is another thing.
            def happens():
                time.sleep(0.3)
                self.files.faults(words)
                time.sleep(seconds)
                self.files.faults("latency_us=1000")
            # In calls of 16 KiB, so that there is something to be short of. A rival that knows no better goes on after failures.
            return lambda _: self.spdk.run([(kind, "B", sick)], ["-w", "randread", "-f"], 32, 16384, 2, meanwhile=happens)

        for kind in ("lloop/threads", "bdev_aio"):
            self.case("gaps " + kind, "gaps", "longest gap between polls of the reactor: %s on a sick file, depth 32" % kind, {
                "%s idle" % kind: lambda _, kind=kind: self.spdk.idle([(kind, "B", sick)], 1.5),
                "%s, 1 ms more" % kind: fault(kind, "latency_us=1000"),
                "%s, 20 ms more" % kind: fault(kind, "latency_us=20000"),
                "%s, short transfers" % kind: fault(kind, "latency_us=1000 short=4096"),
                "%s, EIO" % kind: fault(kind, "latency_us=1000\nerror=5 times=200"),
                "%s, hangs for 1 s" % kind: fault(kind, "hang"),
            }, 32, 16384, None, "its own idle reactor is what it is compared with")

    def report(self):
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown processor")
        return {
            "machine": {"cpu": cpu, "cores": os.cpu_count(), "kernel": platform.release(), "load_before": round(self.load, 2)},
            "spdk": self.args.spdk, "quick": self.args.quick, "rounds": self.rounds, "seconds": self.seconds,
            "date": time.strftime("%Y-%m-%d", time.gmtime(self.started)), "took_s": round(self.seconds_taken),
            "bars": judge(self.results), "broken": self.broken, "cases": self.results,
        }


def main():
    parser = argparse.ArgumentParser(description="run by scripts/bench.sh")
    parser.add_argument("--apps", help="the folder of bdevperf")
    parser.add_argument("--examples", help="the folder of our filesystems' programs")
    parser.add_argument("--t-io-uring", help="fio's t/io_uring")
    parser.add_argument("--work", help="a folder for files to work on; made anew")
    parser.add_argument("--spdk", help="SPDK's version")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", choices=list(output.GROUPS), help="only these cases; may be said again")
    parser.add_argument("--out", help="where the results go")
    parser.add_argument("--docs", action="store_true", help="only write the tables of docs/performance.md anew")
    args = parser.parse_args()
    if args.docs:
        output.write_docs()
        return
    out = args.out or (os.path.join("bench-results", "quick") if args.quick or args.only else "bench-results")
    bench = Bench(args)
    try:
        with Isolation():
            bench.run()
        report = bench.report()
        output.show_bars(report["bars"])
        output.write(report, out)
    finally:
        bench.files.close()
    if out == "bench-results":
        output.write_docs()
    if bench.broken:
        sys.exit("lloop failed:\n  " + "\n  ".join(bench.broken))


if __name__ == "__main__":
    main()
