"""The table of a comparison as text: its columns, in Markdown and LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from harness.cli.fields import UserError
from harness.comparing.latex import describe_outcome, escape, grid_table, outcome_cells, to_table
from harness.storage.files import one_line

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
    "difference_low": ("95 % CI low", "+.2f"),
    "difference_high": ("high", "+.2f"),
    "detectable": ("detectable with power 0.8", ".2f"),
    "versus": ("vs", "s"),
    "p": ("p", ".2g"),
    "p_holm": ("p (Holm)", ".2g"),
    "rounds_to_target": ("rounds to target", ".1f"),
    "rounds_to_target_sd": ("sd", ".1f"),
    "reached": ("seeds reaching it", "d"),
    "not_reached": ("not reached by seed", "s"),
    "censored_at": ("after rounds", "d"),
    "epsilon": ("ε", ".1f"),
    "megabytes": ("MB sent", ",.1f"),
    "megabytes_to_target": ("MB to target", ",.1f"),
    "examples_to_target": ("examples to target", ",.0f"),
    "steps_to_target": ("local steps to target", ",.0f"),
    "seconds_to_target": ("simulated s to target", ",.1f"),
    "simulated_seconds": ("simulated s", ",.1f"),
    "attack_success": ("backdoor success (%)", ".2f"),
    "unseen_accuracy": ("clients never drawn (%)", ".2f"),
    "own_images": ("own test images, global model (%)", ".2f"),
    "personal": ("own test images, own models (%)", ".2f"),
    "personal_sd": ("sd", ".2f"),
    "personal_worst10": ("worst 10 % of clients (%)", ".2f"),
    "personal_difference": ("difference (points)", "+.2f"),
    "personal_p": ("p", ".2g"),
    "personal_p_holm": ("p (Holm)", ".2g"),
    "clients_mean": ("accuracy, mean over clients (%)", ".2f"),
    "clients_worst10": ("worst 10 % of clients (%)", ".2f"),
    "clients_gini": ("Gini over clients", ".3f"),
}
PROBABILITIES = ("p", "p_holm", "personal_p", "personal_p_holm")
ON_REQUEST = ("clients_mean", "clients_worst10", "clients_gini")  # of --table-columns


def used_columns(rows: Table) -> list[str]:
    """Return the columns that say something in some row, the first of which names the rows.

    Those that are shown on request are left out.
    """
    shown = [name for name in rows[0] if name not in ON_REQUEST]
    return [name for name in shown if any(row[name] is not None for row in rows)]


def cell(row: dict[str, Any], column: str) -> str:
    """Return a value as it is written in a table; nothing for None."""
    value = row[column]
    if value is None:
        return ""
    if column == ROW:
        return str(value)
    if column in PROBABILITIES and math.isnan(value):
        return "not testable"
    return f"{value:{COLUMNS[column][1] if column in COLUMNS else '.4g'}}"  # of a user's metric


def heading(column: str) -> str:
    """Return a column's heading."""
    return COLUMNS[column][0] if column in COLUMNS else column


def to_markdown(rows: Table, named: str = "") -> str:
    """Return the rows as a table in Markdown, of all columns or those named."""
    columns = choose_columns(rows, named)
    lines = [[heading(column) for column in columns], ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[escape_markdown(cell(row, column)) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escape_markdown(text: str) -> str:
    """Return a text as a Markdown table shows it: no new cell, line, link or tag begins in it."""
    return re.sub(r"([\\|`*\[\]<>])", r"\\\1", one_line(text))


def read_columns(text: str) -> list[str]:
    """Return the names in --table-columns."""
    return [name.strip() for name in text.split(",") if name.strip()]


def column_of(metric: str) -> str:
    """Return the column of one of a user's --metrics, which may be called as one of ours."""
    return f"metric_{metric}" if metric in COLUMNS or metric == ROW else metric


def check_columns(text: str, metrics: Iterable[str]) -> None:
    """Raise UserError if --table-columns names a column that summary.csv does not have.

    `metrics` are the names of the user's own.
    """
    known = [*COLUMNS, *map(column_of, metrics)]
    unknown = [name for name in read_columns(text) if name not in known]
    if unknown:
        raise UserError(
            f"table_columns={text!r:.60}: {unknown[0]!r:.40} is not a column of summary.csv; "
            f"choose from {', '.join(known)}"
        )


def find_empty(rows: Table, text: str) -> list[str]:
    """Return those of the columns that --table-columns names which say nothing in any row."""
    return [name for name in read_columns(text) if all(row.get(name) is None for row in rows)]


def choose_columns(rows: Table, text: str) -> list[str]:
    """Return the columns that --table-columns names; without it all that say something."""
    names = read_columns(text)
    return [ROW, *(name for name in names if name in rows[0])] if names else used_columns(rows)


def paper_columns(rows: Table, target: float) -> tuple[list[str], list[list[str]]]:
    """Return the headings and cells in LaTeX of a paper's columns: outcome, difference, p."""
    head = ["rounds" if target else r"accuracy (\%)"]
    body = [[text] for text in outcome_cells(rows, target)]
    difference = "rounds_difference" if target else "difference"
    if any(row["difference_low"] is not None for row in rows):
        head.append(r"difference (95\,\% CI)")
        for row, cells in zip(rows, body, strict=True):
            interval = ""
            if row["difference_low"] is not None:
                low = cell(row, "difference_low")
                interval = f"${row[difference]:+.2f}$ (${low}$, ${cell(row, 'difference_high')}$)"
            cells.append(interval)
    p = "p_holm" if any(row["p_holm"] is not None for row in rows) else "p"
    if any(row[p] is not None for row in rows):
        head.append("$p$ (Holm)" if p == "p_holm" else "$p$")
        for row, cells in zip(rows, body, strict=True):
            cells.append(escape(cell(row, p)))
    return head, body


def to_latex(
    rows: Table,
    caption: str,
    label: str = "comparison",
    target: float = 0.0,
    places: Sequence[tuple[str, ...]] | None = None,
    columns: str = "",
) -> str:
    r"""Return the rows as a paper's table; it needs \usepackage{booktabs}.

    `places` are the names of each row in LaTeX, one for each field that is compared; a grid of two
    fields has a row for each value of the first and a column for each value of the second.
    `columns` names those of summary.csv to show instead.
    """
    names = places or [(escape(row[ROW]),) for row in rows]
    shown_target = 0.0 if columns else target  # the mean in a column is of the accuracies
    about = f"{describe_outcome(rows, shown_target)}. {escape(caption)}."
    if columns:
        chosen = choose_columns(rows, columns)[1:]
        head = ["", *(escape(heading(column)) for column in chosen)]
        cells = [[escape(cell(row, column)) for column in chosen] for row in rows]
        if "mean" not in choose_columns(rows, columns):
            about = f"{escape(caption)}."
    elif all(len(name) == 2 for name in names) and len(set(names)) == len(rows):
        return to_table(*grid_table(rows, names, target), about, label)
    else:
        paper_head, cells = paper_columns(rows, target)
        head = ["", *paper_head]
    body = [[", ".join(name), *line] for name, line in zip(names, cells, strict=True)]
    return to_table(head, body, about, label)
