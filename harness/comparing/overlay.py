"""Overlays: finished runs in one table and one figure, --compare runs/a,runs/b."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.cli.fields import ConfigGroup, UserError
from harness.cli.output import warn
from harness.cli.run_options import OF_FINISHED, changed_fields, identity
from harness.cli.saved_config import read_saved
from harness.comparing.comparison import Finished, paper_names, write_comparison
from harness.comparing.latex import name_settings
from harness.comparing.run_folders import find_folder
from harness.comparing.sweep import overlaid_folders, shown_settings
from harness.comparing.tables import check_columns
from harness.comparing.terms import label_settings
from harness.reporting.captions import join_parts
from harness.reporting.results import pluralize
from harness.storage.files import expand_path, one_line, read_json
from harness.storage.saved_run import read_metrics
from harness.training.records import RoundRecord

# Fields that name no row: its seeds are together, its data have a name, and it may be cut.
SAID_ELSEWHERE = {"seed", "dataset", "data", "data_name", "rounds", "holdout", "validation"}


class Done(NamedTuple):
    """A finished run."""

    folder: Path
    config: Any
    dataset: str  # its name
    data: str  # its hash
    split: str  # its hash, where it is from --partition-file; else the seed and fields make it
    records: list[RoundRecord]

    @property
    def kind(self) -> str:
        """What it has in common with runs by other seeds."""
        fields = identity(self.config)
        del fields["seed"]
        training = self.config.training
        files = f"{self.data} {self.split} {training.initial_model}"
        return f"{files} {training.rounds} {sorted(fields.items())}"


def overlay(config: Any, default: ConfigGroup) -> Path:
    """Put the finished runs that --compare names into one table and plot; return their folder.

    Runs that differ by their seed alone are a row. Raises UserError for a folder that has no
    finished run, or the same one twice.
    """
    since = time.perf_counter()
    for notice in config.unused_notices(OF_FINISHED):
        warn(notice)
    paths = overlaid_folders(config.comparison.compare)
    runs = [read_run(path, default) for path in paths]
    check_data(runs)
    metrics = dict.fromkeys(name for run in runs for name in run.records[-1].metrics)
    check_columns(config.run.table_columns, metrics)
    rows: dict[str, dict[int, Done]] = {}
    for run in runs:
        of_seeds = rows.setdefault(run.kind, {})
        if run.config.seed in of_seeds:
            raise UserError(
                f"compare={str(run.folder)!r:.200} is the same run as "
                f"{str(of_seeds[run.config.seed].folder)!r:.200}; name each run once"
            )
        of_seeds[run.config.seed] = run
    first_runs = [next(iter(of_seeds.values())) for of_seeds in rows.values()]
    settings = row_settings(first_runs, default)
    names = name_rows(first_runs, settings, list(map(len, rows.values())))
    by_name = dict(zip(names, rows.values(), strict=True))
    same_seeds = len({tuple(sorted(of_seeds)) for of_seeds in by_name.values()}) == 1
    finished = Finished({}, {}, names[0] if same_seeds else "", [], {}, {}, {})
    for name, run, of_row in zip(names, first_runs, settings, strict=True):
        # Where settings would not tell the rows apart, they have the names of folders.
        shown = of_row if name == label_settings(of_row) else {}
        finished.places[name] = (name_settings(shown, paper_names(run.config), name),)
    for name, of_seeds in by_name.items():
        for seed, run in sorted(of_seeds.items()):
            identified = {"run": run.folder.name, "compared": name, "seed": seed}
            finished.add(name, run.config, run.folder, run.records, identified)
    described = {
        "folders": [str(path.resolve()) for path in paths],
        "target_accuracy": config.run.target_accuracy,
        "values": [path.name for path in paths],
    }
    folder = find_folder(expand_path(config.run.runs), config.run.name, described)
    seeds = sorted({run.config.seed for run in runs})
    caption = join_parts(
        [
            runs[0].dataset,
            f"{pluralize(len(runs), 'finished run')}",
            f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}",
        ]
    )
    write_comparison(folder, finished, config.run, caption, since)
    return folder


def check_data(runs: list[Done]) -> None:
    """Raise UserError for runs of different data."""
    for run in runs:
        if run.data != runs[0].data:
            raise UserError(
                f"compare={str(run.folder)!r:.200} was trained on {run.dataset}, but "
                f"{str(runs[0].folder)!r:.200} on {runs[0].dataset} or other images of it; compare "
                "runs on the same data"
            )


def read_run(folder: Path, default: ConfigGroup) -> Done:
    """Return the finished run in a folder. Raises UserError if there is none."""
    config = read_saved(str(folder), default)
    records = read_metrics(folder)
    if not records:
        raise UserError(
            f"compare={str(folder)!r:.200} is not finished; continue it with --resume {folder}"
        )
    partition = read_json(folder / "partition.json")
    dataset = one_line(str(partition.get("dataset", "")))
    split = str(partition.get("hash", "")) if config.partitioning.partition_file else ""
    data = str(partition.get("dataset_sha256", ""))
    return Done(folder, config, dataset, data, split, records)


def row_settings(runs: list[Done], default: ConfigGroup) -> list[dict[str, Any]]:
    """Return field -> value in which the rows differ; `runs` has one run of each row."""
    given = [run.config.to_dict() for run in runs]
    changed = [changed_fields(of_run, default) for of_run in given]
    fields = sorted({field for of_run in changed for field in of_run} - SAID_ELSEWHERE)
    differing = [field for field in fields if len({of_run[field] for of_run in given}) > 1]
    shown = shown_settings(given, differing, changed)
    labels = [label_settings(of_row) for of_row in shown]
    if len(set(labels)) < len(labels) and len({of_run["rounds"] for of_run in given}) > 1:
        return [
            of_row | {"rounds": of_run["rounds"]}
            for of_row, of_run in zip(shown, given, strict=True)
        ]
    return shown


def name_rows(
    runs: list[Done], settings: list[dict[str, Any]], num_seeds: Sequence[int]
) -> list[str]:
    """Return what the rows are called: by their settings, or else by their folders.

    `runs` has the first run of each row, `num_seeds` how many the row has.
    """
    names = [label_settings(of_row) for of_row in settings]
    if len(set(names)) == len(names) and "" not in names:
        return names
    folders = [one_line(run.folder.name) for run in runs]
    kinds = [
        re.sub(r"-seed\d+$", "", folder) if count > 1 else folder
        for folder, count in zip(folders, num_seeds, strict=True)
    ]
    return kinds if len(set(kinds)) == len(kinds) else folders
