"""Additional evaluation sets: images with a backdoor's trigger, clients never drawn, and images
held out of each client."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_type_hints

from harness.cli.fields import UserError
from harness.cli.loading import import_function
from harness.reporting.results import METRICS_KEYS
from harness.training.client_accuracies import OWN_TESTS, accuracies_of_parts, summarize_accuracies
from harness.training.dataset import OtherImages
from harness.training.records import EXTRA, RoundRecord
from harness.training.streams import open_stream
from variants import adversity

import numpy as np

# Columns of metrics.csv, and keys of metrics.json.
TAKEN = {*get_type_hints(RoundRecord), *EXTRA, *METRICS_KEYS, "seed"}
MOST_IMAGES = 10_000  # of all clients that train, or of all that don't


def evaluate_backdoor(parts: Any, experiment: Any) -> Any:
    """Add attack_success: how often test images with the trigger are taken for the target.

    They are those whose label is another one.
    """
    config = experiment.config
    if config.adversity.attack != "backdoor":
        return parts
    target = config.adversity.backdoor_target
    if (experiment.dataset.test.labels == target).all():
        raise UserError(
            f"backdoor_target={target} is the label of all test images, so no success can be "
            "measured; choose another label"
        )

    def find() -> OtherImages:
        images, labels = experiment.dataset.test
        others = images[labels != target]
        stamped = np.where(adversity.trigger_mask(images.shape[1:]), adversity.WHITE, others)
        return OtherImages(stamped, np.full(len(others), target, labels.dtype))

    extra = parts.extra_evaluations | {"attack_success": find}
    return parts._replace(extra_evaluations=extra)


def evaluate_unseen(parts: Any, experiment: Any) -> Any:
    """Add seen_accuracy and unseen_accuracy: on images of the clients that train, on which they
    trained, and of those that are never drawn."""
    config = experiment.config
    extra = parts.extra_evaluations | {
        "seen_accuracy": lambda: collect_images(experiment, adversity.drawn_clients(config)),
        "unseen_accuracy": lambda: collect_images(experiment, adversity.unseen_clients(config)),
    }
    return parts._replace(extra_evaluations=extra)


def collect_images(experiment: Any, clients: np.ndarray) -> OtherImages:
    """Return images of these clients as they have them, MOST_IMAGES at random if there are more."""
    train = experiment.dataset.train
    indices = np.concatenate([experiment.partition.indices[client] for client in clients])
    rng = open_stream("extra evaluations", experiment.config.seed)
    chosen = np.sort(rng.permutation(indices)[:MOST_IMAGES])
    images = []
    labels = []
    for client in clients:
        own = np.intersect1d(experiment.partition.indices[client], chosen)
        images.append(experiment.images_of_client(train.images[own], int(client)))
        labels.append(train.labels[own])
    return OtherImages(np.concatenate(images), np.concatenate(labels))


def with_metrics(evaluate: Callable, name: str) -> Callable:
    """Wrap evaluate(weights): its Evaluation also has the metrics of a user's FILE.py:FUNCTION."""
    function = import_function(name, "metrics")

    def wrapped(weights: Any) -> Any:
        evaluation = evaluate(weights)
        found = function(evaluation.labels, evaluation.predictions)
        metrics = to_columns(found, name)
        return replace(evaluation, metrics=metrics)

    return wrapped


def to_columns(found: Any, name: str) -> dict[str, float]:
    """Return column -> value of what a user's FILE.py:FUNCTION, `name`, returned.

    Raises UserError for a value that is not a metric.
    """
    columns = found if isinstance(found, dict) else {name.rpartition(":")[2]: found}
    for column, value in columns.items():
        check_metric(f"metrics={name!r:.200}", column, value)
    return {column: float(value) for column, value in columns.items()}


def check_metrics(name: str, labels: np.ndarray) -> None:
    """Raise UserError if a user's FILE.py:FUNCTION cannot measure a model.

    It is called once before the run begins: a mistake found after the first round would cost that
    round.
    """
    name_metrics(name, labels)


def name_metrics(name: str, labels: np.ndarray) -> list[str]:
    """Return the columns of a user's FILE.py:FUNCTION; the labels in another order stand for
    predictions."""
    found = import_function(name, "metrics")(labels, np.roll(labels, 1))
    return [*to_columns(found, name)]


def check_metric(source: str, column: Any, value: Any) -> None:
    """Raise UserError for a metric that is not a number, or that has the name of another column."""
    if not isinstance(column, str) or not re.fullmatch(r"\w+", column):
        raise UserError(
            f"{source} names a metric {column!r:.40}; use letters, digits and underscores"
        )
    if column in TAKEN or column.startswith("train_"):
        raise UserError(
            f"{source} names a metric {column!r:.40}, a name in the files of a run; rename it"
        )
    if not isinstance(value, int | float | np.integer | np.floating):
        raise UserError(
            f"{source} returns {type(value).__name__} for {column}; return a number for each metric"
        )
    if isinstance(value, int) and abs(value) > float(np.finfo(np.float64).max):
        raise UserError(f"{source} returns an integer for {column} that no float can hold")


def evaluate_clients(parts: Any, experiment: Any) -> Any:
    """Add client_accuracy and client_worst10: of the clients' accuracies, each on its own images
    held out, the mean over clients and that of the worst tenth of them."""
    extra = parts.extra_evaluations | {OWN_TESTS: partial(own_tests, experiment)}
    return parts._replace(extra_evaluations=extra)


def own_tests(experiment: Any) -> OtherImages:
    """Return the images held out of all clients, in the clients' order, as the clients see them."""
    train = experiment.dataset.train
    parts = experiment.partition.test_indices
    images = [
        experiment.images_of_client(train.images[indices], client)
        for client, indices in enumerate(parts)
    ]
    sizes = [len(indices) for indices in parts]

    def measure(correct: np.ndarray) -> dict[str, float]:
        return summarize_accuracies("client", accuracies_of_parts(correct, sizes))

    return OtherImages(np.concatenate(images), train.labels[np.concatenate(parts)], measure)
