"""Several runs, each made once, in one table and one plot."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.command_line import check_resumed, read_saved, say
from harness.fields import Theme, UserError
from harness.files import DAMAGE, csv_table, numbered, place, read_json, to_json, write_file
from harness.options import compared, identity
from harness.plots import plot_comparison, plot_rounds_to_target, to_png
from harness.program import changed, program, read_programs
from harness.records import reached, read_records, rounds_to_target
from harness.results import counted, tell_differences, tell_last, tell_rounds
from harness.run_folder import make_folder

import numpy as np


def compare(config: Theme, note: str, check: Callable, run: Callable) -> Path:
    """Run every value and seed that `config` compares; return the folder with comparison.csv and
    its plot.

    comparison.csv is tidy: a row a run and round, with the columns of metrics.csv and what was
    compared. All runs are checked before the first begins: check(config) returns a run's default
    name, its partition's hash, and the hashes of its rows; run(config) makes it, with its
    `records`. Raises UserError for what any of them would be refused for.
    """
    field, names = compared(config)
    seeds = config.comparison.seeds
    made = [(name, config.seed + number) for name in names for number in range(seeds)]
    singles = [
        named(config.only_used(**{field: name}, seed=seed, compare="", seeds=1), check)
        for name, seed in made
    ]
    earlier = [read_earlier(single) for single in singles]
    target = config.run.target_accuracy
    runs = [single.run.name for single in singles]
    what = {
        "field": field,
        "values": names,
        "seeds": seeds,
        "runs": runs,
        "target_accuracy": target,
    }
    folder = find_folder(place(config.run.runs), config.run.name, what)
    rows = []
    curves = {name: [] for name in names}
    spent: dict[str, list[list[float | None]]] = {name: [] for name in names}
    for number, ((name, seed), single, records) in enumerate(
        zip(made, singles, earlier, strict=True), 1
    ):
        say(f"\n[{number}/{len(singles)}] {field} {name}, seed {seed}")
        records = complete(single, records, run)
        rows += [{field: name, "seed": seed, **record.figures()} for record in records]
        curves[name].append(np.array([record.test_accuracy for record in records]))
        spent[name].append([record.epsilon for record in records])
    if target:
        ends = {
            name: [rounds_to_target(curve, target) for curve in several]
            for name, several in curves.items()
        }
        shown = {name: f"{name}{largest(several)}" for name, several in spent.items()}
        picture = plot_rounds_to_target(renamed(curves, shown), renamed(ends, shown), target, note)
        said = [f"target accuracy {target:.2%}: {tell_rounds(needed)}" for needed in ends.values()]
    else:
        # a privacy budget may end a run
        rounds = min(len(curve) for several in curves.values() for curve in several)
        table = {
            name: np.array([curve[:rounds] for curve in several])
            for name, several in curves.items()
        }
        shown = {
            name: f"{name}{largest([one[:rounds] for one in several])}"
            for name, several in spent.items()
        }
        picture = plot_comparison(renamed(table, shown), note)
        said = [
            f"{tell_last(values)} after {counted(rounds, 'round')}" for values in table.values()
        ]
        ends = {name: 100 * values[:, -1] for name, values in table.items()}
    write_file(folder / "comparison.csv", csv_table(rows))
    write_file(folder / "comparison.png", to_png(picture))
    say("")
    against = differences(ends, type(config)().flat()[field], "rounds" if target else "points")
    for name, line in zip(curves, said, strict=True):
        say(f"{shown[name]:20} {line}{against.get(name, '')}")
    say(f"\nwrote {folder / 'comparison.csv'}\nwrote {folder / 'comparison.png'}")
    return folder


def largest(spent: Sequence[Sequence[float | None]]) -> str:
    """Return the epsilon of a row behind its name, the largest of its seeds; nothing of a row that
    is not private."""
    last = [one[-1] for one in spent if one[-1] is not None]
    return f" (ε {max(last):.1f})" if last else ""


def renamed(table: dict[str, Any], shown: dict[str, str]) -> dict[str, Any]:
    """Return the table with its names as they are shown."""
    return {shown[name]: values for name, values in table.items()}


def differences(ends: dict[str, Sequence[Any]], usual: str, unit: str) -> dict[str, str]:
    """Return name -> how far its `ends`, one of each seed, are from those of the row `usual`, or
    without it the first.

    Where a seed has no end, as it did not reach the target, nothing can be said.
    """
    first = usual if usual in ends else next(iter(ends))
    known = {name: values for name, values in ends.items() if None not in (*ends[first], *values)}
    return tell_differences(known, first, unit) if first in known else {}


def caption(first: int, seeds: int) -> str:
    """Return what a caption says of the seeds."""
    return f"seed {first}" if seeds == 1 else f"seeds {first} to {first + seeds - 1}"


def named(config: Theme, check: Callable) -> Theme:
    """Return the configuration of a single run, checked, with a name that stands for all that its
    numbers depend on."""
    name, partition, rows = check(config)
    depends = digits([identity(config), config.training.rounds, partition, program(), rows])
    name = f"{name}-{config.aggregation.aggregator}"
    single = config.but(name=f"{name}-{depends}")
    tell_earlier(single, name, partition, rows)
    return single


def tell_earlier(single: Theme, name: str, partition: str, rows: dict[str, str]) -> None:
    """Say why the run is made again, where another program made it."""
    runs = place(single.run.runs)
    if (runs / single.run.name).exists():
        return
    for folder in sorted(runs.glob(f"{glob.escape(name)}-{'?' * 8}")):
        try:
            saved = read_saved(str(folder), single)
            same = (
                identity(saved) == identity(single)
                and saved.training.rounds == single.training.rounds
            )
            if same and read_json(folder / "partition.json").get("hash") == partition:
                names = changed(read_programs(folder)[-1], rows)
                say(
                    f"{folder} was made by another program ({', '.join(names)} changed): it is "
                    "made again"
                )
        except UserError:
            continue  # of an earlier version, or damaged: it is another run


def digits(content: Any) -> str:
    """Return eight digits of a hash of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def find_folder(runs: Path, name: str, what: dict[str, Any]) -> Path:
    """Return the folder of the comparison `what`, made where it is new; a name that something else
    has gets -2, -3."""
    name = name or f"compare-{'-'.join(what['values'])[:100]}-{digits(what)}"
    for folder in numbered(runs / name):
        if not folder.exists():
            folder = make_folder(runs, folder.name, {"comparison.json": to_json(what)})
        if (folder / "comparison.json").is_file() and read_json(folder / "comparison.json") == what:
            return folder
    raise AssertionError("unreachable")


def read_earlier(config: Theme) -> list | None:
    """Return the records of this run where it is done, None where it is to be made or to go on.

    Raises UserError where its folder holds something else.
    """
    folder = place(config.run.runs) / config.run.name
    if not folder.exists():
        return None
    check_resumed(config.but(resume=str(folder)), read_saved(str(folder), config))
    if not (folder / "metrics.json").exists():
        return None
    try:
        lines = [json.dumps(row) for row in read_json(folder / "metrics.json")["rounds"]]
        records = read_records(lines, len(lines))
    except DAMAGE as error:
        raise UserError(
            f"{folder / 'metrics.json'} does not hold the rounds; remove the folder"
        ) from error
    return (
        records
        if len(records) == config.training.rounds or reached(records, config.run.target_accuracy)
        else None
    )


def complete(config: Any, records: list | None, run: Callable) -> list:
    """Return the records of the run, which is made, or goes on, where they are not there
    already."""
    folder = place(config.run.runs) / config.run.name
    if records:
        say(f"{folder} is there already")
        return records
    return run(config.but(resume=str(folder)) if folder.exists() else config).records
