"""Puts the tables of benchmarks/results into benchmarks/README.md, between its <!-- name --> marks.

python benchmarks/readme.py
"""

import csv
import json

import adversity
import numpy as np
import paper
import round_time
import time_to_target

README = round_time.ROOT / "benchmarks" / "README.md"
RESULTS = round_time.ROOT / "benchmarks" / "results"


def tables() -> dict[str, str]:
    """Mark -> Markdown."""
    found = {}
    for name in ("round_time", "peers"):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        found[name] = f"{round_time.table(result['rows'])}\n\n({result['machine']}.)"
    targets = json.loads((RESULTS / "time_to_target.json").read_text())
    found["time_to_target"] = f"{time_to_target.table(targets['rows'])}\n\n({targets['machine']}.)"
    cells = json.loads((RESULTS / "paper.json").read_text())
    found["paper"] = f"{paper.table(cells['rows'])}\n\n({cells['machine']}.)"
    found["adversity"] = adversity.table(json.loads((RESULTS / "adversity.json").read_text())["rows"])
    found["algorithms"] = algorithms()
    startup = json.loads((RESULTS / "startup.json").read_text())
    rows = sorted(startup["seconds"].items(), key=lambda row: -row[1])
    rows = [*[row for row in rows if row[1] >= 0.1], ("the whole run", startup["total_s"])]
    found["startup"] = "\n".join(
        ["| part | seconds |", "| --- | --- |", *(f"| {name} | {s:.2f} |" for name, s in rows)]
    )
    return found


def algorithms() -> str:
    """The last round of results/algorithms.csv, the comparison.csv of README's command."""
    with (RESULTS / "algorithms.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = [row for row in rows if row["round"] == rows[-1]["round"]]
    lines = ["| algorithm | test accuracy (%), mean ± sd | MB a round |", "| --- | --- | --- |"]
    for name in dict.fromkeys(row["algorithm"] for row in last):
        figures = [100 * float(row["test_accuracy"]) for row in last if row["algorithm"] == name]
        (sent,) = {int(row["bytes_down"]) + int(row["bytes_up"]) for row in last if row["algorithm"] == name}
        lines.append(f"| {name} | {np.mean(figures):.2f} ± {np.std(figures, ddof=1):.2f} | {sent / 1e6:.1f} |")
    return "\n".join(lines)


def fill(text: str) -> str:
    """`text` with each table in its place."""
    for name, table in tables().items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = before + mark + table + "\n" + end + after
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
