"""What people see of it: the terminal, JSON, charts, and the tables of docs/performance.md."""

import json
import os
import re
import sys

DOCS = os.path.join("docs", "performance.md")
# The newest whole run, without a version in the name: the next one takes its place. The version of SPDK is in the JSON.
NAME = "results"
GROUPS = {"unwritten": "4 KiB random, unwritten extents", "written": "4 KiB random, written data", "sequential": "sequential, written data",
          "slow": "slow file", "many": "16 bdevs", "gaps": "longest gap between polls of the reactor"}


def number(value, digits=None):
    """For people: three digits that count, thousands apart."""
    if value is None:
        return "-"
    if digits is None:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


COLUMNS = (("IOPS", "iops", 11, 0), ("MiB/s", "mib_per_s", 8, 0), ("mean us", "mean_us", 8, None), ("p50", "p50_us", 8, None),
           ("p99", "p99_us", 8, None), ("p99.9", "p999_us", 9, None), ("CPU us", "cpu_us_per_io", 7, None), ("gap us", "gap_us", 9, None),
           ("ratio", "ratio", 6, 2))
GAP_COLUMNS = (("gap us", "gap_us", 11, 0), ("longest", "gap_max_us", 11, 0), ("over 1 ms", "gaps_over_1ms", 9, 0), ("slept", "slept", 7, 0),
               ("put off", "put_off", 7, 0), ("IOPS", "iops", 9, 0))


def columns_of(group):
    return GAP_COLUMNS if group == "gaps" else COLUMNS


def show(case):
    columns = columns_of(case["group"])
    print("\n%s" % case["case"])
    print("  %-38s" % "" + " ".join(title.rjust(width) for title, _, width, _ in columns) + "   spread")
    for row in case["rows"]:
        if "failed" in row:
            print("  %-38scannot: %s" % (row["competitor"], row["failed"][:120]))
            continue
        cells = " ".join(number(row.get(what), digits).rjust(width) for _, what, width, digits in columns)
        spread = "%s to %s" % (number(row["iops_min"], 0), number(row["iops_max"], 0)) if "iops_min" in row else ""
        print("  %-38s%s   %s" % (row["competitor"], cells, spread))
    if case["note"]:
        print("  (%s)" % case["note"])
    sys.stdout.flush()


def verdict(bar):
    return "not measured" if bar["met"] is None else "met" if bar["met"] else "MISSED"


def show_bars(bars):
    print("\nthe bars")
    for bar in bars:
        sign = "<=" if bar["at_most"] else ">="
        print("  %-66s %-38s %s %5s, is %8s %-7s %s" % (bar["work"], "of " + bar["of"], sign, bar["wanted"], number(bar["measured"], 3),
                                                       bar["unit"], verdict(bar)))
    known = [bar for bar in bars if bar["met"] is not None]
    print("  %d of %d met" % (sum(bar["met"] for bar in known), len(known)))


def headline(report):
    machine = report["machine"]
    return "%s, %d processors, Linux %s, SPDK v%s, %d round%s of %d s%s" % (
        machine["cpu"], machine["cores"], machine["kernel"], report["spdk"], report["rounds"], "s" * (report["rounds"] > 1),
        report["seconds"], " (--quick)" if report["quick"] else "")


def write(report, out):
    os.makedirs(out, exist_ok=True)
    base = os.path.join(out, NAME)

    def plain(value):
        if isinstance(value, float):
            return float("%.5g" % value)
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, list) else value
    with open(base + ".json", "w") as file:
        json.dump(plain(report), file, indent=1)
        file.write("\n")
    names = [base + ".json"]
    for group in GROUPS:
        cases = [case for case in report["cases"] if case["group"] == group]
        if cases:
            names += chart(report, cases, "%s-%s" % (base, group), GROUPS[group])
    names += chart_bars(report, base + "-bars")
    print("\nwritten in %d s: %s" % (report["took_s"], ", ".join(names)))


def colour(name):
    return "#2a6f97" if "lloop" in name else "#d9a441" if name.startswith("fio") else "#9aa3ad"


def save(figure, base, title, report):
    figure.suptitle(title, fontsize=13, x=0.01, ha="left", weight="bold")
    figure.text(0.01, 0.004, headline(report), fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.012, 1, 0.99))
    figure.savefig(base + ".png", dpi=110, bbox_inches="tight")
    return [base + ".png"]


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def chart(report, cases, base, title):
    """Two pictures side by side for each case: how much, and how late (for gaps: how long)."""
    plt = pyplot()
    gaps = cases[0]["group"] == "gaps"
    columns = 1 if gaps else 2
    heights = [0.34 * len(case["rows"]) + 0.9 for case in cases]
    figure, axes = plt.subplots(len(cases), columns, figsize=(13, sum(heights) + 0.5), squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, case in zip(axes, cases):
        rows = case["rows"][::-1]
        names = [row["competitor"] for row in rows]
        colours = [colour(name) for name in names]
        places = range(len(rows))
        for axis in line:
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
            axis.set_yticks(list(places), names if axis is line[0] else [""] * len(rows), fontsize=8)
            axis.tick_params(axis="x", labelsize=7)
            axis.set_ylim(-0.6, len(rows) - 0.4)
        line[0].set_title(case["case"], fontsize=9, loc="left")
        if gaps:
            tails(line[0], rows, colours, (("gap_us", "longest gap, median of the rounds"), ("gap_max_us", "of all rounds")))
        else:
            rates(line[0], rows, colours, case)
            tails(line[1], rows, colours, (("p50_us", "p50"), ("p99_us", "p99"), ("p999_us", "p99.9")))
    names = save(figure, base, title, report)
    plt.close(figure)
    return names


def rates(axis, rows, colours, case):
    values = [row.get("iops", 0) / 1000 for row in rows]
    low = [value - row.get("iops_min", 0) / 1000 for value, row in zip(values, rows)]
    high = [row.get("iops_max", 0) / 1000 - value for value, row in zip(values, rows)]
    # The ceiling is far above; it must not press the others together.
    shown = [value + more for value, more, row in zip(values, high, rows) if row["competitor"] != "malloc"]
    limit = max(shown + [1e-9]) * 1.45
    axis.barh(range(len(rows)), values, color=colours, xerr=[low, high], error_kw={"lw": 1, "ecolor": "#333333"})
    for place, (row, value, more) in enumerate(zip(rows, values, high)):
        text = "cannot" if "failed" in row else "%s k" % number(value)
        if "ratio" in row:
            text += "  (%s x)" % number(row["ratio"], 2)
        beyond = value > limit
        if beyond:
            axis.text(limit * 0.98, place, text + "  \u2192", va="center", ha="right", fontsize=7, color="white")
        else:
            axis.text(value + more, place, "  " + text, va="center", fontsize=7)
    axis.set_xlim(0, limit)
    axis.set_xlabel("thousand IOPS, median; line: lowest to highest; x: of %s" % case["baseline"], fontsize=7)


def tails(axis, rows, colours, what):
    """Dots on a logarithmic scale, from the usual to the worst."""
    for place, (row, shade) in enumerate(zip(rows, colours)):
        found = [(row[key], marker, size) for (key, _), marker, size in zip(what, "o|x", (5, 9, 6)) if row.get(key)]
        axis.plot([value for value, _, _ in found], [place] * len(found), color=shade, lw=1.5)
        for value, marker, size in found:
            axis.plot([value], [place], marker, color=shade, markersize=size, mew=1.6)
        if found:
            axis.text(found[-1][0], place, "   " + " / ".join(number(value) for value, _, _ in found), va="center", fontsize=7)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * (high / low) ** 0.45)
    axis.grid(axis="x", lw=0.4, color="#dddddd")
    axis.set_axisbelow(True)
    axis.set_xlabel("microseconds: " + ", ".join("%s %s" % pair for pair in zip(("\u25cf", "|", "\u00d7"), (name for _, name in what))), fontsize=7)


def chart_bars(report, base):
    """Each demand as the part of it that is reached: right of the line is met."""
    plt = pyplot()
    bars = [bar for bar in report["bars"] if bar["measured"] is not None][::-1]
    figure, axis = plt.subplots(figsize=(13, 0.3 * len(bars) + 1.2))
    for place, bar in enumerate(bars):
        part = bar["wanted"] / max(bar["measured"], 0.05) if bar["at_most"] else bar["measured"] / bar["wanted"]
        axis.barh(place, min(part, 2.5), color="#3a8f5c" if bar["met"] else "#c0504d")
        axis.text(min(part, 2.5), place, "  %s %s, %s %s wanted" % (number(bar["measured"], 3), bar["unit"],
                                                                  "at most" if bar["at_most"] else "at least", bar["wanted"]),
                  va="center", fontsize=7)
    axis.axvline(1, color="black", lw=1)
    axis.set_yticks(range(len(bars)), ["%s, of %s" % (bar["work"], bar["of"]) for bar in bars], fontsize=7)
    axis.set_xlim(0, 3.2)
    axis.set_xlabel("part of the bar reached (cut at 2.5); the line is the bar", fontsize=7)
    names = save(figure, base, "The bars", report)
    plt.close(figure)
    return names


# -- docs/performance.md ----------------------------------------------------------------------------------------------


def table(titles, lines):
    return "\n".join(["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)] + ["| " + " | ".join(line) + " |" for line in lines])


def bars_in_words(report):
    lines = [(bar["work"], bar["of"], "%s %s %s" % ("at most" if bar["at_most"] else "at least", bar["wanted"], bar["unit"]),
              number(bar["measured"], 3), {True: "yes", False: "**no**", None: "not measured"}[bar["met"]]) for bar in report["bars"]]
    return table(("work", "of", "wanted", "measured", "met"), lines)


def cases_in_words(report, group):
    found = []
    columns = columns_of(group)
    for case in report["cases"]:
        if case["group"] != group:
            continue
        lines = []
        for row in case["rows"]:
            if "failed" in row:
                lines.append((row["competitor"], "cannot") + ("",) * (len(columns) - 1))
            else:
                lines.append((row["competitor"],) + tuple(number(row.get(what), digits) for _, what, _, digits in columns))
        titles = ("",) + tuple("x %s" % case["baseline"] if what == "ratio" else title for title, what, _, _ in columns)
        found.append("**%s**%s\n\n%s" % (case["case"], " (%s)" % case["note"] if case["note"] else "", table(titles, lines)))
    return "\n\n".join(found)


def write_docs():
    """Writes what is between the markers of docs/performance.md anew, from the JSON of the newest whole run."""
    with open(os.path.join("bench-results", NAME + ".json")) as file:
        report = json.load(file)

    def fill(match):
        what = match.group(2)
        if what == "machine":
            text = "%s; %s, load %s before it began, %d s." % (headline(report), report["date"], report["machine"]["load_before"], report["took_s"])
        elif what == "bars":
            text = bars_in_words(report)
        elif what in GROUPS:
            text = cases_in_words(report, what)
        else:
            sys.exit("%s: nothing is known as %r; there are machine, bars, %s" % (DOCS, what, ", ".join(GROUPS)))
        return "%s\n%s\n%s" % (match.group(1), text, match.group(3))

    with open(DOCS) as file:
        text = file.read()
    new = re.sub(r"(<!-- bench ([a-z]+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.S)
    with open(DOCS, "w") as file:
        file.write(new)
    print("written: " + DOCS)
