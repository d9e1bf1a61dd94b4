"""Commands that train several runs, or none: comparison and evaluation.

The script gives them its own functions: how it loads data, builds and runs an experiment, and reads
a trained model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.cli import trust
from harness.cli.command_line import TRAINING, one_at_a_time
from harness.cli.fields import ConfigGroup, UserError
from harness.cli.loading import import_function
from harness.cli.output import quietly, warn
from harness.cli.saved_config import check_config, read_saved
from harness.comparing import comparison, tuning
from harness.comparing.completing import OutOfTime
from harness.comparing.sweep import compared_rows, rows_of_configs
from harness.reporting import captions, results
from harness.storage import origin, run_folder
from harness.storage.files import expand_path
from harness.storage.saved_run import check_model, read_finished

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
    absolute = first.with_absolute_paths()
    deadline = time.perf_counter() + (first.run.seconds_allowed or math.inf)

    def runners(data: Any, given: Any) -> tuple[Callable, Callable]:
        """Return build(config) and run(config) on `given`, or on configured data if it is None."""
        if given is None:
            return partial(build_experiment, dataset=load_dataset(data)), run
        return partial(build_experiment, dataset=given), partial(run, dataset=given)

    with quietly(first.run.quiet):
        for notice in absolute.unused_notices():
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


@one_at_a_time()
def evaluate_saved(config: Any, load_dataset: Callable, read_trained: Callable) -> Path:
    """Evaluate a run's model, as federated_learning.evaluate_saved says, by its functions."""
    check_config(config)
    check_evaluated(config)
    saved = read_saved(config.run.evaluate, type(config)())
    source = expand_path(config.run.evaluate)
    read_finished(source)  # raises for a run that was stopped
    dataset = load_dataset(config.with_absolute_paths().data)
    results.check_classes(source, dataset)
    training = replace(saved.training, model=find_model_name(config, saved))
    trained = read_trained(source / "global_model.keras", training, dataset)
    if saved.has_own_model and not config.has_own_model:
        cure = "restore it, or name it with --model to evaluate what it builds now"
        check_model(source, saved.training.model, trained, cure)
    evaluate = trained.evaluate
    if config.run.metrics:
        evaluate = import_function("evaluations:with_metrics")(evaluate, config.run.metrics)
    evaluation = evaluate(dataset)
    weights = trained.weights.trainable
    about = origin.describe_origin(source, saved, dataset, load_dataset)
    caption = captions.join_parts([dataset.name, f"the model of {source.name}{about}"])
    return run_folder.write_evaluation(config, saved, dataset, evaluation, weights, caption)


def check_evaluated(config: Any) -> None:
    """Raise UserError for flags that ask for training, which an evaluation would ignore."""
    for field, value in config.subset(TRAINING).items():
        if value != config.defaults()[field]:
            raise UserError(
                f"{field}={value!r:.60} cannot be combined with evaluate="
                f"{config.run.evaluate!r:.100}, which trains nothing; drop one of them"
            )


def find_model_name(config: Any, saved: Any) -> str:
    """Return the model of the saved run.

    Its folder may be somebody else's, and name a file that would be executed. Raises UserError for
    one that this user never ran, unless --model names it.
    """
    if saved.has_own_model:
        if config.has_own_model:
            return config.training.model
        trust.check_file("model", saved.training.model, config.run.evaluate)
    return saved.training.model
