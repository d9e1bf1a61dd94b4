"""Federated algorithms: FedAvg, the base class, and what each other one changes, at hooks in a
round's order.

A client gets the weights w and what is `sent` besides; each local step it may `correct` the
gradient; it gives back w - w_k and what is `sent_back` besides, of which the server `remember`s; in
`server_step` the server may change the mean update before its optimizer applies it: w <- w -
server_lr * mean.

Weights, gradients and updates are tuples of float32 tensors. What is kept, sent and sent back are
flat: float32[d], d the number of the model's parameters. The server keeps float32[rows,d], zeros at
first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from harness.fields import UserError
from harness.results import with_fields
from variants.options import FIXED, Optimization

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


class ClientOptimizer(NamedTuple):
    """A row: build(rate, momentum) is a TFF optimizer, `rate` the learning rate where the user
    names none.

    A rate of 0 stands for the algorithm's own.
    """

    build: Callable[[float, float], Any]
    rate: float = 0.0


def sgd(rate: float, momentum: float) -> Any:
    """Return SGD."""
    return tff.learning.optimizers.build_sgdm(rate)


def adagrad(rate: float, momentum: float) -> Any:
    """Return Adagrad."""
    return tff.learning.optimizers.build_adagrad(rate)


def rmsprop(rate: float, momentum: float) -> Any:
    """Return RMSprop."""
    return tff.learning.optimizers.build_rmsprop(rate)


def adam(rate: float, momentum: float) -> Any:
    """Return Adam."""
    return tff.learning.optimizers.build_adam(rate)


def yogi(rate: float, momentum: float) -> Any:
    """Return Yogi."""
    return tff.learning.optimizers.build_yogi(rate)


CLIENT_OPTIMIZERS = {
    "sgd": ClientOptimizer(sgd),
    "momentum": ClientOptimizer(tff.learning.optimizers.build_sgdm, 0.02),
    "adagrad": ClientOptimizer(adagrad, 0.02),
    "rmsprop": ClientOptimizer(rmsprop, 0.001),
    "adam": ClientOptimizer(adam, 0.001),
    "yogi": ClientOptimizer(yogi, 0.002),
}


def caption(options: Optimization, client_lr: float, server_lr: float) -> str:
    """Return what a caption says: the algorithm and the fields that it alone uses, of plain SGD its
    rate alone, of plain averaging nothing."""
    kind = options.client_optimizer
    words = {"sgd": "", "momentum": f"client momentum {options.client_momentum:g}, "}.get(
        kind, f"client {kind}, "
    )
    words += f"weight decay {options.weight_decay:g}, " if options.weight_decay else ""
    words += f"lr {client_lr:g}{name_schedule(options.client_schedule, options)}"
    server = f"{server_lr:g}{name_schedule(options.server_schedule, options)}"
    words += f", server lr {server}" if server != "1" else ""
    fields = options.pick(ALGORITHMS[options.algorithm].flags)
    if not options.server_epsilon:
        fields.pop("server_epsilon", None)  # it is the algorithm's own
    return f"{with_fields(options.algorithm, fields)}, {words}"


def name_schedule(name: str, options: Optimization) -> str:
    """Return what a caption says behind a rate: nothing where it is constant."""
    uses = {
        "constant": "",
        "exponential": f" × {options.lr_decay:g} a round",
        "inverse-sqrt": " inverse-sqrt",
    }
    return uses.get(name, f" cosine over {options.lr_horizon} rounds")


def count_steps(batch_size: int, size: Any, budget: Any) -> Any:
    """Return the SGD steps of a client of `size` examples that trains on `budget` of them, tau_k,
    int32."""
    batch = batch_size or size
    return budget // size * (-(-size // batch)) + (-(-(budget % size) // batch))


class Algorithm:
    """FedAvg: w <- w - 1.0 * sum_k (n_k / n) (w - w_k) = sum_k (n_k / n) w_k (McMahan et al. 2017,
    Algorithm 1)."""

    client_lr = 0.2  # the rates where the user names none
    server_lr = 1.0
    fixed: dict[str, int] = {}  # fields that the algorithm is defined by
    flags: tuple[str, ...] = ()  # fields that it alone uses
    sends_memory = False  # in the paper, as much as the weights goes down and up beside them
    # updates are divided by the clients' numbers of steps, and their mean multiplied by the mean
    normalized = False

    def __init__(self, options: Optimization, sizes: np.ndarray):
        """`sizes` int64[K] are the n_k of all clients."""
        self.options = options
        self.num_clients = len(sizes)
        # n_k / n over all clients, float32[K]
        self.shares = (sizes / sizes.sum()).astype(np.float32)

    def rows(self) -> int:
        """Return how many rows the server keeps."""
        return 0

    def rows_for(self, clients: np.ndarray) -> np.ndarray:
        """Return the places of the rows that `sent` of these clients int64[g] looks at,
        int64[r]."""
        return np.arange(self.rows())

    def sent(self, kept: Any, client: Any) -> Any:
        """Return what `client`, an int64 scalar, gets besides the weights."""
        return ()

    def correct(self, gradients: Tensors, weights: Tensors, initial: Tensors, sent: Any) -> Tensors:
        """Return the gradients of a local step from `weights`; the round began at `initial`."""
        return gradients

    def work(self, steps: Any) -> Any:
        """Return what `steps` local steps, float32, count as in a mean of normalized updates."""
        return steps

    def decayed(self, gradients: Tensors, weights: Tensors, initial: Tensors, sent: Any) -> Tensors:
        """Return the corrected gradients of the loss with weight decay."""
        if self.options.weight_decay:
            decay = self.options.weight_decay
            gradients = tuple(g + decay * w for g, w in zip(gradients, weights, strict=True))
        return self.correct(gradients, weights, initial, sent)

    def sent_back(
        self, sent: Any, initial: Tensors, trained: Tensors, steps: Any, rate: Any, gradient: Any
    ) -> Any:
        """Return what the client gives besides its update, after `steps` steps of learning rate
        `rate`.

        gradient() is that of the client's whole shard at `initial`.
        """
        return tf.zeros([0])

    def remember(self, kept: Any, clients: Any, examples: Any, given: Any) -> Any:
        """Return what the server keeps after a round of `clients` int64[m], n_k float32[m], `given`
        float32[m,d]."""
        return kept

    def server_step(self, mean: Tensors, kept: Any) -> Tensors:
        """Return the update that the server's optimizer applies; `kept` is that after the round."""
        return mean

    def server_optimizer(self, rate: float) -> Any:
        """Return a TFF optimizer with this learning rate."""
        return tff.learning.optimizers.build_sgdm(rate)


class FedSGD(Algorithm):
    """FedAvg with one step on the whole shard: w <- w - client_lr * sum_k (n_k / n) g_k (the same,
    section 2)."""

    fixed = FIXED["fedsgd"]


class FedProx(Algorithm):
    """The gradient of the loss and of prox_mu / 2 * |w - w_0| ** 2 (Li et al. 2020, equation 2)."""

    flags = ("prox_mu",)

    def correct(self, gradients, weights, initial, sent):
        """Return g + mu (w - w_0)."""
        mu = self.options.prox_mu
        return tuple(
            g + mu * (w - w0) for g, w, w0 in zip(gradients, weights, initial, strict=True)
        )


class FedAvgM(Algorithm):
    """Momentum on the server (Hsu et al. 2019)."""

    server_lr = 0.3
    flags = ("server_momentum",)

    def server_optimizer(self, rate):
        """Return SGD with momentum."""
        return tff.learning.optimizers.build_sgdm(rate, self.options.server_momentum)


class FedAdagrad(Algorithm):
    """TFF's Adagrad on the server, in the place that Reddi et al. 2021, Algorithm 2, gives it.

    It divides by the root of v + epsilon, where the paper adds tau to the root of v: epsilon is tau
    ** 2.
    """

    server_lr = 0.03
    flags = ("server_epsilon",)

    def server_optimizer(self, rate):
        """Return Adagrad whose sum of squares starts at 1e-6, with an epsilon of 1e-6 where no tau
        is chosen."""
        epsilon = self.options.server_epsilon**2 or 1e-6
        return tff.learning.optimizers.build_adagrad(
            rate, initial_preconditioner_value=1e-6, epsilon=epsilon
        )


class FedAdam(Algorithm):
    """TFF's Adam on the server, with beta_1, beta_2 and tau = epsilon of Reddi et al. 2021,
    Algorithm 2.

    Unlike theirs it corrects the bias of both moments, and its second moment starts at 0, not at
    tau ** 2.
    """

    server_lr = 0.1
    flags = ("server_epsilon",)

    def server_optimizer(self, rate):
        """Return Adam, whose tau is 1e-3 where none is chosen."""
        epsilon = self.options.server_epsilon or 1e-3
        return tff.learning.optimizers.build_adam(rate, beta_1=0.9, beta_2=0.99, epsilon=epsilon)


class FedYogi(Algorithm):
    """TFF's Yogi on the server, likewise; its second moment starts at TFF's 1e-6."""

    server_lr = 0.1
    flags = ("server_epsilon",)

    def server_optimizer(self, rate):
        """Return Yogi, whose tau is 1e-3 where none is chosen."""
        epsilon = self.options.server_epsilon or 1e-3
        return tff.learning.optimizers.build_yogi(rate, beta_1=0.9, beta_2=0.99, epsilon=epsilon)


class FedNova(Algorithm):
    """w <- w - tau * sum_k (n_k / n) (w - w_k) / tau_k, tau = sum_k (n_k / n) tau_k (Wang et al.
    2020, section 4).

    tau_k is the norm |a|_1 of what the steps' gradients count in w - w_k: with SGD their number.
    """

    normalized = True

    def work(self, steps):
        """Return |a|_1; with momentum m the gradient i steps before the last counts (1 - m ** i) /
        (1 - m)."""
        if self.options.client_optimizer != "momentum":
            return steps
        m = self.options.client_momentum
        return (steps - m * (1 - m**steps) / (1 - m)) / (1 - m)


class Scaffold(Algorithm):
    """SCAFFOLD (Karimireddy et al. 2020, Algorithm 1), option II. The server keeps a row c_k a
    client, and last c.

    That is the mean of the c_k weighted by n_k, as the loss that FedAvg minimizes is that mean of
    the clients'.
    """

    client_lr = 0.1
    sends_memory = True  # c down, the new c_k less the old up

    def rows(self):
        """Return one a client, and one."""
        return self.num_clients + 1

    def rows_for(self, clients):
        """Return their own and the last."""
        return np.append(clients, self.num_clients)

    def sent(self, kept, client):
        """Return c - c_k."""
        return kept[-1] - kept[client]

    def correct(self, gradients, weights, initial, sent):
        """Return g - c_k + c, line 10 of the algorithm."""
        return tuple(g + c for g, c in zip(gradients, unflatten(sent, initial), strict=True))

    def sent_back(self, sent, initial, trained, steps, rate, gradient):
        """Return c_k - c + (w_0 - w_k) / (steps * rate), the new c_k: option II of line 12."""
        return (flatten(initial) - flatten(trained)) / (steps * rate) - sent

    def remember(self, kept, clients, examples, given):
        """Return the new c_k of the round's clients, the old of the others, and c."""
        own = tf.tensor_scatter_nd_update(kept[:-1], clients[:, tf.newaxis], given)
        return tf.concat(
            [own, tf.linalg.matvec(own, self.shares, transpose_a=True)[tf.newaxis]], axis=0
        )


class MimeLite(Algorithm):
    """MimeLite with momentum (Karimireddy et al. 2021, Algorithm 3). The server keeps its momentum
    v, one row."""

    client_lr = 0.0005  # the momentum that is held still through a round suits few local steps
    sends_memory = True  # the momentum down, the shard's gradient up
    flags = ("server_momentum",)

    def rows(self):
        """Return one."""
        return 1

    def sent(self, kept, client):
        """Return beta * v, the same for all clients and steps of a round."""
        return self.options.server_momentum * kept[0]

    def correct(self, gradients, weights, initial, sent):
        """Return g + beta * v."""
        return tuple(g + v for g, v in zip(gradients, unflatten(sent, initial), strict=True))

    def sent_back(self, sent, initial, trained, steps, rate, gradient):
        """Return the gradient of the client's whole shard at the round's first weights."""
        return flatten(gradient())

    def remember(self, kept, clients, examples, given):
        """Return v <- beta * v + sum_k (n_k / n) g_k, over the clients of the round."""
        mean = tf.linalg.matvec(given, examples / tf.reduce_sum(examples), transpose_a=True)
        return self.options.server_momentum * kept + mean


class FedDyn(Algorithm):
    """FedDyn (Acar et al. 2021, Algorithm 1). The server keeps a row g_k a client, its gradient at
    its last weights.

    Means are weighted by n_k where the paper's clients count alike: with shards of one size the two
    are the same. In the paper a device keeps its own g_k, and the server h: the weights alone
    travel, and so they are counted. Our simulation keeps all g_k at the server, as its workers keep
    nothing from round to round.
    """

    flags = ("dyn_alpha",)

    def rows(self):
        """Return one a client."""
        return self.num_clients

    def rows_for(self, clients):
        """Return their own."""
        return clients

    def sent(self, kept, client):
        """Return g_k."""
        return kept[client]

    def correct(self, gradients, weights, initial, sent):
        """Return g - g_k + alpha (w - w_0): the gradient of the dynamically regularized loss,
        equation 1."""
        alpha = self.options.dyn_alpha
        own = unflatten(sent, initial)
        return tuple(
            g - gk + alpha * (w - w0)
            for g, gk, w, w0 in zip(gradients, own, weights, initial, strict=True)
        )

    def sent_back(self, sent, initial, trained, steps, rate, gradient):
        """Return g_k - alpha (w_k - w_0), the new g_k."""
        return sent - self.options.dyn_alpha * (flatten(trained) - flatten(initial))

    def remember(self, kept, clients, examples, given):
        """Return the new g_k of the round's clients, and the old of the others."""
        return tf.tensor_scatter_nd_update(kept, clients[:, tf.newaxis], given)

    def server_step(self, mean, kept):
        """Return mean + h / alpha: w <- sum_k (n_k / n) w_k - h / alpha.

        h = sum_k (n_k / n) g_k over all clients: what the paper's h <- h - alpha sum_k (w_k - w) /
        K adds up to.
        """
        h = unflatten(tf.linalg.matvec(kept, self.shares, transpose_a=True), mean)
        return tuple(m + x / self.options.dyn_alpha for m, x in zip(mean, h, strict=True))


ALGORITHMS = {
    "fedavg": Algorithm,
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


def schedule(name: str, round_num: Any, options: Optimization) -> Any:
    """Return the factor of the learning rate in round 1, 2, ... (float32) by the schedule of this
    name."""
    if name == "exponential":
        return options.lr_decay ** (round_num - 1)
    if name == "inverse-sqrt":
        return tf.math.rsqrt(round_num)
    if name == "cosine":
        return 0.5 + 0.5 * tf.cos(math.pi * tf.minimum((round_num - 1) / options.lr_horizon, 1))
    return tf.ones_like(round_num)


class ServerSteps(NamedTuple):
    """TFF computations between the mean and the server's optimizer, of which a process uses those
    that it needs."""

    from_row: Any  # float32[d] -> update
    times: Any  # (update, factor) -> update
    set_rate: Any  # (optimizer's state, clients' state) -> optimizer's state
    remember: Any  # (clients' state, ids, reports, what was sent back) -> clients' state
    server_step: Any  # (update, clients' state) -> update


def build_server_steps(
    algorithm: Algorithm, server: Any, server_lr: float, like: Tensors, report: type
) -> ServerSteps:
    """Return the server's own computations; they have no types here, as TFF traces each where it is
    used.

    The clients' state has the fields round, int64, and memory, float32[rows,d]; `server` is a TFF
    optimizer, `like` a tuple of arrays with the weights' shapes, `report` a NamedTuple of what each
    client reports, a row of the reports.
    """
    options = algorithm.options

    @tff.tensorflow.computation
    def from_row(row):
        return unflatten(row, like)

    @tff.tensorflow.computation
    def times(update, factor):
        return tuple(factor * u for u in update)

    @tff.tensorflow.computation
    def set_rate(optimizer_state, clients):
        factor = schedule(options.server_schedule, tf.cast(clients.round, tf.float32), options)
        return server.set_hparams(optimizer_state, {"learning_rate": factor * server_lr})

    @tff.tensorflow.computation
    def remember(clients, ids, reports, sent_back):
        told = report(*tf.unstack(reports, axis=1))
        # 0 / 0 where the rate is 0
        kept = (told.finite > 0) & tf.reduce_all(tf.math.is_finite(sent_back), axis=1)
        ids, examples, given = (tf.boolean_mask(x, kept) for x in (ids, told.examples, sent_back))
        memory = algorithm.remember(clients.memory, ids, examples, given)
        return clients._replace(memory=tf.where(tf.reduce_any(kept), memory, clients.memory))

    @tff.tensorflow.computation
    def server_step(update, clients):
        return algorithm.server_step(tuple(update), clients.memory)

    return ServerSteps(from_row, times, set_rate, remember, server_step)


def check_private(algorithm: Algorithm) -> None:
    """Raise UserError for an algorithm whose clients send more than the update, to which alone dp
    adds noise.

    That is known by what it does: it has a memory made of what clients send, or the clients'
    numbers of steps go into the mean.
    """
    if algorithm.rows() or algorithm.normalized:
        more = "what the server remembers of them" if algorithm.rows() else "their numbers of steps"
        raise UserError(
            f"algorithm={algorithm.options.algorithm!r}: its clients send more than the update to "
            f"which aggregator='dp' adds noise ({more}), and epsilon would be false; choose "
            "another of the two"
        )


def check_memory(rows: int, parameters: int, name: str) -> int:
    """Return the size of a row that an algorithm keeps, 0 without any.

    Raise UserError where all are above 1 GiB.
    """
    gibibytes = 4 * rows * parameters / 2**30
    if gibibytes > 1:
        raise UserError(
            f"num_clients makes {rows:,} rows of {parameters:,} parameters, {gibibytes:.1f} GiB, "
            f"that algorithm={name!r} keeps; choose at most {2**28 // parameters - 1} clients, or "
            "a smaller model"
        )
    return parameters if rows else 0
