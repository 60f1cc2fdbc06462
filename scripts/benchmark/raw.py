"""The rivals outside SPDK: fio's engines and fio's t/io_uring on the raw file, fio on the kernel's loop device."""

import json
import os
import re
import resource
import subprocess

from .spdk import Failed

ENGINES = {
    "fio libaio": ["--ioengine=libaio"],
    "fio io_uring": ["--ioengine=io_uring", "--registerfiles=1", "--fixedbufs=1"],
    "fio pvsync2 pool": ["--ioengine=pvsync2"],
    "fio on kernel loop": ["--ioengine=io_uring"],
}
RATES = {"read": "read", "write": "write", "randread": "randread", "randwrite": "randwrite", "mixed": "randrw"}


def measured(command, seconds, folder=None):
    """Runs a program; its output, and the seconds of processor that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=seconds + 120, cwd=folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise Failed("%s: %s" % (command[3] if command[0] == "taskset" else command[0], (done.stdout.strip() or "no word")[-300:]))
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def fio(name, path, rw, depth, size, seconds, file_size, with_latencies):
    """A sample of fio's. Counting latencies slows fio down, so that is a run of its own, of which the IOPS do not count."""
    command = ["fio", "--name=x", "--filename=" + path, "--direct=1", "--time_based=1", "--thread=1", "--runtime=%d" % seconds,
               "--bs=%d" % size, "--rw=" + RATES[rw], "--output-format=json", "--randrepeat=0", "--norandommap=1",
               "--unified_rw_reporting=1", "--group_reporting=1", "--size=%d" % file_size] + ENGINES[name]
    if rw == "mixed":
        command.append("--rwmixread=70")
    if name == "fio pvsync2 pool":
        # Threads that block, on all processors: what a program does that knows nothing better.
        command = ["taskset", "-c", "0-%d" % (os.cpu_count() - 1)] + command + ["--iodepth=1", "--numjobs=%d" % depth]
    else:
        command = ["taskset", "-c", "0"] + command + ["--iodepth=%d" % depth]
        if depth > 1:
            command += ["--iodepth_batch_submit=%d" % min(16, depth // 2), "--iodepth_batch_complete_max=%d" % min(16, depth // 2)]
    command += ["--lat_percentiles=1", "--clat_percentiles=0"] if with_latencies else ["--gtod_reduce=1"]
    output, cpu = measured(command, seconds)
    result = json.loads(output[output.index("{"):])["jobs"][0]["mixed"]
    if not result["iops"]:
        raise Failed("fio did no I/O: " + output[:300])
    if with_latencies:
        percentiles = result["lat_ns"]["percentile"]
        found = {"mean_us": result["lat_ns"]["mean"] / 1000}
        for key, percentile in (("p50_us", "50.000000"), ("p99_us", "99.000000"), ("p999_us", "99.900000")):
            found[key] = percentiles[percentile] / 1000
        return found
    # The loop device's work is done by the kernel's own threads, which count for nobody.
    cpu_us = None if name == "fio on kernel loop" else cpu * 1e6 / (result["iops"] * seconds)
    return {"iops": result["iops"], "cpu_us_per_io": cpu_us}


def t_io_uring(program, path, rw, depth, size, seconds, tsc_hz, with_latencies):
    """A sample of fio's t/io_uring: the least that reads through io_uring can cost. One thread, registered file and buffers."""
    if rw not in ("randread", "read"):
        raise Failed("t/io_uring only reads")
    batch = max(1, min(32, depth // 2))
    command = ["taskset", "-c", "0", program, "-d%d" % depth, "-s%d" % batch, "-c%d" % batch, "-b%d" % size, "-p0", "-B1", "-F1",
               "-n1", "-r%d" % (seconds + 1), "-R%d" % (rw == "randread")]
    if with_latencies:
        if tsc_hz is None:
            raise Failed("t/io_uring's latencies need the clock's rate, and no bdevperf ran to tell it")
        command += ["-t1", "-T%d" % tsc_hz]
    # It leaves a file with the clock's rate where it runs.
    output, cpu = measured(command + [path], seconds, os.path.dirname(path))
    if with_latencies:
        unit = {"usec": 1, "nsec": 1e-3, "msec": 1e3}[re.search(r"percentiles \((\w+)\)", output).group(1)]
        percentiles = {float(p): int(value) * unit for p, value in re.findall(r"([\d.]+)th=\[\s*(\d+)\]", output)}
        return {"p50_us": percentiles[50.0], "p99_us": percentiles[99.0], "p999_us": percentiles[99.9]}
    rates = [float(number) * {"": 1, "K": 1e3, "M": 1e6}[unit]
             for number, unit in re.findall(r"^IOPS=([\d.]+)([KM]?)", output, re.M)]
    if not rates:
        raise Failed("t/io_uring printed no rate: " + output[-300:])
    iops = sum(rates) / len(rates)
    return {"iops": iops, "cpu_us_per_io": cpu * 1e6 / (iops * (seconds + 1))}
