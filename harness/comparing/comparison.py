"""Comparisons: several runs in one table and one figure."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from harness.cli.loading import import_function
from harness.cli.output import print_line, warn
from harness.cli.run_options import COMPARABLE, OF_SEVERAL, SINGLE, Run
from harness.comparing.completing import (
    Single,
    check_time,
    complete_all,
    describe_work,
    folder_of,
    run_jobs,
)
from harness.comparing.latex import escape, name_settings
from harness.comparing.outcomes import (
    ON_OWN_IMAGES,
    common_distributions,
    compare_accuracies,
    compare_rounds_to_target,
    cost_figures,
    differences_to_base,
    format_own_models,
    format_spent,
    format_times,
    have_clock,
)
from harness.comparing.run_folders import (
    Planned,
    folder_names,
    key_of,
    note_runs,
    open_folder,
    place_run,
)
from harness.comparing.significance import Base
from harness.comparing.summary import Rates, summarize
from harness.comparing.sweep import Compared
from harness.comparing.tables import check_columns, find_empty, to_latex, to_markdown
from harness.reporting.captions import USUAL, caption_parts, join_parts
from harness.reporting.client_plots import plot_clients_of_rows
from harness.reporting.clients import distributions, read_clients
from harness.reporting.comparison_plots import plot_comparison
from harness.reporting.figure_files import draw_files, remove_outdated
from harness.reporting.figure_form import form_of
from harness.reporting.results import format_accuracy, pluralize
from harness.storage.files import csv_table, one_line, write_files
from harness.storage.provenance import describe_provenance
from harness.training.histories import has_own_models, have_one_length, own_accuracies
from harness.training.records import RoundRecord

import numpy as np


class Finished(NamedTuple):
    """The runs of a comparison, all done."""

    records_of: dict[str, list[list[RoundRecord]]]  # name -> the records of each seed
    rates: dict[str, Rates]  # name -> learning rates and batch size
    base: Base  # what a row is held against; "" where their seeds differ
    table: list[dict[str, Any]]  # the rows of comparison.csv
    seeds_of: dict[str, list[int]]  # name -> its seeds, in the order of its records
    places: dict[str, tuple[str, ...]]  # name -> what it is called in LaTeX, by what is compared
    # name -> by seed, the accuracies over the clients; see clients.distributions
    clients_of: dict[str, list[dict[str, np.ndarray]]]
    panels: dict[str, tuple[str, str]] | None = None  # of a grid: name -> its line and panel

    def add(
        self,
        name: str,
        config: Any,
        folder: Path,
        records: list[RoundRecord],
        identified: dict[str, Any],
    ) -> None:
        """Add a run of a row; `identified` are its first columns in comparison.csv."""
        self.rates[name] = Rates.of(config.training)
        self.table.extend(identified | record.figures() for record in records)
        self.records_of.setdefault(name, []).append(records)
        self.seeds_of.setdefault(name, []).append(config.seed)
        self.clients_of.setdefault(name, []).append(distributions(read_clients(folder)))


class Tuning(NamedTuple):
    """How the rows of a comparison got the settings that --tune chose."""

    caption: str
    tried: list[dict[str, Any]]  # the rows of tuning.csv


def compare(
    config: Any,
    compared: Compared,
    build: Callable[[Any], Any],
    run: Callable,
    deadline: float = math.inf,
    tuning: Tuning | None = None,
) -> tuple[Path, Finished]:
    """Train every row and seed; return the folder with the tables and the plot, and the runs.

    comparison.csv is tidy: a row a run and round, with the columns of metrics.csv and what was
    compared; summary.csv, .md and .tex have a row for each choice. All runs are checked before the
    first begins. build(config) makes an Experiment, run(config) a Result; `tuning` is how the rows
    got their settings. Raises UserError for what any of the runs would be refused for, and
    OutOfTime if not all runs are done at the `deadline`, a perf_counter().
    """
    since = time.perf_counter()
    form_of(config.run)
    seeds = range(config.seed, config.seed + config.comparison.seeds)
    # What is of the comparison alone, or was said to have no effect, is at its default in the runs.
    told = config.find_unused().keys() & Run().to_dict().keys()
    of_one = {**SINGLE, **{field: config.defaults()[field] for field in (*OF_SEVERAL, *told)}}
    experiments: list[Any] = []
    planned = []
    for row, name in zip(compared.rows, folder_names(compared.rows), strict=True):
        for seed in seeds:
            single = config.effective(**{**row.changes, **of_one, "seed": seed})
            experiment = build(single)
            if not experiments:
                check_columns(config.run.table_columns, name_own_metrics(experiment))
            if seed == seeds[0]:
                experiments.append(experiment)
            planned.append(
                Planned(
                    row,
                    f"{name}-seed{seed}",
                    experiment.config,
                    key_of(experiment),
                    experiment.choice_hashes,
                )
            )
    caption = compared_caption(config, compared, experiments)
    if tuning:
        caption = f"{caption} · {tuning.caption}"
    folder = open_folder(config, compared, planned)
    singles = [place_run(folder, plan) for plan in planned]
    note_runs(folder, singles, planned)
    print_line(
        f"{pluralize(len(compared.rows), 'row')}, {pluralize(len(seeds), 'seed')}: "
        f"{describe_work(singles)}"
    )
    try:
        done = run_jobs(singles, config.comparison.jobs, folder, deadline)
        complete_all([n for n in range(len(singles)) if n not in done], singles, run, deadline)
        check_time(singles, config.run.time_limit, folder)
    except (KeyboardInterrupt, Exception):
        with contextlib.suppress(Exception):  # what stopped the runs is what the user must know
            write_partial(folder, singles, compared, config, caption, since)
        raise
    finished = gather_runs(singles, compared)
    write_comparison(folder, finished, config.run, caption, since, tuning)
    note_runs(folder, singles, planned, finished=True)
    return folder, finished


def name_own_metrics(experiment: Any) -> list[str]:
    """Return the names of the metrics of --metrics, as its function names them before the runs."""
    metrics = experiment.config.run.metrics
    if not metrics:
        return []
    return import_function("evaluations:name_metrics")(metrics, experiment.dataset.test.labels)


def compared_caption(config: Any, compared: Compared, experiments: Sequence[Any]) -> str:
    """Return what the plot of a comparison says: of what is compared, every choice.

    `experiments` are those of the rows.
    """
    parts_of_rows = [caption_parts(experiment) for experiment in experiments]
    parts = parts_of_rows[0]
    for topic in parts:
        usual = USUAL.get(topic, "none")
        said = list(dict.fromkeys(row[topic] or usual for row in parts_of_rows))
        if len(said) > 1 or (config.comparison.compare and topic in compared.fields):
            name = f"{topic}s" if topic in COMPARABLE else topic.replace("_", " ")
            parts[topic] = f"{name} compared: {'; '.join(said)}"
    if config.comparison.seeds > 1:
        last = config.seed + config.comparison.seeds - 1
        parts["seed"] = f"seeds {config.seed} to {last}"
    return join_parts([experiments[0].dataset.name, *parts.values()])


def gather_runs(singles: Sequence[Single], compared: Compared) -> Finished:
    """Return the runs that are done, by row."""
    done = [single for single in singles if single.earlier]
    finished = Finished({}, {}, compared.base, [], {}, {}, {})
    for single in done:
        label = single.row.label
        names = paper_names(single.config)
        terms = [name_settings(settings, names, label) for settings in single.row.settings]
        finished.places[label] = tuple(terms) or (escape(label),)
        flat = single.config.to_dict()
        identified = {field: flat[field] for field in (*compared.fields, "seed")}
        folder = folder_of(single.config)
        finished.add(label, single.config, folder, single.earlier, identified)
    cells: dict[str, Any] = {single.row.label: tuple(single.row.cells.values()) for single in done}
    is_grid = all(len(texts) == 2 and None not in texts for texts in cells.values())
    return finished._replace(panels=cells if is_grid else None)


def write_partial(
    folder: Path,
    singles: Sequence[Single],
    compared: Compared,
    config: Any,
    caption: str,
    since: float,
) -> None:
    """Write the tables and the plot of the runs that were done when a comparison was stopped."""
    finished = gather_runs(singles, compared)
    num_done = sum(map(len, finished.records_of.values()))
    if not num_done:
        return
    are_paired = len({tuple(seeds) for seeds in finished.seeds_of.values()}) == 1
    if not are_paired or not {*bases_of(compared.base)} <= finished.records_of.keys():
        finished = finished._replace(base="")
    note = f"partial: {num_done} of {len(singles)} runs"
    write_comparison(folder, finished, config.run, f"{caption} · {note}", since)


def paper_names(config: Any) -> dict[str, str]:
    """Return choice -> its name in papers, of the choices made: {"fedavg": "FedAvg"}."""
    made = {field: config.to_dict()[field] for field in COMPARABLE}
    names = {
        value: getattr(config.chosen(field), "paper_name", "") for field, value in made.items()
    }
    return {value: name for value, name in names.items() if name}


def bases_of(base: Base) -> list[str]:
    """Return the names of the rows that others are held against."""
    return [base] if isinstance(base, str) else list(base.values())


def write_comparison(
    folder: Path,
    finished: Finished,
    run: Any,
    caption: str,
    since: float,
    tuning: Tuning | None = None,
) -> None:
    """Write the tables and the plot of a comparison, and print a line for each of its names.

    `run` is the group of flags, `since` when the comparison began.
    """
    target = run.target_accuracy
    records_of = finished.records_of
    if target:
        draw_comparison, texts, outcomes = compare_rounds_to_target(
            records_of, target, caption, finished.seeds_of
        )
    else:
        draw_comparison, texts, outcomes = compare_accuracies(records_of, caption, finished.panels)
    measured_on, clients_of = common_distributions(finished.clients_of)
    summary = summarize(
        records_of, finished.rates, finished.base, target, finished.seeds_of, clients_of
    )
    is_private = any(runs[0][-1].private for runs in records_of.values())
    provenance = describe_provenance(None if is_private else since)
    figures = {"comparison.png": draw_comparison}
    figures |= cost_figures(records_of, caption, finished.panels, bool(target))
    figures |= own_model_figures(finished, caption)
    if clients_of:
        draw_clients = partial(plot_clients_of_rows, clients_of, measured_on, caption)
        figures["client_accuracy.png"] = draw_clients
    files: dict[str, bytes | str] = {
        "comparison.csv": csv_table(finished.table),
        **draw_files(figures, form_of(run), provenance),
        "summary.csv": csv_table(summary),
        "summary.md": to_markdown(summary, run.table_columns),
        "summary.tex": to_latex(
            summary,
            caption,
            re.sub(r"[^\w.-]+", "-", folder.name),
            target,
            list(finished.places.values()),
            run.table_columns,
        ),
    }
    if tuning:
        files["tuning.csv"] = csv_table(tuning.tried)
    remove_outdated(folder, figures, write_files(folder, files))
    print_line("")
    tell_caveats(records_of, target, find_empty(summary, run.table_columns))
    differences = differences_to_base(outcomes, finished.base, "rounds" if target else "points")
    print_rows(finished, texts, differences, run)
    print_line(f"\nwrote {', '.join(files)} into {one_line(str(folder))}")


def print_rows(
    finished: Finished, texts: dict[str, str], differences: dict[str, str], run: Any
) -> None:
    """Print a line for each row, and tables of simulated times and of clients' own models.

    `texts` and `differences` are name -> its outcome, and how far that is from its base's; `run` is
    the group of flags.
    """
    target = run.target_accuracy
    records_of = finished.records_of
    labels = {
        name: name + format_rate(name, finished.rates) + format_spent(records_of[name])
        for name in texts
    }
    width = max(map(len, labels.values()))
    for name, text in texts.items():
        at_the_end = ""
        if target and run.after_target == "continue":
            finals = [records[-1].test_accuracy for records in records_of[name]]
            rounds = pluralize(max(map(len, records_of[name])), "round")
            at_the_end = f"; {format_accuracy(finals)} after {rounds}"
        print_line(f"{labels[name]:{width}}  {text}{at_the_end}{differences.get(name, '')}")
    if target and have_clock(records_of):
        print_lines(format_times(records_of, target, finished.base))
    if has_own_models(records_of):
        print_lines(format_own_models(records_of, finished.base))


def own_model_figures(finished: Finished, caption: str) -> dict[str, Callable]:
    """Return file name -> what draws it, of the clients' own models; nothing without them."""
    if not has_own_models(finished.records_of):
        return {}
    curves = {name: [*map(own_accuracies, runs)] for name, runs in finished.records_of.items()}
    draw = partial(plot_comparison, curves, caption, panels=finished.panels, measured=ON_OWN_IMAGES)
    return {"personal_accuracy.png": draw}


def print_lines(texts: dict[str, str]) -> None:
    """Print a heading, of the name "", and a line for each other name."""
    width = max(map(len, texts))
    print_line(f"\n{texts['']}")
    for name, text in texts.items():
        if name:
            print_line(f"{name:{width}}  {text}")


def tell_caveats(
    records_of: dict[str, list[list[RoundRecord]]], target: float, empty: Sequence[str]
) -> None:
    """Warn of private runs that add up, of accuracies after different numbers of rounds, and of
    columns that were asked for and are empty."""
    for name in empty:
        warn(f"the column {name} of --table-columns is empty: no row of this comparison has it")
    epsilons = [run[-1].epsilon for runs in records_of.values() for run in runs if run[-1].private]
    if len(epsilons) > 1:
        warn(
            f"{len(epsilons)} private runs on the same clients are released here: their ε add up "
            f"to {sum(epsilons):.2f}, and their δ add up likewise; each row shows the ε of a "
            "single run"
        )
    if not target and not have_one_length(records_of):
        warn(
            "the runs have different numbers of rounds: each accuracy is from that run's last "
            "round, and differences between rows are not tested"
        )


def format_rate(name: str, rates: dict[str, Rates]) -> str:
    """Return the clients' rate, behind a name, where the rows have different ones."""
    used = {of_row.client_lr for of_row in rates.values()}
    named = "client lr" in name or len(used) == 1
    return "" if named else f" (lr {rates[name].client_lr:g})"
