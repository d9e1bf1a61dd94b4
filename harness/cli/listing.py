"""Listing of the runs in a folder, without TensorFlow."""

from __future__ import annotations

import csv
import json
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.cli.command_line import print_version
from harness.cli.fields import ConfigGroup, UserError
from harness.cli.output import print_line
from harness.cli.run_options import Run, changed_fields, show
from harness.storage.files import expand_path, one_line, read_bytes, read_json, strict

WIDTH = 100  # columns of the list
LONGEST_SHOWN = 44  # letters of a folder's name; --json has all


class Listed(NamedTuple):
    """What is listed of a run, a comparison or an evaluation; --json prints the same."""

    folder: str
    rounds: int | None = None  # done so far
    of_rounds: int | None = None
    test_accuracy: float | None = None
    epsilon: float | None = None
    seconds: float | None = None  # of all rounds
    state: str = "cannot be read"
    settings: str = ""  # those that are not at their defaults; what is compared or evaluated

    @property
    def cells(self) -> list[str]:
        """The cells of its line; HEADINGS names them."""
        accuracy = self.test_accuracy
        return [
            shorten_middle(one_line(self.folder)),
            "" if self.rounds is None else f"{self.rounds}/{self.of_rounds}",
            "" if accuracy is None else f"{accuracy:.2%}",
            "" if self.epsilon is None else f"{self.epsilon:.1f}",
            "" if self.seconds is None else f"{self.seconds:.0f}",
            self.state,
        ]


HEADINGS = ["folder", "rounds", "accuracy", "ε", "time (s)", "state"]


def describe_run(path: Path, default: ConfigGroup) -> Listed:
    """Return what is listed of a run."""
    try:
        saved = read_json(path / "config.json")
        rounds = read_rounds(path / "metrics.csv")
        total = int(saved["rounds"])
        last = rounds[-1] if rounds else {}
        spent = last.get("epsilon")
        seconds = sum(float(row["seconds"]) for row in rounds)
        return Listed(
            path.name,
            len(rounds),
            total,
            float(last["test_accuracy"]) if rounds else None,
            float(spent) if spent else None,
            None if math.isnan(seconds) or not rounds else round(seconds, 3),
            describe_state(path, len(rounds), total),
            describe_changes(saved, default),
        )
    except (UserError, OSError, LookupError, ValueError, TypeError, ArithmeticError, csv.Error):
        return Listed(path.name)


def describe_comparison(path: Path) -> Listed:
    """Return what is listed of a comparison."""
    try:
        described = read_json(path / "comparison.json")
        values = ", ".join(map(str, described["values"]))
        seeds = described.get("seeds", 1)
        over = f", {seeds} seeds" if seeds > 1 else ""
        is_done = described.get("finished", (path / "summary.csv").exists())
        state = "finished" if is_done else "unfinished"
        return Listed(path.name, state=state, settings=f"comparison of {values}{over}")
    except (UserError, LookupError, TypeError):
        return Listed(path.name)


def describe_evaluation(path: Path) -> Listed:
    """Return what is listed of a model that was evaluated without training."""
    try:
        metrics = read_json(path / "metrics.json")
        model = Path(metrics["evaluated_run"]).name
        of_model = "" if model in path.name else f" of {model}"
        what = f"evaluation{of_model} on {metrics['dataset']}"
        accuracy = float(metrics["test_accuracy"])
        return Listed(path.name, test_accuracy=accuracy, state="finished", settings=what)
    except (UserError, LookupError, TypeError, ValueError):
        return Listed(path.name)


# The file by which a folder other than a run's is known, and what tells of it.
OTHERS = {"comparison.json": describe_comparison, "metrics.json": describe_evaluation}


def read_rounds(path: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv; none if no round was done."""
    if not path.exists():
        return []
    return list(csv.DictReader(read_bytes(path).decode(errors="replace").splitlines()))


def describe_changes(saved: dict[str, Any], default: ConfigGroup) -> str:
    """Return these fields as a text, such as "alpha 0.1"."""
    changed = changed_fields(saved, default)
    return ", ".join(f"{field} {show(value)}" for field, value in changed.items())


def describe_state(path: Path, done: int, total: int) -> str:
    """Return whether the run is finished, or was stopped before its end."""
    if not (path / "metrics.json").exists():
        return "unfinished"
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
        return
    listed = list_runs(run.list, default)
    if run.json:
        print_line(json.dumps(strict([line._asdict() for line in listed])))
    elif not run.quiet:
        print_list(listed)


def list_runs(folder: str, default: ConfigGroup) -> list[Listed]:
    """Return the runs in `folder`, by name, then the comparisons and evaluations there.

    Raises UserError if there is none.
    """
    runs: list[Listed] = []
    others: list[Listed] = []
    for path in subfolders(folder):
        if os.path.exists(path / "config.json"):  # False of a folder that may not be entered
            runs.append(describe_run(path, default))
            continue
        for file, describe in OTHERS.items():
            if os.path.exists(path / file):
                others.append(describe(path))
                break
    if not runs + others:
        is_run = os.path.isfile(expand_path(folder) / "config.json")
        what = (
            "is a run; give the folder above it"
            if is_run
            else "contains no run; give the folder of --runs"
        )
        raise UserError(f"list={folder!r:.200} {what}")
    return [*runs, *others]


def print_list(listed: Sequence[Listed]) -> None:
    """Print a table: a line a run, and indented below it what is special about it."""
    rows = [HEADINGS, *(line.cells for line in listed)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    settings = ["", *(line.settings for line in listed)]
    for row, text in zip(rows, settings, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print_line("  ".join(cells).rstrip())
        indent = 4 * " "
        for part in textwrap.wrap(one_line(text), WIDTH - len(indent)):
            print_line(indent + part)


def shorten_middle(text: str) -> str:
    """Return a text without its middle, if it is too long."""
    half = LONGEST_SHOWN // 2
    return text if len(text) <= LONGEST_SHOWN else f"{text[: half - 1]}…{text[-half:]}"
