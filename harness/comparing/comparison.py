"""Comparisons: several runs in one table and one figure."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from harness.cli.fields import UserError
from harness.cli.output import print_line, warn
from harness.cli.run_options import SINGLE, identity
from harness.cli.saved_config import read_saved
from harness.comparing.completing import Single, complete_all, describe_work, read_earlier, run_jobs
from harness.comparing.latex import escape, name_settings
from harness.comparing.summary import Rates, read_columns, summarize, to_latex, to_markdown
from harness.comparing.sweep import COMPARABLE, Compared, Row
from harness.reporting.captions import compared_caption
from harness.reporting.client_plots import plot_clients_of_rows
from harness.reporting.clients import TITLES, distributions, read_clients
from harness.reporting.figure_files import draw_files
from harness.reporting.figure_form import form_of
from harness.reporting.plots import (
    MEGABYTES,
    SECONDS,
    Cost,
    Spent,
    plot_comparison,
    plot_rounds_to_target,
)
from harness.reporting.results import (
    Base,
    format_accuracy,
    format_differences,
    format_rounds_to_target,
    pluralize,
)
from harness.storage.files import (
    csv_table,
    expand_path,
    numbered,
    one_line,
    read_json,
    to_json,
    write_file,
)
from harness.storage.provenance import changed, describe_provenance, program, read_programs
from harness.storage.run_folder import make_run_folder
from harness.training.records import (
    OWN_MODELS,
    WORST_OWN,
    RoundRecord,
    has_own_models,
    have_one_length,
    own_accuracies,
    rounds_to_target,
    seconds_to_target,
    simulated_so_far,
)

import numpy as np


class Planned(NamedTuple):
    """A run of a comparison, before it has a place."""

    row: Row
    name: str  # of its folder
    config: Any
    key: str  # hash of all that its numbers depend on
    choice_hashes: dict[str, str]


class Finished(NamedTuple):
    """The runs of a comparison, all done."""

    records_of: dict[str, list[list[RoundRecord]]]  # name -> the records of each seed
    rates: dict[str, Rates]  # name -> learning rates and batch size
    base: Base  # what a row is held against; "" where their seeds differ
    table: list[dict[str, Any]]  # the rows of comparison.csv
    seeds_of: dict[str, list[int]]  # name -> its seeds, in the order of its records
    places: dict[str, tuple[str, ...]]  # name -> what it is called in LaTeX, by what is compared
    panels: dict[str, tuple[str, str]] | None = None  # of a grid: name -> its line and panel
    # name -> by seed, the accuracies over the clients; see clients.distributions
    clients_of: dict[str, list[dict[str, np.ndarray]]] = {}


class Tuning(NamedTuple):
    """How the rows of a comparison got the settings that --tune chose."""

    caption: str
    tried: list[dict[str, Any]]  # the rows of tuning.csv


def compare(
    config: Any,
    compared: Compared,
    build: Callable[[Any], Any],
    run: Callable,
    tuning: Tuning | None = None,
) -> tuple[Path, Finished]:
    """Train every row and seed; return the folder with the tables and the plot, and the runs.

    comparison.csv is tidy: a row a run and round, with the columns of metrics.csv and what was
    compared; summary.csv, .md and .tex have a row for each choice. All runs are checked before the
    first begins. build(config) makes an Experiment, run(config) a Result; `tuning` is how the rows
    got their settings. Raises UserError for what any of the runs would be refused for.
    """
    since = time.perf_counter()
    read_columns(config.run.table_columns)  # errors before anything is trained
    form_of(config.run)
    seeds = range(config.seed, config.seed + config.comparison.seeds)
    experiments = []
    planned = []
    for row, name in zip(compared.rows, folder_names(compared.rows), strict=True):
        for seed in seeds:
            single = config.effective(**{**row.changes, **SINGLE, "seed": seed})
            experiment = build(single)
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
        done = run_jobs(singles, config.comparison.jobs, folder)
        complete_all([n for n in range(len(singles)) if n not in done], singles, run)
    except (KeyboardInterrupt, Exception):
        with contextlib.suppress(Exception):  # what stopped the runs is what the user must know
            write_partial(folder, singles, compared, config, caption, since)
        raise
    finished = gather_runs(singles, compared)
    write_comparison(folder, finished, config.run, caption, since, tuning)
    note_runs(folder, singles, planned, finished=True)
    return folder, finished


def gather_runs(singles: Sequence[Single], compared: Compared) -> Finished:
    """Return the runs that are done, by row."""
    done = [single for single in singles if single.earlier]
    finished = Finished({}, rates_of(done), compared.base, [], {}, {}, clients_of={})
    for single in done:
        label = single.row.label
        names = paper_names(single.config)
        terms = [name_settings(settings, names, label) for settings in single.row.settings]
        finished.places[label] = tuple(terms) or (escape(label),)
        flat = single.config.to_dict()
        identified = {field: flat[field] for field in (*compared.fields, "seed")}
        finished.table.extend(identified | record.figures() for record in single.earlier)
        finished.records_of.setdefault(label, []).append(single.earlier)
        finished.seeds_of.setdefault(label, []).append(single.config.seed)
        run_folder = expand_path(single.config.run.runs) / single.config.run.name
        finished.clients_of.setdefault(label, []).append(distributions(read_clients(run_folder)))
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
    if len({tuple(seeds) for seeds in finished.seeds_of.values()}) > 1:
        finished = finished._replace(base="")  # nothing to pair
    elif not {*bases_of(compared.base)} <= finished.records_of.keys():
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
    if has_own_models(records_of):
        own_curves = {name: [*map(own_accuracies, runs)] for name, runs in records_of.items()}
        figures["personal_accuracy.png"] = partial(
            plot_comparison, own_curves, caption, panels=finished.panels, measured=ON_OWN_IMAGES
        )
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
    for name, content in files.items():
        write_file(folder / name, content)
    print_line("")
    tell_caveats(records_of, target)
    if target and run.after_target == "continue":
        for name, runs in records_of.items():
            finals = [records[-1].test_accuracy for records in runs]
            rounds = pluralize(max(map(len, runs)), "round")
            texts[name] += f"; {format_accuracy(finals)} after {rounds}"
    unit = "rounds" if target else "points"
    differences = differences_to_base(outcomes, finished.base, unit)
    labels = {
        name: name + format_rate(name, finished.rates) + format_spent(finished.records_of[name])
        for name in texts
    }
    width = max(map(len, labels.values()))
    for name, text in texts.items():
        print_line(f"{labels[name]:{width}}  {text}{differences.get(name, '')}")
    if target and have_clock(records_of):
        print_lines(describe_times(records_of, target, finished.base))
    if has_own_models(records_of):
        print_lines(describe_own_models(records_of, finished.base))
    print_line(f"\nwrote {', '.join(files)} into {one_line(str(folder))}")


def print_lines(texts: dict[str, str]) -> None:
    """Print a heading, of the name "", and a line for each other name."""
    width = max(map(len, texts))
    print_line(f"\n{texts['']}")
    for name, text in texts.items():
        if name:
            print_line(f"{name:{width}}  {text}")


def tell_caveats(records_of: dict[str, list[list[RoundRecord]]], target: float) -> None:
    """Warn of private runs that add up, and of accuracies after different numbers of rounds."""
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
    named = "lr" in name.split() or len(used) == 1
    return "" if named else f" (lr {rates[name].client_lr:g})"


def rates_of(singles: Sequence[Single]) -> dict[str, Rates]:
    """Return name -> learning rates and batch size."""
    trainings = {single.row.label: single.config.training for single in singles}
    return {
        name: Rates(training.client_lr, training.server_lr, training.batch_size)
        for name, training in trainings.items()
    }


ON_OWN_IMAGES = "clients' own test"
Outcome = tuple[Callable, dict[str, str], Mapping[str, Any]]


def compare_rounds_to_target(
    records_of: dict[str, list[list[RoundRecord]]],
    target: float,
    caption: str,
    seeds_of: dict[str, list[int]],
) -> Outcome:
    """Return (what draws it, name -> its line, name -> rounds to the target by seed)."""
    curves = {name: curves_of(runs) for name, runs in records_of.items()}
    needed = {
        name: [rounds_to_target(curve, target) for curve in of_seeds]
        for name, of_seeds in curves.items()
    }
    texts = {
        name: f"target accuracy {target:.2%}: {format_rounds_to_target(rounds, seeds_of[name])}"
        + (f"; highest {format_accuracy(list(map(max, curves[name])))}" if None in rounds else "")
        for name, rounds in needed.items()
    }
    labels = {name: name + format_spent(runs) for name, runs in records_of.items()}
    draw = partial(
        plot_rounds_to_target,
        {labels[name]: of_seeds for name, of_seeds in curves.items()},
        {labels[name]: rounds for name, rounds in needed.items()},
        target,
        caption,
        {labels[name]: seeds for name, seeds in seeds_of.items()},
    )
    return draw, texts, needed


def curves_of(runs: Sequence[Sequence[RoundRecord]]) -> list[np.ndarray]:
    """Return the test accuracies float64[rounds] of each run."""
    return [np.array([record.test_accuracy for record in records]) for records in runs]


Panels = dict[str, tuple[str, str]] | None  # of a grid: name -> (its line, its panel)


def compare_accuracies(
    records_of: dict[str, list[list[RoundRecord]]], caption: str, panels: Panels = None
) -> Outcome:
    """Return (a function that draws, name -> its line, name -> final accuracies in percent by
    seed).

    Each run counts with its own last round. If the runs have different numbers of rounds, as when a
    privacy budget ended one, nothing is tested.
    """
    curves = {name: curves_of(runs) for name, runs in records_of.items()}
    final = {name: np.array([curve[-1] for curve in curves[name]]) for name in curves}
    texts = {
        name: f"{format_accuracy(final[name])} after {format_lengths(runs)}"
        for name, runs in records_of.items()
    }
    full = {name: name + format_spent(records_of[name]) for name in curves}
    labeled = {full[name]: curves[name] for name in curves}
    of_labeled = {full[name]: panels[name] for name in curves} if panels else None
    outcomes = {name: 100 * values for name, values in final.items()}
    tested = outcomes if have_one_length(records_of) else {}
    return partial(plot_comparison, labeled, caption, panels=of_labeled), texts, tested


def format_lengths(runs: Sequence[Sequence[RoundRecord]]) -> str:
    """Return "5 rounds", or "3 to 5 rounds" of seeds that ended at different ones."""
    fewest = min(map(len, runs))
    most = max(map(len, runs))
    span = f"{fewest} to " if fewest < most else ""
    return f"{span}{pluralize(most, 'round')}"


def cost_figures(
    records_of: dict[str, list[list[RoundRecord]]],
    caption: str,
    panels: Panels = None,
    to_target: bool = False,
) -> dict[str, Callable]:
    """Return file name -> what draws the errors by megabytes sent, and by simulated seconds.

    Megabytes are left out where all rows send the same and in runs to a target, seconds where a run
    has no clock.
    """
    labels = {name: name + format_spent(runs) for name, runs in records_of.items()}
    accuracies = {labels[name]: curves_of(runs) for name, runs in records_of.items()}
    of_labeled = {labels[name]: panels[name] for name in records_of} if panels else None
    figures: dict[str, Callable] = {}
    sent = mean_spent(MEGABYTES, records_of, labels)
    totals = [float(of_rounds[-1]) for of_rounds in sent.of_rounds.values()]
    if not to_target and max(totals) >= 1.01 * min(totals):
        draw = partial(plot_comparison, accuracies, caption, sent, of_labeled)
        figures["comparison_by_megabytes.png"] = draw
    if have_clock(records_of):
        taken = mean_spent(SECONDS, records_of, labels)
        draw = partial(plot_comparison, accuracies, caption, taken, of_labeled)
        figures["comparison_by_seconds.png"] = draw
    return figures


def mean_spent(
    cost: Cost, records_of: dict[str, list[list[RoundRecord]]], labels: dict[str, str]
) -> Spent:
    """Return what the rows have spent by round, the mean over their seeds, by their labels."""
    of_rounds = {}
    for name, runs in records_of.items():
        rounds = min(map(len, runs))  # of a privacy budget's runs, one may be shorter
        spent = [cost.so_far(records)[:rounds] for records in runs]
        of_rounds[labels[name]] = np.mean(spent, axis=0)
    return Spent(cost, of_rounds)


def have_clock(records_of: dict[str, list[list[RoundRecord]]]) -> bool:
    """Return whether all runs have simulated seconds."""
    runs = [records for of_seeds in records_of.values() for records in of_seeds]
    return all(simulated_so_far(records) is not None for records in runs)


def describe_times(
    records_of: dict[str, list[list[RoundRecord]]], target: float, base: Base
) -> dict[str, str]:
    """Return name -> the simulated seconds to the target and how they differ; "" is the heading."""
    times = {
        name: [seconds_to_target(records, target) for records in runs]
        for name, runs in records_of.items()
    }
    texts = {"": f"simulated seconds to {target:.2%}:"}
    differences = differences_to_base(times, base, "s")
    for name, of_seeds in times.items():
        reached = [seconds for seconds in of_seeds if seconds is not None]
        text = f"{np.mean(reached):,.1f}" if reached else "not reached"
        if len(reached) > 1:
            text += f" ± {np.std(reached, ddof=1):,.1f}"
        if 0 < len(reached) < len(of_seeds):
            text += f" ({len(reached)} of {pluralize(len(of_seeds), 'seed')})"
        texts[name] = text + differences.get(name, "")
    return texts


def describe_own_models(
    records_of: dict[str, list[list[RoundRecord]]], base: Base
) -> dict[str, str]:
    """Return name -> the accuracy of the clients' own models, and how it differs from the base.

    The heading is "". A row without own models has the global model's on the same images.
    """
    final = {
        name: [100 * own_accuracies(records)[-1] for records in runs]
        for name, runs in records_of.items()
    }
    differences = differences_to_base(final if have_one_length(records_of) else {}, base, "points")
    after = "" if have_one_length(records_of) else ", each after its own last round"
    heading = f"accuracy on the {ON_OWN_IMAGES} images, by the model that each client uses{after}:"
    texts = {"": heading}
    for name, runs in records_of.items():
        last = [records[-1].extra_accuracies for records in runs]
        worst = np.mean([found.get(WORST_OWN, found["client_worst10"]) for found in last])
        spread = f" ± {np.std(final[name], ddof=1):.2f}" if len(runs) > 1 else ""
        model = "own models" if OWN_MODELS in last[0] else "global model"
        texts[name] = (
            f"{np.mean(final[name]):.2f}{spread} %, worst 10 % {100 * worst:.2f} % ({model})"
            f"{differences.get(name, '')}"
        )
    return texts


def common_distributions(
    clients_of: dict[str, list[dict[str, np.ndarray]]],
) -> tuple[str, dict[str, list[np.ndarray]]]:
    """Return (what was measured, row -> the clients' accuracies float64[K] of each seed).

    On the images that the clients hold out if all runs have them, else on their label mixes;
    ("", {}) if a run has neither.
    """
    runs = [run for of_seeds in clients_of.values() for run in of_seeds]
    for name in reversed(TITLES):
        if runs and all(name in run for run in runs):
            return TITLES[name], {row: [run[name] for run in of] for row, of in clients_of.items()}
    return "", {}


def format_spent(runs: Sequence[Sequence[RoundRecord]]) -> str:
    """Return the largest epsilon of these runs, behind a name; nothing if they are not private."""
    spent = [records[-1].epsilon for records in runs if records[-1].private]
    return f" (ε {max(spent):.1f})" if spent else ""


def differences_to_base(
    outcomes: Mapping[str, Sequence[Any]], base: Base, unit: str
) -> dict[str, str]:
    """Return name -> how far its outcomes are from those of its base.

    Nothing can be said of a name with a seed that did not reach the target: its outcome is None.
    """
    complete_ones = {name: values for name, values in outcomes.items() if None not in (*values,)}
    return format_differences(complete_ones, base, unit)


LONGEST_NAME = 60  # letters of a run's folder in that of its comparison


def folder_names(rows: Sequence[Row]) -> list[str]:
    """Return what the rows' folders are called, without the seed: "fedavg-alpha0.1"."""
    names = []
    for row in rows:
        joined = re.sub(r"(?<=\w) (?=[\d.])", "", row.label)  # alpha 0.1: alpha0.1
        names.append(re.sub(r"[^\w.]+", "-", joined).strip("-."))
    most = LONGEST_NAME - len("-seed2147483647")
    return [
        name
        if name and len(name) <= most and names.count(name) == 1
        else f"{name[: most - 9]}-{short_hash(row.label)}"
        for name, row in zip(names, rows, strict=True)
    ]


def key_of(experiment: Any) -> str:
    """Return a hash of everything that the numbers of a run depend on."""
    depends_on = [
        identity(experiment.config),
        experiment.config.training.rounds,
        experiment.partition.digest,
        program(),
        experiment.choice_hashes,
    ]
    return short_hash(depends_on, 16)


def short_hash(content: Any, digits: int = 8) -> str:
    """Return some digits of a hash of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:digits]


def open_folder(config: Any, compared: Compared, planned: Sequence[Planned]) -> Path:
    """Return the folder of a comparison, made if it is new."""
    described = {
        "field": ", ".join(compared.fields),
        "values": [row.label for row in compared.rows],
        "seeds": config.comparison.seeds,
        "keys": [plan.key for plan in planned],
        "target_accuracy": config.run.target_accuracy,
    }
    return find_folder(expand_path(config.run.runs), config.run.name, described)


def find_folder(runs: Path, name: str, described: dict[str, Any]) -> Path:
    """Return the folder of the comparison that is `described`, made if it is new.

    A name that something else has gets -2, -3, ...
    """
    values = re.sub(r"[^\w.]+", "-", "-".join(described["values"]))
    name = name or f"compare-{values[: LONGEST_NAME - 17]}-{short_hash(described)}"
    for folder in numbered(runs / name):
        if not folder.exists():
            folder = make_run_folder(runs, folder.name, {"comparison.json": to_json(described)})
        path = folder / "comparison.json"
        if path.is_file() and described.items() <= read_json(path).items():
            return folder
    raise AssertionError("unreachable")


def place_run(folder: Path, plan: Planned) -> Single:
    """Return a run of the comparison in `folder`.

    It is in that folder, unless another comparison in the same runs/ has made it already.
    """
    path = folder / plan.name
    if not path.exists():
        path = find_run(folder, plan) or path
    config = plan.config.replace(runs=str(path.parent), name=path.name)
    return Single(plan.row, config, read_earlier(config))


def find_run(folder: Path, plan: Planned) -> Path | None:
    """Return the folder of this run in another comparison, None if there is none.

    Says why a run is repeated, if another version of the program made it.
    """
    for file in sorted(folder.parent.glob("*/comparison.json")):
        try:
            runs = read_json(file).get("runs", {}) if file.parent != folder else {}
        except UserError:
            continue
        for name, key in runs.items() if isinstance(runs, dict) else ():
            path = file.parent / name
            if key == plan.key and (path / "config.json").exists():
                return path
            if path.name == plan.name:
                explain_rerun(path, plan)
    return None


def explain_rerun(folder: Path, plan: Planned) -> None:
    """Report that a run of the same settings was made by another version of the program."""
    try:
        saved = read_saved(str(folder), plan.config)
        same_run = identity(saved) == identity(plan.config)
        if same_run and saved.training.rounds == plan.config.training.rounds:
            names = ", ".join(changed(read_programs(folder)[-1], plan.choice_hashes))
            if names:
                print_line(
                    f"{one_line(str(folder))} was made by another version of the program ({names} "
                    "changed): re-running it"
                )
    except UserError:
        return  # of an earlier version, or damaged: it is another run


def note_runs(
    folder: Path, singles: Sequence[Single], planned: Sequence[Planned], finished: bool = False
) -> None:
    """Write into comparison.json where the runs are, and whether all are done."""
    path = folder / "comparison.json"
    runs = {
        os.path.relpath(Path(single.config.run.runs) / single.config.run.name, folder): plan.key
        for single, plan in zip(singles, planned, strict=True)
    }
    content = read_json(path)
    was_finished = content.get("finished", False)
    write_file(path, to_json(content | {"runs": runs, "finished": finished or was_finished}))
