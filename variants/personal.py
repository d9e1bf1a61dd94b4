"""Personal models: each client keeps a model, or layers, of its own.

A simulation keeps them at the server, as an algorithm's memory. In the papers they stay at the
client, so the bytes of a round do not count them. Where clients keep only some layers, the global
model has the mean of these, which no client uses: it serves clients that have never trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from harness.cli.fields import UserError
from harness.cli.loading import import_function
from harness.cli.output import warn
from harness.reporting.results import pluralize
from harness.training.client_accuracies import PERSONAL, accuracies_of_parts, summarize_accuracies
from harness.training.own_models import places_by_layer
from variants import CHANGES
from variants.adversity import unseen_clients
from variants.aggregators import compressed_bytes
from variants.stateful import Memory, build_stateful_round, check_memory, check_neighbours
from variants.wrapping import Corrected, Tensors, flatten, unflatten, wrap_client

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

HEAD_KEY = -2_000_000  # of the order of batches in a client's second training of a round
# What a client's fine-tuning follows from, of the variants' fields.
TUNING_FIELDS = ("client_optimizer", "weight_decay", "batch_norm")


class OwnTensors(Memory):
    """A row for each client: its own tensors less the initial ones, and 1 once it has trained.

    float32[K,d+1] for d parameters that each client keeps. The tensors are those in some `places`
    of the weights; None stands for a whole model.
    """

    keeps_nonfinite = True

    def __init__(self, experiment: Any, places: Sequence[int] | None = None):
        super().__init__(experiment)
        weights = experiment.initial_weights
        self.places = frozenset(range(len(weights)) if places is None else places)
        self.initial = self.own_of(weights)
        self.num_parameters = 1 + sum(math.prod(w.shape) for w in self.initial)

    def own_of(self, tensors: Sequence[Any]) -> Tensors:
        """Return the tensors that clients keep."""
        return tuple(tensor for place, tensor in enumerate(tensors) if place in self.places)

    def insert(self, tensors: Sequence[Any], own: Sequence[Any]) -> Tensors:
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

    def own_tensors(self, row: Any) -> Tensors:
        """Return a client's own tensors, of its row float32[d+1]."""
        moves = unflatten(row[:-1], self.initial)
        return tuple(w + move for w, move in zip(self.initial, moves, strict=True))

    def make_row(self, own: Sequence[Any]) -> Any:
        """Return the row float32[d+1] of a client that has trained."""
        moves = tuple(w - first for w, first in zip(own, self.initial, strict=True))
        return tf.concat([flatten(moves), [1.0]], axis=0)

    def update_memory(self, memory: Any, clients: Any, weights: Any, messages: Any) -> Any:
        """Return the new rows of these clients, and the old ones of the others."""
        return tf.tensor_scatter_nd_update(memory, clients[:, tf.newaxis], messages)

    def model_of(self, weights: Sequence[Any], row: Any) -> Tensors:
        """Return the client's model, by the global weights and its row."""
        return self.insert(weights, self.own_tensors(row))


class Mixture(OwnTensors):
    """Rows of whole models, of which a client uses a mixture with the global one."""

    def __init__(self, experiment: Any, alpha: float):
        super().__init__(experiment)
        self.alpha = alpha

    def model_of(self, weights: Sequence[Any], row: Any) -> Tensors:
        """Return alpha * v + (1 - alpha) * w."""
        return mix(self.own_tensors(row), weights, self.alpha)


def mix(own: Sequence[Any], weights: Sequence[Any], alpha: float) -> Tensors:
    """Return alpha * own + (1 - alpha) * weights."""
    return tuple(alpha * v + (1 - alpha) * w for v, w in zip(own, weights, strict=True))


# What a client does in a round: (broadcast, task, its own tensors) -> (ClientOutput, its new ones).
Training = Callable[[Any, Any, Tensors], tuple[Any, Tensors]]


def keep_own(
    parts: Any,
    experiment: Any,
    memory: OwnTensors,
    build_training: Callable[[Any], Training],
    name: str,
) -> Any:
    """Return the parts in which each client keeps tensors of its own.

    `build_training(client_optimizer)` returns what a client does, `name` is what errors call it.
    Raises UserError with another memory, and without test images of the clients, on which their
    models are evaluated.
    """
    if parts.memory is not None or experiment.config.run.baselines:
        algorithm = experiment.config.optimization.algorithm
        other = "baselines" if experiment.config.run.baselines else algorithm
        raise UserError(f"{name} cannot be combined with {other!r}; drop one of them")
    check_neighbours(experiment, name)
    check_tests(experiment, name)
    check_memory(memory, name)

    def build_client_update(optimizer):
        train = build_training(optimizer)

        def client_update(broadcast, task):
            own = memory.own_tensors(broadcast.memory[task.client])
            output, new_own = train(broadcast, task, own)
            return output._replace(message=memory.make_row(new_own))

        return client_update

    return parts._replace(
        build_client_update=build_client_update,
        memory=memory,
        message_size=memory.num_parameters,
        build_round=build_stateful_round(memory, parts.metrics_type),
        extend_evaluation=PersonalEvaluation(experiment, parts.extend_evaluation, memory),
    )


def check_tests(experiment: Any, name: str) -> None:
    """Raise UserError if clients have no test images, on which their own models are evaluated."""
    if not experiment.partition.test_indices:
        raise UserError(
            f"{name} gives each client a model of its own, which is evaluated on its own images; "
            "add --client-test 0.2"
        )


def keep_at_clients(parts: Any, experiment: Any, places: Sequence[int], name: str) -> Any:
    """Return the parts in which each client keeps the tensors in these places of the weights.

    It starts each round with its own ones, and the global weights in the other places. The update
    leads from the global weights to the client's, so the global model has the mean of all tensors.
    """
    memory = OwnTensors(experiment, places)

    def build_training(optimizer):
        client_update = parts.build_client_update(optimizer)

        def train(broadcast, task, own):
            begun = memory.insert(broadcast.weights, own)
            output = client_update(broadcast._replace(weights=begun), task)
            return end_at(output, begun, broadcast.weights, memory)

        return train

    changed = keep_own(parts, experiment, memory, build_training, name)
    return stay_at_clients(changed, experiment, memory, name)


def end_at(
    output: Any, begun: Tensors, global_weights: Tensors, memory: OwnTensors
) -> tuple[Any, Tensors]:
    """Return (a ClientOutput from the global weights on, the client's own tensors).

    `output` has the update from the weights `begun` on.
    """
    own = memory.own_of(subtract(begun, output.update))
    from_global = subtract(memory.own_of(global_weights), own)
    return output._replace(update=memory.insert(output.update, from_global)), own


def subtract(first: Sequence[Any], second: Sequence[Any]) -> Tensors:
    """Return first - second."""
    return tuple(a - b for a, b in zip(first, second, strict=True))


def stay_at_clients(parts: Any, experiment: Any, memory: OwnTensors, name: str) -> Any:
    """Return the parts in which the tensors that clients keep do not travel, and a notice of it."""
    kept = memory.num_parameters - 1
    sizes = [math.prod(w.shape) for w in memory.initial]
    is_compressed = experiment.config.aggregation.aggregator == "compressed"
    kept_bytes = compressed_bytes(sizes) if is_compressed else 4 * sum(sizes)
    notice = (
        f"{name}: {kept:,} of {experiment.num_parameters:,} parameters stay at each client; the "
        "test accuracy, and a target, are of the global model, which has their mean"
    )
    return parts._replace(
        kept_parameters=kept,
        update_bytes=parts.update_bytes - kept_bytes,
        notices=(*parts.notices, notice),
    )


def last_layers(experiment: Any) -> list[int]:
    """Return the places of the tensors of the last personal_layers layers of the network."""
    count = experiment.config.optimization.personal_layers
    by_layer = places_by_layer(experiment.build_model())
    if len(by_layer) < 2:
        raise UserError(
            f"model={experiment.config.training.model!r:.200} has one layer with weights, so none "
            "is left to share; choose another model"
        )
    if count >= len(by_layer):
        raise UserError(
            f"personal_layers={count} leaves no layer to share: model="
            f"{experiment.config.training.model!r:.200} has {len(by_layer)} layers with weights; "
            f"choose 1 to {len(by_layer) - 1}, or another model"
        )
    return sorted(place for layer in by_layer[-count:] for place in layer)


def fedper(parts: Any, experiment: Any) -> Any:
    """FedPer: the last layers stay at the client (Arivazhagan et al. 2019)."""
    return keep_at_clients(parts, experiment, last_layers(experiment), "algorithm='fedper'")


class OnlySome(tff.learning.optimizers.Optimizer):
    """An optimizer that moves the tensors in some places only."""

    def __init__(self, optimizer: Any, places: frozenset[int]):
        self.optimizer = optimizer
        self.places = places

    def initialize(self, specs: Any) -> Any:
        """Return the optimizer's state."""
        return self.optimizer.initialize(specs)

    def set_hparams(self, state: Any, hparams: dict[str, Any]) -> Any:
        """Return the state with these hyperparameters."""
        return self.optimizer.set_hparams(state, hparams)

    def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        """Return (state, weights) after a step."""
        state, stepped = self.optimizer.next(state, weights, gradients)
        both = enumerate(zip(weights, stepped, strict=True))
        return state, type(weights)(
            new if place in self.places else old for place, (old, new) in both
        )


def second_key(task: Any) -> Any:
    """Return the task with a key of its own, for another training of the same round."""
    own = tf.random.experimental.stateless_fold_in(task.key, tf.constant(HEAD_KEY, tf.int64))
    return task._replace(key=own)


def fedrep(parts: Any, experiment: Any) -> Any:
    """FedRep: head_epochs on the client's own last layers, then local_epochs on the others.

    Collins et al. 2021, Algorithm 1. A straggler does the same share of both.
    """
    config = experiment.config
    places = last_layers(experiment)
    memory = OwnTensors(experiment, places)
    shared = frozenset(range(len(experiment.initial_weights))) - memory.places
    epochs = config.training.local_epochs
    head_epochs = config.optimization.head_epochs

    def build_training(optimizer):
        train_head = parts.build_client_update(OnlySome(optimizer, memory.places))
        train_body = parts.build_client_update(OnlySome(optimizer, shared))

        def train(broadcast, task, own):
            begun = memory.insert(broadcast.weights, own)
            examples = tf.maximum(head_epochs * task.examples_to_train // epochs, 1)
            on_head = second_key(task)._replace(examples_to_train=examples)
            head = train_head(broadcast._replace(weights=begun), on_head)
            between = subtract(begun, head.update)
            output = train_body(broadcast._replace(weights=between), task)
            steps = head.metrics.steps + output.metrics.steps
            counted = output._replace(metrics=output.metrics._replace(steps=steps))
            return end_at(counted, between, broadcast.weights, memory)

        return train

    name = "algorithm='fedrep'"
    changed = keep_own(parts, experiment, memory, build_training, name)
    work = parts.work * (1 + head_epochs / epochs)
    return stay_at_clients(changed._replace(work=work), experiment, memory, name)


def ditto(parts: Any, experiment: Any) -> Any:
    """Ditto: FedAvg, and a model of each client's own that stays close to the global one.

    Li et al. 2021, Algorithm 1: v <- v - rate * (gradient at v + ditto_lambda * (v - w)). The
    client makes the same number of steps on v and on w.
    """
    pull = experiment.config.optimization.ditto_lambda
    memory = OwnTensors(experiment)

    def rule(gradients: Tensors, weights: Tensors, global_weights: Tensors) -> Tensors:
        triples = zip(gradients, weights, global_weights, strict=True)
        return tuple(g + pull * (v - w) for g, v, w in triples)

    def build_training(optimizer):
        train_global = parts.build_client_update(optimizer)
        train_own = parts.build_client_update(Corrected(optimizer, rule, ["global_weights"]))

        def train(broadcast, task, own):
            output = train_global(broadcast, task)
            hparams = task.hparams | {"global_weights": broadcast.weights}
            of_own = second_key(task)._replace(hparams=hparams)
            trained = train_own(broadcast._replace(weights=own), of_own)
            return output, subtract(own, trained.update)

        return train

    changed = keep_own(parts, experiment, memory, build_training, "algorithm='ditto'")
    rate = experiment.config.training.client_lr
    notices = parts.notices
    if rate * pull >= 2 and experiment.config.optimization.client_optimizer == "sgd":
        notice = (
            f"ditto_lambda={pull:g} with client_lr={rate:g}: where the product is 2 or more, own "
            "models diverge; choose a smaller one"
        )
        notices = (*notices, notice)
    return changed._replace(work=2 * parts.work, notices=notices)


def apfl(parts: Any, experiment: Any) -> Any:
    """APFL: each client's model is a mixture of its own, v, with the global one, w.

    Deng et al. 2020, Algorithm 1, with the same alpha for all clients: in each local step
    w <- w - rate * gradient at w, and v <- v - rate * alpha * gradient at alpha * v + (1 - alpha)
    * w.
    """
    alpha = experiment.config.optimization.apfl_alpha
    memory = Mixture(experiment, alpha)
    num_tensors = len(experiment.initial_weights)

    def differentiate(network, pair, x, y, key):
        weights = pair[:num_tensors]
        mixed = mix(pair[num_tensors:], weights, alpha)
        losses, logits, gradients = experiment.loss_and_gradients(weights, x, y, key)
        _, _, at_mixture = experiment.loss_and_gradients(mixed, x, y, key)
        return losses, logits, (*gradients, *(alpha * g for g in at_mixture))

    def build_training(optimizer):
        train_pair = parts.build_client_update(optimizer, differentiate=differentiate)

        def train(broadcast, task, own):
            pair = broadcast._replace(weights=(*broadcast.weights, *own))
            output = train_pair(pair, task)
            moved = subtract(own, output.update[num_tensors:])
            return output._replace(update=output.update[:num_tensors]), moved

        return train

    changed = keep_own(parts, experiment, memory, build_training, "algorithm='apfl'")
    return changed._replace(work=2 * parts.work)


class PersonalEvaluation:
    """Adds personal_accuracy and personal_worst10 to a round's evaluation.

    Each client's own model is evaluated on the images that the client holds out. A client that has
    not trained yet uses the global model, after `tune` if there is one. A model that has diverged
    is wrong on all images, with a notice in the first round that has one. Clients that are never
    drawn count too, and also have a column of their own, unseen_personal_accuracy.
    """

    def __init__(
        self,
        experiment: Any,
        inner: Callable,
        memory: OwnTensors | None = None,
        tune: Callable[[Sequence[Any], int, int], Any] | None = None,
    ):
        self.inner = inner
        self.memory = memory
        self.tune = tune
        self.has_told = False
        is_ditto = "ditto_lambda" in experiment.config.chosen("algorithm").fields
        self.cure = f"choose a smaller --client-lr{' or --ditto-lambda' if is_ditto else ''}"
        if isinstance(inner, PersonalEvaluation):  # that of --fine-tune-epochs
            self.inner = inner.inner
            self.tune = inner.tune
        self.predict = experiment.build_predictor()
        self.unseen = unseen_clients(experiment.config)
        train = experiment.dataset.train
        self.tests = [
            (experiment.images_of_client(train.images[part], client), train.labels[part])
            for client, part in enumerate(experiment.partition.test_indices)
        ]

    def model_of(self, state: Any, client: int) -> Any:
        """Return the tensors of a client's model, by the state of TFF's process."""
        weights = state.global_model_weights.trainable
        progress = state.client_work
        if self.memory:
            row = np.asarray(progress.memory)[client]
            if row[-1]:
                return self.memory.model_of(weights, row)
        # Of a round of its own: the order of the batches is not that of the client's training.
        return self.tune(weights, client, -int(progress.round)) if self.tune else weights

    def tell_divergence(self, num_diverged: int, round_num: int) -> None:
        """Warn, once, of models with weights that are not finite."""
        if num_diverged and not self.has_told:
            self.has_told = True
            warn(
                f"round {round_num}: the models that {pluralize(num_diverged, 'client')} would use "
                f"have weights that are not finite, and count as wrong on all images; {self.cure}"
            )

    def __call__(self, evaluation: Any, state: Any) -> Any:
        """Return the Evaluation with the columns; `state` is that of TFF's process."""
        usual = self.inner(evaluation, state)
        correct = []
        num_diverged = 0
        for client, (images, labels) in enumerate(self.tests):
            weights = self.model_of(state, client) if len(labels) else ()
            is_finite = all(np.isfinite(tensor).all() for tensor in weights)
            num_diverged += not is_finite
            if not len(labels) or not is_finite:
                correct.append(np.zeros(len(labels), bool))
                continue
            model = tff.learning.models.ModelWeights(list(weights), [])
            correct.append(self.predict(model, images, labels)[0] == labels)
        self.tell_divergence(num_diverged, int(state.client_work.round))
        every = np.concatenate(correct)
        accuracies = accuracies_of_parts(every, [len(of_client) for of_client in correct])
        columns = summarize_accuracies("personal", accuracies)
        if len(self.unseen):
            columns["unseen_personal_accuracy"] = float(np.nanmean(accuracies[self.unseen]))
        return replace(
            usual,
            extra_accuracies=usual.extra_accuracies | columns,
            correct=usual.correct | {PERSONAL: every},
        )


def fine_tune(parts: Any, experiment: Any) -> Any:
    """Evaluate each client by the global model after fine_tune_epochs on its own images.

    Cheng et al. 2021, the baseline of personal models. It is plain FedAvg's local training, at the
    run's rate, and changes nothing in the federation.
    """
    epochs = experiment.config.optimization.fine_tune_epochs
    check_tests(experiment, f"fine_tune_epochs={epochs}")
    config = experiment.config
    changed = config.changed()
    with_averages = experiment
    if config.training.batch_norm == "local":
        with_averages = replace(experiment, config=config.replace(batch_norm="average"))
    plain = parts
    for change in CHANGES:
        if set(change.fields) <= set(TUNING_FIELDS) & changed.keys():
            plain = import_function(change.function)(plain, with_averages)

    def wrap(client_update):
        def wrapped(broadcast, task):
            examples = epochs * tf.size(task.shard.labels)
            return client_update(broadcast, task._replace(examples_to_train=examples))

        return wrapped

    tune = experiment.build_tuner(wrap_client(plain, wrap))
    evaluate = PersonalEvaluation(experiment, parts.extend_evaluation, tune=tune)
    return parts._replace(extend_evaluation=evaluate)
