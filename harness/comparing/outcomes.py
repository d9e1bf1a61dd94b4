"""What a comparison tells of its rows: outcomes, costs, differences, and the figures of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from harness.comparing.significance import Base, format_differences
from harness.comparing.summary import curves_of, final_own_accuracies, needed_rounds
from harness.reporting.clients import TITLES
from harness.reporting.comparison_plots import Spent, plot_comparison, plot_rounds_to_target
from harness.reporting.plots import MEGABYTES, SECONDS, Cost
from harness.reporting.results import format_accuracy, format_rounds_to_target, pluralize
from harness.training.histories import (
    have_one_length,
    seconds_to_target,
    simulated_so_far,
)
from harness.training.records import OWN_MODELS, WORST_OWN, RoundRecord

import numpy as np

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
    needed = {name: needed_rounds(runs, target) for name, runs in records_of.items()}
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


def format_times(
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


def format_own_models(records_of: dict[str, list[list[RoundRecord]]], base: Base) -> dict[str, str]:
    """Return name -> the accuracy of the clients' own models, and how it differs from the base.

    The heading is "". A row without own models has the global model's on the same images.
    """
    final = {name: final_own_accuracies(runs) for name, runs in records_of.items()}
    is_tested = have_one_length(records_of)
    differences = differences_to_base(final if is_tested else {}, base, "points")
    after = "" if is_tested else ", each after its own last round"
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

    By the clients' own models if all runs have them, else by the global one: on the images that the
    clients hold out, or else on their label mixes. ("", {}) if a run has none of these.
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
