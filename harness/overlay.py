"""Overlays: finished runs in one table and one figure, --compare runs/a,runs/b."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from harness.command_line import read_saved, warn
from harness.comparison import Finished, find_folder, read_metrics, write_comparison
from harness.fields import ConfigGroup, UserError
from harness.files import expand_path, one_line, read_json
from harness.listing import changed_fields
from harness.plots import join_parts
from harness.records import RoundRecord
from harness.results import pluralize
from harness.run_options import identity
from harness.sweep import COMPARABLE, label_of, overlaid_folders

# Fields that name no row: its seeds are together, its data have a name, and it may be cut.
SAID_ELSEWHERE = {"seed", "dataset", "data", "data_name", "rounds", "holdout", "validation"}


class Done(NamedTuple):
    """A finished run."""

    folder: Path
    config: Any
    dataset: str  # its name
    data: str  # its hash
    records: list[RoundRecord]

    @property
    def kind(self) -> str:
        """What it has in common with runs by other seeds."""
        fields = identity(self.config)
        del fields["seed"]
        return f"{self.data} {self.config.training.rounds} {sorted(fields.items())}"


def overlay(config: ConfigGroup, default: ConfigGroup) -> Path:
    """Put the finished runs that --compare names into one table and plot; return their folder.

    Runs that differ by their seed alone are a row. Raises UserError for a folder that has no
    finished run, or the same one twice.
    """
    since = time.perf_counter()
    paths = overlaid_folders(config.comparison.compare)
    runs = [read_run(path, default) for path in paths]
    rows: dict[str, dict[int, Done]] = {}
    for run in runs:
        of_seeds = rows.setdefault(run.kind, {})
        if run.config.seed in of_seeds:
            raise UserError(
                f"compare={str(run.folder)!r:.200} is the same run as "
                f"{str(of_seeds[run.config.seed].folder)!r:.200}; name each run once"
            )
        of_seeds[run.config.seed] = run
    names = name_rows([next(iter(of_seeds.values())) for of_seeds in rows.values()], default)
    by_name = dict(zip(names, rows.values(), strict=True))
    same_seeds = len({tuple(sorted(of_seeds)) for of_seeds in by_name.values()}) == 1
    finished = Finished({}, {}, names[0] if same_seeds else "", [], {})
    for name, of_seeds in by_name.items():
        ordered = [of_seeds[seed] for seed in sorted(of_seeds)]
        training = ordered[0].config.training
        finished.records_of[name] = [run.records for run in ordered]
        finished.seeds_of[name] = [run.config.seed for run in ordered]
        finished.rates[name] = (training.client_lr, training.server_lr)
        for run in ordered:
            identified = {"run": run.folder.name, "compared": name, "seed": run.config.seed}
            finished.table.extend(identified | record.figures() for record in run.records)
    described = {
        "folders": [str(path.resolve()) for path in paths],
        "target_accuracy": config.run.target_accuracy,
        "values": [path.name for path in paths],
    }
    folder = find_folder(expand_path(config.run.runs), config.run.name, described)
    datasets = sorted({run.dataset for run in runs})
    if len(datasets) > 1:
        warn(f"the runs were trained on different data: {' and '.join(datasets)}")
    seeds = sorted({run.config.seed for run in runs})
    caption = join_parts(
        [
            " and ".join(datasets),
            f"{pluralize(len(runs), 'finished run')}",
            f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}",
        ]
    )
    write_comparison(folder, finished, config.run, caption, since)
    return folder


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
    return Done(folder, config, dataset, str(partition.get("dataset_sha256", "")), records)


def name_rows(runs: list[Done], default: ConfigGroup) -> list[str]:
    """Return what the rows are called: the values in which they differ, else their folders' names.

    `runs` has one run of each row.
    """
    changed = [changed_fields(run.config.to_dict(), default) for run in runs]
    fields = sorted({field for of_run in changed for field in of_run} - SAID_ELSEWHERE)
    values = {field: [run.config.to_dict()[field] for run in runs] for field in fields}
    differing = [field for field in fields if len(set(values[field])) > 1]
    whole_names = [
        ", ".join(label_of(field, values[field][place]) for field in differing)
        for place in range(len(runs))
    ]
    # A field that is at its default is often one that the row does not use.
    names = [
        ", ".join(
            label_of(field, values[field][place])
            for field in differing
            if field in COMPARABLE or field in of_run
        )
        for place, of_run in enumerate(changed)
    ]
    if len(set(names)) < len(names) or "" in names:
        names = whole_names
    if len({run.data for run in runs}) > 1:
        names = [
            ", ".join(filter(None, [run.dataset, name]))
            for run, name in zip(runs, names, strict=True)
        ]
    if len(set(names)) < len(names) or names == [""]:
        return [one_line(run.folder.name) for run in runs]
    return names
