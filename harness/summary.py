"""A comparison's table as files: CSV for a program, Markdown for a README, LaTeX for a paper."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from harness.files import one_line
from harness.records import RoundRecord, megabytes_so_far, rounds_to_target
from harness.results import Base, base_of, compare_outcomes

import numpy as np
import scipy.stats

Table = list[dict[str, Any]]
ROW = "compared"  # the first column, of the rows' names
# Of a column: its heading in Markdown and LaTeX, and how its numbers are written.
COLUMNS = {
    "seeds": ("seeds", "d"),
    "rounds": ("rounds", "d"),
    "client_lr": ("client lr", "g"),
    "server_lr": ("server lr", "g"),
    "mean": ("test accuracy (%)", ".2f"),
    "sd": ("sd", ".2f"),
    "low": ("95 % from", ".2f"),
    "high": ("to", ".2f"),
    "difference": ("difference", "+.2f"),
    "versus": ("against", "s"),
    "p": ("p", ".2g"),
    "p_holm": ("p (Holm)", ".2g"),
    "rounds_to_target": ("rounds to the target", ".1f"),
    "reached": ("reached it", "d"),
    "epsilon": ("ε", ".1f"),
    "megabytes": ("MB sent", ",.1f"),
}


def summarize(
    records_of: dict[str, list[list[RoundRecord]]],
    rates: dict[str, tuple[float, float]],
    base: Base,
    target: float,
) -> Table:
    """Return a row for each name: its test accuracy in percent over the seeds, and what it needed.

    `records_of` has the records of each seed, `rates` the clients' and the server's. Accuracies are
    those after the last round that all runs have. Differences are to the row's `base`, if it has
    one, by the paired t-test, with Holm's correction where there are more than two rows. What does
    not apply is None.
    """
    rounds = min(len(records) for runs in records_of.values() for records in runs)
    accuracies = {
        name: [100 * records[rounds - 1].test_accuracy for records in runs]
        for name, runs in records_of.items()
    }
    differences = compare_outcomes(accuracies, base) if base else {}
    rows = []
    for name, runs in records_of.items():
        seeds = len(runs)
        row = {ROW: name, "seeds": seeds, "rounds": rounds}
        row |= dict(zip(("client_lr", "server_lr"), rates[name], strict=True))
        row |= describe_spread(accuracies[name])
        row |= {"difference": None, "versus": None, "p": None, "p_holm": None}
        if name in differences:
            row["versus"] = base_of(name, base)
            row["difference"] = differences[name].mean
            if seeds > 1:
                row["p"] = differences[name].p
            if seeds > 1 and len(differences) > 1:
                row["p_holm"] = differences[name].adjusted_p
        curves = [[record.test_accuracy for record in records] for records in runs]
        needed = [rounds_to_target(curve, target) for curve in curves]
        reached = [number for number in needed if number is not None]
        row["rounds_to_target"] = float(np.mean(reached)) if reached else None
        row["reached"] = len(reached) if target else None
        spent = [records[rounds - 1].epsilon for records in runs]
        row["epsilon"] = None if None in spent else max(spent)
        sent = [megabytes_so_far(records[:rounds])[-1] for records in runs]
        row["megabytes"] = float(np.mean(sent))
        rows.append(row)
    return rows


def describe_spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, standard deviation and the 95 % interval of the mean, by Student's t.

    They are percent: the interval ends at 0 and at 100.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None}
    sd = float(np.std(values, ddof=1))
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    return {"mean": mean, "sd": sd, "low": max(mean - half, 0.0), "high": min(mean + half, 100.0)}


def used_columns(rows: Table) -> list[str]:
    """Return the columns that say something in some row, the first of which names the rows."""
    return [name for name in rows[0] if any(row[name] is not None for row in rows)]


def cell(row: dict[str, Any], column: str) -> str:
    """Return a value as it is written in a table; nothing for None."""
    value = row[column]
    if value is None:
        return ""
    return f"{value:{COLUMNS[column][1]}}" if column in COLUMNS else str(value)


def heading(column: str) -> str:
    """Return a column's heading."""
    return COLUMNS[column][0] if column in COLUMNS else column


def to_markdown(rows: Table) -> str:
    """Return the rows as a table in Markdown."""
    columns = used_columns(rows)
    lines = [[heading(column) for column in columns], ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[escape_markdown(cell(row, column)) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escape_markdown(text: str) -> str:
    """Return a text as a Markdown table shows it: no new cell, line, link or tag begins in it."""
    return re.sub(r"([\\|`*\[\]<>])", r"\\\1", one_line(text))


def to_latex(rows: Table, caption: str) -> str:
    r"""Return the rows as a LaTeX table; it needs \usepackage{booktabs}."""
    columns = used_columns(rows)
    lines = [[heading(column) for column in columns]]
    lines += [[cell(row, column) for column in columns] for row in rows]
    head, *body = [f"{' & '.join(map(escape, line))} \\\\\n" for line in lines]
    return (
        f"% {one_line(caption)}\n\\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}\n\\toprule\n"
        f"{head}\\midrule\n{''.join(body)}\\bottomrule\n\\end{{tabular}}\n"
    )


LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "%": r"\%",
    "_": r"\_",
    "&": r"\&",
    "#": r"\#",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "ε": r"$\varepsilon$",
    "±": r"$\pm$",
    "·": r"$\cdot$",
}


def escape(text: str) -> str:
    """Return a text as LaTeX prints it: none of its characters is a command."""
    return "".join(LATEX.get(char, char) for char in one_line(text))
