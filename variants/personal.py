"""Tensors that each client keeps for itself, such as FedBN's: a model of its own for each client.

The server's global model has their mean, which no client uses. A simulation keeps them at the
server, as an algorithm's memory: what a client keeps does not travel in the papers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from harness.clients import PERSONAL, accuracies_of_parts, worst_tenth
from harness.fields import UserError
from variants.stateful import Memory, build_stateful_round, check_neighbours
from variants.wrapping import flatten, unflatten, wrap_client

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff


class OwnTensors(Memory):
    """A row for each client: its own tensors less the initial ones, float32[K,d]."""

    def __init__(self, experiment: Any, places: Sequence[int]):
        super().__init__(experiment)
        self.places = frozenset(places)
        self.initial = self.own_of(experiment.initial_weights)
        self.num_parameters = sum(math.prod(w.shape) for w in self.initial)

    def own_of(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """Return the tensors that clients keep."""
        return tuple(tensor for place, tensor in enumerate(tensors) if place in self.places)

    def insert(self, tensors: Sequence[Any], own: Sequence[Any]) -> tuple[Any, ...]:
        """Return the tensors with a client's own ones in their places."""
        rest = iter(own)
        return tuple(
            next(rest) if place in self.places else tensor for place, tensor in enumerate(tensors)
        )

    def num_slots(self) -> int:
        """Return K."""
        return self.num_clients

    def slots_of(self, clients: np.ndarray) -> np.ndarray:
        """Return the clients' own rows."""
        return clients

    def own_tensors(self, row: Any) -> tuple[Any, ...]:
        """Return a client's own tensors, of its row float32[d]."""
        moves = unflatten(row, self.initial)
        return tuple(w + move for w, move in zip(self.initial, moves, strict=True))

    def update_memory(self, memory: Any, clients: Any, weights: Any, messages: Any) -> Any:
        """Return the new rows of these clients, and the old ones of the others."""
        return tf.tensor_scatter_nd_update(memory, clients[:, tf.newaxis], messages)


def keep_at_clients(parts: Any, experiment: Any, places: Sequence[int], name: str) -> Any:
    """Return the parts in which each client keeps the tensors in these places of the weights.

    It starts each round with its own ones, and the global weights in the other places. The update
    leads from the global weights to the client's, so the server takes the mean of all tensors.
    `name` is what errors call it. Raises UserError with another memory, and without test images
    of the clients, on which their models are evaluated.
    """
    config = experiment.config
    if not experiment.partition.test_indices:
        raise UserError(
            f"{name} gives each client a model of its own, which is evaluated on its own images; "
            "add --client-test 0.2"
        )
    if parts.memory is not None or config.run.baselines:
        other = "baselines" if config.run.baselines else config.optimization.algorithm
        raise UserError(f"{name} cannot be combined with {other!r}; drop one of them")
    check_neighbours(experiment)
    memory = OwnTensors(experiment, places)

    def wrap(client_update):
        def wrapped(broadcast, task):
            own = memory.own_tensors(broadcast.memory[task.client])
            begun = memory.insert(broadcast.weights, own)
            output = client_update(broadcast._replace(weights=begun), task)
            trained = tuple(w - u for w, u in zip(begun, output.update, strict=True))
            moved = memory.own_of(trained)
            initial = flatten(tuple(tf.constant(w) for w in memory.initial))
            update = memory.insert(
                output.update,
                tuple(
                    w - own_w
                    for w, own_w in zip(memory.own_of(broadcast.weights), moved, strict=True)
                ),
            )
            return output._replace(update=update, message=flatten(moved) - initial)

        return wrapped

    evaluate = PersonalEvaluation(experiment, memory)
    changed = parts._replace(
        memory=memory,
        message_size=memory.num_parameters,
        build_round=build_stateful_round(memory, parts.metrics_type),
        extend_evaluation=evaluate,
    )
    return wrap_client(changed, wrap)


class PersonalEvaluation:
    """Adds personal_accuracy and personal_worst10 to a round's evaluation.

    Each client's own model is evaluated on the images that the client holds out.
    """

    def __init__(self, experiment: Any, memory: OwnTensors):
        self.memory = memory
        self.predict = experiment.build_predictor()
        train = experiment.dataset.train
        self.tests = [
            (experiment.images_of_client(train.images[part], client), train.labels[part])
            for client, part in enumerate(experiment.partition.test_indices)
        ]

    def __call__(self, evaluation: Any, state: Any) -> Any:
        """Return the Evaluation with the two columns; `state` is that of TFF's process."""
        weights = state.global_model_weights.trainable
        rows = np.asarray(state.client_work.memory)
        correct = []
        for (images, labels), row in zip(self.tests, rows, strict=True):
            if not len(labels):
                correct.append(np.zeros(0, bool))
                continue
            own = self.memory.insert(weights, self.memory.own_tensors(row))
            model = tff.learning.models.ModelWeights(list(own), [])
            correct.append(self.predict(model, images, labels)[0] == labels)
        every = np.concatenate(correct)
        accuracies = accuracies_of_parts(every, [len(of_client) for of_client in correct])
        columns = {
            "personal_accuracy": float(np.nanmean(accuracies)),
            "personal_worst10": worst_tenth(accuracies),
        }
        return replace(
            evaluation,
            extra_accuracies=evaluation.extra_accuracies | columns,
            correct=evaluation.correct | {PERSONAL: every},
        )
