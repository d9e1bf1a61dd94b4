"""Additional evaluation sets: images with a backdoor's trigger, and clients never drawn."""

from __future__ import annotations

from typing import Any

from harness.dataset import Split
from harness.streams import open_stream
from variants import adversity

import numpy as np

MOST_IMAGES = 10_000  # of all clients that train, or of all that don't


def evaluate_backdoor(parts: Any, experiment: Any) -> Any:
    """Add attack_success: how often test images with the trigger are taken for the target.

    They are those whose label is another one.
    """
    config = experiment.config
    if config.adversity.attack != "backdoor":
        return parts
    target = config.adversity.backdoor_target

    def find() -> Split:
        images, labels = experiment.dataset.test
        others = images[labels != target]
        stamped = np.where(adversity.trigger_mask(images.shape[1:]), adversity.WHITE, others)
        return Split(stamped, np.full(len(others), target, labels.dtype))

    extra = parts.extra_evaluations | {"attack_success": find}
    return parts._replace(extra_evaluations=extra)


def evaluate_unseen(parts: Any, experiment: Any) -> Any:
    """Add seen_accuracy and unseen_accuracy: on images of the clients that train, on which they
    trained, and of those that are never drawn."""
    config = experiment.config
    extra = parts.extra_evaluations | {
        "seen_accuracy": lambda: gather(experiment, adversity.drawn_clients(config)),
        "unseen_accuracy": lambda: gather(experiment, adversity.unseen_clients(config)),
    }
    return parts._replace(extra_evaluations=extra)


def gather(experiment: Any, clients: np.ndarray) -> Split:
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
    return Split(np.concatenate(images), np.concatenate(labels))
