"""Callbacks before and after each round, as in Keras."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.cli.fields import UserError
from harness.cli.output import print_line, warn
from harness.reporting.figure_files import to_bytes
from harness.training.histories import stops_early
from harness.training.records import RoundRecord

import numpy as np
import tensorflow as tf


class StopRun(Exception):
    """Raised by a callback to end the run, which keeps its rounds so far and all its files."""


class Callback:
    """Does nothing; a subclass replaces what it needs."""

    def before_run(self, folder: Any, first_round: int) -> None:
        """Prepare for the rounds from `first_round` on; `folder` is a RunFolder, or None."""

    def before_round(self, round_num: int) -> None:
        """Do something before the round. StopRun ends the run before it."""

    def release(self, record: RoundRecord) -> RoundRecord:
        """Return the record to publish; everything that is written or printed comes from it."""
        return record

    def after_round(self, outcome: Any) -> None:
        """Do something with a RoundOutcome. StopRun ends the run after this round."""


def check_callbacks(callbacks: Any) -> None:
    """Raise UserError for something else than a list of callbacks."""
    if not isinstance(callbacks, list | tuple) or not all(
        isinstance(callback, Callback) for callback in callbacks
    ):
        raise UserError(
            f"callbacks={callbacks!r:.60} is not a list of callbacks; give objects of classes "
            "derived from fl.Callback"
        )


class CallbackList:
    """A sequence of callbacks; the run continues as long as none raises StopRun."""

    def __init__(self, callbacks: Sequence[Callback]):
        self.callbacks = tuple(callbacks)

    def before_run(self, folder: Any, first_round: int) -> None:
        """Prepare each one."""
        for callback in self.callbacks:
            callback.before_run(folder, first_round)

    def before_round(self, round_num: int) -> bool:
        """Return whether the round may begin.

        The last one is asked first: a private run's, which comes first, notes that the round
        begins, and no other may then prevent it.
        """
        try:
            for callback in reversed(self.callbacks):
                callback.before_round(round_num)
        except StopRun:
            return False
        return True

    def release(self, record: RoundRecord) -> RoundRecord:
        """Return the record as all of them let it out."""
        for callback in self.callbacks:
            record = callback.release(record)
        return record

    def after_round(self, outcome: Any) -> bool:
        """Return whether the run continues. Every callback gets the outcome, even if an earlier one
        stops the run."""
        goes_on = True
        for callback in self.callbacks:
            try:
                callback.after_round(outcome)
            except StopRun:
                goes_on = False
        return goes_on


class EarlyStopping(Callback):
    """Ends a run that has reached its target accuracy, or has not become better for long enough."""

    def __init__(self, run: Any, earlier: Sequence[RoundRecord]):
        """`run` is the group of flags, `earlier` are the records of the rounds before."""
        self.run = run
        self.records = list(earlier)

    def after_round(self, outcome: Any) -> None:
        """Raise StopRun if this round was the last."""
        self.records.append(outcome.record)
        if stops_early(self.records, self.run):
            raise StopRun


class PrintRounds(Callback):
    """Prints a line a round, and a notice of what seems wrong with it after those before."""

    def __init__(self, experiment: Any, earlier: Sequence[RoundRecord]):
        self.experiment = experiment
        self.records = list(earlier)

    def after_round(self, outcome: Any) -> None:
        """Print the line."""
        record = outcome.record
        rounds = self.experiment.config.training.rounds
        print_line(record.line(rounds))
        is_last = record.round == rounds
        trouble = record.trouble(self.records, self.experiment.dataset.chance, is_last)
        if trouble:
            warn(f"round {record.round}: {trouble}")
        self.tell_few_reports(record)
        self.records.append(record)

    def tell_few_reports(self, record: RoundRecord) -> None:
        """Warn, once, of a round with fewer reports than Krum needs to withstand attackers."""
        config = self.experiment.config
        if "tolerated" not in config.fields_of_choice("aggregator") or config.is_private:
            return
        needed = 2 * config.aggregation.tolerated + 3
        earlier = [len(one.clients) for one in self.records if one.clients]
        count = len(record.clients)
        if 0 < count < needed <= min(earlier, default=needed):
            warn(
                f"round {record.round}: {count} clients reported, but "
                f"{config.aggregation.aggregator} needs {needed} to withstand "
                f"tolerated={config.aggregation.tolerated}; such rounds are not robust"
            )


class OnRound(Callback):
    """Calls a user's function with the record of each round; returning False ends the run."""

    def __init__(self, function: Callable[[RoundRecord], Any]):
        """`function` takes a RoundRecord."""
        self.function = function

    def after_round(self, outcome: Any) -> None:
        """Call it."""
        answer = self.function(outcome.record)
        if isinstance(answer, bool | np.bool_) and not answer:
            raise StopRun


class TimeLimit(Callback):
    """Ends the run before a round as long as the longest so far would exceed the time."""

    def __init__(self, seconds: float, started: float, resume_hint: str):
        """`started` is the perf_counter() from which the seconds count."""
        self.seconds = seconds
        self.started = started
        self.resume_hint = resume_hint
        self.round_started = 0.0
        self.longest = 0.0
        self.has_passed = False

    def before_round(self, round_num: int) -> None:
        """Raise StopRun if the round does not fit; the first one always does."""
        now = time.perf_counter()
        if self.longest and now - self.started + self.longest > self.seconds:
            warn(
                f"time limit of {self.seconds:g} s: no further round fits after round "
                f"{round_num - 1}; {self.resume_hint}"
            )
            self.has_passed = True
            raise StopRun
        self.round_started = now

    def after_round(self, outcome: Any) -> None:
        """Note how long it took."""
        self.longest = max(self.longest, time.perf_counter() - self.round_started)


class TensorBoard(Callback):
    """Writes each round's figures and its confusion matrix to TensorBoard's events.

    Of a file that it cannot write TensorFlow says nothing, or fails at a later round: whether the
    file grows tells. After that no more events are written.
    """

    def __init__(self, path: Path, draw_confusion: Callable[[Any], Any]):
        """draw_confusion(evaluation) returns a Figure."""
        self.path = path
        self.draw_confusion = draw_confusion
        self.events = tf.summary.create_file_writer(str(path))

    def after_round(self, outcome: Any) -> None:
        """Write the round's events."""
        if self.events is None:
            return
        record = outcome.record
        size_before = self.size()
        picture = tf.io.decode_png(to_bytes(self.draw_confusion(outcome.evaluation)))[None]
        with contextlib.suppress(tf.errors.OpError):
            with self.events.as_default(step=record.round):
                for name, value in record.numbers().items():
                    tf.summary.scalar(name, value)
                tf.summary.image("confusion matrix", picture)
            self.events.flush()
            if self.size() > size_before:
                return
        self.events = None
        warn(
            f"TensorBoard events end before round {record.round}: their file in {self.path} "
            "cannot grow; all other files are written"
        )

    def size(self) -> int:
        """Return the bytes of all TensorBoard events of the run."""
        return sum(path.stat().st_size for path in self.path.glob("events.out.tfevents.*"))
