"""Algorithms without a memory of clients: FedSGD, FedProx, FedNova, FedBuff, server optimizers.

Each is a function change(parts, experiment) -> parts. Those with such a memory are in stateful.py
and personal.py.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from harness.cli.fields import UserError
from harness.cli.loading import change_parts
from harness.cli.own_files import is_own
from harness.engine.execution import convert, with_autograph
from variants.aggregators import Unflattened
from variants.choices import CLIENT_OPTIMIZERS
from variants.optimizers import sum_of_factors
from variants.wrapping import Corrected, Tensors, with_hparams, wrap_client

import tensorflow as tf
import tensorflow_federated as tff

optimizers = tff.learning.optimizers
# Parts that privacy does not rest on: how a client trains, since its update is clipped, and what
# the server does with the noisy sum. The others say who is drawn and reports, what is sent and
# summed, and what is published.
FREE_PARTS = {
    *("client_optimizer", "build_client_update", "server_optimizer"),
    *("work", "shard_passes", "note", "notices"),
}


def change_algorithm(parts: Any, experiment: Any) -> Any:
    """Change the parts as the chosen algorithm does."""
    changed = change_parts("algorithm", parts, experiment)
    check_private_parts(parts, changed, experiment)
    if not is_own(experiment.config.optimization.algorithm):
        return changed
    # AutoGraph, which does not convert FedAvg's own, has to convert what a user writes.
    if changed.client_optimizer is not parts.client_optimizer:
        changed = changed._replace(client_optimizer=with_autograph(changed.client_optimizer))
    if changed.build_client_update is not parts.build_client_update:
        changed = wrap_client(changed, convert)
    return changed


def check_private_parts(before: Any, after: Any, experiment: Any) -> None:
    """Raise UserError if a user's own algorithm changes a part that privacy rests on."""
    name = experiment.config.optimization.algorithm
    if not experiment.config.is_private or not is_own(name):
        return
    for part in before._fields:
        if part not in FREE_PARTS and getattr(after, part) is not getattr(before, part):
            raise UserError(
                f"algorithm={name!r:.200} changes {part}, on which the privacy of aggregator='dp' "
                f"rests; leave {part} as it is, or change one of the flags"
            )


def fedsgd(parts: Any, experiment: Any) -> Any:
    """FedAvg with one step on the whole shard: w <- w - client_lr * sum_k (n_k / n) g_k.

    McMahan et al. 2017, section 2. choices.ALGORITHMS sets the epoch and the batch.
    """
    return parts


def fedbuff(parts: Any, experiment: Any) -> Any:
    """FedAvg's clients, whose rounds are asynchronous: the clock's change, clock.keep_time."""
    return parts


def fedprox(parts: Any, experiment: Any) -> Any:
    """The gradient of the loss + prox_mu / 2 * |w - w_0| ** 2 (Li et al. 2020, equation 2)."""
    mu = experiment.config.optimization.prox_mu

    def rule(gradients: Tensors, weights: Tensors, round_weights: Tensors) -> Tensors:
        triples = zip(gradients, weights, round_weights, strict=True)
        return tuple(g + mu * (w - w_0) for g, w, w_0 in triples)

    optimizer = Corrected(parts.client_optimizer, rule, ["round_weights"])
    return with_hparams(
        parts._replace(client_optimizer=optimizer),
        lambda broadcast, task: {"round_weights": broadcast.weights},
    )


def fedavgm(parts: Any, experiment: Any) -> Any:
    """Momentum on the server (Hsu et al. 2019)."""
    config = experiment.config
    momentum = config.optimization.server_momentum
    return parts._replace(
        server_optimizer=optimizers.build_sgdm(config.training.server_lr, momentum)
    )


def fedadagrad(parts: Any, experiment: Any) -> Any:
    """TFF's Adagrad on the server, where Reddi et al. 2021, Algorithm 2, has it.

    It divides by sqrt(v + epsilon), where the paper divides by sqrt(v) + tau: epsilon is tau ** 2,
    and 1e-6 unless the user names tau. The sum of squares, v, starts at 1e-6.
    """
    config = experiment.config
    tau = config.optimization.server_epsilon
    epsilon = 1e-6 if tau is None else tau**2
    optimizer = optimizers.build_adagrad(
        config.training.server_lr, initial_preconditioner_value=1e-6, epsilon=epsilon
    )
    return parts._replace(server_optimizer=optimizer)


def fedadam(parts: Any, experiment: Any, build: Any = optimizers.build_adam) -> Any:
    """TFF's Adam on the server, with beta_1, beta_2 and tau of Reddi et al. 2021, Algorithm 2.

    Unlike theirs it corrects the bias of both moments, and its second moment starts at 0, not at
    tau ** 2. Tau is 1e-3 unless the user names it.
    """
    config = experiment.config
    tau = config.optimization.server_epsilon
    epsilon = 1e-3 if tau is None else tau
    optimizer = build(config.training.server_lr, beta_1=0.9, beta_2=0.99, epsilon=epsilon)
    return parts._replace(server_optimizer=optimizer)


def fedyogi(parts: Any, experiment: Any) -> Any:
    """TFF's Yogi on the server, likewise. Its second moment starts at TFF's 1e-6."""
    return fedadam(parts, experiment, optimizers.build_yogi)


def fednova(parts: Any, experiment: Any) -> Any:
    """w <- w - tau * sum_k (n_k / n) (w - w_k) / tau_k, with tau = sum_k (n_k / n) tau_k.

    Wang et al. 2020, section 4. tau_k is |a|_1, a being what each step's gradient counts in w - w_k
    in units of the rate: with SGD and a constant rate, the number of steps. Tensors that no rate
    moves, BatchNormalization's statistics, and those that clients keep have FedAvg's mean.
    """
    if experiment.config.is_private:
        raise UserError(
            f"algorithm={experiment.config.optimization.algorithm!r}: its clients also send their "
            "number of steps, to which aggregator='dp' adds no noise, so epsilon would be false; "
            "change one of the flags"
        )
    if isinstance(parts.aggregator, Unflattened):  # of a user's own rule; see check_aggregator
        raise UserError(
            "algorithm='fednova' cannot be combined with an aggregator of all updates, which does "
            "not average the numbers of steps; change one of the flags"
        )
    optimization = experiment.config.optimization
    is_scheduled = experiment.config.chosen("client_schedule").is_within_round
    if is_scheduled and "client_momentum" in experiment.config.chosen("client_optimizer").fields:
        raise UserError(
            f"client_schedule={optimization.client_schedule!r} cannot be combined with "
            f"algorithm={optimization.algorithm!r} and client_optimizer="
            f"{optimization.client_optimizer!r}, whose step count assumes a constant rate; change "
            "one of them"
        )
    inner = parts.build_train_chunk
    network = experiment.network
    is_local = experiment.config.training.batch_norm == "local"
    unscaled = frozenset(network.norms if is_local else network.statistics)

    def build_train_chunk(train_client, parts_in_use):
        def normalized(broadcast, client_id):
            output = train_client(broadcast, client_id)
            tau = count_normalized_steps(optimization, output.metrics.steps)
            update = tuple(
                u if place in unscaled else u / tau for place, u in enumerate(output.update)
            )
            return output._replace(update=(update, tau))

        return inner(normalized, parts_in_use)

    return parts._replace(
        build_train_chunk=build_train_chunk,
        update_spec=(parts.update_spec, tf.TensorSpec([])),
        aggregator=NormalizedMean(parts.aggregator, unscaled),
    )


def count_normalized_steps(optimization: Any, steps: Any) -> Any:
    """Return |a|_1 of `steps` float32 local steps.

    With momentum m the i-th gradient, from the last, counts (1 - m ** i) / (1 - m); the last 1.
    """
    if "client_momentum" not in CLIENT_OPTIMIZERS[optimization.client_optimizer].fields:
        return sum_of_factors(optimization, steps)
    m = optimization.client_momentum
    return (steps - m * (1 - m**steps) / (1 - m)) / (1 - m)


class NormalizedMean(tff.aggregators.WeightedAggregationFactory):
    """FedNova's mean of pairs (update / tau_k, tau_k): the mean of the first times the mean tau.

    Tensors in the places `unscaled` are not divided by tau_k, and not multiplied.
    """

    def __init__(self, inner: Any, unscaled: Container[int] = frozenset()):
        self.inner = inner
        self.unscaled = unscaled

    def create(self, value_type: Any, weight_type: Any) -> tff.templates.AggregationProcess:
        """Return the process for such pairs; `inner` makes the mean of the normalized updates."""
        inner = self.inner.create(value_type[0], weight_type)
        at_clients = [
            tff.FederatedType(member, tff.CLIENTS) for member in (value_type, weight_type)
        ]

        @tff.tensorflow.computation
        def multiply(update, tau):
            return tuple(u if place in self.unscaled else tau * u for place, u in enumerate(update))

        @tff.federated_computation(inner.initialize.type_signature.result, *at_clients)
        def next_fn(state, value, weight):
            mean = inner.next(state, value[0], weight)
            tau = tff.federated_mean(value[1], weight)
            result = tff.federated_map(multiply, (mean.result, tau))
            return tff.templates.MeasuredProcessOutput(mean.state, result, mean.measurements)

        return tff.templates.AggregationProcess(inner.initialize, next_fn)
