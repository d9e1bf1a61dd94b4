"""Commands that train no run, or several: evaluation and comparison.

They use the script from outside, as a notebook does; so do the baselines, in variants/. All else
in harness/ and variants/ is used by the script, and imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import federated_learning as fl
from harness import comparison, layers, plots, results, run_folder, trust, tuning
from harness.command_line import one_at_a_time, quietly, read_saved, warn
from harness.fields import UserError
from harness.files import expand_path
from harness.loading import import_function
from harness.sweep import Compared, compared_rows, rows_of_configs

import tensorflow_federated as tff


@one_at_a_time()
def compare(config: Any, *, dataset: Any = None) -> Path:
    """Run every compared setting and seed; return the folder with the table and the figure.

    Args:
        config: a configuration with `compare` or `seeds`, or a list of configurations, a row each;
            the first one's `seeds`, `runs` and `name` count.
        dataset: a data set from build_dataset, used instead of the configured one.

    Raises:
        UserError: the configuration compares nothing, or one of the runs is invalid.
    """
    if isinstance(config, list | tuple):
        compared = rows_of_configs(config)
        first = config[0]
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
    with quietly(first.run.quiet):
        return compare_on(first.with_absolute_paths(), compared, dataset)


def compare_on(absolute: Any, compared: Compared, dataset: Any) -> Path:
    """Train the rows on `dataset`, or on the configured one if it is None; return the folder.

    With --tune their values are chosen first, on training images held out.
    """
    for notice in absolute.unused_notices():
        warn(notice)
    if not absolute.comparison.tune:
        folder, _ = comparison.compare(absolute, compared, *make_runners(absolute, dataset))
        return folder
    on_all = absolute.replace(holdout=0)
    whole = fl.load_dataset(on_all.data) if dataset is None else dataset
    count = absolute.data.holdout or len(whole.train.labels) // 6
    on_held_out = absolute.replace(holdout=count)
    held_out = None if dataset is None else fl.datasets.hold_out(dataset, count)
    chosen, how = tuning.tune(on_held_out, compared, *make_runners(on_held_out, held_out))
    folder, _ = comparison.compare(on_all, chosen, *make_runners(on_all, dataset), how)
    return folder


def make_runners(config: Any, dataset: Any) -> tuple[Callable, Callable]:
    """Return build(config) and run(config) on `dataset`, or on the configured one if it is None."""
    if dataset is None:
        return partial(fl.build_experiment, dataset=fl.load_dataset(config.data)), fl.run
    return partial(fl.build_experiment, dataset=dataset), partial(fl.run, dataset=dataset)


@one_at_a_time()
def evaluate_saved(config: Any) -> Path:
    """Evaluate a run's model, named by config.run.evaluate, on the configured data.

    Returns the folder with metrics.json and the figures.

    Raises:
        UserError: the images or labels are unlike those that the model was trained on.
    """
    saved = read_saved(config.run.evaluate, type(config)())
    source = expand_path(config.run.evaluate)
    dataset = fl.load_dataset(config.with_absolute_paths().data)
    results.check_classes(source, dataset)
    name = find_model_name(config, saved)
    network = fl.make_network(name, fl.find_model(name), dataset, saved.training.batch_norm)
    file = str(source / "global_model.keras")
    weights = layers.read_weights(file, fl.build_model(network, seed=0))
    evaluate = fl.build_evaluator(network, dataset)
    if config.run.metrics:
        evaluate = import_function("evaluations:with_metrics")(evaluate, config.run.metrics)
    evaluation = evaluate(tff.learning.models.ModelWeights(weights, []))
    origin = results.describe_origin(source, dataset)
    caption = plots.join_parts([dataset.name, f"the model of {source.name}{origin}"])
    return run_folder.write_evaluation(config, saved, dataset, evaluation, weights, caption)


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
