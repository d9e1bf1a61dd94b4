"""Local losses other than the mean cross-entropy: smoothed labels, weighted classes, a user's own.

A loss is a function(labels int32[n], logits float32[n,C]) -> float32[n].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from harness.cli.fields import UserError
from harness.cli.loading import import_function
from harness.cli.own_files import change_function, is_own
from harness.engine.execution import convert

import numpy as np
import tensorflow as tf


def smoothed(labels: Any, logits: Any, smoothing: float) -> Any:
    """Return the cross-entropy with 1 - smoothing + smoothing / C on the label, and smoothing / C
    on each other one (Szegedy et al. 2016, section 7)."""
    num_classes = logits.shape[1]
    targets = (1 - smoothing) * tf.one_hot(labels, num_classes) + smoothing / num_classes
    return tf.nn.softmax_cross_entropy_with_logits(targets, logits)


def weighted(labels: Any, logits: Any, loss: Callable, weights: np.ndarray) -> Any:
    """Return the loss times its label's weight; `weights` are float32[C]."""
    return tf.gather(tf.constant(weights), labels) * loss(labels, logits)


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """Return n / (C n_c) for the label counts int64[K,C] of all clients, float32[C].

    So each label counts as much as any other; one without images has the weight 0.
    """
    of_labels = counts.sum(axis=0)
    held = of_labels > 0
    weights = np.zeros(len(of_labels))
    weights[held] = of_labels.sum() / (held.sum() * of_labels[held])
    return weights.astype(np.float32)


def checked(labels: Any, logits: Any, function: Callable, name: str) -> Any:
    """Return a user's loss. Raises UserError unless it is one number per image."""
    losses = function(labels, logits)
    if not tf.is_tensor(losses) or not losses.shape.is_compatible_with(labels.shape):
        shape = losses.shape if tf.is_tensor(losses) else type(losses).__name__
        raise UserError(
            f"loss={name!r:.200} returns {shape!s:.60} for a batch; return one loss per image, a "
            "tensor float32[n]"
        )
    return tf.cast(losses, tf.float32)


def try_loss(loss: Callable, num_classes: int, name: str) -> None:
    """Call a user's loss on two batches, before TensorFlow traces it and lengthens its errors.

    Raises UserError for one without a gradient, by which nothing would be learned.
    """
    for size in (3, 5):
        logits = tf.zeros((size, num_classes))
        with tf.GradientTape() as tape:
            tape.watch(logits)
            losses = loss(tf.range(size) % num_classes, logits)
        try:
            gradient = tape.gradient(losses, logits)
        except Exception:  # of an operation that has none
            gradient = None
        if gradient is None:
            raise UserError(
                f"loss={name!r:.200} has no gradient by the logits; compute it from them by "
                "differentiable functions of TensorFlow"
            )


def choose_loss(network: Any, experiment: Any) -> Any:
    """Return the network with the loss that the flags ask for. Raises UserError for two."""
    training = experiment.config.training
    loss = network.loss
    if is_own(training.loss):
        if training.label_smoothing:
            raise UserError(
                f"label_smoothing={training.label_smoothing:g} cannot be combined with "
                f"loss={training.loss!r:.100}; drop one of them"
            )
        function = import_function(training.loss, "loss")
        own_loss = partial(checked, name=training.loss)
        try_loss(partial(own_loss, function=function), network.num_classes, training.loss)
        loss = partial(own_loss, function=change_function(function, convert))
    elif training.label_smoothing:
        loss = partial(smoothed, smoothing=training.label_smoothing)
    if training.class_weights == "balanced" and experiment.config.is_private:
        raise UserError(
            "class_weights='balanced' cannot be combined with aggregator='dp', since it uses the "
            "exact number of the clients' images of each label; drop one of them"
        )
    if training.class_weights == "balanced":
        weights = balanced_weights(experiment.partition.counts)
        loss = partial(weighted, loss=loss, weights=weights)
    return network._replace(loss=loss)
