"""Client optimizers, weight decay, learning-rate schedules, and the number of local steps.

All optimizers are TFF's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

from harness.cli.loading import import_function
from variants.choices import SCHEDULES
from variants.options import Optimization
from variants.wrapping import Corrected, Tensors, add, with_hparams, wrap_client

import tensorflow as tf
import tensorflow_federated as tff

optimizers = tff.learning.optimizers


def momentum(learning_rate: float, optimization: Optimization) -> Any:
    """Return TFF's SGD with client_momentum."""
    return optimizers.build_sgdm(learning_rate, optimization.client_momentum)


def adagrad(learning_rate: float, optimization: Optimization) -> Any:
    """Return TFF's Adagrad."""
    return optimizers.build_adagrad(learning_rate)


def rmsprop(learning_rate: float, optimization: Optimization) -> Any:
    """Return TFF's RMSprop."""
    return optimizers.build_rmsprop(learning_rate)


def adam(learning_rate: float, optimization: Optimization) -> Any:
    """Return TFF's Adam."""
    return optimizers.build_adam(learning_rate)


def yogi(learning_rate: float, optimization: Optimization) -> Any:
    """Return TFF's Yogi."""
    return optimizers.build_yogi(learning_rate)


def change_optimizer(parts: Any, experiment: Any) -> Any:
    """Let clients step by the chosen optimizer."""
    config = experiment.config
    build = import_function(config.chosen("client_optimizer").function)
    optimizer = build(config.training.client_lr, config.optimization)
    return parts._replace(client_optimizer=optimizer)


def decay_weights(parts: Any, experiment: Any) -> Any:
    """Add weight_decay * w to the gradient of the loss, before all else corrects it."""
    decay = experiment.config.optimization.weight_decay

    def rule(gradients: Tensors, weights: Tensors) -> Tensors:
        return add(gradients, weights, decay)

    return parts._replace(client_optimizer=Corrected(parts.client_optimizer, rule))


def exponential(round_num: Any, optimization: Optimization) -> Any:
    """Return lr_decay ** (t - 1)."""
    return optimization.lr_decay ** (round_num - 1)


def inverse_sqrt(round_num: Any, optimization: Optimization) -> Any:
    """Return t ** -0.5."""
    return tf.math.rsqrt(round_num)


def cosine(round_num: Any, optimization: Optimization) -> Any:
    """Return half a cosine, from 1 in round 1 to 0 after lr_horizon rounds."""
    done = tf.minimum((round_num - 1) / optimization.lr_horizon, 1)
    return 0.5 + 0.5 * tf.cos(math.pi * done)


def schedule_server(parts: Any, experiment: Any) -> Any:
    """Change the server's rate with the round, by TFF's own scheduled optimizer."""
    config = experiment.config
    factor = import_function(config.chosen("server_schedule").function)

    def rate(rounds_done: Any) -> Any:
        round_num = tf.cast(rounds_done + 1, tf.float32)
        return factor(round_num, config.optimization) * config.training.server_lr

    scheduled = optimizers.schedule_learning_rate(parts.server_optimizer, rate)
    return parts._replace(server_optimizer=scheduled)


def schedule_clients(parts: Any, experiment: Any) -> Any:
    """Change the clients' rate with the round; a warm-up changes it with the local step."""
    config = experiment.config
    schedule = config.chosen("client_schedule")
    if schedule.is_within_round:
        return warm_up(parts, experiment)
    factor = import_function(schedule.function)

    def make(broadcast: Any, task: Any) -> dict[str, Any]:
        round_num = tf.cast(broadcast.round_num, tf.float32)
        return {"learning_rate": config.training.client_lr * factor(round_num, config.optimization)}

    return with_hparams(parts, make)


def make_local_steps(parts: Any, experiment: Any) -> Any:
    """Let each client make local_steps of them, in place of whole epochs."""
    training = experiment.config.training

    def wrap(client_update):
        def wrapped(broadcast, task):
            size = tf.size(task.shard.labels)
            examples = count_examples(training.local_steps, training.batch_size, size)
            return client_update(broadcast, task._replace(examples_to_train=examples))

        return wrapped

    return wrap_client(parts, wrap)


def count_examples(local_steps: int, batch_size: int, size: Any) -> Any:
    """Return on how many examples, int32, a client with `size` of them trains in `local_steps`.

    In an epoch the last batch may be smaller.
    """
    batch = batch_size or size
    steps_of_epoch = -(-size // batch)  # rounded up
    epochs = local_steps // steps_of_epoch
    return epochs * size + local_steps % steps_of_epoch * batch


class Warmed(tff.learning.optimizers.Optimizer):
    """An optimizer whose rate grows in its first steps: times (i + 1) / warmup_steps, up to 1."""

    def __init__(self, optimizer: Any, warmup_steps: int):
        self.optimizer = optimizer
        self.warmup_steps = float(warmup_steps)

    def initialize(self, specs: Any) -> Any:
        """Return the optimizer's state, the step and the full rate."""
        inner = self.optimizer.initialize(specs)
        return OrderedDict(optimizer=inner, step=tf.constant(0.0), rate=tf.constant(0.0))

    def set_hparams(self, state: Any, hparams: dict[str, Any]) -> Any:
        """Return the state with these hyperparameters."""
        inner = self.optimizer.set_hparams(state["optimizer"], hparams)
        rate = tf.convert_to_tensor(hparams["learning_rate"], tf.float32)
        return OrderedDict(optimizer=inner, step=state["step"], rate=rate)

    def next(self, state: Any, weights: Tensors, gradients: Tensors) -> tuple[Any, Tensors]:
        """Return (state, weights) after a step at the rate of this step."""
        factor = tf.minimum(1.0, (state["step"] + 1) / self.warmup_steps)
        hparams = {"learning_rate": factor * state["rate"]}
        inner = self.optimizer.set_hparams(state["optimizer"], hparams)
        inner, stepped = self.optimizer.next(inner, weights, gradients)
        step = state["step"] + 1
        return OrderedDict(optimizer=inner, step=step, rate=state["rate"]), stepped


def warm_up(parts: Any, experiment: Any) -> Any:
    """Let the rate of each client grow in the first local steps of each round."""
    warmed = Warmed(parts.client_optimizer, experiment.config.optimization.warmup_steps)
    return parts._replace(client_optimizer=warmed)


def sum_of_factors(optimization: Optimization, steps: Any) -> Any:
    """Return the sum of what multiplies the client's rate over `steps` float32 local steps."""
    if not SCHEDULES[optimization.client_schedule].is_within_round:
        return steps
    warmup = float(optimization.warmup_steps)
    grown = tf.minimum(steps, warmup)
    return grown * (grown + 1) / (2 * warmup) + (steps - grown)
