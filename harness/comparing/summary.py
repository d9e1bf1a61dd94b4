"""The rows of summary.csv: what a comparison measured, a row a setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from harness.comparing.significance import (
    Base,
    Difference,
    base_of,
    compare_outcomes,
    half_width_of_mean,
)
from harness.comparing.tables import COLUMNS, ROW, Table, column_of
from harness.training.client_accuracies import gini, worst_tenth
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

PERCENT = {  # column -> the accuracy of a run's records
    "attack_success": "attack_success",
    "unseen_accuracy": "unseen_accuracy",
    "own_images": "client_accuracy",
    "personal": OWN_MODELS,
    "personal_worst10": WORST_OWN,
}


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
    each seed (of all names, or none). The accuracy is that of each run's last round.
    Differences from the row's `base` are tested by the paired t-test, with Holm's correction for
    more than two rows: on the rounds to the `target` if there is one, else on the accuracies, if
    all runs have the same number of rounds. Values that do not apply are None, such as a mean over
    seeds of which one did not reach the target.
    """
    are_equally_long = have_one_length(records_of)
    needed = {name: needed_rounds(runs, target) for name, runs in records_of.items()}
    outcomes = {}
    if target:
        outcomes = {name: rounds for name, rounds in needed.items() if None not in rounds}
    elif are_equally_long:
        outcomes = {name: final_accuracies(runs) for name, runs in records_of.items()}
    differences = compare_outcomes(outcomes, base) if base else {}
    own = {}
    if base and are_equally_long and has_own_models(records_of):
        own = {name: final_own_accuracies(runs) for name, runs in records_of.items()}
    own_differences = compare_outcomes(own, base) if own else {}
    rows = []
    for name, runs in records_of.items():
        clients = clients_of[name] if clients_of else [None] * len(runs)
        measured = [
            measure_run(records, target, rates[name].batch_size, accuracies)
            for records, accuracies in zip(runs, clients, strict=True)
        ]
        row = {ROW: name, "seeds": len(runs)}
        row |= {"client_lr": rates[name].client_lr, "server_lr": rates[name].server_lr}
        row |= mean_over_seeds(measured)
        row |= describe_spread(final_accuracies(runs))
        row |= describe_difference(name, differences, base, bool(target), len(runs))
        row |= describe_own_difference(own_differences.get(name), len(runs), len(own_differences))
        if target:
            seeds = seeds_of[name] if seeds_of else range(len(runs))
            row |= describe_reached(needed[name], seeds, [*map(len, runs)])
            row["rounds_to_target_sd"] = sd_over_seeds(measured, "rounds_to_target")
        row["personal_sd"] = sd_over_seeds(measured, "personal")
        spent = [records[-1].epsilon for records in runs]
        row["epsilon"] = None if None in spent else max(spent)
        if target and not are_equally_long:  # the target ends a run: so far is not all
            row |= dict.fromkeys(("megabytes", "simulated_seconds"))
        rows.append(row)
    every = [records[-1] for runs in records_of.values() for records in runs]
    metrics = [column_of(name) for record in every for name in record.metrics]
    columns = dict.fromkeys((ROW, *COLUMNS, *metrics))
    return [columns | row for row in rows]


def final_accuracies(runs: Sequence[Sequence[RoundRecord]]) -> list[float]:
    """Return the percent of the test set that each run's last model classifies correctly."""
    return [100 * records[-1].test_accuracy for records in runs]


def measure_run(
    records: Sequence[RoundRecord],
    target: float,
    batch_size: int,
    clients: np.ndarray | None = None,
) -> dict[str, float]:
    """Return column -> value of a run, without those that do not apply to it.

    `clients` are the accuracies float64[K] over the clients. Bytes, examples and local steps to the
    target are counted up to the end of the round that reached it.
    """
    last = records[-1]
    row = {"rounds": float(len(records)), "megabytes": float(megabytes_so_far(records)[-1])}
    row |= {column_of(name): value for name, value in last.metrics.items()}
    row |= {
        column: 100 * last.extra_accuracies[name]
        for column, name in PERCENT.items()
        if name in last.extra_accuracies
    }
    if clients is not None:
        row["clients_mean"] = 100 * float(clients.mean())
        row["clients_worst10"] = 100 * worst_tenth(clients)
        row["clients_gini"] = gini(clients)
    ends = simulated_so_far(records)
    if ends is not None:
        row["simulated_seconds"] = float(ends[-1])
    (rounds,) = needed_rounds([records], target)
    if rounds is None:
        return row
    row["rounds_to_target"] = rounds
    if ends is not None:
        row["seconds_to_target"] = seconds_to_target(records, target)
    used = records[: math.ceil(rounds)]
    row["megabytes_to_target"] = float(megabytes_so_far(used)[-1])
    if all(has_work(record) for record in used):
        reports = [report for record in used for report in record.clients]
        row["steps_to_target"] = sum(report["steps"] for report in reports)
        trained_on = [examples_trained_on(report, batch_size) for report in reports]
        row["examples_to_target"] = sum(trained_on)
    return row


def mean_over_seeds(measured: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Return column -> the mean over the runs; None where it does not apply to one of them."""
    columns = dict.fromkeys(column for run in measured for column in run)
    values = {column: [run.get(column) for run in measured] for column in columns}
    return {
        column: None if None in of_seeds else float(np.mean(of_seeds))
        for column, of_seeds in values.items()
    }


def sd_over_seeds(measured: Sequence[dict[str, float]], column: str) -> float | None:
    """Return the standard deviation of a column; None of one run, or where one has no value."""
    values = [run.get(column) for run in measured]
    return None if None in values or len(values) < 2 else float(np.std(values, ddof=1))


def describe_own_difference(
    difference: Difference | None, seeds: int, num_differences: int
) -> dict[str, float | None]:
    """Return the columns on how far the model that each client uses is from the row's base.

    `num_differences` are tested at once.
    """
    if not difference:
        return {}
    row: dict[str, float | None] = {"personal_difference": difference.mean}
    if seeds > 1:
        row["personal_p"] = difference.p
    if seeds > 1 and num_differences > 1:
        row["personal_p_holm"] = difference.adjusted_p
    return row


def describe_difference(
    name: str, differences: dict[str, Any], base: Base, to_target: bool, seeds: int
) -> dict[str, Any]:
    """Return the columns on how far a row is from its base; nothing if it was not tested."""
    if name not in differences:
        return {}
    found = differences[name]
    row: dict[str, Any] = {"versus": base_of(name, base)}
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


def describe_reached(
    needed: Sequence[float | None], seeds: Sequence[int], lengths: Sequence[int]
) -> dict[str, Any]:
    """Return the columns on which seeds reached the target.

    `needed` are the rounds that each needed, None if it did not in its `lengths` of rounds.
    """
    late = [place for place, rounds in enumerate(needed) if rounds is None]
    row: dict[str, Any] = {"reached": len(needed) - len(late)}
    if late:
        row["not_reached"] = " ".join(str(seeds[place]) for place in late)
        row["censored_at"] = min(lengths[place] for place in late)
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
