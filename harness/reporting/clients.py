"""What each client gets: clients.csv, its summary and distributions."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.storage.files import read_lines
from harness.training.client_accuracies import gini, worst_tenth

import numpy as np

TITLES = {
    "label_mix_accuracy": "the test set in their label mix",
    "own_test_accuracy": "their own images held out",
    "personal_accuracy": "their own images held out, by their own models",
}


def read_clients(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's clients.csv, none without the file."""
    return list(csv.DictReader(read_lines(folder / "clients.csv")))


def distributions(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return name in TITLES -> the clients' accuracies float64[K'], without NaN, of clients.csv."""
    found = {}
    for name in TITLES:
        # an empty text is a missing value in a file
        found_in = [row[name] for row in rows if name in row]
        values = np.array([math.nan if value == "" else value for value in found_in], float)
        measured = values[~np.isnan(values)]
        if len(measured):
            found[name] = measured
    return found


def summarize_clients(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return name in TITLES -> mean, sd, worst10 and gini over the clients, for metrics.json."""
    return {
        name: {
            "mean": float(accuracies.mean()),
            "sd": float(accuracies.std()),
            "worst10": worst_tenth(accuracies),
            "gini": gini(accuracies),
        }
        for name, accuracies in distributions(rows).items()
    }


def format_clients(summary: dict[str, dict[str, float]]) -> str:
    """Return the closing lines on the clients' accuracies; `summary` as in metrics.json."""
    return "".join(
        f"\nclients, on {TITLES[name]}: mean {found['mean']:.2%}, worst 10 % "
        f"{found['worst10']:.2%}, Gini coefficient {found['gini']:.3f}"
        for name, found in summary.items()
    )
