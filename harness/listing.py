"""The runs in a folder, a line each. No TensorFlow here: it is answered at once."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any

from harness.command_line import print_line
from harness.fields import ConfigGroup, UserError
from harness.files import expand_path, read_json
from harness.options import Run

# Fields whose defaults follow from others, and these.
FOLLOWING = ("client_lr", "server_lr", "lr_horizon")
DECIDING = (
    "algorithm",
    "client_optimizer",
    "client_schedule",
    "model",
    "rounds",
    "server_schedule",
)
HEADINGS = (
    "folder",
    "differs from the default in",
    "rounds",
    "accuracy",
    "ε",
    "s of rounds",
    "state",
)


def print_runs(folder: str, default: ConfigGroup) -> None:
    """Print a table of the runs in `folder`, by name. Raises UserError if there is none."""
    try:
        paths = sorted(path.parent for path in expand_path(folder).glob("*/config.json"))
    except OSError:  # such as a name that is too long
        paths = []
    if not paths:
        is_run = os.path.isfile(expand_path(folder) / "config.json")
        what = (
            "is a run itself; give the folder above"
            if is_run
            else "holds no run; give the folder of --runs"
        )
        raise UserError(f"list={folder!r:.200} {what}")
    rows = [HEADINGS, *(describe_run(path, default) for path in paths)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print_line("  ".join(cells).rstrip())


def describe_run(path: Path, default: ConfigGroup) -> tuple[str, ...]:
    """Return the cells of a run's line."""
    try:
        saved = read_json(path / "config.json")
        rounds = read_rounds(path / "metrics.csv")
        total = int(saved["rounds"])
        last = rounds[-1] if rounds else {}
        spent = last.get("epsilon")
        seconds = sum(float(row["seconds"]) for row in rounds)
        return (
            path.name,
            describe_changes(saved, default),
            f"{len(rounds)}/{total}",
            f"{float(last['test_accuracy']):.2%}" if rounds else "",
            f"{float(spent):.1f}" if spent else "",
            "" if math.isnan(seconds) or not rounds else f"{seconds:.0f}",
            describe_state(path, len(rounds), total),
        )
    except (UserError, OSError, LookupError, ValueError, TypeError, csv.Error):
        return (path.name, "", "", "", "", "", "cannot be read")


def read_rounds(path: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv; none if no round was done."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def changed_fields(saved: dict[str, Any], default: ConfigGroup) -> dict[str, Any]:
    """Return field -> value of those that change numbers and are not as by default.

    `saved` is field -> value, of this version of the program or another. A rate counts if it is not
    the default of its algorithm, optimizer and model.
    """
    usual = default.to_dict()
    chosen = {field: saved[field] for field in DECIDING if field in saved}
    usual |= default.effective(**chosen).subset(FOLLOWING)
    own = Run().to_dict()  # where files lie
    return {
        field: saved[field]
        for field in usual
        if field in saved and field not in own and saved[field] != usual[field]
    }


def describe_changes(saved: dict[str, Any], default: ConfigGroup) -> str:
    """Return these fields as a text, such as "alpha 0.1"."""
    changed = changed_fields(saved, default)
    return ", ".join(f"{field} {show(value)}" for field, value in changed.items()) or "nothing"


def show(value: Any) -> str:
    """Return a field's value: a number without a needless point, a path by its end."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).rpartition("/")[2]


def describe_state(path: Path, done: int, total: int) -> str:
    """Return whether the run is finished, or was stopped before its end."""
    if not (path / "metrics.json").exists():
        return "stopped, or going on"
    return "finished" if done == total else "ended early"
