"""--evaluate: a saved model on other data, without training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.cli import trust
from harness.cli.command_line import EVALUATING, TRAINING, one_at_a_time
from harness.cli.fields import UserError
from harness.cli.loading import import_function
from harness.cli.output import print_line, warn
from harness.cli.saved_config import check_config, read_saved
from harness.config.configuration import check_model_of_run
from harness.reporting.captions import join_parts
from harness.reporting.figure_files import draw_files
from harness.reporting.figure_form import form_of
from harness.reporting.plots import evaluation_figures
from harness.reporting.results import describe_accuracy, describe_evaluation, print_written
from harness.storage.files import expand_path, to_json, write_files
from harness.storage.origin import describe_origin
from harness.storage.provenance import describe_provenance
from harness.storage.run_names import make_run_folder
from harness.storage.saved_run import check_classes, check_model, read_finished


@one_at_a_time()
def evaluate_saved(config: Any, load_dataset: Callable, read_trained: Callable) -> Path:
    """Evaluate a run's model, as federated_learning.evaluate_saved says, by its functions."""
    since = time.perf_counter()
    check_config(config)
    check_evaluated(config)
    form_of(config.run)  # raises before anything is evaluated or written
    for notice in config.unused_notices({*EVALUATING, *config.data.to_dict()}):
        warn(notice)
    saved = read_saved(config.run.evaluate, type(config)())
    source = expand_path(config.run.evaluate)
    read_finished(source)  # raises for a run that was stopped
    dataset = load_dataset(config.with_absolute_paths().data)
    check_classes(source, dataset)
    training = replace(saved.training, model=find_model_name(config, saved))
    trained = read_trained(source / "global_model.keras", training, dataset)
    if saved.has_own_model and not config.has_own_model:
        cure = "restore it, or name it with --model to evaluate what it builds now"
        check_model(source, saved.training.model, trained, cure)
    evaluate = trained.evaluate
    if config.run.metrics:
        evaluate = import_function("evaluations:with_metrics")(evaluate, config.run.metrics)
    evaluation = evaluate(dataset)
    about = describe_origin(source, saved, dataset, load_dataset)
    caption = join_parts([dataset.name, f"the model of {source.name}{about}"])
    metrics = describe_evaluation(dataset, trained.weights.trainable, evaluation, source)
    metrics |= {"config": saved.to_dict(), "provenance": describe_provenance(since)}
    return write_evaluation(config, dataset, evaluation, metrics, caption)


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
    one that this user never ran, unless --model names it, and for another model.
    """
    asked = config.training.model
    is_usual = asked in (config.defaults()["model"], saved.training.model)
    if not is_usual and not (saved.has_own_model and config.has_own_model):
        check_model_of_run(config, saved.training.model)
    if saved.has_own_model:
        if config.has_own_model:
            return config.training.model
        trust.check_file("model", saved.training.model, config.run.evaluate)
    return saved.training.model


def write_evaluation(
    config: Any, dataset: Any, evaluation: Any, metrics: dict[str, Any], caption: str
) -> Path:
    """Write metrics.json and the plots of a model that was evaluated without training, and print a
    summary; return their folder.

    `config` is what the command line asks for, `metrics` the content of metrics.json.
    """
    source = expand_path(config.run.evaluate)
    name = config.run.name or f"evaluate-{source.name}"
    folder = make_run_folder(expand_path(config.run.runs), name, {"metrics.json": to_json(metrics)})
    figures = evaluation_figures(dataset, evaluation, caption)
    drawn = write_files(folder, draw_files(figures, form_of(config.run), metrics["provenance"]))
    print_line(f"{caption}\n\n{describe_accuracy(metrics)}\n")
    print_written([folder / "metrics.json", *drawn])
    return folder
