"""Federated algorithms: FedAvg, which is the base class, and what each other one changes.

A round calls these hooks, in this order. A client gets the weights w and a `server_message`. In
each local step `correct_gradients` may change the gradient. The client sends w - w_k and a
`client_message`, from which the server makes its new memory in `update_memory`. In `server_step` it
may change the mean update, before its optimizer applies it: w <- w - server_lr * mean.

Weights, gradients and updates are tuples of float32 tensors. Messages are flat, float32[d], d the
number of the model's parameters. The memory is float32[slots,d], zeros at first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from harness.fields import UserError
from variants import adversity
from variants.options import Optimization

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

Tensors = tuple[Any, ...]


def flatten(weights: Tensors) -> Any:
    """Return a tuple of float32 tensors as one float32[d]."""
    return tf.concat([tf.reshape(w, [-1]) for w in weights], axis=0)


def unflatten(flat: Any, like: Tensors) -> Tensors:
    """Return float32[d] as a tuple of tensors with the shapes of `like`."""
    pieces = tf.split(flat, [math.prod(w.shape) for w in like])
    return tuple(tf.reshape(piece, w.shape) for piece, w in zip(pieces, like, strict=True))


def build_sgd(learning_rate: float, optimization: Optimization) -> Any:
    """Return TFF's SGD, the default client optimizer."""
    return tff.learning.optimizers.build_sgdm(learning_rate)


def build_momentum(learning_rate: float, optimization: Optimization) -> Any:
    """Return TFF's SGD with client_momentum."""
    return tff.learning.optimizers.build_sgdm(learning_rate, optimization.client_momentum)


def without_fields(build: Callable[[float], Any]) -> Callable[[float, Optimization], Any]:
    """Return a row for an optimizer that uses no field but its rate."""
    return lambda learning_rate, optimization: build(learning_rate)


# Each row is build(learning_rate, optimization) -> a TFF optimizer.
OPTIMIZER_ROWS = {
    "momentum": build_momentum,
    "adagrad": without_fields(tff.learning.optimizers.build_adagrad),
    "rmsprop": without_fields(tff.learning.optimizers.build_rmsprop),
    "adam": without_fields(tff.learning.optimizers.build_adam),
    "yogi": without_fields(tff.learning.optimizers.build_yogi),
}


def count_steps(batch_size: int, size: Any, num_visits: Any) -> Any:
    """Return tau_k, int32: the SGD steps on `num_visits` examples of a shard of `size`, int32.

    Each full epoch has ceil(size / batch) steps; the rest of a straggler's last one follows.
    """
    batch = batch_size or size
    steps_per_epoch = -(-size // batch)
    full_epochs = num_visits // size
    rest = num_visits % size
    return full_epochs * steps_per_epoch + -(-rest // batch)


class AlgorithmState(NamedTuple):
    """The part of TFF's state that is the algorithm's, at the server."""

    round: Any  # int64, rounds done
    memory: Any  # float32[slots,d]


class Algorithm:
    """FedAvg: w <- w - 1.0 * sum_k (n_k / n) (w - w_k) = sum_k (n_k / n) w_k.

    McMahan et al. 2017, Algorithm 1. The other algorithms override what they do otherwise.
    """

    # In the paper, as much as the weights goes down and up beside them.
    sends_memory = False
    # Updates are divided by what the clients' steps count, and their mean is multiplied by the
    # mean of that.
    normalize_by_steps = False

    def __init_subclass__(cls) -> None:
        """Raise TypeError for a public method that is no hook: it would never be called."""
        super().__init_subclass__()
        for name, value in vars(cls).items():
            if callable(value) and not name.startswith("_") and not hasattr(Algorithm, name):
                raise TypeError(f"{cls.__name__}.{name} is no hook of Algorithm; see its methods")

    def __init__(self, config: Any, sizes: np.ndarray):
        """`sizes` int64[K] are the n_k of all clients."""
        self.optimization: Optimization = config.optimization
        self.name = self.optimization.algorithm
        self.num_clients = len(sizes)
        self.is_uniform = config.aggregation.client_weighting == "uniform"
        # What a client's memory counts in means over all clients is what its updates count in those
        # of a round. A client that is never drawn has no memory.
        counts = np.ones(len(sizes)) if self.is_uniform else sizes.copy()
        counts[adversity.unseen_clients(config)] = 0
        self.shares = (counts / counts.sum()).astype(np.float32)

    def memory_slots(self) -> int:
        """Return how many vectors float32[d] the server keeps."""
        return 0

    def memory_slots_of(self, clients: np.ndarray) -> np.ndarray:
        """Return the slots, int64[s], that `server_message` reads for these clients int64[g]."""
        return np.arange(self.memory_slots())

    def server_message(self, memory: Any, client: Any) -> Any:
        """Return what `client`, an int64 scalar, gets beside the weights, float32[d] or ()."""
        return ()

    def correct_gradients(
        self, gradients: Tensors, weights: Tensors, initial: Tensors, server_message: Any
    ) -> Tensors:
        """Return the gradients of a local step from `weights`; the round began at `initial`."""
        return gradients

    def local_gradients(
        self, gradients: Tensors, weights: Tensors, initial: Tensors, server_message: Any
    ) -> Tensors:
        """Add the weight decay to the gradients of the loss, then correct them."""
        decay = self.optimization.weight_decay
        if decay:
            gradients = tuple(g + decay * w for g, w in zip(gradients, weights, strict=True))
        return self.correct_gradients(gradients, weights, initial, server_message)

    def check_rate(self, is_constant: bool) -> None:
        """Raise UserError if the algorithm needs a rate that is constant within a round."""

    def effective_steps(self, steps: Any) -> Any:
        """Return what the local steps count in a mean of normalized updates.

        `steps`, float32, is the sum of the learning rate's factors over the steps: their number,
        unless the rate changes within a round.
        """
        return steps

    def client_message(
        self,
        server_message: Any,
        initial: Tensors,
        trained: Tensors,
        steps: Any,
        learning_rate: Any,
        shard_gradient: Callable[[], Tensors],
    ) -> Any:
        """Return what the client sends beside its update, float32[d] or [0].

        `steps` is as in `effective_steps`: steps * learning_rate is the sum of the rates.
        shard_gradient() is the gradient over the client's whole shard, at `initial`.
        """
        return tf.zeros([0])

    def update_memory(self, memory: Any, clients: Any, weights: Any, messages: Any) -> Any:
        """Return the memory after a round of `clients` int64[m].

        `weights` float32[m] are what they count in a mean, n_k or 1; `messages` float32[m,d] are
        what they sent.
        """
        return memory

    def server_step(self, mean: Tensors, memory: Any) -> Tensors:
        """Return the update that the server's optimizer applies; `memory` is the updated one."""
        return mean

    def server_optimizer(self, learning_rate: float) -> Any:
        """Return the server's TFF optimizer. SGD with rate 1 replaces w by w - mean."""
        return tff.learning.optimizers.build_sgdm(learning_rate)


class FedSGD(Algorithm):
    """FedAvg with one step on the whole shard: w <- w - client_lr * sum_k (n_k / n) g_k.

    McMahan et al. 2017, section 2. options.ALGORITHMS sets the epoch and the batch.
    """


class FedProx(Algorithm):
    """The gradient of the loss + prox_mu / 2 * |w - w_0| ** 2 (Li et al. 2020, equation 2)."""

    def correct_gradients(self, gradients, weights, initial, server_message):
        """Return g + mu (w - w_0)."""
        mu = self.optimization.prox_mu
        return tuple(
            g + mu * (w - w0) for g, w, w0 in zip(gradients, weights, initial, strict=True)
        )


class FedAvgM(Algorithm):
    """Momentum on the server (Hsu et al. 2019)."""

    def server_optimizer(self, learning_rate):
        """Return SGD with server_momentum."""
        momentum = self.optimization.server_momentum
        return tff.learning.optimizers.build_sgdm(learning_rate, momentum)


class FedAdagrad(Algorithm):
    """TFF's Adagrad on the server, where Reddi et al. 2021, Algorithm 2, has it.

    It divides by sqrt(v + epsilon), where the paper divides by sqrt(v) + tau: epsilon is tau ** 2.
    The sum of squares, v, starts at 1e-6.
    """

    def server_optimizer(self, learning_rate):
        """Return Adagrad; its epsilon is 1e-6 unless the user names tau."""
        tau = self.optimization.server_epsilon
        epsilon = 1e-6 if tau is None else tau**2
        return tff.learning.optimizers.build_adagrad(
            learning_rate, initial_preconditioner_value=1e-6, epsilon=epsilon
        )


class FedAdam(Algorithm):
    """TFF's Adam on the server, with beta_1, beta_2 and tau of Reddi et al. 2021, Algorithm 2.

    Unlike theirs it corrects the bias of both moments, and its second moment starts at 0, not at
    tau ** 2.
    """

    _build_optimizer = staticmethod(tff.learning.optimizers.build_adam)

    def server_optimizer(self, learning_rate):
        """Return the optimizer; its epsilon, tau, is 1e-3 unless the user names it."""
        tau = self.optimization.server_epsilon
        epsilon = 1e-3 if tau is None else tau
        return self._build_optimizer(learning_rate, beta_1=0.9, beta_2=0.99, epsilon=epsilon)


class FedYogi(FedAdam):
    """TFF's Yogi on the server, likewise. Its second moment starts at TFF's 1e-6."""

    _build_optimizer = staticmethod(tff.learning.optimizers.build_yogi)


class FedNova(Algorithm):
    """w <- w - tau * sum_k (n_k / n) (w - w_k) / tau_k, with tau = sum_k (n_k / n) tau_k.

    Wang et al. 2020, section 4. tau_k is |a|_1, a being what each step's gradient counts in w - w_k
    in units of the rate: with SGD and a constant rate, the number of steps.
    """

    normalize_by_steps = True

    def check_rate(self, is_constant):
        """Refuse a rate that changes within a round together with momentum."""
        if not is_constant and self.optimization.client_optimizer == "momentum":
            raise UserError(
                "algorithm='fednova' with client_optimizer='momentum' needs a learning rate that "
                "is constant within a round; choose client_optimizer='sgd'"
            )

    def effective_steps(self, steps):
        """Return |a|_1.

        With momentum m the gradient i steps before the last counts (1 - m ** i) / (1 - m).
        """
        if self.optimization.client_optimizer != "momentum":
            return steps
        m = self.optimization.client_momentum
        return (steps - m * (1 - m**steps) / (1 - m)) / (1 - m)


class Scaffold(Algorithm):
    """SCAFFOLD (Karimireddy et al. 2020, Algorithm 1), option II.

    The server's memory has a control variate c_k for each client, and c in its last slot. c is the
    mean of the c_k weighted as updates are, by n_k, as the loss that FedAvg minimizes is such a
    mean; with --client-weighting uniform it is the paper's.
    """

    sends_memory = True  # c down; the new c_k less the old one up

    def memory_slots(self):
        """Return K + 1."""
        return self.num_clients + 1

    def memory_slots_of(self, clients):
        """Return those of the clients' c_k and of c."""
        return np.append(clients, self.num_clients)

    def server_message(self, memory, client):
        """Return c - c_k."""
        return memory[-1] - memory[client]

    def correct_gradients(self, gradients, weights, initial, server_message):
        """Return g - c_k + c, line 10 of the algorithm."""
        corrections = unflatten(server_message, initial)
        return tuple(g + c for g, c in zip(gradients, corrections, strict=True))

    def client_message(
        self, server_message, initial, trained, steps, learning_rate, shard_gradient
    ):
        """Return c_k - c + (w_0 - w_k) / (steps * rate), the new c_k: option II of line 12."""
        moved = flatten(initial) - flatten(trained)
        return moved / (steps * learning_rate) - server_message

    def update_memory(self, memory, clients, weights, messages):
        """Return the new c_k of these clients, the old ones of the others, and c."""
        variates = tf.tensor_scatter_nd_update(memory[:-1], clients[:, tf.newaxis], messages)
        mean = tf.linalg.matvec(variates, self.shares, transpose_a=True)
        return tf.concat([variates, mean[tf.newaxis]], axis=0)


class MimeLite(Algorithm):
    """MimeLite with momentum (Karimireddy et al. 2021, Algorithm 3).

    The server's memory is its momentum v, one slot.
    """

    sends_memory = True  # the momentum down, the shard's gradient up

    def memory_slots(self):
        """Return 1."""
        return 1

    def server_message(self, memory, client):
        """Return beta * v, which stays the same through the round."""
        return self.optimization.server_momentum * memory[0]

    def correct_gradients(self, gradients, weights, initial, server_message):
        """Return g + beta * v."""
        momentum = unflatten(server_message, initial)
        return tuple(g + v for g, v in zip(gradients, momentum, strict=True))

    def client_message(
        self, server_message, initial, trained, steps, learning_rate, shard_gradient
    ):
        """Return the gradient over the client's whole shard at the round's first weights."""
        return flatten(shard_gradient())

    def update_memory(self, memory, clients, weights, messages):
        """Return v <- beta * v + sum_k (n_k / n) g_k, over the clients of the round."""
        shares = weights / tf.reduce_sum(weights)
        mean = tf.linalg.matvec(messages, shares, transpose_a=True)
        return self.optimization.server_momentum * memory + mean


class FedDyn(Algorithm):
    """FedDyn (Acar et al. 2021, Algorithm 1).

    The server's memory has a g_k for each client, its gradient at its last weights. Means are
    weighted as updates are, by n_k, where the paper's clients count alike: --client-weighting
    uniform. In the paper each device keeps its own g_k, and only weights travel; so the bytes count
    only those. Our simulation keeps all g_k at the server, since workers keep nothing.
    """

    def memory_slots(self):
        """Return K."""
        return self.num_clients

    def memory_slots_of(self, clients):
        """Return those of the clients' own g_k."""
        return clients

    def server_message(self, memory, client):
        """Return g_k."""
        return memory[client]

    def correct_gradients(self, gradients, weights, initial, server_message):
        """Return g - g_k + alpha (w - w_0), the gradient of the regularized loss, equation 1."""
        alpha = self.optimization.dyn_alpha
        own = unflatten(server_message, initial)
        return tuple(
            g - gk + alpha * (w - w0)
            for g, gk, w, w0 in zip(gradients, own, weights, initial, strict=True)
        )

    def client_message(
        self, server_message, initial, trained, steps, learning_rate, shard_gradient
    ):
        """Return g_k - alpha (w_k - w_0), the new g_k."""
        moved = flatten(trained) - flatten(initial)
        return server_message - self.optimization.dyn_alpha * moved

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


ROWS = {
    "fedsgd": FedSGD,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fednova": FedNova,
    "mimelite": MimeLite,
    "scaffold": Scaffold,
    "feddyn": FedDyn,
}


def schedule(name: str, round_num: Any, optimization: Optimization) -> Any:
    """Return the factor of a learning rate in round 1, 2, ..., a float32 scalar as `round_num`."""
    if name == "exponential":
        return optimization.lr_decay ** (round_num - 1)
    if name == "inverse-sqrt":
        return tf.math.rsqrt(round_num)
    if name == "cosine":
        done = tf.minimum((round_num - 1) / optimization.lr_horizon, 1)
        return 0.5 + 0.5 * tf.cos(math.pi * done)
    return tf.ones_like(round_num)


class ServerSteps(NamedTuple):
    """The server's TFF computations around the mean; a process uses those that it needs."""

    begin_round: Any  # AlgorithmState -> the same with the next round's number
    from_flat: Any  # float32[d] -> update
    multiply: Any  # (update, factor) -> update
    set_rate: Any  # (optimizer's state, AlgorithmState) -> optimizer's state
    update_memory: Any  # (AlgorithmState, ids, metrics, messages) -> AlgorithmState
    server_step: Any  # (update, AlgorithmState) -> update


def build_server_steps(
    algorithm: Algorithm, optimizer: Any, server_lr: float, like: Tensors, metrics_type: type
) -> ServerSteps:
    """Return the server's computations. They have no types: TFF traces each where it is used.

    `optimizer` is TFF's, `like` a tuple of arrays with the weights' shapes, and a row of the
    clients' metrics has the fields of the NamedTuple `metrics_type`.
    """
    optimization = algorithm.optimization

    @tff.tensorflow.computation
    def begin_round(state):
        return state._replace(round=state.round + 1)

    @tff.tensorflow.computation
    def from_flat(flat):
        return unflatten(flat, like)

    @tff.tensorflow.computation
    def multiply(update, factor):
        return tuple(factor * u for u in update)

    @tff.tensorflow.computation
    def set_rate(optimizer_state, state):
        round_num = tf.cast(state.round, tf.float32)
        factor = schedule(optimization.server_schedule, round_num, optimization)
        return optimizer.set_hparams(optimizer_state, {"learning_rate": factor * server_lr})

    @tff.tensorflow.computation
    def update_memory(state, clients, metrics, messages):
        by_name = metrics_type(*tf.unstack(metrics, axis=1))
        # A message can be 0 / 0 where the learning rate is 0.
        weights = tf.ones_like(by_name.examples) if algorithm.is_uniform else by_name.examples
        usable = (by_name.finite > 0) & tf.reduce_all(tf.math.is_finite(messages), axis=1)
        memory = algorithm.update_memory(
            state.memory,
            tf.boolean_mask(clients, usable),
            tf.boolean_mask(weights, usable),
            tf.boolean_mask(messages, usable),
        )
        return state._replace(memory=tf.where(tf.reduce_any(usable), memory, state.memory))

    @tff.tensorflow.computation
    def server_step(update, state):
        return algorithm.server_step(tuple(update), state.memory)

    return ServerSteps(begin_round, from_flat, multiply, set_rate, update_memory, server_step)


def check_sampling(algorithm: Algorithm, sampling: str) -> None:
    """Raise UserError for an algorithm with memory whose clients may come twice in a round."""
    if sampling == "by-size" and algorithm.memory_slots() > 0:
        raise UserError(
            "sampling='by-size' may draw a client twice, which an algorithm with memory of its "
            "clients, as scaffold and feddyn are, has no rule for; choose fixed or poisson"
        )


def check_aggregator(algorithm: Algorithm, aggregator: Any) -> None:
    """Raise UserError for an algorithm that does not go with the aggregator, by what it does."""
    if algorithm.normalize_by_steps and aggregator.update_format == "stacked":
        raise UserError(
            f"algorithm={algorithm.name!r} needs the weighted mean of the clients' steps, which "
            "this aggregator does not make; choose another of the two"
        )
    if not aggregator.private:
        return
    more = ""
    if algorithm.memory_slots():
        more = "what the server remembers of them"
    elif algorithm.normalize_by_steps:
        more = "their numbers of steps"
    if more:
        raise UserError(
            f"algorithm={algorithm.name!r}: its clients send more than the update to which "
            f"aggregator='dp' adds noise ({more}), and epsilon would be false; choose another of "
            "the two"
        )


def check_memory(algorithm: Algorithm, num_parameters: int) -> None:
    """Raise UserError if the algorithm's memory is above 1 GiB."""
    slots = algorithm.memory_slots()
    gibibytes = 4 * slots * num_parameters / 2**30
    if gibibytes > 1:
        raise UserError(
            f"num_clients makes {slots:,} vectors of {num_parameters:,} parameters, "
            f"{gibibytes:.1f} GiB, that algorithm={algorithm.name!r} keeps; choose at most "
            f"{2**28 // num_parameters - 1} clients, or a smaller model"
        )
