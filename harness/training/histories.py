"""What follows from the records of a run: the best round, the target, the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.training.records import OWN_MODELS, RoundRecord

import numpy as np


def reached(records: Sequence[RoundRecord], target: float) -> bool:
    """Return whether a round reached the test accuracy `target`; 0 stands for no target."""
    return 0 < target <= max((record.test_accuracy for record in records), default=0)


def best_record(records: Sequence[RoundRecord]) -> RoundRecord:
    """Return the first record with the highest test accuracy."""
    return max(records, key=lambda record: record.test_accuracy)


def ends_after(round_num: int, best: RoundRecord, run: Any) -> bool:
    """Return whether a run whose best round so far is `best` ends early; `run` are its flags.

    It has reached its target accuracy, or has not become better for long enough.
    """
    is_at_target = run.after_target == "stop" and reached([best], run.target_accuracy)
    return is_at_target or 0 < run.stop_after <= round_num - best.round


def stops_early(records: Sequence[RoundRecord], run: Any) -> bool:
    """Return whether a run with these records ends before all its rounds are done."""
    return bool(records) and ends_after(records[-1].round, best_record(records), run)


def find_early_end(records: Sequence[RoundRecord], run: Any) -> int:
    """Return after which round, of those before the last, `stops_early` ends the run first.

    0 if after none.
    """
    best = records[0] if records else None
    for record in records[:-1]:
        best = best_record([best, record])
        if ends_after(record.round, best, run):
            return record.round
    return 0


def describe_end(records: Sequence[RoundRecord], run: Any) -> str:
    """Return the line that is printed when a finished run is resumed."""
    if run.after_target == "stop" and reached(records, run.target_accuracy):
        return describe_reached(records, run.target_accuracy)
    return (
        f"no round after round {best_record(records).round} was better; to continue, raise "
        "--stop-after, or set it to 0"
    )


def describe_reached(records: Sequence[RoundRecord], target: float) -> str:
    """Return the line that is printed when a run that has reached its target is resumed."""
    first = next(record.round for record in records if record.test_accuracy >= target)
    return (
        f"the target accuracy {target:.2%} was reached in round {first}; to continue, raise "
        "--target-accuracy, or add --after-target continue"
    )


def megabytes_so_far(records: Sequence[RoundRecord]) -> np.ndarray:
    """Return the cumulated traffic of server and clients after each round, in 10^6 bytes,
    float64[rounds]."""
    return np.cumsum([record.bytes_down + record.bytes_up for record in records]) / 1e6


def simulated_so_far(records: Sequence[RoundRecord]) -> np.ndarray | None:
    """Return the simulated seconds at the end of each round, float64[rounds]; None without a
    clock."""
    seconds = [record.simulated_seconds for record in records]
    return None if None in seconds else np.cumsum(seconds)


def rounds_to_target(accuracies: Sequence[float] | np.ndarray, target: float) -> float | None:
    """Return after how many rounds the best test accuracy so far crossed `target`, or None.

    As in McMahan et al. 2017, section 3: the curve is made monotone, and is a straight line between
    two rounds. A target that the first round reaches counts as 1.
    """
    best = np.maximum.accumulate(accuracies)
    if not target or best[-1] < target:
        return None
    after = int(np.argmax(best >= target))  # from 0; all before are lower
    if after == 0:
        return 1.0
    return float(after + (target - best[after - 1]) / (best[after] - best[after - 1]))


def seconds_to_target(records: Sequence[RoundRecord], target: float) -> float | None:
    """Return the simulated seconds until the best test accuracy crossed `target`, or None.

    They are read at rounds_to_target on the straight line between the ends of two rounds.
    """
    ends = simulated_so_far(records)
    rounds = rounds_to_target([record.test_accuracy for record in records], target)
    if ends is None or rounds is None:
        return None
    return float(np.interp(rounds, np.arange(1, len(ends) + 1), ends))


def has_own_models(records_of: Mapping[str, Sequence[Sequence[RoundRecord]]]) -> bool:
    """Return whether some run, by row and seed, has clients' own models, and all can be compared.

    They can where clients hold out test images.
    """
    last = [records[-1].extra_accuracies for runs in records_of.values() for records in runs]
    tested = all("client_accuracy" in found for found in last)
    return tested and any(OWN_MODELS in found for found in last)


def own_accuracies(records: Sequence[RoundRecord]) -> np.ndarray:
    """Return, by round, the mean accuracy of the clients on their own test images, float64[rounds].

    Each client uses its own model, or the global one in a run without such models.
    """
    found = [record.extra_accuracies for record in records]
    return np.array([columns.get(OWN_MODELS, columns["client_accuracy"]) for columns in found])


def have_one_length(records_of: Mapping[str, Sequence[Sequence[RoundRecord]]]) -> bool:
    """Return whether all runs, by row and seed, have the same number of rounds."""
    return len({len(records) for runs in records_of.values() for records in runs}) == 1
