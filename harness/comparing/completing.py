"""The runs of a comparison: one after another, or side by side in processes of their own."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import JOB
from harness.cli.fields import in_notebook
from harness.cli.output import Progress, print_line, warn
from harness.cli.saved_config import check_resumed, read_saved
from harness.comparing.sweep import Row
from harness.engine import stopping
from harness.reporting.results import pluralize
from harness.storage.files import InUse, expand_path, one_line, read_lines
from harness.storage.provenance import ROOT
from harness.storage.saved_run import read_metrics
from harness.training.histories import find_early_end, stops_early
from harness.training.records import RoundRecord

import numpy as np

SECONDS_BETWEEN = 2  # two looks at a run that another process makes
SECONDS_BETWEEN_LOOKS = 0.5  # at the runs of our own jobs


class OutOfTime(Exception):
    """Raised when a comparison's time limit comes before its end; what is done is written."""

    def __init__(self, folder: Path):
        """`folder` is that of the comparison."""
        super().__init__(str(folder))
        self.folder = folder


class Single(NamedTuple):
    """One of the runs that are compared."""

    row: Row
    config: Any
    earlier: list[RoundRecord] | None  # its records if it is done already

    def describe(self) -> str:
        """Return the line that is printed before it begins."""
        return f"{self.row.label}, seed {self.config.seed}"


def count_left(singles: Sequence[Single]) -> int:
    """Return how many of the runs are to be made."""
    return sum(single.earlier is None for single in singles)


def describe_work(singles: Sequence[Single]) -> str:
    """Return how many of the runs are to be made, and in what time, by the mean of those done.

    Of private runs, whose time is not told, and where none is done, it is not known.
    """
    num_left = count_left(singles)
    times = [
        sum(record.seconds for record in single.earlier) for single in singles if single.earlier
    ]
    known = [seconds for seconds in times if not math.isnan(seconds)]
    text = f"{pluralize(num_left, 'run')} left of {len(singles)}"
    if num_left and known:
        text += f", about {format_time(num_left * float(np.mean(known)))}"
    return text


def format_time(seconds: float) -> str:
    """Return "40 s", "7 min" or "2.5 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def folder_of(config: Any) -> Path:
    """Return the folder of a comparison's run, which has a name."""
    return expand_path(config.run.runs) / config.run.name


def read_earlier(config: Any) -> list[RoundRecord] | None:
    """Return the records of this run if it is finished, or None if it has to be started or
    continued.

    Raises UserError if its folder contains something else.
    """
    folder = folder_of(config)
    if not folder.exists():
        return None
    check_resumed(config.replace(resume=str(folder)), read_saved(str(folder), config))
    records = read_metrics(folder)
    is_done = len(records) == config.training.rounds
    return records if is_done or stops_early(records, config.run) else None


def warn_of_reuse(records: Sequence[RoundRecord], run: Any) -> None:
    """Say what the flags of the group `run` would have done to a run that is reused as it is."""
    end = find_early_end(records, run)
    if end:
        flag = "stop_after" if run.stop_after > 0 else "target_accuracy"
        warn(
            f"{flag}={getattr(run, flag):g} would have ended this run after round {end}; its "
            f"{len(records)} rounds are used; for a shorter one give another --runs"
        )
    for field in ("save_every", "save_clients"):
        if getattr(run, field):
            warn(f"{field}={getattr(run, field)} has no effect on this run; give another --runs")


def complete(single: Single, run: Callable, deadline: float) -> list[RoundRecord] | None:
    """Run or continue this run unless it is finished, and return its records.

    Returns None if it cannot be finished before the `deadline`, a perf_counter().
    """
    config = single.config
    folder = folder_of(config)
    earlier = single.earlier or read_earlier(config)  # which another process may have made since
    if earlier:
        print_line(f"{one_line(str(folder))}: finished earlier, reused")
        warn_of_reuse(earlier, config.run)
        return earlier
    seconds_left = deadline - time.perf_counter()
    if seconds_left <= 0:
        return None
    if folder.exists():
        config = config.replace(resume=str(folder))
    if deadline < math.inf:
        config = config.replace(time_limit=f"{max(seconds_left, 0.1):.1f}")
    result = run(config, resume_hint=how_to_continue())
    return None if result.is_cut else result.records


def check_time(singles: Sequence[Single], time_limit: str, folder: Path) -> None:
    """Raise OutOfTime, and warn, if some of the runs are not done."""
    num_left = count_left(singles)
    if num_left:
        left = pluralize(num_left, "run")
        warn(f"time_limit={time_limit} has passed with {left} left; {how_to_continue()}")
        raise OutOfTime(folder)


def how_to_continue() -> str:
    """Return how a stopped comparison is continued."""
    again = "call fl.compare again" if in_notebook() else "run the same command"
    return f"{again} to continue"


def complete_all(
    numbers: Sequence[int], singles: list[Single], run: Callable, deadline: float
) -> None:
    """Make the runs with these numbers, in their order, and put their records into `singles`.

    Ends where a run cannot be finished before the `deadline`, a perf_counter().
    A run that another process makes at this time, as the same comparison of a job array does, is
    left until the others are done, and is waited for.
    """
    waiting = list(numbers)
    told = set()
    while waiting:
        busy = []
        for number in waiting:
            single = singles[number]
            if time.perf_counter() > deadline:
                return
            if number not in told:
                place = f"[{number + 1}/{len(singles)}]"
                print_line(f"\n{place} {single.describe()}; {describe_work(singles)}")
            try:
                singles[number] = single._replace(earlier=complete(single, run, deadline))
                if singles[number].earlier is None:
                    return
            except InUse:
                busy.append(number)
                if number not in told:
                    warn(
                        f"{single.describe()}: another process is running this; waiting for it to "
                        "finish"
                    )
                told.add(number)
        if len(busy) == len(waiting):
            time.sleep(SECONDS_BETWEEN)
            stopping.raise_if_requested()
        waiting = busy


def run_jobs(singles: list[Single], num_jobs: int, folder: Path, deadline: float) -> set[int]:
    """Make the runs that are not done in processes of their own, and put their records in place.

    Each of them takes the next run that nobody has begun, and writes what it prints into the
    comparison's folder. Returns the numbers of the runs made; one that fails is left, so that
    whoever makes it again sees why.
    """
    left = [number for number, single in enumerate(singles) if not single.earlier]
    if num_jobs == 1 or len(left) < 2:
        return set()
    configs = [singles[number].config.to_dict() for number in left]
    work = json.dumps({"deadline": deadline, "configs": configs})
    jobs: list[subprocess.Popen] = []

    def end() -> None:
        for job in jobs:
            if job.poll() is None:
                job.terminate()  # SIGINT may be ignored, as in a shell with &

    with (
        contextlib.ExitStack() as stack,
        stopping.last_words(f"notice: stopped; {how_to_continue()}"),
        stopping.ended_by_request(end),
    ):
        stopping.save_first()
        for number in range(min(num_jobs, len(left))):
            log = stack.enter_context(open(folder / f"job-{number + 1}.log", "wb"))
            jobs.append(start_job(log))
        try:
            for job in jobs:
                job.stdin.write(work.encode() + b"\n")
                job.stdin.flush()  # and kept open: its end tells a job that we have ended
            watch_jobs(jobs, singles, left)
        except BaseException:
            end()
            raise
        finally:
            for job in jobs:
                job.wait()
        if stopping.requested:
            warn(f"stopped with {pluralize(count_left(singles), 'run')} left; {how_to_continue()}")
        stopping.raise_if_requested()
    return {number for number in left if singles[number].earlier}


def start_job(log: Any) -> subprocess.Popen:
    """Return a process that makes the runs that are written to its standard input."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", JOB],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        start_new_session=True,  # Ctrl-C comes to us alone, and we pass it on once
    )


def watch_jobs(
    jobs: Sequence[subprocess.Popen], singles: list[Single], left: Sequence[int]
) -> None:
    """Show the rounds that the jobs make, and each run that is done, until the jobs have ended."""
    configs = [singles[number].config for number in left]
    total = sum(config.training.rounds for config in configs)
    timed = not any(config.is_private for config in configs)
    waiting = list(left)
    num_done = len(singles) - len(left)
    progress = Progress(total, count_rounds(configs), timed)
    try:
        going_on = True
        while going_on:
            going_on = any(job.poll() is None for job in jobs)
            for number in list(waiting):
                records = read_earlier(singles[number].config)
                if records:
                    singles[number] = singles[number]._replace(earlier=records)
                    waiting.remove(number)
                    num_done += 1
                    print_line(f"[{num_done}/{len(singles)}] {describe_done(singles[number])}")
            progress.bar.update(count_rounds(configs) - progress.bar.n)
            if going_on:
                time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        progress.bar.close()


def count_rounds(configs: Sequence[Any]) -> int:
    """Return how many rounds of these runs are done so far."""
    return sum(len(read_lines(folder_of(config) / "rounds.jsonl")) for config in configs)


def describe_done(single: Single) -> str:
    """Return the line that is printed when a job has finished a run."""
    last = single.earlier[-1]
    seconds = sum(record.seconds for record in single.earlier)
    time_taken = "" if math.isnan(seconds) else f" in {format_time(seconds)}"
    rounds = pluralize(len(single.earlier), "round")
    return f"{single.describe()}: test accuracy {last.test_accuracy:.2%}, {rounds}{time_taken}"
