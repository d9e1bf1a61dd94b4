"""Tables of a comparison as files: CSV, Markdown, LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from harness.cli.fields import UserError
from harness.comparing.latex import describe_outcome, escape, grid_table, outcome_cells, to_table
from harness.comparing.significance import Base, Difference, base_of, compare_outcomes
from harness.reporting.clients import gini, worst_tenth
from harness.storage.files import one_line
from harness.training.histories import (
    has_own_models,
    have_one_length,
    megabytes_so_far,
    own_accuracies,
    rounds_to_target,
    seconds_to_target,
    simulated_so_far,
)
from harness.training.records import OWN_MODELS, WORST_OWN, RoundRecord, examples_trained_on

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
    "difference_low": ("95 % CI low", "+.2f"),
    "difference_high": ("high", "+.2f"),
    "detectable": ("detectable with power 0.8", ".2f"),
    "versus": ("vs", "s"),
    "p": ("p", ".2g"),
    "p_holm": ("p (Holm)", ".2g"),
    "rounds_to_target": ("rounds to target", ".1f"),
    "rounds_to_target_sd": ("sd", ".1f"),
    "reached": ("seeds reaching it", "d"),
    "not_reached": ("seeds not reaching it", "s"),
    "censored_at": ("after rounds", "d"),
    "epsilon": ("ε", ".1f"),
    "megabytes": ("MB sent", ",.1f"),
    "megabytes_to_target": ("MB to target", ",.1f"),
    "examples_to_target": ("examples to target", ",.0f"),
    "steps_to_target": ("local steps to target", ",.0f"),
    "seconds_to_target": ("simulated s to target", ",.1f"),
    "simulated_seconds": ("simulated s", ",.1f"),
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
ON_REQUEST = ("clients_mean", "clients_worst10", "clients_gini")  # of --table-columns


class Rates(NamedTuple):
    """What a row's runs train with."""

    client_lr: float
    server_lr: float
    batch_size: int  # 0: the whole shard


def summarize(
    records_of: dict[str, list[list[RoundRecord]]],
    rates: dict[str, Rates],
    base: Base,
    target: float,
    seeds_of: Mapping[str, Sequence[int]] | None = None,
    clients_of: dict[str, list[np.ndarray]] | None = None,
) -> Table:
    """Return a row for each name: its test accuracy in percent over the seeds, and costs.

    `records_of` has the records of each seed, `rates` the learning rates and batch size,
    `seeds_of` the seeds (default: 0, 1, ...), `clients_of` the clients' accuracies float64[K] of
    each seed. The accuracy is that of each run's last round.
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
    own = {}
    if base and has_own_models(records_of) and have_one_length(records_of):
        own = {
            name: [100 * own_accuracies(records)[-1] for records in runs]
            for name, runs in records_of.items()
        }
    own_differences = compare_outcomes(own, base) if own else {}
    rows = []
    for name, runs in records_of.items():
        seeds = seeds_of[name] if seeds_of else range(len(runs))
        row = {ROW: name, "seeds": len(runs), "rounds": float(np.mean([*map(len, runs)]))}
        row |= {"client_lr": rates[name].client_lr, "server_lr": rates[name].server_lr}
        row |= describe_spread(accuracies[name])
        row |= describe_difference(name, differences, base, bool(target), len(runs))
        row |= describe_target(runs, needed[name], seeds, target, rates[name].batch_size)
        spent = [records[-1].epsilon for records in runs]
        row["epsilon"] = None if None in spent else max(spent)
        sent = [megabytes_so_far(records)[-1] for records in runs]
        row["megabytes"] = None if target else float(np.mean(sent))
        row |= describe_simulated(runs, target)
        row |= describe_own_models(runs, own_differences.get(name), len(own_differences))
        row |= describe_distribution((clients_of or {}).get(name, []))
        rows.append(row)
    return rows


def describe_simulated(
    runs: Sequence[Sequence[RoundRecord]], target: float
) -> dict[str, float | None]:
    """Return the columns on simulated time: to the target if there is one, else in all."""
    row = dict.fromkeys(("seconds_to_target", "simulated_seconds"))
    ends = [simulated_so_far(records) for records in runs]
    if any(of_rounds is None for of_rounds in ends):
        return row
    if not target:
        return row | {"simulated_seconds": float(np.mean([times[-1] for times in ends]))}
    needed = [seconds_to_target(records, target) for records in runs]
    return row | {"seconds_to_target": None if None in needed else float(np.mean(needed))}


def describe_own_models(
    runs: Sequence[Sequence[RoundRecord]], difference: Difference | None, num_differences: int
) -> dict[str, float | None]:
    """Return the columns on the clients' own test images: by the global model, and by their own.

    `difference` is that of the model which each client uses, to the row's base; `num_differences`
    are tested at once.
    """
    names = [name for name in COLUMNS if name.startswith("personal") or name == "own_images"]
    row: dict[str, float | None] = dict.fromkeys(names)
    last = [records[-1].extra_accuracies for records in runs]
    if all("client_accuracy" in found for found in last):
        row["own_images"] = 100 * float(np.mean([found["client_accuracy"] for found in last]))
    if all(OWN_MODELS in found for found in last):
        own = [100 * found[OWN_MODELS] for found in last]
        row["personal"] = float(np.mean(own))
        row["personal_sd"] = float(np.std(own, ddof=1)) if len(own) > 1 else None
        row["personal_worst10"] = 100 * float(np.mean([found[WORST_OWN] for found in last]))
    if difference:
        row["personal_difference"] = difference.mean
        if len(runs) > 1:
            row["personal_p"] = difference.p
        if len(runs) > 1 and num_differences > 1:
            row["personal_p_holm"] = difference.adjusted_p
    return row


def describe_distribution(accuracies: Sequence[np.ndarray]) -> dict[str, float | None]:
    """Return the columns on the clients' accuracies float64[K] of each seed, means over seeds."""
    if not accuracies:
        return dict.fromkeys(ON_REQUEST)
    return {
        "clients_mean": 100 * float(np.mean([of_seed.mean() for of_seed in accuracies])),
        "clients_worst10": 100 * float(np.mean([*map(worst_tenth, accuracies)])),
        "clients_gini": float(np.mean([*map(gini, accuracies)])),
    }


def describe_difference(
    name: str, differences: dict[str, Any], base: Base, to_target: bool, seeds: int
) -> dict[str, Any]:
    """Return the columns on how far a row is from its base; None where nothing can be said."""
    columns = ("difference", "rounds_difference", "difference_low", "difference_high")
    row: dict[str, Any] = dict.fromkeys((*columns, "detectable", "versus", "p", "p_holm"))
    if name not in differences:
        return row
    found = differences[name]
    row["versus"] = base_of(name, base)
    row["rounds_difference" if to_target else "difference"] = found.mean
    if seeds > 1:
        row["p"] = found.p
    if not math.isnan(found.half_width):
        row["difference_low"] = found.mean - found.half_width
        row["difference_high"] = found.mean + found.half_width
        row["detectable"] = found.detectable
    if seeds > 1 and len(differences) > 1:
        row["p_holm"] = found.adjusted_p
    return row


def describe_target(
    runs: Sequence[Sequence[RoundRecord]],
    needed: Sequence[float | None],
    seeds: Sequence[int],
    target: float,
    batch_size: int,
) -> dict[str, Any]:
    """Return the columns on the target: what its seeds needed, and which did not reach it.

    Bytes, examples and local steps are counted up to the round that reached the target.
    """
    columns = [name for name in COLUMNS if name.endswith("_to_target")]
    names = (*columns, "rounds_to_target_sd", "reached", "not_reached", "censored_at")
    row: dict[str, Any] = dict.fromkeys(names)
    if not target:
        return row
    late = [place for place, rounds in enumerate(needed) if rounds is None]
    row["reached"] = len(runs) - len(late)
    if late:
        row["not_reached"] = " ".join(str(seeds[place]) for place in late)
        row["censored_at"] = min(len(runs[place]) for place in late)
        return row
    row["rounds_to_target"] = float(np.mean(needed))
    if len(needed) > 1:
        row["rounds_to_target_sd"] = float(np.std(needed, ddof=1))
    used = [run[: math.ceil(rounds)] for run, rounds in zip(runs, needed, strict=True)]
    row["megabytes_to_target"] = float(np.mean([megabytes_so_far(run)[-1] for run in used]))
    if all(has_work(record) for run in used for record in run):
        reports = [[report for record in run for report in record.clients] for run in used]
        steps = [sum(report["steps"] for report in of_run) for of_run in reports]
        row["steps_to_target"] = float(np.mean(steps))
        trained_on = [
            sum(examples_trained_on(report, batch_size) for report in of_run) for of_run in reports
        ]
        row["examples_to_target"] = float(np.mean(trained_on))
    return row


def has_work(record: RoundRecord) -> bool:
    """Return whether a round's record says what its clients did; that of a private run does not."""
    return not record.private and all({"steps", "examples"} <= r.keys() for r in record.clients)


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
    if isinstance(value, float) and math.isnan(value):
        return "not testable"
    return f"{value:{COLUMNS[column][1]}}" if column in COLUMNS else str(value)


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
    """Return the columns that --table-columns names. Raises UserError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise UserError(
            f"table_columns={text!r:.60}: {unknown[0]!r:.40} is not a column of summary.csv; "
            f"choose from {', '.join(COLUMNS)}"
        )
    return names


def choose_columns(rows: Table, text: str) -> list[str]:
    """Return the columns that --table-columns names; without it all that say something."""
    names = read_columns(text)
    return [ROW, *names] if names else used_columns(rows)


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
    about = f"{describe_outcome(rows, target)}. {escape(caption)}."
    if columns:
        chosen = choose_columns(rows, columns)[1:]
        head = ["", *(escape(heading(column)) for column in chosen)]
        cells = [[escape(cell(row, column)) for column in chosen] for row in rows]
        about = f"{escape(caption)}."
    elif all(len(name) == 2 for name in names) and len(set(names)) == len(rows):
        return to_table(*grid_table(rows, names, target), about, label)
    else:
        paper_head, cells = paper_columns(rows, target)
        head = ["", *paper_head]
    body = [[", ".join(name), *line] for name, line in zip(names, cells, strict=True)]
    return to_table(head, body, about, label)
