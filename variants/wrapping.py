"""Helpers to wrap a part from outside: a client, its optimizer's gradients, its rate; and
arithmetic of weights."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

Tensors = tuple[Any, ...]


def wrap_client(parts: Any, wrap: Callable[[Callable], Callable]) -> Any:
    """Return the parts with wrap(client_update) in the place of client_update."""
    inner = parts.build_client_update
    return parts._replace(build_client_update=lambda optimizer: wrap(inner(optimizer)))


def with_hparams(parts: Any, make: Callable[[Any, Any], dict[str, Any]]) -> Any:
    """Return the parts whose client optimizer gets make(broadcast, task) as hyperparameters too."""

    def wrap(client_update):
        def wrapped(broadcast, task):
            hparams = task.hparams | make(broadcast, task)
            return client_update(broadcast, task._replace(hparams=hparams))

        return wrapped

    return wrap_client(parts, wrap)


class Corrected(tff.learning.optimizers.Optimizer):
    """An optimizer that steps along rule(gradients, weights, **named).

    `named` are hyperparameters of its own, such as the round's first weights: tuples of tensors
    with the weights' shapes.
    """

    def __init__(self, optimizer: Any, rule: Callable[..., Tensors], named: Sequence[str] = ()):
        self.optimizer = optimizer
        self.rule = rule
        self.named = named

    def initialize(self, specs: Any) -> Any:
        """Return the optimizer's state, with zeros for what is named."""
        state = OrderedDict(optimizer=self.optimizer.initialize(specs))
        for name in self.named:
            state[name] = tf.nest.map_structure(lambda s: tf.zeros(s.shape, s.dtype), specs)
        return state

    def set_hparams(self, state: Any, hparams: dict[str, Any]) -> Any:
        """Return the state with these hyperparameters, its own and the inner optimizer's."""
        others = {name: value for name, value in hparams.items() if name not in self.named}
        new = OrderedDict(optimizer=self.optimizer.set_hparams(state["optimizer"], others))
        for name in self.named:
            new[name] = hparams.get(name, state[name])
        return new

    def next(self, state: Any, weights: Tensors, gradients: Tensors) -> tuple[Any, Tensors]:
        """Return (state, weights) after a step along the corrected gradients."""
        named = {name: state[name] for name in self.named}
        corrected = self.rule(gradients, weights, **named)
        inner, stepped = self.optimizer.next(state["optimizer"], weights, corrected)
        return OrderedDict(optimizer=inner, **named), stepped


def add(first: Tensors, second: Tensors, factor: float = 1.0) -> Tensors:
    """Return first + factor * second."""
    return tuple(a + factor * b for a, b in zip(first, second, strict=True))


def flatten(weights: Tensors) -> Any:
    """Return a tuple of float32 tensors as one float32[d]."""
    return tf.concat([tf.reshape(w, [-1]) for w in weights], axis=0)


def unflatten(flat: Any, like: Tensors) -> Tensors:
    """Return float32[d] as a tuple of tensors with the shapes of `like`."""
    pieces = tf.split(flat, [math.prod(w.shape) for w in like])
    return tuple(tf.reshape(piece, w.shape) for piece, w in zip(pieces, like, strict=True))
