"""What is demanded of lloop, as ratios within one run, and whether it is met."""

MS = 1000


def judge(results):
    """[{work, of, wanted, measured, met}]; what was not measured has none of the last two."""
    cases = {case["key"]: {row["competitor"]: row for row in case["rows"]} for case in results}
    bars = []

    def get(key, name, what="iops"):
        return cases.get(key, {}).get(name, {}).get(what)

    def bar(work, of, wanted, measured, at_most=False, unit="x"):
        met = None if measured is None else bool(measured <= wanted if at_most else measured >= wanted)
        bars.append({"work": work, "of": of, "wanted": wanted, "at_most": at_most, "unit": unit,
                     "measured": None if measured is None else round(measured, 3), "met": met})

    def ratio(key, mine, theirs):
        above, below = get(key, mine), get(key, theirs)
        return above / below if above and below else None

    for depth in (32, 128):
        key, work = "unwritten randread 4 KiB %d" % depth, "4 KiB random read, unwritten extents, depth %d: %%s" % depth
        for rival, wanted in (("bdev_uring", 1.15), ("bdev_aio", 2.2), ("fio t/io_uring", 0.85)):
            bar(work % "uring", rival, wanted, ratio(key, "lloop/uring", rival))
        bar(work % "threads", "bdev_aio", 1.4, ratio(key, "lloop/threads", "bdev_aio"))
    for engine, wanted in (("uring", 1.2), ("threads", 1.0)):
        bar("4 KiB random read, unwritten extents, depth 1: " + engine, "bdev_uring", wanted,
            ratio("unwritten randread 4 KiB 1", "lloop/" + engine, "bdev_uring"))
    for engine in ("uring", "threads"):
        key = "written read 1 MiB 8"
        raw = max([get(key, name) or 0 for name in ("fio io_uring", "fio libaio")])
        mine = get(key, "lloop/" + engine)
        bar("1 MiB sequential read, written data: " + engine, "raw fio, the better engine", 0.97, mine / raw if mine and raw else None)
    bar("4 KiB sequential write, slow file, depth 32: threads", "bdev_aio", 4.0, ratio("slow write 4 KiB 32", "lloop/threads", "bdev_aio"))
    mine = get("slow randread 4 KiB 64", "lloop/threads")
    work = "4 KiB random read, slow file, depth 64, lane_limit 64: threads"
    bar(work, "depth / 1 ms", 0.95, mine / (64 * MS) if mine else None)
    # What the file's millisecond is to a caller that is alone.
    one = get("slow randread 4 KiB 1", "fio pvsync2 pool")
    bar(work, "depth / latency, as fio's one caller sees it", 0.95, mine / (64 * one) if mine and one else None)
    bar("the innocent neighbour, beside threads", "alone", 0.95, ratio("neighbour", "beside lloop/threads", "alone"))
    bar("the innocent neighbour, beside threads", "alone, with the same load elsewhere", 0.95,
        ratio("neighbour", "beside lloop/threads", "alone, fio on the slow file elsewhere"))
    key, name = "gaps lloop/threads", "lloop/threads"
    idle = get(key, name + " idle", "gap_us")
    for fault in ("1 ms more", "20 ms more", "short transfers", "EIO", "hangs for 1 s"):
        gap = get(key, "%s, %s" % (name, fault), "gap_us")
        bar("longest gap of the reactor: threads, " + fault, "idle", 1.0, (gap - idle) / MS if gap and idle else None, True, "ms more")
    for engine in ("uring", "threads"):
        kind = "lloop/" + engine
        bar("16 bdevs of depth 8: " + engine, "one of depth 128", 0.95, ratio("many " + kind, "sixteen " + kind, "one " + kind))
    return bars
