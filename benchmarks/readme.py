"""Puts the tables of benchmarks/results into the pages, between their <!-- name --> marks.

python benchmarks/readme.py            # a table that is stale says so below it
python benchmarks/readme.py --check    # only names those; exit code 1 if there is one
"""

import statistics
import textwrap
from collections.abc import Iterable

import adversity
import algorithms
import compared
import default_run
import hosts
import niid_bench
import paper
import round_time
import skew
import time_to_target
import tuning
from results import ROOT, arguments, faults, machines, parse, read

PAGES = [ROOT / name for name in ("README.md", "benchmarks/README.md", "docs/partitions.md")]


def tables() -> dict[str, str]:
    """Mark -> Markdown, of the results that there are: the other places stay as they are."""
    found = {}
    if rows := read("round_time").get("rows"):
        found["speed"] = speed(rows)
    if read("default_run").get("runs"):
        found["default"] = default_run.table(read("default_run"))
    for name in ("round_time", "peers"):
        if result := read(name):
            found[name] = f"{round_time.table(result['rows'])}\n\n({result['machine']}.)"
    for name, table, key in (
        ("niid_bench", niid_bench.table, "rows"),
        ("algorithms", algorithms.table, "results"),
        ("adversity", adversity.table, "rows"),
        ("time_to_target", time_to_target.table, "rows"),
    ):
        if rows := read(name).get(key):
            found[name] = f"{table(rows)}\n\n({machines(rows)}.)"
    if rows := read("paper").get("rows"):
        runs = [run for row in rows for run in row["runs"]]
        found["paper"] = f"{paper.table(rows)}\n\n({machines(runs)}.)"
    if several := read("hosts"):
        found["hosts"] = f"{hosts.cost_table(several['costs'])}\n\n({several['machine']}.)"
        found["hosts_rows"] = f"{hosts.row_table(several['rows'])}\n\n({several['machine']}.)"
        found["hosts_calculation"] = hosts.calculation(several, read("scaling")["rows"])
    results = read("compared")
    for name in compared.COMPARISONS:
        if name in results:
            found[name] = compared.table(results, name)
    if rows := read("tuning").get("rows"):
        found["tuning"] = f"{tuning.table(rows)}\n\n({machines(rows)}.)"
    if rows := read("skew").get("rows"):
        found["skew"] = skew.table(rows)
    if startup := read("startup"):
        found["startup"] = startup_table(startup)
    return found


def startup_table(startup: dict) -> str:
    """Where the seconds of the default run are spent, as Markdown, the longest part first."""
    rows = sorted(startup["seconds"].items(), key=lambda row: -row[1])
    rows = [*[row for row in rows if row[1] >= 0.1], ("the whole run", startup["total_s"])]
    lines = ["| part | seconds |", "| --- | --- |", *(f"| {name} | {s:.2f} |" for name, s in rows)]
    return "\n".join([*lines, "", f"({startup['machine']}.)"])


def speed(rows: list[dict]) -> str:
    """README's sentence on the time of a round."""
    medians = {
        (row["work"].partition(",")[0], row["name"]): statistics.median(row["seconds"])
        for row in rows
    }
    works = dict.fromkeys(work for work, _ in medians)
    ratios = [medians[work, "ours"] / medians[work, "floor"] for work in works]
    ours, stock, usual = (medians["mlp", name] for name in ("ours", "stock-tff", "usual-tff"))
    low = min(ratios)
    high = max(ratios)
    by_id = stock / ours
    by_data = usual / ours
    text = (
        f"A round takes {low:.2f} to {high:.2f} times as long as one of a hand-written TensorFlow "
        "loop, both on two threads, depending on the workload (and the loop is faster in some "
        "processes than in others). With `mlp` and ten clients of 6,000 "
        f"images it takes {ours:.3f} s. A round of TFF's own FedAvg takes {stock:.2f} s "
        f"({by_id:.1f} times as long) if the worker loads each client's images by its id, and "
        f"{usual:.2f} s ({by_data:.0f} times) if the images are arguments of the round, as in most "
        "tutorials."
    )
    return "\n".join(textwrap.wrap(text, 120))


# Mark -> the results that it is made of, where these have another name.
SOURCES = {
    "speed": "round_time",
    "default": "default_run",
    "hosts_rows": "hosts",
    "hosts_calculation": "hosts",
}
MARKED = ("niid_bench", "paper", "adversity", "tuning", "algorithms")  # row by row
DAGGER = "† *Made by another version of the program.*"


def stale(names: Iterable[str]) -> dict[str, list[str]]:
    """Mark -> what is wrong with where its results are from, of each table where something is."""
    found = {}
    for name in names:
        if name in compared.COMPARISONS:
            content = read("compared")[name]
        else:
            content = read(SOURCES.get(name, name))
        wrong = faults(content)
        if wrong:
            found[name] = wrong
    return found


def fill(text: str, found: dict[str, str]) -> str:
    """`text` with each table in its place; `found` are those of `tables`."""
    wrong = stale(found)
    for name, table in found.items():
        if name in MARKED and "†" in table:
            table += f"\n\n{DAGGER}"
        elif name in wrong and name not in MARKED:
            table += f"\n\n*Made by {' and '.join(wrong[name])}.*"
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if mark:
            text = before + mark + table + "\n" + end + after
    return text


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--check", action="store_true", help="name the tables that are stale")
    only_check = parse(parser).check
    found = tables()
    if only_check:
        named = stale(found)
        for name, wrong in named.items():
            print(f"{name}: made by {' and '.join(wrong)}")
        raise SystemExit(bool(named))
    for path in PAGES:
        path.write_text(fill(path.read_text(), found))


if __name__ == "__main__":
    main()
