"""FedProx, SCAFFOLD and MimeLite: what they change in a client's gradients, and what the server keeps for them.

A memory is float32[rows,d], d the number of the model's parameters. `context`, float32[d], is what a client of the
round is sent of it, and `result`, float32[d], what the client sends back.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf


class Memory(NamedTuple):
    """What the server keeps from round to round: `rows(config)` rows of float32[d], zeros at first."""

    rows: Callable
    context: Callable
    result: Callable
    update: Callable


def flatten(weights: Any) -> Any:
    """A tuple of float32 tensors as one float32[d]."""
    return tf.concat([tf.reshape(w, [-1]) for w in weights], axis=0)


def unflatten(flat: Any, like: Any) -> Any:
    """float32[d] as a tuple of tensors with the shapes of `like`."""
    pieces = tf.split(flat, [math.prod(w.shape) for w in like])
    return tuple(tf.reshape(piece, w.shape) for piece, w in zip(pieces, like, strict=True))


def pull_back(gradients: Any, weights: Any, initial: Any, context: Any, config: Any) -> Any:
    """FedProx: the gradient of the loss and of prox_mu / 2 * |w - w_0| ** 2 (Li et al. 2020, equation 2)."""
    return tuple(g + config.prox_mu * (w - w0) for g, w, w0 in zip(gradients, weights, initial, strict=True))


# SCAFFOLD (Karimireddy et al. 2020, Algorithm 1). The memory is float32[K,d]: a row c_k a client, zeros at first.
# Its c is the mean of the c_k weighted by n_k, as the loss that FedAvg's weights n_k make is that mean of the clients'.


def scaffold_context(memory: Any, client: Any, shares: Any, config: Any) -> Any:
    """c - c_k; `shares` are n_k / n, float32[K]."""
    return tf.linalg.matvec(memory, shares, transpose_a=True) - memory[client]


def correct_drift(gradients: Any, weights: Any, initial: Any, context: Any, config: Any) -> Any:
    """g - c_k + c, line 10 of the algorithm."""
    return tuple(g + c for g, c in zip(gradients, unflatten(context, initial), strict=True))


def scaffold_result(context: Any, initial: Any, trained: Any, steps: Any, rate: Any, gradient: Any) -> Any:
    """c_k - c + (w_0 - w_k) / (steps * rate), the new c_k: option II of line 12."""
    return (flatten(initial) - flatten(trained)) / (steps * rate) - context


def scaffold_update(memory: Any, clients: Any, examples: Any, results: Any, config: Any) -> Any:
    """The clients of the round have their new c_k, the others the old."""
    return tf.tensor_scatter_nd_update(memory, clients[:, tf.newaxis], results)


SCAFFOLD = Memory(lambda config: config.num_clients, scaffold_context, scaffold_result, scaffold_update)


# MimeLite with momentum (Karimireddy et al. 2021, Algorithm 3). The memory is float32[1,d]: the server's momentum.


def mime_context(memory: Any, client: Any, shares: Any, config: Any) -> Any:
    """beta * v, the same for all clients and steps of a round."""
    return config.server_momentum * memory[0]


def mime_result(context: Any, initial: Any, trained: Any, steps: Any, rate: Any, gradient: Any) -> Any:
    """The gradient of the client's whole shard at the round's first weights."""
    return flatten(gradient())


def mime_update(memory: Any, clients: Any, examples: Any, results: Any, config: Any) -> Any:
    """v <- beta * v + sum_k (n_k / n) g_k, over the clients of the round."""
    mean = tf.linalg.matvec(results, examples / tf.reduce_sum(examples), transpose_a=True)
    return config.server_momentum * memory + mean


MIMELITE = Memory(lambda config: 1, mime_context, mime_result, mime_update)
