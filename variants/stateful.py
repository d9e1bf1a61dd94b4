"""Algorithms with memory at the server: SCAFFOLD, MimeLite, FedDyn.

Along with the weights, a client receives a message made from the memory, which corrects its local
gradients. Along with its update, it sends a message, from which the server computes the new memory.
Messages are flat, float32[d] for d model parameters. The memory is float32[slots,d], initially
zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.cli.fields import UserError
from harness.engine.gather import gather
from variants.adversity import unseen_clients
from variants.aggregators import Unflattened
from variants.optimizers import sum_of_factors
from variants.wrapping import Corrected, Tensors, add, flatten, unflatten, with_hparams, wrap_client

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff


class Memory:
    """What an algorithm keeps at the server, and how it uses it; a subclass for each algorithm."""

    shard_passes = 0  # gradients that a client computes over its whole shard
    sends_memory = False  # in the paper, as much as the weights goes down and up beside them
    keeps_nonfinite = False  # whether a message may be so: a model of a client's own that diverged

    def __init__(self, experiment: Any):
        config = experiment.config
        sizes = experiment.partition.sizes
        self.optimization = config.optimization
        self.num_clients = len(sizes)
        self.num_parameters = experiment.num_parameters
        self.num_examples = sizes
        self.unseen = unseen_clients(config)
        self.weigh(config.aggregation.client_weighting == "uniform")

    def weigh(self, is_uniform: bool) -> None:
        """Set what a client's memory counts in means over all: 1 each, or its examples.

        It is what the client's updates count in those of a round. A client that is never drawn has
        no memory.
        """
        self.is_uniform = is_uniform
        counts = np.ones(self.num_clients) if is_uniform else self.num_examples.copy()
        counts[self.unseen] = 0
        self.shares = (counts / counts.sum()).astype(np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """(slots, d)."""
        return self.num_slots(), self.num_parameters

    def num_slots(self) -> int:
        """Return how many vectors float32[d] the server keeps."""
        raise NotImplementedError

    def slots_of(self, clients: np.ndarray) -> np.ndarray:
        """Return the slots, int64[s], that `server_message` reads for these clients int64[g]."""
        return np.arange(self.num_slots())

    def server_message(self, memory: Any, client: Any) -> Any:
        """Return the message to `client`, an int64 scalar, as float32[d]."""
        raise NotImplementedError

    def correct_gradients(
        self, gradients: Tensors, weights: Tensors, round_weights: Tensors, message: Tensors
    ) -> Tensors:
        """Return the gradients of a local step; the message has the weights' shapes here."""
        return gradients

    def client_message(
        self,
        message: Any,
        update: Tensors,
        steps: Any,
        learning_rate: Any,
        shard_gradient: Callable[[], Tensors],
    ) -> Any:
        """Return the client's message, float32[d], sent along with its update w - w_k.

        steps * learning_rate is the sum of the rates of its local steps. shard_gradient() is the
        gradient over the client's whole shard, at the round's weights.
        """
        raise NotImplementedError

    def update_memory(self, memory: Any, clients: Any, weights: Any, messages: Any) -> Any:
        """Return the memory after a round of `clients` int64[m].

        `weights` float32[m] are what they count in a mean, n_k or 1; `messages` float32[m,d] are
        what they sent.
        """
        raise NotImplementedError

    def server_step(self, mean: Tensors, memory: Any) -> Tensors:
        """Return the update that the server's optimizer applies; `memory` is the updated one."""
        return mean


class Scaffold(Memory):
    """SCAFFOLD (Karimireddy et al. 2020, Algorithm 1), option II.

    The server's memory has a control variate c_k for each client, and c in its last slot. c is the
    mean of the c_k weighted as updates are, by n_k, as the loss that FedAvg minimizes is such a
    mean; with --client-weighting uniform it is the paper's.
    """

    sends_memory = True  # c down; the new c_k less the old one up

    def num_slots(self):
        """Return K + 1."""
        return self.num_clients + 1

    def slots_of(self, clients):
        """Return those of the clients' c_k and of c."""
        return np.append(clients, self.num_clients)

    def server_message(self, memory, client):
        """Return c - c_k."""
        return memory[-1] - memory[client]

    def correct_gradients(self, gradients, weights, round_weights, message):
        """Return g - c_k + c, line 10 of the algorithm."""
        return add(gradients, message)

    def client_message(self, message, update, steps, learning_rate, shard_gradient):
        """Return c_k - c + (w_0 - w_k) / (steps * rate), the new c_k: option II of line 12."""
        return flatten(update) / (steps * learning_rate) - message

    def update_memory(self, memory, clients, weights, messages):
        """Return the new c_k of these clients, the old ones of the others, and c."""
        variates = tf.tensor_scatter_nd_update(memory[:-1], clients[:, tf.newaxis], messages)
        mean = tf.linalg.matvec(variates, self.shares, transpose_a=True)
        return tf.concat([variates, mean[tf.newaxis]], axis=0)


class MimeLite(Memory):
    """MimeLite with momentum (Karimireddy et al. 2021, Algorithm 3).

    The server's memory is its momentum v, one slot.
    """

    shard_passes = 1
    sends_memory = True  # the momentum down, the shard's gradient up

    def num_slots(self):
        """Return 1."""
        return 1

    def server_message(self, memory, client):
        """Return beta * v, which stays the same through the round."""
        return self.optimization.server_momentum * memory[0]

    def correct_gradients(self, gradients, weights, round_weights, message):
        """Return g + beta * v."""
        return add(gradients, message)

    def client_message(self, message, update, steps, learning_rate, shard_gradient):
        """Return the gradient over the client's whole shard at the round's first weights."""
        return flatten(shard_gradient())

    def update_memory(self, memory, clients, weights, messages):
        """Return v <- beta * v + sum_k (n_k / n) g_k, over the clients of the round."""
        shares = weights / tf.reduce_sum(weights)
        mean = tf.linalg.matvec(messages, shares, transpose_a=True)
        return self.optimization.server_momentum * memory + mean


class FedDyn(Memory):
    """FedDyn (Acar et al. 2021, Algorithm 1).

    The server's memory has a g_k for each client, its gradient at its last weights. Means are
    weighted as updates are, by n_k, where the paper's clients count alike: --client-weighting
    uniform. In the paper each device keeps its own g_k, and only weights travel; so the bytes count
    only those. Our simulation keeps all g_k at the server, since workers keep nothing.
    """

    def num_slots(self):
        """Return K."""
        return self.num_clients

    def slots_of(self, clients):
        """Return those of the clients' own g_k."""
        return clients

    def server_message(self, memory, client):
        """Return g_k."""
        return memory[client]

    def correct_gradients(self, gradients, weights, round_weights, message):
        """Return g - g_k + alpha (w - w_0), the gradient of the regularized loss, equation 1."""
        alpha = self.optimization.dyn_alpha
        return tuple(
            g - g_k + alpha * (w - w_0)
            for g, g_k, w, w_0 in zip(gradients, message, weights, round_weights, strict=True)
        )

    def client_message(self, message, update, steps, learning_rate, shard_gradient):
        """Return g_k - alpha (w_k - w_0), the new g_k."""
        return message + self.optimization.dyn_alpha * flatten(update)

    def update_memory(self, memory, clients, weights, messages):
        """Return the new g_k of these clients, and the old ones of the others."""
        return tf.tensor_scatter_nd_update(memory, clients[:, tf.newaxis], messages)

    def server_step(self, mean, memory):
        """Return mean + h / alpha, so that w <- sum_k (n_k / n) w_k - h / alpha.

        h = sum_k (n_k / n) g_k over all clients is what the paper's h <- h - alpha / K *
        sum_k (w_k - w) adds up to.
        """
        alpha = self.optimization.dyn_alpha
        h = unflatten(tf.linalg.matvec(memory, self.shares, transpose_a=True), mean)
        return tuple(m + x / alpha for m, x in zip(mean, h, strict=True))


def remember(parts: Any, experiment: Any, memory: Memory) -> Any:
    """Return the parts of an algorithm with this memory.

    Raises UserError if it is above 1 GiB, or does not go with the sampling or the aggregator.
    """
    name = f"algorithm={experiment.config.optimization.algorithm!r}"
    check_memory(memory, name)
    check_neighbours(experiment, name)
    if isinstance(parts.aggregator, Unflattened):  # a rule that counts all clients alike
        memory.weigh(is_uniform=True)
    d = experiment.num_parameters
    optimizer = Corrected(
        parts.client_optimizer, memory.correct_gradients, ["round_weights", "message"]
    )
    changed = parts._replace(
        client_optimizer=optimizer,
        memory=memory,
        message_size=d,
        shard_passes=memory.shard_passes,
        message_bytes=parts.message_bytes + (4 * d if memory.sends_memory else 0),
        build_round=build_stateful_round(memory, parts.metrics_type),
    )

    def wrap(client_update):
        def wrapped(broadcast, task):
            output = client_update(broadcast, task)
            steps = sum_of_factors(experiment.config.optimization, output.metrics.steps)
            message = memory.client_message(
                memory.server_message(broadcast.memory, task.client),
                output.update,
                steps,
                task.hparams["learning_rate"],
                lambda: experiment.shard_gradient(broadcast.weights, task),
            )
            return output._replace(message=message)

        return wrapped

    def corrections(broadcast, task):
        message = memory.server_message(broadcast.memory, task.client)
        return {
            "round_weights": broadcast.weights,
            "message": unflatten(message, broadcast.weights),
        }

    return wrap_client(with_hparams(changed, corrections), wrap)


def build_stateful_round(memory: Memory, metrics_type: type) -> Callable[[Any], Any]:
    """Return what builds FedAvg's round with two lines more: messages change the memory, and the
    memory the step."""

    def build_round(steps: Any) -> Any:
        @tff.tensorflow.computation
        def update_memory(progress, clients, metrics, messages):
            by_name = metrics_type(*tf.unstack(metrics, axis=1))
            weights = tf.ones_like(by_name.examples) if memory.is_uniform else by_name.examples
            usable = by_name.finite > 0
            if not memory.keeps_nonfinite:  # a message can be 0 / 0 where the learning rate is 0
                usable &= tf.reduce_all(tf.math.is_finite(messages), axis=1)
            new = memory.update_memory(
                progress.memory,
                tf.boolean_mask(clients, usable),
                tf.boolean_mask(weights, usable),
                tf.boolean_mask(messages, usable),
            )
            return progress._replace(memory=tf.where(tf.reduce_any(usable), new, progress.memory))

        @tff.tensorflow.computation
        def server_step(mean, progress):
            return memory.server_step(tuple(mean), progress.memory)

        state_type = steps.initialize.type_signature.result
        chunks_type = tff.FederatedType(tff.TensorType(np.int64, [None]), tff.CLIENTS)

        @tff.federated_computation(state_type, chunks_type)
        def next_round(state, chunks):
            begun = tff.federated_map(steps.begin_round, state.client_work)
            weights = tff.federated_broadcast(state.global_model_weights)
            sent = (weights, tff.federated_broadcast(begun), chunks)
            trained = tff.federated_map(steps.train, sent)
            mean = steps.aggregate.next(state.aggregator, trained.update, trained.weight)
            clients, metrics, messages = gather(
                tff.federated_zip((chunks, trained.metrics, trained.messages))
            )
            progress = tff.federated_map(update_memory, (begun, clients, metrics, messages))
            update = tff.federated_map(server_step, (mean.result, progress))
            new = steps.finalize.next(state.finalizer, state.global_model_weights, update)
            next_state = tff.learning.templates.LearningAlgorithmState(
                new.result, (), progress, mean.state, new.state
            )
            return tff.federated_zip(next_state), mean.measurements, metrics

        return next_round

    return build_round


def check_memory(memory: Any, name: str) -> None:
    """Raise UserError if the memory is above 1 GiB; `name` is what errors call its user."""
    slots, num_parameters = memory.shape
    gibibytes = 4 * slots * num_parameters / 2**30
    if gibibytes > 1:
        raise UserError(
            f"num_clients: {name} keeps {slots:,} vectors of {num_parameters:,} "
            f"parameters, {gibibytes:.1f} GiB, more than 1 GiB; choose at most "
            f"{2**28 // num_parameters - 1} clients, or a smaller model"
        )


def check_neighbours(experiment: Any, name: str) -> None:
    """Raise UserError for a sampling or an aggregator that a memory has no rule for."""
    config = experiment.config
    if config.training.sampling == "by-size":
        raise UserError(
            "sampling='by-size' may draw a client twice, which algorithms with a memory of their "
            "clients, such as scaffold and feddyn, do not support; choose fixed or poisson"
        )
    if config.is_private:
        raise UserError(
            f"{name}: its clients also send a message that the server remembers, to which "
            "aggregator='dp' adds no noise, so epsilon would be false; change one of the flags"
        )


def scaffold(parts: Any, experiment: Any) -> Any:
    """SCAFFOLD: see `Scaffold`."""
    return remember(parts, experiment, Scaffold(experiment))


def mimelite(parts: Any, experiment: Any) -> Any:
    """MimeLite: see `MimeLite`."""
    return remember(parts, experiment, MimeLite(experiment))


def feddyn(parts: Any, experiment: Any) -> Any:
    """FedDyn: see `FedDyn`."""
    return remember(parts, experiment, FedDyn(experiment))
