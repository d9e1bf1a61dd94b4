"""What the global model is evaluated on beside the test set: a trigger, and clients never drawn."""

from __future__ import annotations

from typing import Any

from harness.streams import open_stream
from variants import adversity
from variants.datasets import Split

import numpy as np

MOST_IMAGES = 10_000  # of all clients that train, or of all that don't


def find_splits(experiment: Any) -> dict[str, Split]:
    """Return column -> images whose accuracy by their labels is that column of each round.

    attack_success: test images with the backdoor's trigger, whose label is called its target; those
    that are of the target are left out. seen_accuracy and unseen_accuracy: images of the clients
    that train, on which they trained, and of those that are never drawn.
    """
    splits = {}
    config = experiment.config
    if config.adversity.byzantine and config.adversity.attack == "backdoor":
        images, labels = experiment.dataset.test
        target = config.adversity.backdoor_target
        others = images[labels != target]
        stamped = np.where(adversity.trigger_mask(images.shape[1:]), adversity.WHITE, others)
        splits["attack_success"] = Split(stamped, np.full(len(others), target, labels.dtype))
    if config.partitioning.unseen_clients:
        splits["seen_accuracy"] = gather(experiment, adversity.drawn_clients(config))
        splits["unseen_accuracy"] = gather(experiment, adversity.unseen_clients(config))
    return splits


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
