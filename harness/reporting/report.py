"""The page of a run, report.html: result, figures, rounds, clients.

All is in the file, so it can be sent by mail. It reads what metrics.json and partition.json hold,
which of a private run is nothing about single clients.
"""

from __future__ import annotations

import base64
import html
import shlex
from collections.abc import Sequence
from typing import Any

from harness.cli.fields import ConfigGroup
from harness.cli.flags import to_flag
from harness.training.records import DURING_TRAINING

MEDIA = {"png": "image/png", "svg": "image/svg+xml"}
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #20262b; margin: 0 auto; max-width: 70rem;
  padding: 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.small { color: #5c6770; font-size: .9rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 1rem; align-items: start; }
img { width: 100%; height: auto; border: 1px solid #e3e7ea; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #e3e7ea; }
th:first-child, td:first-child { text-align: left; }
thead th { background: #f3f5f7; } th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid #0b6fa4; } th button::after { content: " \\2195"; }
pre { background: #f3f5f7; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""
# A click on a heading sorts the rows by its column: by number, or by text.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const cell = button.closest("th"), table = cell.closest("table"), body = table.tBodies[0];
    const column = cell.cellIndex, down = cell.getAttribute("aria-sort") !== "ascending";
    const value = row => row.cells[column].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b), numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      return (numbers ? x - y : x.localeCompare(y)) * (down ? 1 : -1);
    });
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", down ? "ascending" : "descending");
    body.append(...rows);
  });
}
"""
HIDDEN = ("finite", "clients", "measured_bytes_down", "measured_bytes_up")


def to_html(
    title: str,
    metrics: dict[str, Any],
    partition: dict[str, Any],
    pictures: dict[str, bytes],
    commands: dict[str, str],
) -> str:
    """Return the page. `metrics` and `partition` are what their files hold.

    `pictures` are file name -> bytes of PNG or SVG, `commands` what each is for -> it.
    """
    epsilon = metrics["epsilon"]
    score = f"{metrics['test_accuracy']:.2%}" + (f", ε {epsilon:.2f}" if epsilon else "")
    about = {
        "weights (SHA-256)": metrics["weights_sha256"],
        "best round": f"{metrics['best_round']}, {metrics['best_accuracy']:.2%} on "
        f"{metrics['best_chosen_on']}",
        **metrics["provenance"],
    }
    is_clean = about.pop("clean", None)
    about["working tree clean"] = is_clean if is_clean is None else ("no", "yes")[is_clean]
    rounds = [
        {name: value for name, value in row.items() if name not in HIDDEN and value is not None}
        for row in metrics["rounds"]
    ]
    count = f"{len(rounds)} round{'s' * (len(rounds) != 1)}"
    parts = [
        f"<h1>{score} test accuracy after {count}</h1>",
        f'<p class="small">{html.escape(title)}</p>',
        *(["<h2>Figures</h2>"] if pictures else []),
        f'<div class="figures">{"".join(show(*item) for item in pictures.items())}</div>',
        section("Rounds", table(rounds)),
        section("Clients", table(describe_clients(metrics["rounds"][-1]["clients"], partition))),
        *(f"<h2>{what}</h2><pre>{html.escape(line)}</pre>" for what, line in commands.items()),
        section("Provenance", facts(about)),
        f"<details><summary>Full configuration</summary>{facts(metrics['config'])}</details>",
    ]
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(heading: str, content: str) -> str:
    """Return a section; nothing without content."""
    return f'<h2>{heading}</h2>\n<div class="wide">{content}</div>' if content else ""


def show(name: str, content: bytes) -> str:
    """Return a picture, inside the page."""
    stem, _, kind = name.rpartition(".")
    data = base64.b64encode(content).decode()
    text = html.escape(stem.replace("_", " "))
    return f'<img alt="{text}" src="data:{MEDIA[kind]};base64,{data}">'


def describe_clients(
    reports: Sequence[dict[str, Any]], partition: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return a row for each client: its images, its labels, and what it reported of the last round.

    Nothing of a private run.
    """
    counts = partition.get("label_counts", [])
    reported = {report["client"]: report for report in reports}
    rows = []
    for client, of_labels in enumerate(counts):
        held = [(count, label) for label, count in enumerate(of_labels) if count]
        most, commonest = max(held, default=(0, 0))
        rows.append(
            {
                "client": client,
                "images": sum(of_labels),
                "labels": len(held),
                "most frequent label": partition["classes"][commonest],
                "share": most / max(sum(of_labels), 1),
            }
        )
        report = reported.get(client, {})
        for name in next(iter(reported.values()), {}):
            if name not in ("client", "examples", *HIDDEN):
                title = f"train {name}" if name in DURING_TRAINING else name.replace("_", " ")
                rows[-1][f"{title} (last round)"] = report.get(name)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a sortable table; nothing without rows."""
    if not rows:
        return ""
    names = list(rows[0])
    heads = "".join(
        f'<th scope="col"><button type="button">{html.escape(name.replace("_", " "))}</button></th>'
        for name in names
    )
    lines = ["".join(make_cell(name, row.get(name)) for name in names) for row in rows]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody>\n</table>"


def make_cell(name: str, value: Any) -> str:
    """Return a table's cell, with the value that its column is sorted by."""
    sorted_by = "" if value is None else html.escape(str(value))
    return f'<td data-value="{sorted_by}">{cell(name, value)}</td>'


def cell(name: str, value: Any) -> str:
    """Return a value as a reader wants it: accuracies and shares in percent."""
    if value is None:
        return "–"
    if isinstance(value, float):
        is_share = "accuracy" in name or "share" in name or "success" in name
        return f"{value:.2%}" if is_share else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


def facts(values: dict[str, Any]) -> str:
    """Return a table of names and values."""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>\n'
        for name, value in values.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def command_of(config: ConfigGroup, script: str) -> str:
    """Return the command that makes the run of a configuration again."""
    words = []
    for field, value in config.changed().items():
        if field in ("resume", "accept_changes", "config", "name") or value is None:
            continue
        if isinstance(value, bool):
            words.append(to_flag(field) if value else f"--no-{to_flag(field)[2:]}")
        else:
            text = repr(value) if isinstance(value, float) else str(value)
            # A value that begins as a flag does is one with the flag.
            is_like_a_flag = text.startswith("-")
            words += [f"{to_flag(field)}={text}"] if is_like_a_flag else [to_flag(field), text]
    return " ".join([script, shlex.join(words)]).strip()
