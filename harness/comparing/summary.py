"""The rows of summary.csv: what a comparison measured, a row a setting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from harness.comparing.significance import (
    Base,
    Difference,
    base_of,
    compare_outcomes,
    half_width_of_mean,
)
from harness.comparing.tables import COLUMNS, ON_REQUEST, ROW, Table
from harness.reporting.clients import gini, worst_tenth
from harness.training.histories import (
    has_own_models,
    have_one_length,
    megabytes_so_far,
    own_accuracies,
    rounds_to_target,
    seconds_to_target,
    simulated_so_far,
)
from harness.training.records import OWN_MODELS, WORST_OWN, RoundRecord, examples_trained_on

import numpy as np


def curves_of(runs: Sequence[Sequence[RoundRecord]]) -> list[np.ndarray]:
    """Return the test accuracies float64[rounds] of each run."""
    return [np.array([record.test_accuracy for record in records]) for records in runs]


def needed_rounds(runs: Sequence[Sequence[RoundRecord]], target: float) -> list[float | None]:
    """Return the rounds that each run needed to reach the target accuracy; None if it did not."""
    return [rounds_to_target(curve, target) for curve in curves_of(runs)]


def final_own_accuracies(runs: Sequence[Sequence[RoundRecord]]) -> list[float]:
    """Return the percent that clients' own models classify correctly after each run's last round.

    It is on the clients' own test images. A run without own models has the global model's.
    """
    return [100 * float(own_accuracies(records)[-1]) for records in runs]


class Rates(NamedTuple):
    """What a row's runs train with."""

    client_lr: float
    server_lr: float
    batch_size: int  # 0: the whole shard

    @classmethod
    def of(cls, training: Any) -> Rates:
        """Return those of the group of flags."""
        return cls(training.client_lr, training.server_lr, training.batch_size)


def summarize(
    records_of: dict[str, list[list[RoundRecord]]],
    rates: dict[str, Rates],
    base: Base,
    target: float,
    seeds_of: Mapping[str, Sequence[int]] | None = None,
    clients_of: dict[str, list[np.ndarray]] | None = None,
) -> Table:
    """Return a row for each name: its test accuracy in percent over the seeds, and costs.

    `records_of` has the records of each seed, `rates` the learning rates and batch size,
    `seeds_of` the seeds (default: 0, 1, ...), `clients_of` the clients' accuracies float64[K] of
    each seed. The accuracy is that of each run's last round.
    Differences from the row's `base` are tested by the paired t-test, with Holm's correction for
    more than two rows: on the rounds to the `target` if there is one, else on the accuracies, if
    all runs have the same number of rounds. Values that do not apply are None, such as a mean over
    seeds of which one did not reach the target.
    """
    needed = {name: needed_rounds(runs, target) for name, runs in records_of.items()}
    accuracies = {
        name: [100 * records[-1].test_accuracy for records in runs]
        for name, runs in records_of.items()
    }
    outcomes = accuracies if have_one_length(records_of) else {}
    if target:
        outcomes = {name: rounds for name, rounds in needed.items() if None not in rounds}
    differences = compare_outcomes(outcomes, base) if base else {}
    own = {}
    if base and has_own_models(records_of) and have_one_length(records_of):
        own = {name: final_own_accuracies(runs) for name, runs in records_of.items()}
    own_differences = compare_outcomes(own, base) if own else {}
    all_rounds = not target or have_one_length(records_of)  # though the target may end a run
    every = [records[-1] for runs in records_of.values() for records in runs]
    own_metrics = dict.fromkeys(name for record in every for name in record.metrics)
    rows = []
    for name, runs in records_of.items():
        seeds = seeds_of[name] if seeds_of else range(len(runs))
        row = {ROW: name, "seeds": len(runs), "rounds": float(np.mean([*map(len, runs)]))}
        row |= {"client_lr": rates[name].client_lr, "server_lr": rates[name].server_lr}
        row |= describe_spread(accuracies[name])
        row |= describe_difference(name, differences, base, bool(target), len(runs))
        row |= describe_target(runs, needed[name], seeds, target, rates[name].batch_size)
        spent = [records[-1].epsilon for records in runs]
        row["epsilon"] = None if None in spent else max(spent)
        sent = [megabytes_so_far(records)[-1] for records in runs]
        row["megabytes"] = float(np.mean(sent)) if all_rounds else None
        row |= describe_simulated(runs, target, all_rounds)
        row |= describe_extra(runs)
        row |= describe_own_models(runs, own_differences.get(name), len(own_differences))
        row |= describe_distribution((clients_of or {}).get(name, []))
        row |= describe_metrics(runs, own_metrics)
        rows.append(row)
    return rows


def describe_simulated(
    runs: Sequence[Sequence[RoundRecord]], target: float, all_rounds: bool
) -> dict[str, float | None]:
    """Return the columns on simulated time: to the target, and of all rounds if all are made."""
    row = dict.fromkeys(("seconds_to_target", "simulated_seconds"))
    ends = [simulated_so_far(records) for records in runs]
    if any(of_rounds is None for of_rounds in ends):
        return row
    if all_rounds:
        row["simulated_seconds"] = float(np.mean([times[-1] for times in ends]))
    if not target:
        return row
    needed = [seconds_to_target(records, target) for records in runs]
    return row | {"seconds_to_target": None if None in needed else float(np.mean(needed))}


def describe_extra(runs: Sequence[Sequence[RoundRecord]]) -> dict[str, float | None]:
    """Return the columns on other images than the test set, in percent, means over seeds."""
    last = [records[-1].extra_accuracies for records in runs]
    return {
        name: 100 * float(np.mean([found[name] for found in last]))
        if all(name in found for found in last)
        else None
        for name in ("attack_success", "unseen_accuracy")
    }


def describe_metrics(
    runs: Sequence[Sequence[RoundRecord]], names: Iterable[str]
) -> dict[str, float | None]:
    """Return the columns of a user's --metrics, means over seeds."""
    last = [records[-1].metrics for records in runs]
    return {
        f"metric_{name}" if name in COLUMNS or name == ROW else name: float(
            np.mean([found[name] for found in last])
        )
        if all(name in found for found in last)
        else None
        for name in names
    }


def describe_own_models(
    runs: Sequence[Sequence[RoundRecord]], difference: Difference | None, num_differences: int
) -> dict[str, float | None]:
    """Return the columns on the clients' own test images: by the global model, and by their own.

    `difference` is that of the model which each client uses, to the row's base; `num_differences`
    are tested at once.
    """
    names = [name for name in COLUMNS if name.startswith("personal") or name == "own_images"]
    row: dict[str, float | None] = dict.fromkeys(names)
    last = [records[-1].extra_accuracies for records in runs]
    if all("client_accuracy" in found for found in last):
        row["own_images"] = 100 * float(np.mean([found["client_accuracy"] for found in last]))
    if all(OWN_MODELS in found for found in last):
        own = [100 * found[OWN_MODELS] for found in last]
        row["personal"] = float(np.mean(own))
        row["personal_sd"] = float(np.std(own, ddof=1)) if len(own) > 1 else None
        row["personal_worst10"] = 100 * float(np.mean([found[WORST_OWN] for found in last]))
    if difference:
        row["personal_difference"] = difference.mean
        if len(runs) > 1:
            row["personal_p"] = difference.p
        if len(runs) > 1 and num_differences > 1:
            row["personal_p_holm"] = difference.adjusted_p
    return row


def describe_distribution(accuracies: Sequence[np.ndarray]) -> dict[str, float | None]:
    """Return the columns on the clients' accuracies float64[K] of each seed, means over seeds."""
    if not accuracies:
        return dict.fromkeys(ON_REQUEST)
    return {
        "clients_mean": 100 * float(np.mean([of_seed.mean() for of_seed in accuracies])),
        "clients_worst10": 100 * float(np.mean([*map(worst_tenth, accuracies)])),
        "clients_gini": float(np.mean([*map(gini, accuracies)])),
    }


def describe_difference(
    name: str, differences: dict[str, Any], base: Base, to_target: bool, seeds: int
) -> dict[str, Any]:
    """Return the columns on how far a row is from its base; None where nothing can be said."""
    columns = ("difference", "rounds_difference", "difference_low", "difference_high")
    row: dict[str, Any] = dict.fromkeys((*columns, "detectable", "versus", "p", "p_holm"))
    if name not in differences:
        return row
    found = differences[name]
    row["versus"] = base_of(name, base)
    row["rounds_difference" if to_target else "difference"] = found.mean
    if seeds > 1:
        row["p"] = found.p
    if not math.isnan(found.half_width):
        row["difference_low"] = found.mean - found.half_width
        row["difference_high"] = found.mean + found.half_width
        row["detectable"] = found.detectable
    if seeds > 1 and len(differences) > 1:
        row["p_holm"] = found.adjusted_p
    return row


def describe_target(
    runs: Sequence[Sequence[RoundRecord]],
    needed: Sequence[float | None],
    seeds: Sequence[int],
    target: float,
    batch_size: int,
) -> dict[str, Any]:
    """Return the columns on the target: what its seeds needed, and which did not reach it.

    Bytes, examples and local steps are counted up to the round that reached the target.
    """
    columns = [name for name in COLUMNS if name.endswith("_to_target")]
    names = (*columns, "rounds_to_target_sd", "reached", "not_reached", "censored_at")
    row: dict[str, Any] = dict.fromkeys(names)
    if not target:
        return row
    late = [place for place, rounds in enumerate(needed) if rounds is None]
    row["reached"] = len(runs) - len(late)
    if late:
        row["not_reached"] = " ".join(str(seeds[place]) for place in late)
        row["censored_at"] = min(len(runs[place]) for place in late)
        return row
    row["rounds_to_target"] = float(np.mean(needed))
    if len(needed) > 1:
        row["rounds_to_target_sd"] = float(np.std(needed, ddof=1))
    used = [run[: math.ceil(rounds)] for run, rounds in zip(runs, needed, strict=True)]
    row["megabytes_to_target"] = float(np.mean([megabytes_so_far(run)[-1] for run in used]))
    if all(has_work(record) for run in used for record in run):
        reports = [[report for record in run for report in record.clients] for run in used]
        steps = [sum(report["steps"] for report in of_run) for of_run in reports]
        row["steps_to_target"] = float(np.mean(steps))
        trained_on = [
            sum(examples_trained_on(report, batch_size) for report in of_run) for of_run in reports
        ]
        row["examples_to_target"] = float(np.mean(trained_on))
    return row


def has_work(record: RoundRecord) -> bool:
    """Return whether a round's record says what its clients did; that of a private run does not."""
    return not record.private and all({"steps", "examples"} <= r.keys() for r in record.clients)


def describe_spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, standard deviation and the 95 % interval of the mean, by Student's t.

    They are percent: the interval ends at 0 and at 100.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None}
    sd = float(np.std(values, ddof=1))
    half = half_width_of_mean(values)
    return {"mean": mean, "sd": sd, "low": max(mean - half, 0.0), "high": min(mean + half, 100.0)}
