"""Several runs, each made once, in one table and one plot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.command_line import check_resumed, read_saved, say
from harness.fields import Theme, UserError
from harness.files import csv_table, read_json, write_file, writing
from harness.options import compared, identity
from harness.plots import plot_comparison, to_png

import numpy as np


def compare(config: Theme, digest: str, note: str, name_of: Callable, run: Callable) -> Path:
    """Run every value and seed that `config` compares; return the folder with comparison.csv and its plot.

    comparison.csv is tidy: a row a run and round, with the columns of metrics.csv and what was compared. `digest`
    identifies the data set, name_of(config) is a run's default name, run(config) makes it and has its `records`.
    """
    field, names = compared(config)
    seeds = config.comparison.seeds
    runs = [(name, config.seed + number) for name in names for number in range(seeds)]
    singles = [config.but(**{field: name}, seed=seed, compare="", seeds=1, name="") for name, seed in runs]
    rows, curves = [], {name: [] for name in names}
    for number, ((name, seed), single) in enumerate(zip(runs, singles, strict=True), 1):
        say(f"\n[{number}/{len(runs)}] {field} {name}, seed {seed}")
        aggregator = single.aggregation.aggregator
        records = run_once(single.but(name=f"{name_of(single)}-{aggregator}-{fingerprint(single, digest)}"), run)
        rows += [{field: name, "seed": seed, **record} for record in records]
        curves[name].append([record["test_accuracy"] for record in records])
    rounds = min(len(curve) for several in curves.values() for curve in several)  # a privacy budget may end a run
    table = {name: np.array([curve[:rounds] for curve in several]) for name, several in curves.items()}
    default = f"compare-{config.comparison.compare or 'seeds'}-{fingerprint(config, digest)}"
    folder = Path(config.run.runs).expanduser() / (config.run.name or default)
    with writing(folder):
        folder.mkdir(exist_ok=True)
    write_file(folder / "comparison.csv", csv_table(rows))
    write_file(folder / "comparison.png", to_png(plot_comparison(table, note)))
    say("")
    for name, values in table.items():
        spread = f" ± {values[:, -1].std(ddof=1):.2%}" if seeds > 1 else ""
        say(f"{name:20} test accuracy {values[:, -1].mean():.2%}{spread} after {rounds} rounds")
    say(f"\nwrote {folder / 'comparison.csv'}\nwrote {folder / 'comparison.png'}")
    return folder


def fingerprint(config: Theme, digest: str) -> str:
    """Return eight digits of a hash of all that a run's numbers depend on."""
    depends = [identity(config), config.training.rounds, digest]
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:8]


def run_once(config: Any, run: Callable) -> list[dict[str, Any]]:
    """Return the rounds' figures of this run: read where it is there, resumed where it was stopped."""
    folder = Path(config.run.runs).expanduser() / config.run.name
    if folder.exists():
        config = config.but(resume=str(folder))
        check_resumed(config, read_saved(str(folder), config))
        if (folder / "metrics.json").exists():
            rounds = read_json(folder / "metrics.json").get("rounds")
            if not isinstance(rounds, list):
                raise UserError(f"{folder / 'metrics.json'} has no list of rounds; remove the folder")
            if len(rounds) == config.training.rounds:
                say(f"{folder} is there already")
                return [{name: value for name, value in row.items() if name != "clients"} for row in rounds]
    return [record.figures() for record in run(config).records]
