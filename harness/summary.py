"""Tables of a comparison as files: CSV, Markdown, LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from harness.files import one_line
from harness.records import (
    RoundRecord,
    have_one_length,
    megabytes_so_far,
    rounds_to_target,
)
from harness.results import Base, base_of, compare_outcomes

import numpy as np
import scipy.stats

Table = list[dict[str, Any]]
ROW = "compared"  # the first column, of the rows' names
# Of a column: its heading in Markdown and LaTeX, and how its numbers are written.
COLUMNS = {
    "seeds": ("seeds", "d"),
    "rounds": ("rounds", "g"),
    "client_lr": ("client lr", "g"),
    "server_lr": ("server lr", "g"),
    "mean": ("test accuracy (%)", ".2f"),
    "sd": ("sd", ".2f"),
    "low": ("95 % CI low", ".2f"),
    "high": ("high", ".2f"),
    "difference": ("difference (points)", "+.2f"),
    "rounds_difference": ("difference (rounds)", "+.2f"),
    "versus": ("vs", "s"),
    "p": ("p", ".2g"),
    "p_holm": ("p (Holm)", ".2g"),
    "rounds_to_target": ("rounds to target", ".1f"),
    "reached": ("seeds reaching it", "d"),
    "not_reached": ("seeds not reaching it", "s"),
    "epsilon": ("ε", ".1f"),
    "megabytes": ("MB sent", ",.1f"),
    "megabytes_to_target": ("MB to target", ",.1f"),
}


def summarize(
    records_of: dict[str, list[list[RoundRecord]]],
    rates: dict[str, tuple[float, float]],
    base: Base,
    target: float,
    seeds_of: dict[str, Sequence[int]] | None = None,
) -> Table:
    """Return a row for each name: its test accuracy in percent over the seeds, and costs.

    `records_of` has the records of each seed, `rates` the client and server learning rates,
    `seeds_of` the seeds (default: 0, 1, ...). The accuracy is that of each run's last round.
    Differences from the row's `base` are tested by the paired t-test, with Holm's correction for
    more than two rows: on the rounds to the `target` if there is one, else on the accuracies, if
    all runs have the same number of rounds. Values that do not apply are None, such as a mean over
    seeds of which one did not reach the target.
    """
    needed = {
        name: [rounds_to_target([record.test_accuracy for record in run], target) for run in runs]
        for name, runs in records_of.items()
    }
    accuracies = {
        name: [100 * records[-1].test_accuracy for records in runs]
        for name, runs in records_of.items()
    }
    outcomes = accuracies if have_one_length(records_of) else {}
    if target:
        outcomes = {name: rounds for name, rounds in needed.items() if None not in rounds}
    differences = compare_outcomes(outcomes, base) if base else {}
    rows = []
    for name, runs in records_of.items():
        seeds = seeds_of[name] if seeds_of else range(len(runs))
        row = {ROW: name, "seeds": len(runs), "rounds": float(np.mean([*map(len, runs)]))}
        row |= dict(zip(("client_lr", "server_lr"), rates[name], strict=True))
        row |= describe_spread(accuracies[name])
        row |= describe_difference(name, differences, base, bool(target), len(runs))
        row |= describe_target(runs, needed[name], seeds, target)
        spent = [records[-1].epsilon for records in runs]
        row["epsilon"] = None if None in spent else max(spent)
        sent = [megabytes_so_far(records)[-1] for records in runs]
        row["megabytes"] = None if target else float(np.mean(sent))
        rows.append(row)
    return rows


def describe_difference(
    name: str, differences: dict[str, Any], base: Base, to_target: bool, seeds: int
) -> dict[str, Any]:
    """Return the columns on how far a row is from its base; None where nothing can be said."""
    row = {"difference": None, "rounds_difference": None, "versus": None, "p": None, "p_holm": None}
    if name not in differences:
        return row
    row["versus"] = base_of(name, base)
    row["rounds_difference" if to_target else "difference"] = differences[name].mean
    if seeds > 1:
        row["p"] = differences[name].p
    if seeds > 1 and len(differences) > 1:
        row["p_holm"] = differences[name].adjusted_p
    return row


def describe_target(
    runs: Sequence[Sequence[RoundRecord]],
    needed: Sequence[float | None],
    seeds: Sequence[int],
    target: float,
) -> dict[str, Any]:
    """Return the columns on the target: what its seeds needed, and which did not reach it."""
    row = dict.fromkeys(("rounds_to_target", "reached", "not_reached", "megabytes_to_target"))
    if not target:
        return row
    late = [str(seed) for seed, rounds in zip(seeds, needed, strict=True) if rounds is None]
    row["reached"] = len(runs) - len(late)
    row["not_reached"] = " ".join(late) or None
    if not late:
        row["rounds_to_target"] = float(np.mean(needed))
        # A run may have gone on: what it sent is counted up to the round that reached the target.
        sent = [
            megabytes_so_far(records)[math.ceil(rounds) - 1]
            for records, rounds in zip(runs, needed, strict=True)
        ]
        row["megabytes_to_target"] = float(np.mean(sent))
    return row


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
    if isinstance(value, float) and math.isnan(value):
        return "not testable"
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
