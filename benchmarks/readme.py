"""Puts the tables of benchmarks/results into README, between its <!-- name --> marks.

python benchmarks/readme.py
"""

import json

import round_time

README = round_time.ROOT / "README.md"
RESULTS = round_time.ROOT / "benchmarks" / "results"


def tables() -> dict[str, str]:
    """Mark -> Markdown."""
    found = {}
    for name in ("round_time", "peers"):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        found[name] = f"{round_time.table(result['rows'])}\n\n({result['machine']}.)"
    startup = json.loads((RESULTS / "startup.json").read_text())
    rows = sorted(startup["seconds"].items(), key=lambda row: -row[1])
    rows = [*[row for row in rows if row[1] >= 0.1], ("the whole run", startup["total_s"])]
    found["startup"] = "\n".join(
        ["| part | seconds |", "| --- | --- |", *(f"| {name} | {s:.2f} |" for name, s in rows)]
    )
    return found


def fill(text: str) -> str:
    """`text` with each table in its place."""
    for name, table in tables().items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = before + mark + table + "\n" + end + after
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
