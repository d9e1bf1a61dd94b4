"""Listing of the runs in a folder, without TensorFlow."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any

from harness.command_line import print_line, print_version
from harness.fields import ConfigGroup, UserError
from harness.files import expand_path, one_line, read_bytes, read_json
from harness.run_options import Run

# Fields whose defaults follow from others, and these.
FOLLOWING = ("client_lr", "server_lr", "lr_horizon")
DECIDING = (
    "algorithm",
    "client_optimizer",
    "client_schedule",
    "dataset",
    "model",
    "rounds",
    "server_schedule",
)
HEADINGS = (
    "folder",
    "non-default settings",
    "rounds",
    "accuracy",
    "ε",
    "training (s)",
    "state",
)


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
    except (UserError, OSError, LookupError, ValueError, TypeError, ArithmeticError, csv.Error):
        return (path.name, "", "", "", "", "", "cannot be read")


def describe_comparison(path: Path, default: ConfigGroup) -> tuple[str, ...]:
    """Return the cells of a comparison's line."""
    try:
        described = read_json(path / "comparison.json")
        values = ", ".join(map(str, described["values"]))
        seeds = described.get("seeds", 1)
        over = f", {seeds} seeds" if seeds > 1 else ""
        is_done = (path / "summary.csv").exists()
        state = "finished" if is_done else "stopped or still running"
        return (path.name, f"comparison of {values}{over}", "", "", "", "", state)
    except (UserError, LookupError, TypeError):
        return (path.name, "", "", "", "", "", "cannot be read")


def describe_evaluation(path: Path, default: ConfigGroup) -> tuple[str, ...]:
    """Return the cells of the line of a model that was evaluated without training."""
    try:
        metrics = read_json(path / "metrics.json")
        model = Path(metrics["evaluated_run"]).name
        of_model = "" if model in path.name else f" of {model}"
        what = f"evaluation{of_model} on {metrics['dataset']}"
        accuracy = f"{float(metrics['test_accuracy']):.2%}"
        return (path.name, what, "", accuracy, "", "", "finished")
    except (UserError, LookupError, TypeError, ValueError):
        return (path.name, "", "", "", "", "", "cannot be read")


# The file by which a folder is known, and what tells of it.
DESCRIBED = (
    ("config.json", describe_run),
    ("comparison.json", describe_comparison),
    ("metrics.json", describe_evaluation),
)


def read_rounds(path: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv; none if no round was done."""
    if not path.exists():
        return []
    return list(csv.DictReader(read_bytes(path).decode(errors="replace").splitlines()))


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
        return "stopped or still running"
    return "finished" if done == total else "ended early"


def subfolders(folder: str) -> list[Path]:
    """Return the folders in a folder, by name; none where it cannot be read."""
    try:
        return sorted(path for path in expand_path(folder).iterdir() if path.is_dir())
    except OSError:  # such as a name that is too long
        return []


def answer(run: Run, default: ConfigGroup) -> None:
    """Do what --version or --list asks for, without TensorFlow; `run` is the group of flags."""
    if run.version:
        print_version()
    else:
        print_runs(run.list, default)


def print_runs(folder: str, default: ConfigGroup) -> None:
    """Print a table of the runs in `folder`, by name, then of comparisons and evaluations there.

    Raises UserError if there is none.
    """
    runs = []
    others = []
    for path in subfolders(folder):
        for file, describe in DESCRIBED:
            if os.path.exists(path / file):  # False of a folder that may not be entered
                lines = runs if describe is describe_run else others
                lines.append(describe(path, default))
                break
    if not runs + others:
        is_run = os.path.isfile(expand_path(folder) / "config.json")
        what = (
            "is a run; give the folder above it"
            if is_run
            else "contains no run; give the folder of --runs"
        )
        raise UserError(f"list={folder!r:.200} {what}")
    rows = [tuple(map(one_line, row)) for row in (HEADINGS, *runs, *others)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print_line("  ".join(cells).rstrip())
