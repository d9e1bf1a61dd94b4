"""Commands that train several runs, or none: comparison and evaluation.

The script gives them its own functions: how it loads data, builds and runs an experiment, and reads
a trained model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from harness.cli.command_line import one_at_a_time
from harness.cli.fields import ConfigGroup, UserError
from harness.cli.loading import import_function
from harness.cli.output import quietly, warn
from harness.comparing import comparison, tuning
from harness.comparing.completing import OutOfTime
from harness.comparing.sweep import compared_rows, overlaid_folders, rows_of_configs
from harness.storage.run_folder import check_given_dataset
from harness.training.dataset import check_dataset

MOST_HELD_OUT = 50_000  # the largest --holdout


@one_at_a_time()
def compare(
    config: Any, dataset: Any, load_dataset: Callable, build_experiment: Callable, run: Callable
) -> Path:
    """Run every compared setting and seed; return the folder with the table and the figure.

    The first two arguments are those of federated_learning.compare, the others its functions.
    """
    if not isinstance(config, ConfigGroup):
        configs = list(config) if isinstance(config, Iterable) else [config]
        compared = rows_of_configs(configs)
        first = configs[0]
    else:
        compared = compared_rows(config)
        first = config
    if compared is None and overlaid_folders(first.comparison.compare):
        raise UserError(
            f"compare={first.comparison.compare!r:.60} names finished runs, which fl.main(config) "
            "compares"
        )
    if compared is None:
        raise UserError(
            f"compare={first.comparison.compare!r:.60} with seeds=1 compares nothing; give "
            "choices such as compare='fedavg,fedprox', or seeds=3"
        )
    if dataset is not None and first.comparison.jobs > 1:
        raise UserError(
            f"jobs={first.comparison.jobs} cannot be combined with dataset=, which other processes "
            "do not have; drop it, or give the data as a file"
        )
    if dataset is not None:
        check_dataset(dataset)
        check_given_dataset(first)
    absolute = first.with_absolute_paths()
    deadline = time.perf_counter() + (first.run.seconds_allowed or math.inf)

    def runners(data: Any, given: Any) -> tuple[Callable, Callable]:
        """Return build(config) and run(config) on `given`, or on configured data if it is None."""
        if given is None:
            return partial(build_experiment, dataset=load_dataset(data)), run
        return partial(build_experiment, dataset=given), partial(run, dataset=given)

    with quietly(first.run.quiet):
        several = max(first.comparison.seeds, len(compared.rows))  # though a list names no rows
        for notice in absolute.unused_notices(seeds=several):
            warn(notice)
        try:
            if not absolute.comparison.tune:
                of_data = runners(absolute.data, dataset)
                return comparison.compare(absolute, compared, *of_data, deadline)[0]
            # The values are chosen on training images held out, and the rows then trained on all.
            on_all = absolute.replace(holdout=0)
            whole = load_dataset(on_all.data) if dataset is None else dataset
            count = absolute.data.holdout or min(len(whole.train.labels) // 6, MOST_HELD_OUT)
            on_held_out = absolute.replace(holdout=count)
            hold_out = import_function("datasets:hold_out")
            held_out = None if dataset is None else hold_out(dataset, count)
            trials = runners(on_held_out.data, held_out)
            chosen, how = tuning.tune(on_held_out, compared, *trials, deadline)
            of_data = runners(on_all.data, dataset)
            return comparison.compare(on_all, chosen, *of_data, deadline, how)[0]
        except OutOfTime as end:
            return end.folder
